"""Requests to stop a run, by a signal to any of its hosts."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax.experimental import multihost_utils

from gpt_jax import hosts


class StopRequest:
    """The signal that asked the run to stop; 0 before there is one."""

    signum = 0

    def after(self, step: int) -> int:
        """The signal that ends the run after `step` steps, the same on all hosts; 0 to go on.

        With several hosts, the distributed runtime passes a signal on to all of them, and finds a step to stop after
        that none of them has passed.
        """
        if hosts.several() and not self.signum and multihost_utils.reached_preemption_sync_point(step):
            self.signum = signal.SIGTERM
        return self.signum


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second one stops at once.

    With several hosts, SIGINT becomes a SIGTERM, which the distributed runtime handles and passes on to all hosts.
    """
    request = StopRequest()
    caught = (signal.SIGINT,) if hosts.several() else (signal.SIGINT, signal.SIGTERM)

    def handle(signum: int, frame: object) -> None:
        for s, handler in before.items():
            signal.signal(s, handler)
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            request.signum = signum
        print("\nstopping after this step; again to stop at once, without saving", file=sys.stderr)

    before: dict[signal.Signals, Any] = {s: signal.signal(s, handle) for s in caught}
    try:
        yield request
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
