"""Which request is read next, into which slot, and who writes: plain Python over small records, without a device.

A request waits, its prompt is read, it writes, and it is gone. One prompt is being read at a time, or several that are
read at once, each for a slot that is kept free for it. Clients take turns, and the requests of a client are taken in
the order in which they came.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gpt_jax.errors import UserError

State = Literal["waiting", "reading", "writing", "done"]


class QueueFullError(UserError):
    """There is no room for another request; the client may come again later."""


@dataclass
class Ticket:
    """What the scheduler knows of a request."""

    id: int
    n_tokens: int  # Tokens of the prompt, and most tokens of the answer.
    client: str = ""
    slot: int = -1
    state: State = "waiting"


class Scheduler:
    """The requests of an engine with so many slots. Besides those for which there are slots, at most `most_waiting` may
    wait; and all that wait, for at most `most_waiting_tokens` tokens."""

    def __init__(self, n_slots: int, most_waiting: int, most_waiting_tokens: int) -> None:
        self.most_waiting, self.most_waiting_tokens = most_waiting, most_waiting_tokens
        self.free = deque(range(n_slots))  # The slot that has been free for the longest time is taken first.
        self.queues: dict[str, deque[Ticket]] = {}  # Of each client that waits; the one whose turn it is first.
        self.tickets: dict[int, Ticket] = {}
        self.reading: list[Ticket] = []  # The one that is read first is the first.
        self.writing: dict[int, Ticket] = {}  # By slot.
        self.n_waiting = self.n_waiting_tokens = 0

    def add(self, ticket: Ticket, is_new: bool = True) -> None:
        """Lets a request wait. Raises QueueFullError when too many wait already, unless this one has waited before."""
        if is_new and self.n_waiting >= self.most_waiting + len(self.free):
            raise QueueFullError(f"{self.n_waiting} requests wait already, the most that may; ask again later")
        # One alone may be longer, or it could never be taken.
        if is_new and self.n_waiting and self.n_waiting_tokens + ticket.n_tokens > self.most_waiting_tokens:
            raise QueueFullError(
                f"requests for {self.n_waiting_tokens} tokens wait already, and {ticket.n_tokens} more would be above "
                f"the limit of {self.most_waiting_tokens}; ask again later"
            )
        self.tickets[ticket.id] = ticket
        self.queues.setdefault(ticket.client, deque()).append(ticket)
        self._count(ticket, 1)

    def _count(self, ticket: Ticket, sign: int) -> None:
        self.n_waiting += sign
        self.n_waiting_tokens += sign * ticket.n_tokens

    def next_to_read(self) -> Ticket | None:
        """The request whose prompt is being read, or else the next one, if there is a slot for it."""
        if not self.reading:
            self.take(lambda ticket: True)
        return self.reading[0] if self.reading else None

    def take(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """Lets the next request be read, too, if there is a slot for it and `fits` is true of it; else returns None."""
        client = next(iter(self.queues), None)
        if client is None or not self.free or not fits(self.queues[client][0]):
            return None
        queue = self.queues.pop(client)
        ticket = queue.popleft()
        if queue:
            self.queues[client] = queue  # Behind the other clients.
        self._count(ticket, -1)
        ticket.slot, ticket.state = self.free.popleft(), "reading"
        self.reading.append(ticket)
        return ticket

    def write(self, ticket: Ticket) -> None:
        """Lets the request that was read write."""
        self.reading.remove(ticket)
        ticket.state = "writing"
        self.writing[ticket.slot] = ticket

    def end(self, ticket: Ticket) -> None:
        """Forgets a request, whatever its state; its slot is free at once."""
        if ticket.state == "waiting":
            queue = self.queues[ticket.client]
            queue.remove(ticket)
            if not queue:
                del self.queues[ticket.client]
            self._count(ticket, -1)
        elif ticket.state == "reading":
            self.reading.remove(ticket)
            self.free.append(ticket.slot)
        elif ticket.state == "writing":
            del self.writing[ticket.slot]
            self.free.append(ticket.slot)
        ticket.state = "done"
        self.tickets.pop(ticket.id, None)
