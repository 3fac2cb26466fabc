"""A plan as text: what it needs, and how that is known."""

from gpt_jax.model.backend import resolved_to
from gpt_jax.model.flops import FLOPS_FORMULA, flops_per_token
from gpt_jax.plan.planner import Plan, Planner
from gpt_jax.plan.targets import GB


def gib(n_bytes: float) -> str:
    """Bytes as text."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"


def describe(plan: Plan, planner: Planner) -> dict[str, str]:
    """A plan as a table of names and texts."""
    target, sizes, program, bounds = planner.target, plan.sizes, plan.program, plan.bounds
    model = planner.model(plan.config).config
    tokens = plan.config.data.batch_size * model.context_length
    limit = plan.total - program.lacking if program.lacking and plan.compiled else target.usable_memory
    verdict = "fits" if not program.lacking else f"does NOT fit: {gib(program.lacking)} a device are lacking"
    moved = [f"{t.count:,.0f} {kind} ({t.bytes / GB:,.2f} GB)" for kind, t in program.traffic.items()]
    moved_how = ", ".join(moved) or "none"
    if plan.compiled and program.text and program.traffic and not program.counted:
        moved_how += ", by formula: in the compiler's text none was found"
    if program.unknown:
        moved_how += "; not counted, since it is not understood: "
        moved_how += ", ".join(f"{n:,} {name}" for name, n in program.unknown.most_common())
    return {
        "target": f"{target.name}: {target.n_devices} x {target.chip.kind}, by {planner.placement}",
        "model": f"{model.n_params / 1e6:,.1f} M parameters, "
        f"{resolved_to(model, target.hardware, planner.placement.context)}, layers "
        f"{'unrolled' if model.unroll else 'scanned'}, rematerialised: {model.remat}",
        "a step": f"{plan.config.data.batch_size:,} sequences of {model.context_length:,} = {tokens:,} tokens; a "
        f"device computes {sizes.n_micro} x {sizes.sequences}{planner.placement.part_of_each}",
        "parameters": f"{gib(sizes.params)} a device"
        + (f", and {gib(sizes.frozen)} that are not trained" if sizes.frozen else ""),
        "optimizer": f"{gib(sizes.optimizer)} a device",
        "activations and temporaries": f"{gib(program.temporaries)} a device",
        "memory": f"{gib(plan.total)} of {gib(limit)} that can be used: {verdict}",
        "collectives a step": moved_how,
        "FLOPs a step": f"{tokens * flops_per_token(model):.3g}; {FLOPS_FORMULA}",
        "intensity": f"{bounds.intensity:,.0f} FLOPs a byte of memory (the device's own: "
        f"{target.chip.peak / target.chip.memory_bandwidth:,.0f})",
        "at least": f"{bounds.seconds * 1e3:,.1f} ms a step (compute {bounds.compute * 1e3:,.1f}, memory "
        f"{bounds.memory * 1e3:,.1f}, network {bounds.network * 1e3:,.1f}), {tokens / bounds.seconds:,.0f} tokens/s",
        "bound by": bounds.name,
        "how it is known": "compiled for the target by libtpu; traffic of memory and times by formula"
        if plan.compiled
        else f"by formula{', since libtpu is not installed (pip install gpt-jax[tpu])' if target.is_tpu else ''}",
    }
