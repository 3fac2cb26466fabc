"""Optimizer, step, placement on devices, metrics, and the loop that joins them."""
