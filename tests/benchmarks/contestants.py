"""Contestants that tests send into their processes."""

import os
import time


class Counter:
    """Counts, and fails in every way there is."""

    def __init__(self, start: int) -> None:
        self.n = start

    def next(self) -> int:
        print("what a library prints does not come between the answers")
        self.n += 1
        return self.n

    def fail(self) -> None:
        raise MemoryError("out of memory:\nmore of it")

    def die(self) -> None:
        os._exit(3)

    def sleep(self) -> None:
        time.sleep(60)
