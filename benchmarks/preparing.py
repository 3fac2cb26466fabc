"""`prepare` with so many processes that tokenise, where the command has one a core, and the tokenizer of a folder:
python -m benchmarks.preparing PROCESSES ARGUMENT ...
"""

import sys

from gpt_jax.cli.parse import parse
from gpt_jax.data.prepare import PrepareArgs, prepare

if __name__ == "__main__":
    n_workers, *arguments = sys.argv[1:]
    prepare(parse(PrepareArgs, arguments, "prepare"), int(n_workers))
