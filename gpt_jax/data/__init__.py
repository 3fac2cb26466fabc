"""Text to documents, documents to token ids, token ids to files, files to batches.

`prepare` writes a data folder, `shards.open_dataset` reads one. Nothing that `prepare` needs imports JAX, so that it
starts at once and its worker processes stay small.
"""
