"""Runs as folders for other software: tensors, settings, tokenizer, and a card that tells how they were made."""
