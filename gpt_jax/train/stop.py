"""Requests to stop a run, by a signal to any of its hosts."""

import os
import signal
import sys
import threading
from typing import Any

from jax.experimental import multihost_utils

from gpt_jax import hosts


class StopSignals:
    """Turns the first SIGINT or SIGTERM after the first step into a request to stop after the current step; a second
    one does what it did before: it stops at once. Before that step, when there is nothing to save, all of them do.

    A context manager; leaving it gives the signals back. With several hosts, SIGINT becomes a SIGTERM, which the
    distributed runtime handles and passes on to all hosts.
    """

    def __init__(self) -> None:
        self.signum = 0  # The signal that asked the run to stop; 0 before there is one.
        self.listens = self.asked = False
        self.before: dict[signal.Signals, Any] = {}  # The handlers that ours replaced.

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_back()

    def after(self, step: int) -> int:
        """The signal that ends the run after `step` steps, the same on all hosts; 0 to go on.

        With several hosts, the distributed runtime passes a signal on to all of them, and finds a step to stop after
        that none of them has passed.
        """
        if not self.listens:
            self.listen()
        if hosts.several() and not self.signum and multihost_utils.reached_preemption_sync_point(step):
            self.signum = signal.SIGTERM
        return self.signum

    def listen(self) -> None:
        """Takes the signals over, in the main thread, where alone that is possible."""
        self.listens = True
        if hosts.several():
            hosts.share_preemptions()
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT,) if hosts.several() else (signal.SIGINT, signal.SIGTERM)
            self.before = {s: signal.signal(s, self.handle) for s in caught}

    def handle(self, signum: int, frame: object) -> None:
        """Handles a signal. The handlers are given back for the second one only, since whoever sees the earlier handler
        in place may take the first one for not noticed; see `gpt_jax.cli.main.end_soon_after_signals`."""
        if self.asked:
            self.give_back()
            os.kill(os.getpid(), signum)
            return
        self.asked = True
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signum = signum
        print("\nstopping after this step; again to stop at once, without saving", file=sys.stderr)

    def give_back(self) -> None:
        """Restores the handlers that were there before."""
        for s, handler in self.before.items():
            signal.signal(s, handler)
        self.before = {}
