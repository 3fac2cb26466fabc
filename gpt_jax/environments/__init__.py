"""Where problems come from, and what judges the answers to them. Nothing here imports JAX."""
