"""Several engines that work as one: a job over many prompts is divided over the replicas of a model's parameters."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.sample.decode import Scores
from gpt_jax.sample.engine import Counts, Engine, Progress, Request


class Replicas:
    """Engines with the same model, of which none waits for another. A request goes to the one that has the fewest, and
    the first of them reads what it is told to read: a conversation stays where it was."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.model, self.n_tokens, self.n_adapters = engines[0].model, engines[0].n_tokens, engines[0].n_adapters
        self.n_slots = sum(engine.n_slots for engine in engines)
        self.said: list[Progress] = []
        self.lost: list[int] = []
        self.suspects: list[int] = []

    def submit(self, request: Request, is_new: bool = True) -> int:
        """See Engine. The number of the request's engine is the rest when the id is divided by theirs."""
        number = min(range(len(self.engines)), key=lambda i: len(self.engines[i].tasks))
        return self.engines[number].submit(request, is_new) * len(self.engines) + number

    def cancel(self, id: int) -> None:
        """See Engine."""
        at, number = divmod(id, len(self.engines))
        self.engines[number].cancel(at)

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return not self.said and all(engine.is_idle for engine in self.engines)

    @property
    def is_reading(self) -> bool:
        """See Engine. It is the first one that scores."""
        return self.engines[0].is_reading

    @property
    def occupancy(self) -> tuple[int, int]:
        """See Engine."""
        waiting, taken = zip(*(engine.occupancy for engine in self.engines), strict=True)
        return sum(waiting), sum(taken)

    @property
    def counts(self) -> Counts:
        """See Engine."""
        return Counts(*map(sum, zip(*(astuple(engine.counts) for engine in self.engines), strict=True)))

    def turn(self) -> list[Progress]:
        """See Engine. Each engine's device works while the others are seen to. Where one raises, `lost` and `suspects`
        are its own, and what the others said is returned the next time."""
        n = len(self.engines)
        for i, engine in enumerate(self.engines):
            try:
                self.said += [p._replace(id=p.id * n + i) for p in engine.turn()]
            except BaseException:
                self.lost, self.suspects = ([id * n + i for id in ids] for ids in (engine.lost, engine.suspects))
                raise
        said, self.said = self.said, []
        return said

    def read(self, tokens: Sequence[int], adapter: int = 0) -> None:
        """See Engine."""
        self.engines[0].read(tokens, adapter)

    def score(self, tokens: Sequence[int], adapter: int = 0) -> Scores:
        """See Engine."""
        return self.engines[0].score(tokens, adapter)

    def reserve(self, places: int) -> None:
        """See Engine."""
        for engine in self.engines:
            engine.reserve(places)

    def compile(self) -> None:
        """See Engine."""
        for engine in self.engines:
            engine.compile()


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
