"""The command line: `gpt-jax COMMAND`, `python -m gpt_jax COMMAND`, and the scripts train.py and sample.py.

Each command has a file, with a frozen dataclass of arguments and a function `command(argv)` that returns the exit
status. JAX is imported only after the arguments have been checked.
"""
