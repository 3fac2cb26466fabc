"""Files and folders, here and at remote addresses: written whole or not at all, locked, read by ranges."""
