"""A run of two rows that take no time to speak of, without PyTorch: for tests that interrupt it."""

import sys

from benchmarks import __main__ as command
from benchmarks import machine, train
from benchmarks.presets import Preset, small

TINY = small(1, 1, 8, 8, "float32")
MACHINE = {
    "name": "a TPU",
    "cores": 1,
    "platform": "tpu",
    "devices": 1,
    "peak_flops": None,
    "versions": {"jax": "1"},
    "flags": {},
}

if __name__ == "__main__":
    presets = {name: Preset(name, TINY, 2, steps) for name, steps in (("short", 1), ("long", int(sys.argv[1])))}
    train.presets = lambda _: presets  # type: ignore[assignment]
    machine.describe = lambda: MACHINE
    sys.exit(command.main(sys.argv[2:]))
