"""Servers as processes of their own."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.commands import start


@contextmanager
def served(*args: object) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process of a server that is ready, its address, and the lines that it writes to standard error."""
    process = start("serve", "--port=0", *args)
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if ": ready at " in line:
                ready.set()
        ready.set()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert ready.wait(300)
        assert process.poll() is None, lines
        yield process, next(line for line in lines if ": ready at " in line).split(" ")[-1].strip(), lines
    finally:
        process.kill()
        process.wait()
        thread.join()
        assert process.stdout is not None
        process.stdout.close()
