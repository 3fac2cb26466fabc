"""The command line of lm_eval with gpt_jax among its models: see `gpt_jax.evaluate.harness`."""

import sys

from gpt_jax import runtime
from gpt_jax.errors import UserError
from gpt_jax.system import open_closed_streams


def main() -> int:
    """Returns the exit status. Errors that the user can fix are printed as one line."""
    open_closed_streams()
    runtime.setup()
    try:
        from gpt_jax.evaluate.harness import command_line

        command_line()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
