"""Exports of runs as folders for other software: tensors, settings, tokenizer, and a card on how they were made."""
