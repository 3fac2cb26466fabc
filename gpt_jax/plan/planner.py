"""Variants of a configuration on a slice of devices, what each needs, and which one to recommend."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax

from gpt_jax.config import Config, RematName
from gpt_jax.errors import UserError
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import Placement, choose_placement
from gpt_jax.plan import estimate
from gpt_jax.plan.estimate import Bounds, Sizes
from gpt_jax.plan.program import Program, compile_step
from gpt_jax.plan.targets import Target
from gpt_jax.runtime import local_devices

POLICIES: tuple[RematName, ...] = ("none", "dots", "full")


@dataclass(frozen=True)
class Plan:
    """A configuration on a target: its memory, its collectives, and the bounds of its time."""

    config: Config
    sizes: Sizes
    program: Program
    bounds: Bounds
    compiled: bool

    @property
    def total(self) -> float:
        """Bytes on one device."""
        return self.sizes.state + self.program.temporaries


class Planner:
    """Plans configurations for one target: by its compiler if there is one, else by formula."""

    def __init__(self, config: Config, target: Target, compiles: bool) -> None:
        self.target, self.compiles = target, compiles
        devices = target.devices() if compiles else stand_ins(target)
        self.placement: Placement = choose_placement(config.parallel, config.model, devices)
        self.model_config = resolve(config.model, target.hardware, self.placement.context)

    def model(self, config: Config) -> GPT:
        """The model, its attention and types resolved for the target."""
        return GPT(dataclasses.replace(self.model_config, remat=config.model.remat))

    def by_formula(self, config: Config) -> Plan:
        """The plan by formula."""
        model = self.model(config)
        sizes = estimate.sizes_of(model, config, self.placement)
        temporaries = estimate.temporaries(model.config, sizes)
        lacking = sizes.state + temporaries - self.target.usable_memory
        moved = estimate.traffic(model.config, sizes, self.target.n_devices)
        program = Program(temporaries, max(0.0, lacking), moved)
        return Plan(config, sizes, program, self.bounds(config, sizes, program), compiled=False)

    def by_compiler(self, config: Config) -> Plan:
        """The plan by the target's compiler."""
        model = self.model(config)
        sizes = estimate.sizes_of(model, config, self.placement)
        program = compile_step(model, config, self.placement, sizes.state)
        if not program.traffic:  # There is no program, or nothing in its text is understood.
            moved = estimate.traffic(model.config, sizes, self.target.n_devices)
            program = dataclasses.replace(program, traffic=moved, counted=False)
        return Plan(config, sizes, program, self.bounds(config, sizes, program), compiled=True)

    def bounds(self, config: Config, sizes: Sizes, program: Program) -> Bounds:
        """The roofline of a step."""
        return estimate.bounds(config, self.model(config).config, sizes, self.target, program.traffic)

    def plan(self, config: Config) -> Plan:
        """The plan by the compiler if there is one, else by formula."""
        return self.by_compiler(config) if self.compiles else self.by_formula(config)

    def variants(self, config: Config) -> list[Plan]:
        """Plans by formula of the same training with each microbatch size and rematerialisation policy, fastest first.
        Those within a percent of each other are in the order of less recomputation, then of larger microbatches."""
        share = config.data.batch_size // self.placement.n_shares
        plans = [
            self.by_formula(
                dataclasses.replace(
                    config,
                    data=dataclasses.replace(config.data, microbatch_size=microbatch),
                    model=dataclasses.replace(config.model, remat=policy),
                )
            )
            for policy in POLICIES
            for microbatch in range(1, share + 1)
            if share % microbatch == 0
        ]
        least = min(plan.bounds.seconds for plan in plans)

        def order(plan: Plan) -> tuple[int, int, int]:
            steps = round(math.log(plan.bounds.seconds / least) / math.log(1.01))
            return steps, POLICIES.index(plan.config.model.remat), -plan.sizes.sequences

        return sorted(plans, key=order)

    def recommend(self, first: Plan, tries: int, say: Callable[[str], object]) -> Plan | None:
        """The fastest plan that fits, of `first` and at most `tries` compiled variants; None when none fits.

        When the compiler finds that more memory is needed than the formulas say, later estimates are scaled up.
        """
        correction = 1.0
        for guess in self.variants(first.config):
            worth_it = guess.bounds.seconds < 0.99 * first.bounds.seconds
            if not first.program.lacking and not worth_it:
                return first
            if guess.sizes.state + guess.program.temporaries * correction > self.target.usable_memory:
                continue
            if flags(guess.config) == flags(first.config):
                continue  # `first` does not fit, or it would have been returned.
            if self.compiles and tries == 0:
                break
            if self.compiles:
                say(f"trying {flags(guess.config)}")
            plan, tries = self.plan(guess.config), tries - 1
            if not plan.program.lacking:
                return plan
            correction = max(correction, plan.program.temporaries / guess.program.temporaries)
        return None if first.program.lacking else first


def stand_ins(target: Target) -> list[jax.Device]:
    """Devices of this machine in place of the target's, for shapes only. Raises UserError when there are too few: the
    number of CPU devices is set before JAX starts."""
    devices = local_devices()
    if len(devices) < target.n_devices:
        raise UserError(f"{target.name} has {target.n_devices} devices, and this process only {len(devices)}")
    return devices[: target.n_devices]


def can_compile(target: Target) -> bool:
    """True when this machine has a compiler for the target."""
    return target.is_tpu and importlib.util.find_spec("libtpu") is not None


def flags(config: Config) -> str:
    """The flags of the fields that `recommend` varies."""
    return f"--data.microbatch-size {config.data.microbatch_size} --model.remat {config.model.remat}"
