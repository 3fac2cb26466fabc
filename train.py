"""Trains a GPT: python train.py [CONFIG.py] [--out-dir DIR] [--resume] [--model.n-layer 4 ...]"""

import sys

from gpt_jax.cli.main import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
