"""A server that the tests of the protocol share."""

from collections.abc import Iterator

import pytest

from tests.serve.browser import chromium  # noqa: F401
from tests.serve.servers import Running, serving, tiny_engine


@pytest.fixture(scope="session")
def shared() -> Iterator[Running]:
    with serving(tiny_engine()) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """The shared server. Afterwards it has nothing left to do."""
    yield shared
    shared.wait_until_idle()
    assert shared.engine.occupancy == (0, 0)


@pytest.fixture(scope="session")
def roomy() -> Iterator[Running]:
    """A server with room for definitions of tools, and for all white space that JSON may have."""
    with serving(tiny_engine(n_slots=2, context_length=1024)) as running:
        yield running
