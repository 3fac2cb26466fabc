"""Several engines that work as one: a job over many prompts is divided over the replicas of a model's parameters."""

from collections.abc import Sequence
from typing import Any

from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.sample.engine import Engine, Progress, Request


class Replicas:
    """Engines with the same model, of which none waits for another. A request goes to the one that has the fewest, and
    the first of them reads what it is told to read: a conversation stays where it was."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.model, self.n_tokens = engines[0].model, engines[0].n_tokens
        self.n_slots = sum(engine.n_slots for engine in engines)

    def submit(self, request: Request) -> int:
        """See Engine. The number of the request's engine is the rest when the id is divided by theirs."""
        number = min(range(len(self.engines)), key=lambda i: len(self.engines[i].tasks))
        return self.engines[number].submit(request) * len(self.engines) + number

    def cancel(self, id: int) -> None:
        """See Engine."""
        at, number = divmod(id, len(self.engines))
        self.engines[number].cancel(at)

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return all(engine.is_idle for engine in self.engines)

    def turn(self) -> list[Progress]:
        """See Engine. Each engine's device works while the others are seen to."""
        n = len(self.engines)
        return [p._replace(id=p.id * n + i) for i, engine in enumerate(self.engines) for p in engine.turn()]

    def read(self, tokens: Sequence[int], adapter: int = 0) -> None:
        """See Engine."""
        self.engines[0].read(tokens, adapter)

    def reserve(self, places: int) -> None:
        """See Engine."""
        for engine in self.engines:
            engine.reserve(places)


def engine_on(
    placement: Placement, model: GPT, params: Params, n_texts: int, most_slots: int, **options: Any
) -> Engine | Replicas:
    """What writes so many texts where the parameters lie: an engine on each replica of them that this host takes part
    in, as far as there are texts for it, with at most so many slots. options: those of each engine."""
    replicas = list(placement.replicas(params).values())[:n_texts]
    n_slots = min(most_slots, -(-n_texts // len(replicas)))
    engines = [Engine(model, own, n_slots, **options) for own in replicas]
    return engines[0] if len(engines) == 1 else Replicas(engines)


def replace_params(engine: Engine | Replicas, placement: Placement, params: Params) -> None:
    """Gives other weights, placed like those before, to what `engine_on` made."""
    engines = engine.engines if isinstance(engine, Replicas) else [engine]
    for one, own in zip(engines, placement.replicas(params).values(), strict=False):
        one.replace_params(own)
