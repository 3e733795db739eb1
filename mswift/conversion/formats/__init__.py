"""One module for each way in which a checkpoint stores its weights quantised; `mswift.conversion.quantised` reads them all."""
