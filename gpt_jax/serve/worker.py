"""The thread that owns the engine, and what the event loop says to it: the loop only queues, and never computes.

Between two turns of the engine the thread does what it was told meanwhile, so that a client that has left frees its
slots within a block. What the engine has drawn becomes text here, while the device works on the next block.
"""

import asyncio
import dataclasses
import functools
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gpt_jax.errors import UserError
from gpt_jax.sample.decode import Scores
from gpt_jax.sample.engine import Engine, Progress
from gpt_jax.sample.generate import Row
from gpt_jax.sample.replicas import Replicas

Result = TypeVar("Result")

TRIES = 2
"""How often a request may be among those of which one made the engine fail; the last time, it ends."""


class EngineError(Exception):
    """The engine failed, and a request is lost by that."""


class StoppedError(Exception):
    """The server ends before a request has."""


@dataclass
class Piece:
    """What has been added to one of a work's texts. The token that ended it, and a stop string, are among its tokens,
    and not in its text."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]
    finish_reason: str  # See Result; "": it goes on.
    reused_tokens: int


@dataclass(eq=False)
class Work:
    """Texts that a client wants, and what has come of them. The event loop makes it, and reads `pieces`; all else is
    the thread's."""

    rows: Sequence[Row]
    client: str = ""  # Clients take turns.
    pieces: "asyncio.Queue[Piece | Exception | None]" = field(default_factory=asyncio.Queue)  # None: it was accepted.
    ids: dict[int, int] = field(default_factory=dict)  # The engine's number of a text, by index, while it is written.
    tries: int = 1

    async def accepted(self) -> None:
        """Waits for the engine to take the work. Raises UserError or QueueFullError where it does not."""
        if error := await self.pieces.get():
            assert isinstance(error, Exception)
            raise error

    async def next(self) -> Piece:
        """The next piece of any of the texts. Raises UserError, or EngineError, which ends all of them."""
        piece = await self.pieces.get()
        if isinstance(piece, Exception):
            raise piece
        assert piece is not None
        return piece


