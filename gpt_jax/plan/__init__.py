"""Whether a configuration compiles for a slice of devices that is not here, fits its memory, and what will bound it."""
