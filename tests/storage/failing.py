"""Backends that fail when a test says so."""

from collections.abc import Callable
from typing import Any

import pytest

from gpt_jax.storage import remote
from gpt_jax.storage.remote import RemotePath

Fails = Callable[[int], BaseException | None]
"""The error of a request by its number, counted from 1; None: it succeeds."""


class Failing:
    """A file system whose calls fail where `fails` says so."""

    def __init__(self, fails: Fails) -> None:
        self.fs: Any = None
        self.fails, self.calls = fails, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if error := self.fails(self.calls):
                raise error
            return getattr(self.fs, name)(*args, **kwargs)

        return call


def make_fail(patch: pytest.MonkeyPatch, fails: Fails) -> tuple[Failing, list[float]]:
    """Makes the requests of all remote paths fail. Returns the file system in front of all others, and the waits, in
    seconds, which are collected instead of waited for."""
    waits: list[float] = []
    backend, failing = RemotePath._backend, Failing(fails)

    def wrapped(self: RemotePath) -> tuple[Any, str]:
        failing.fs, name = backend(self)
        return failing, name

    patch.setattr(RemotePath, "_backend", wrapped)
    patch.setattr(remote.time, "sleep", waits.append)
    return failing, waits