class Worker:
    """An engine with its thread."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, engine: Engine | Replicas) -> None:
        self.engine = engine
        self.context_length = engine.model.config.context_length
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.asides: deque[Callable[[], None]] = deque()  # What waits until no prompt is half read.
        self.outbox: list[tuple[asyncio.Queue[Any], Any]] = []
        self.writing: dict[int, tuple[Work, int]] = {}  # Works, and the index of the text, by the engine's number.
        self.is_ready = self.is_stopped = False
        self.failure: BaseException | None = None  # That of the thread, which has ended by it.
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # For the event loop.

    def start(self, changed: Callable[[], None] = lambda: None) -> None:
        """Compiles, then works until it is stopped, for the running event loop. changed: is called on it once the
        worker is ready, and if it fails."""
        self.loop, self.changed = asyncio.get_running_loop(), changed
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread, once it has done what it does; what was not done is lost."""
        self.inbox.put(self._stop)

    def abandon(self) -> None:
        """Ends all works by a StoppedError."""
        self.inbox.put(self._abandon)

    def submit(self, work: Work) -> None:
        """Lets the engine take a work; see `Work.accepted`."""
        self.inbox.put(functools.partial(self._submit, work))

    def cancel(self, work: Work) -> None:
        """Ends what is left of a work."""
        self.inbox.put(functools.partial(self._cancel, work))

    async def score(self, tokens: Sequence[int], adapter: int = 0) -> Scores:
        """See Engine.score."""
        answer: asyncio.Queue[Any] = asyncio.Queue()
        asker = asyncio.current_task()

        def score() -> None:
            if asker is not None and asker.done():
                return  # The client has left.
            try:
                self._post(answer, self.engine.score(tokens, adapter))
            except UserError as e:
                self._post(answer, e)
            except Exception as e:
                self._recover(e, ())
                self._post(answer, EngineError(describe(e)))

        self.inbox.put(lambda: self.asides.append(score))
        found = await answer.get()
        if isinstance(found, Exception):
            raise found
        return found

    # For the thread.

    def _run(self) -> None:
        try:
            self.engine.compile()
            self.is_ready = True
            self.loop.call_soon_threadsafe(self.changed)
            while not self.is_stopped:
                self._obey()
                if not self.engine.is_idle:
                    self._turn()
                if self.asides and not self.engine.is_reading:
                    self.asides.popleft()()
                self._flush()
        except BaseException as e:
            traceback.print_exc()
            self.failure = e
            for work in {work for work, _ in self.writing.values()}:
                self._post(work.pieces, EngineError(describe(e)))
            self._flush()
            self.loop.call_soon_threadsafe(self.changed)

    def _obey(self) -> None:
        """Does what was asked of the thread, for which it waits where there is nothing else to do."""
        if self.engine.is_idle and not self.asides:
            self.inbox.get()()
        while not self.inbox.empty():
            self.inbox.get()()

    def _stop(self) -> None:
        self.is_stopped = True

    def _abandon(self) -> None:
        for work in {work for work, _ in self.writing.values()}:
            self._end(work, StoppedError())

    def _submit(self, work: Work) -> None:
        try:
            for index in range(len(work.rows)):
                self._ask(work, index)
        except UserError as e:
            self._end(work, e)
        except Exception as e:
            self._recover(e, ())
            self._end(work, EngineError(describe(e)))
        else:
            self._post(work.pieces, None)

    def _ask(self, work: Work, index: int, is_new: bool = True) -> None:
        request = work.rows[index].request(self.context_length)
        id = self.engine.submit(dataclasses.replace(request, client=work.client), is_new)
        work.ids[index] = id
        self.writing[id] = work, index

    def _cancel(self, work: Work) -> None:
        for id in work.ids.values():
            self.engine.cancel(id)
            del self.writing[id]
        work.ids.clear()

    def _turn(self) -> None:
        """Lets the engine go on, and passes on what it has drawn."""
        try:
            found = self.engine.turn()
        except Exception as e:
            self._recover(e, self.engine.suspects)
            return
        for progress in found:
            if progress.id in self.writing:
                self._take(progress, *self.writing[progress.id])

    def _take(self, progress: Progress, work: Work, index: int) -> None:
        row = work.rows[index]
        result = row.result
        n = len(result.tokens)
        try:
            text = "".join(row.take(progress))
            if row.error:
                raise row.error
        except Exception as e:
            self._end(work, EngineError(str(e) if isinstance(e, UserError) else describe(e)))
            return
        if result.finish_reason:
            self.engine.cancel(progress.id)  # Where it ended by a string, which the engine does not know of.
            del self.writing[progress.id], work.ids[index]
        new = result.tokens[n:], result.logprobs[n:], result.alternatives[n:]
        self._post(work.pieces, Piece(index, text, *new, result.finish_reason, progress.reused_tokens))

    def _end(self, work: Work, error: Exception) -> None:
        """Ends a work by an error."""
        self._cancel(work)
        self._post(work.pieces, error)

    def _recover(self, error: Exception, suspects: Collection[int]) -> None:
        """Asks the engine for the rest of the requests that it has forgotten, but for those that made it fail.

        Those are among the suspects, of which each is tried once more. What was drawn stays; its keys and values are
        computed again, all together, and so are rounded in another way.
        """
        traceback.print_exception(error)
        lost = [(number, *self.writing[number]) for number in self.engine.lost if number in self.writing]
        for work in {work for number, work, _ in lost if number in suspects}:
            work.tries += 1
            if work.tries > TRIES:
                self._end(work, EngineError(describe(error)))
        for number, work, index in lost:
            if self.writing.pop(number, None):
                self._ask(work, index, is_new=False)

    def _post(self, pieces: "asyncio.Queue[Any]", item: Any) -> None:
        self.outbox.append((pieces, item))

    def _flush(self) -> None:
        """Hands over what was posted, all at once, since to wake the loop costs more than to queue."""
        if self.outbox:
            self.loop.call_soon_threadsafe(deliver, self.outbox)
            self.outbox = []


def deliver(items: "list[tuple[asyncio.Queue[Any], Any]]") -> None:
    """Puts each item into its queue."""
    for pieces, item in items:
        pieces.put_nowait(item)


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
