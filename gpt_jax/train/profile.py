"""A profiler trace of a few steps, for XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax

SKIPPED, TRACED = 10, 5  # Steps before the trace, so that it shows the steady state; steps in the trace.


class Trace:
    """Traces steps 11 to 15 of this process into `folder`; earlier or fewer ones when the run is shorter.

    A context manager. With no folder, nothing is traced.
    """

    def __init__(self, folder: Path | None, steps: range) -> None:
        self.folder = folder
        self.first = max(steps.start + 1, min(steps.start + SKIPPED, steps.stop - TRACED))
        self.running = False

    def __enter__(self) -> "Trace":
        return self

    def after(self, step: int, state: Any) -> None:
        """Starts or stops the trace. Call it after `step` steps have been dispatched, with the state of the last."""
        if self.folder is None:
            return
        if step == self.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.running and step == self.first + TRACED:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Ends the trace if it is running."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()

    def __exit__(self, *exception: object) -> None:
        self.stop()
