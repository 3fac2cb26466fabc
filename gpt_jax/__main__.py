"""python -m gpt_jax COMMAND"""

import sys

from gpt_jax.cli import main

sys.exit(main())
