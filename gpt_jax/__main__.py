"""python -m gpt_jax COMMAND"""

from gpt_jax.cli.main import run

run()
