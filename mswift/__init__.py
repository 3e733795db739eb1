"""mswift: a Hugging Face checkpoint and a data set to a trained, exported and answering model, on Megatron-core."""

__version__ = "0.1.0"
