"""Weights and tokenizers of other ecosystems, both ways."""
