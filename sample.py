"""Lets a trained GPT write: python sample.py [--run DIR] [--prompt TEXT] ..."""

import sys

from gpt_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
