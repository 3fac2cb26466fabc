"""A training step compiled ahead of time, and what its program needs: memory and collectives."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import Config
from gpt_jax.data.batch import Batch
from gpt_jax.errors import UserError
from gpt_jax.model import lora
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import MeshPlacement, Placement, with_shardings
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import TrainState, init_state, make_train_step

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

NAMES_DEVICES = re.compile(r"\b(channel_id|replica_groups|source_target_pairs)=")
"""The attributes of instructions by which devices exchange data."""

CALLS = r"\b(calls|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.-]+)"
"""The attributes by which an instruction names other computations, and their names."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step: their number, and the bytes of their arrays on one device."""

    count: float = 0
    bytes: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes)


@dataclass(frozen=True)
class Program:
    """The needs of one step, in bytes on one device. `lacking` is 0 when it fits; `text` is empty when it does not.

    unknown: what else its text has that seems to move data between devices, and how often in a step. counted: False
    when `traffic` is by formula.
    """

    temporaries: float
    lacking: float = 0
    traffic: dict[str, Traffic] = field(default_factory=dict)
    text: str = ""
    unknown: Counter[str] = field(default_factory=Counter)
    counted: bool = True


def abstract_state(model: GPT, config: Config) -> TrainState:
    """Shapes of the state of a run; when it trains adapters, with the frozen parameters."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config.train.seed))
    if not model.config.lora.rank:
        return state
    _, frozen = lora.split(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    return state._replace(frozen=frozen)


def compile_step(model: GPT, config: Config, placement: Placement, state_bytes: float = 0) -> Program:
    """Compiles the train step for the devices of `placement`, which this machine need not have.

    state_bytes: bytes of the state on one device, to tell what is lacking when the step does not fit. Raises UserError
    when the batch does not divide over the devices.
    """
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    step = make_train_step(next_token, model, optimizer, schedule, config.train.seed, placement.axis_name)
    A = placement.microbatches(config.data.batch_size, config.data.microbatch_size)
    B, T = config.data.batch_size // A, config.model.context_length
    state = abstract_state(model, config)
    if isinstance(placement, MeshPlacement):
        state = with_shardings(state, placement.state_shardings(state))
        tokens = jax.ShapeDtypeStruct((A, B, T + 1), jnp.int32, sharding=placement.batch_sharding(A))
    elif placement.n_devices > 1:
        tokens = jax.ShapeDtypeStruct((placement.n_devices, A, B // placement.n_devices, T + 1), jnp.int32)
    else:
        state = with_shardings(state, placement.state_shardings(state))
        sharding = jax.sharding.SingleDeviceSharding(placement.devices[0])
        tokens = jax.ShapeDtypeStruct((A, B, T + 1), jnp.int32, sharding=sharding)
    try:
        compiled = placement.jit(step, donate=True).lower(state, Batch(tokens)).compile()
    except jax.errors.JaxRuntimeError as e:
        return out_of_memory(e, state_bytes)
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    temporaries = float(memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    traffic, unknown = collectives(text)
    return Program(temporaries, 0, traffic, text, unknown)


def out_of_memory(e: Exception, state_bytes: float) -> Program:
    """The sizes in the compiler's error on a program that does not fit. Raises UserError for its other errors.

    The error has the size of the temporaries alone when they are too large already, or else of everything.
    """
    size = r"([\d.]+)([KMGT]?)"
    everything = re.search(rf"Used {size} of {size} hbm", str(e))
    sizes = everything or re.search(rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", str(e))
    if "RESOURCE_EXHAUSTED" not in str(e) or not sizes:
        raise UserError(f"the step does not compile: {(str(e).splitlines() or [''])[0][:300]}") from e
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, available = float(sizes[1]) * unit[sizes[2]], float(sizes[3]) * unit[sizes[4]]
    temporaries = used - state_bytes if everything else used
    return Program(temporaries, lacking=temporaries + state_bytes - available)


def collectives(text: str) -> tuple[dict[str, Traffic], Counter[str]]:
    """The collectives in one run of a program, by kind, from its text, and what is not understood in it, by name. Those
    in loops count once for each iteration.

    The TPU compiler writes a reduce-scatter, an all-reduce of which each device keeps a part only, as a fusion of such
    a name. It writes a collective that overlaps with products as several fusions (start, parts, end), which all have
    its channel. The form of the text is XLA's own affair and changes: what names devices or a channel and is none of
    the known kinds is not understood.
    """
    computations = split_computations(text)
    total: dict[str, Traffic] = {}
    unknown: Counter[str] = Counter()

    def visit(name: str, times: float, fused: set[tuple[str, str]] | None = None) -> None:
        """Adds the collectives of a computation. fused: kinds and channels counted in fusions beside this one."""
        in_fusions: set[tuple[str, str]] = set() if fused is None else fused
        if name not in computations:
            unknown["computation that is not in the text"] += 1
        for line in computations.get(name, []):
            operation = re.search(r" = .*? ([a-z][\w-]*)\(", line)
            kind, _, part = re.sub(r"-(start|update|done)$", r"/\1", operation[1] if operation else "").partition("/")
            if kind in KINDS and part in ("", "start"):
                channel = re.search(r"channel_id=(\d+)", line)
                counted = (kind, channel[1] if channel else "")
                if fused is not None and channel and counted in in_fusions:
                    continue
                if fused is not None:
                    in_fusions.add(counted)
                kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
                total[kind] = total.get(kind, Traffic()) + Traffic(times, times * largest_array(line))
            elif kind not in KINDS and part != "done" and NAMES_DEVICES.search(line):
                unknown[kind or line.strip()[:40]] += int(times)
            loop = re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line)
            if loop:
                before, turns = total.copy(), trip_count(line, computations.get(loop[1], []))
                visit(loop[2], times * (turns or 1))
                if not turns and total != before:
                    unknown["loop of which the number of iterations is not told"] += 1
            else:
                for key, called in re.findall(CALLS, line):
                    for one in re.findall(r"%?([\w.-]+)", called):
                        visit(one, times, in_fusions if key == "calls" else None)

    visit("ENTRY", 1)
    return {kind: total[kind] for kind in KINDS if kind in total}, unknown


def split_computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program, by its name; that of the program itself is ENTRY."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            lines = computations.setdefault("ENTRY" if head[1] else head[2], [])
        else:
            lines.append(line)
    return computations


def trip_count(loop: str, condition: list[str]) -> int:
    """Number of iterations of a loop: what the compiler knows or, of a loop over 0, 1, 2, ..., the constant that its
    condition compares with; 0 when there is neither."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
    limits = [int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)]
    return int(known[1]) if known else max(limits, default=0)


def largest_array(line: str) -> float:
    """The bytes of a collective's arrays: of its operands or of its results, whichever is more."""
    result = line.split(" = ", 1)[-1]
    kind = next(k for k in KINDS if f" {k}" in result)
    shapes = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", result[: result.index(f" {kind}")])
    # A pred names no number of bits, and is a byte.
    sizes = [int(bits or 8) / 8 * math.prod(int(n) for n in dims.split(",") if n) for _, bits, dims in shapes]
    if f" {kind}-start(" in result:  # Its result holds the operands, too.
        return float(max(sizes, default=0))
    return float(np.sum(sizes))


def bytes_on_a_device(tree: Any, shardings: Any) -> float:
    """The bytes of an abstract tree that each device holds."""
    shapes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return float(sum(jax.tree.leaves(shapes)))
