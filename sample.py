"""Lets a trained GPT write: python sample.py [--run DIR] [--prompt TEXT] ..."""

import sys

from gpt_jax.cli.main import run

if __name__ == "__main__":
    run(["sample", *sys.argv[1:]])
