"""Engines of tiny models, random requests, and what they are answered: for tests, and for the soak."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.interop.save import parts_of
from gpt_jax.model.cache import cache_bytes
from gpt_jax.model.gpt import GPT
from gpt_jax.run.quantized import quantized, tree_of
from gpt_jax.sample.engine import Engine, Progress, Request
from gpt_jax.sample.replicas import Replicas
from gpt_jax.sample.settings import Filters
from tests import tiny

CONTEXT = 512

MODELS: dict[str, ModelConfig] = {
    name: dataclasses.replace(config, context_length=CONTEXT, vocab_size=259)
    for name, config in tiny.ARCHITECTURES.items()
}
MODELS["int8"] = dataclasses.replace(MODELS["llama"], cache_dtype="int8")
"""GPT-2's architecture, a Llama with grouped queries, also with weights and cache in int8, one with sliding windows,
and one with adapters."""


class Sieve:
    """A constraint that allows about a sixth of the tokens at a time, which depends on all tokens before."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def is_allowed(self, n_tokens: int = 259) -> np.ndarray:
        """Of each token whether it may come next."""
        return np.random.default_rng([1, *self.taken]).random(n_tokens) < 1 / 6

    def allowed(self) -> np.ndarray:
        """See Constraint."""
        return as_bits(self.is_allowed())

    def take(self, token: int) -> None:
        """See Constraint."""
        assert self.is_allowed()[token]
        self.taken.append(token)


def as_bits(is_allowed_V: np.ndarray) -> np.ndarray:
    """The bits of `Constraint.allowed`."""
    padded_V = np.pad(is_allowed_V, (0, -len(is_allowed_V) % 32))
    return np.packbits(padded_V, bitorder="little").view("<u4")


Answer = tuple[list[int], list[float], list[float], list[list[tuple[int, float]]], str]
"""Tokens, log-probabilities under the model and as drawn, alternatives, and why it ended."""


def engine_of(name: str, n_slots: int = 3, prefix_chunks: int = 5) -> Engine:
    """An engine whose kept prefixes do not suffice for all requests."""
    config = MODELS[name]
    params = tiny.uneven_params(config)
    if name == "int8":
        params = jax.device_put(tree_of(dict(quantized(parts_of(params), config))))
    engine = Engine(GPT(config), params, n_slots, prefix_bytes=prefix_chunks * cache_bytes(config, 128))
    engine.reserve(CONTEXT)
    return engine


def random_requests(seed: int, n: int, longest: int = CONTEXT) -> list[Request]:
    """Requests of all lengths and settings, some of which begin alike, some of which are the same but for the seed. One
    in twelve has a constraint."""
    rng = np.random.default_rng(seed)
    beginnings = [rng.integers(0, 256, longest).tolist() for _ in range(3)]
    requests: list[Request] = []
    for i in range(n):
        shared = beginnings[rng.integers(3)][: rng.integers(0, longest) if rng.random() < 0.7 else rng.integers(0, 30)]
        tokens = [*shared, *rng.integers(0, 256, rng.integers(1, 40)).tolist()][: longest - 50]
        if requests and rng.random() < 0.2:
            tokens = list(requests[-1].tokens)
        filters = Filters(
            temperature=float(rng.choice([0, 0.7, 1.0, 2.5])),
            top_k=int(rng.choice([0, 0, 1, 5, 40])),
            top_p=float(rng.choice([1.0, 0.95, 0.5])),
            min_p=float(rng.choice([0.0, 0.0, 0.1])),
            repetition_penalty=float(rng.choice([1.0, 1.0, 1.3])),
            presence_penalty=float(rng.choice([0.0, 0.0, 0.5])),
            frequency_penalty=float(rng.choice([0.0, 0.0, -0.2])),
            logit_bias=((int(rng.integers(256)), 5.0),) if rng.random() < 0.3 else (),
        )
        stop_ids = set(rng.integers(0, 256, rng.integers(0, 4)).tolist())
        alternatives = int(rng.choice([0, 0, 3]))
        new, constraint = int(rng.integers(1, 50)), Sieve() if i % 12 == 11 else None
        requests.append(
            Request(tokens, new, filters, stop_ids, (i, 0, 0), alternatives=alternatives, constraint=constraint)
        )
    return requests


class Answers:
    """What an engine says, put together by request."""

    def __init__(self, engine: Engine | Replicas) -> None:
        self.engine = engine
        self.answers: dict[int, Answer] = {}

    def ask(self, request: Request) -> int:
        """Submits a request, with a new constraint if it has one: the same request may be made many times."""
        new = None if request.constraint is None else Sieve()
        return self.engine.submit(dataclasses.replace(request, constraint=new))

    def turn(self) -> None:
        """Lets the engine go on."""
        for p in self.engine.turn():
            self.put(p)

    def put(self, p: Progress) -> None:
        """Adds to the answer of a request."""
        tokens, logprobs, drawn, alternatives, reason = self.answers.get(p.id, ([], [], [], [], ""))
        assert not reason
        assert p.tokens
        self.answers[p.id] = (
            tokens + p.tokens,
            logprobs + p.logprobs,
            drawn + p.drawn_logprobs,
            alternatives + p.alternatives,
            p.finish_reason,
        )

    def all(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to requests that are made at the same time."""
        ids = [self.ask(request) for request in requests]
        while not self.engine.is_idle:
            self.turn()
        return [self.answers.pop(id) for id in ids]
