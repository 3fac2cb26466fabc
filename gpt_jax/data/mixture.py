"""Which source each sample of a training run comes from, in closed form.

Samples are counted from 0 over all steps, batch_size a step. A stage begins a new sequence of blocks. Each block has a
fixed number of samples of each source, in an order in which any part of the block is near the weights, too.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from gpt_jax.data.order import hash_key
from gpt_jax.errors import UserError

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS  # Samples. Counts are exact at the ends of blocks, so the fewer, the nearer to the weights.


class Stage(NamedTuple):
    """The weights of all sources from a step on. A source's weight is its share of the targets, up to a factor."""

    start: int
    weights: tuple[float, ...]


class Mixture:
    """The sources of samples: `mixture(samples)`, a pure function of its arguments and of these settings."""

    def __init__(
        self, names: Sequence[str], mean_targets: Sequence[float], stages: Sequence[Stage], batch_size: int, seed: int
    ) -> None:
        """mean_targets: of a row of each source; 0 when it has none. A source is drawn in proportion to its weight over
        its mean targets.

        Raises UserError for names that come twice, for stages that do not ascend from step 0, for weights that are not
        finite, negative, or all 0 in a stage, and for a weight of a source without targets.
        """
        _check(names, mean_targets, stages)
        self._seed = seed
        self._starts = np.array([stage.start * batch_size for stage in stages], np.int64)
        # Exact, since among large counts the rounding of floats would let a source's count fall.
        self._rates = [
            tuple(
                Fraction(w) / Fraction(t) if w else Fraction(0)
                for w, t in zip(stage.weights, mean_targets, strict=True)
            )
            for stage in stages
        ]
        self._before = [np.zeros(len(names), np.int64)]  # The samples of each source before each stage.
        for i, n in enumerate(np.diff(self._starts).tolist()):
            self._before.append(self._before[i] + self._within(i, n))

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The index of each sample's source, and how many samples of that source came before it: int64 (n,) each."""
        stages = np.searchsorted(self._starts, samples, side="right") - 1
        blocks, places = np.divmod(samples - self._starts[stages], BLOCK)
        sources, numbers = np.empty((2, len(samples)), np.int64)
        for stage, block in sorted(set(zip(stages.tolist(), blocks.tolist(), strict=True))):
            here = (stages == stage) & (blocks == block)
            table = _block(self._rates[stage], block, self._seed, stage)
            sources[here] = table.sources[places[here]]
            numbers[here] = self._before[stage][sources[here]] + table.numbers[places[here]]
        return sources, numbers

    def counts(self, n_samples: int) -> np.ndarray:
        """How many of the first n_samples each source has, int64 (sources,)."""
        stage = int(np.searchsorted(self._starts, n_samples, side="right")) - 1
        return self._before[stage] + self._within(stage, n_samples - int(self._starts[stage]))

    def _within(self, stage: int, n: int) -> np.ndarray:
        """How many of the first n samples of a stage each source has, int64 (sources,)."""
        rates = self._rates[stage]
        table = _block(rates, n // BLOCK, self._seed, stage)
        rest = np.bincount(table.sources[: n % BLOCK], minlength=len(rates))
        return np.array(counts_at(rates, n // BLOCK * BLOCK), np.int64) + rest


def counts_at(rates: Sequence[Fraction], n: int) -> list[int]:
    """The parts of n samples in proportion to `rates`, rounded, which sum to n and never fall while n grows.

    The first source has its rounded share, the others share the rest alike. Each share grows by 0 or 1 with n, and so
    does what it leaves. Rounding all shares at once would let one fall by 1 when another grows by 2.
    """
    counts, left, total = [], n, sum(rates)
    for rate in rates:
        counts.append(math.floor(left * rate / total + Fraction(1, 2)) if rate else 0)
        left, total = left - counts[-1], total - rate
    return counts


class _Block(NamedTuple):
    sources: np.ndarray  # int64 (BLOCK,): of each sample.
    numbers: np.ndarray  # int64 (BLOCK,): how many samples of its source come before it in the stage.


@functools.lru_cache(maxsize=4)  # A batch needs one or two, and the next batches need them again.
def _block(rates: tuple[Fraction, ...], block: int, seed: int, stage: int) -> _Block:
    """The samples of a block. Their order is the van der Corput sequence, whose every part is spread evenly, with a
    digital shift (see Lemieux 2009, Monte Carlo and Quasi-Monte Carlo Sampling)."""
    before = np.array(counts_at(rates, block * BLOCK), np.int64)
    counts = np.array(counts_at(rates, (block + 1) * BLOCK), np.int64) - before
    shift = int(hash_key(seed, stage, block)[0]) % BLOCK
    ends = np.cumsum(counts)
    sources = np.searchsorted(ends, _bit_reversal() ^ shift, side="right")
    numbers = np.empty(BLOCK, np.int64)
    numbers[np.argsort(sources, kind="stable")] = np.arange(BLOCK) + np.repeat(before - ends + counts, counts)
    return _Block(sources, numbers)


def _bit_reversal() -> np.ndarray:
    """The numbers below BLOCK with their BLOCK_BITS bits reversed, int64 (BLOCK,)."""
    reversed_bits = np.zeros(1, np.int64)
    for _ in range(BLOCK_BITS):
        reversed_bits = np.concatenate((2 * reversed_bits, 2 * reversed_bits + 1))
    return reversed_bits


def _check(names: Sequence[str], mean_targets: Sequence[float], stages: Sequence[Stage]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the mixture has two sources {twice[0]!r}; give each a name of its own")
    starts = [stage.start for stage in stages]
    if starts[:1] != [0] or starts != sorted(set(starts)):
        raise UserError(f"the stages of the mixture start at the steps {starts}; they must ascend, and the first be 0")
    for start, weights in stages:
        if len(weights) != len(names):
            raise UserError(f"the mixture has {len(weights)} weights from step {start} on for {len(names)} sources")
        for name, weight, targets in zip(names, weights, mean_targets, strict=True):
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(
                    f"the weight of {name!r} from step {start} on is {weight}; it must be finite, 0 or more"
                )
            if weight and not targets:
                raise UserError(
                    f"the source {name!r} has the weight {weight} from step {start} on, but no row with a target; "
                    f"give it more text, a shorter context or the weight 0"
                )
        if not any(weights):
            raise UserError(f"all weights of the mixture are 0 from step {start} on; one must be more")
