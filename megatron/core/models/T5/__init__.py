"""T5. Import from the modules: the presets need no torch, and `--help` relies on that."""
