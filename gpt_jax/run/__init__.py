"""A run on the disk: its folder, its records, its checkpoints, and loading a model from it."""
