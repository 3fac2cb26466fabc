"""Who is read and who writes, without a device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.sample.scheduler import QueueFullError, Scheduler, Ticket


def scheduler(n_slots: int = 2, most_waiting: int = 10**6, most_waiting_tokens: int = 10**6) -> Scheduler:
    return Scheduler(n_slots, most_waiting, most_waiting_tokens)


def write_next(s: Scheduler) -> Ticket:
    ticket = s.next_to_read()
    assert ticket is not None
    s.write(ticket)
    return ticket


def test_requests_are_taken_in_their_order_while_there_are_slots() -> None:
    s = scheduler(n_slots=2)
    for i in range(3):
        s.add(Ticket(i, 1))
    first = s.next_to_read()
    assert first is s.next_to_read()  # One prompt is read at a time.
    assert first is not None
    s.write(first)
    assert [first.id, write_next(s).id] == [0, 1]
    assert s.next_to_read() is None
    s.end(first)
    assert (write_next(s).id, s.writing[first.slot].id) == (2, 2)


def test_others_are_read_with_the_next_one_while_they_fit() -> None:
    s = scheduler(n_slots=3)
    for i, n_tokens in enumerate([5, 5, 50, 5]):
        s.add(Ticket(i, n_tokens))
    s.next_to_read()
    assert s.take(lambda ticket: ticket.n_tokens == 5) is s.tickets[1]
    assert s.take(lambda ticket: ticket.n_tokens == 5) is None  # Nobody overtakes the third.
    assert [ticket.id for ticket in s.reading] == [0, 1]
    s.write(s.reading[1])
    assert s.next_to_read() is s.tickets[0]


def test_clients_take_turns() -> None:
    s = scheduler(n_slots=10)
    for i, client in enumerate(["a", "a", "a", "b", "c", "b"]):
        s.add(Ticket(i, 1, client))
    assert [write_next(s).id for _ in range(6)] == [0, 3, 4, 1, 5, 2]


def test_no_more_wait_than_may() -> None:
    s = scheduler(n_slots=1, most_waiting=2, most_waiting_tokens=100)
    s.add(Ticket(0, 1000))  # One alone may be longer.
    with pytest.raises(QueueFullError, match="requests for 1000 tokens wait already, and 1 more would be abov"):
        s.add(Ticket(1, 1))
    write_next(s)
    s.add(Ticket(2, 50))
    s.add(Ticket(3, 50))
    with pytest.raises(QueueFullError, match="2 requests wait already, the most that may; ask again later"):
        s.add(Ticket(4, 1))
    s.end(s.tickets[3])
    s.add(Ticket(5, 1))
    assert (s.n_waiting, s.n_waiting_tokens) == (2, 51)


@given(
    st.integers(1, 4), st.lists(st.tuples(st.sampled_from(["add", "read", "take", "write", "end"]), st.integers(0, 9)))
)
def test_no_slot_is_lost_and_none_is_given_twice(n_slots: int, steps: list[tuple[str, int]]) -> None:
    s = scheduler(n_slots)
    for i, (step, number) in enumerate(steps):
        if step == "add":
            s.add(Ticket(i, number, f"client {number % 3}"))
        elif step == "read":
            s.next_to_read()
        elif step == "take":
            s.take(lambda ticket, number=number: ticket.n_tokens > number)  # type: ignore[misc]
        elif step == "write" and s.reading:
            s.write(s.reading[number % len(s.reading)])
        elif step == "end" and s.tickets:
            s.end(list(s.tickets.values())[number % len(s.tickets)])
        reading = [ticket.slot for ticket in s.reading]
        assert sorted([*s.free, *s.writing, *reading]) == list(range(n_slots))
        assert all(slot == ticket.slot for slot, ticket in s.writing.items())
        waiting = [ticket for queue in s.queues.values() for ticket in queue]
        assert (s.n_waiting, s.n_waiting_tokens) == (len(waiting), sum(ticket.n_tokens for ticket in waiting))
        assert all(s.queues.values())
        assert len(s.tickets) == len(waiting) + len(s.writing) + len(reading)
