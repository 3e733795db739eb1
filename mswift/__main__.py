"""``python -m mswift`` is the program ``mswift``."""

from mswift.cli import main

raise SystemExit(main())
