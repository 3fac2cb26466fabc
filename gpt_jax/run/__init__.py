"""A run on the disk: its folder, its records, its checkpoints, and the way back from there to a model."""
