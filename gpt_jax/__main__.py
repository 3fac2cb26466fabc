"""python -m gpt_jax COMMAND"""

from gpt_jax.cli import run

run()
