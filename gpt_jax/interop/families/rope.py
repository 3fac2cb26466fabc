"""Rotary positions in a config.json: the form of transformers 5 (rope_parameters) and the older one (rope_scaling).

If a config.json has both, the older one counts, as in transformers 5; where the two differ, `agreement.py` says so.
"""

import math
from typing import Any

from gpt_jax.config import ModelConfig, RopeConfig, check
from gpt_jax.errors import UserError

TYPES = {"default": "none", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}
NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ORIGINAL = "original_max_position_embeddings"
REQUIRED = {"linear": ("factor",), "dynamic": ("factor",), "llama3": NUMBERS["llama3"]}  # As in transformers.
ONLY = {"partial_rotary_factor": 1.0, "truncate": True}


def rotary_settings(given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of all layers, and those of sliding layers, where a config.json has them apart."""
    rope = given or {}
    if "full_attention" in rope:  # transformers 5, for models with two kinds of layers.
        return rope["full_attention"] or {}, rope.get("sliding_attention") or {}
    return rope, {}


def first_of(*values: Any) -> Any:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def kind_of(rope: dict[str, Any]) -> str:
    """The type of rotary positions, as transformers names it."""
    return rope.get("rope_type") or rope.get("type") or "default"


def read_rope(settings: dict[str, Any], context: int, default_theta: float, default_local_theta: float) -> RopeConfig:
    """Our rotary settings of a model with this context. default_local_theta: 0 if sliding layers rotate as the others.

    Raises UserError for a scaling that is not known.
    """
    rope, local = rotary_settings(settings.get("rope_scaling") or settings.get("rope_parameters"))
    kind = kind_of(rope)
    if not isinstance(kind, str) or kind not in TYPES:
        raise UserError(f"rotary positions of type {kind!r} are not supported; there are {', '.join(TYPES)}")
    for name, allowed in ONLY.items():
        value = rope.get(name, settings.get(name))
        if value not in (allowed, None):
            raise UserError(f"{name} = {value!r} is not supported for rotary positions; only {allowed!r} is")
    if local.get("rope_type", "default") != "default":
        raise UserError("rotary positions of sliding layers that are scaled are not supported")
    numbers = {name: float(rope[name]) for name in NUMBERS.get(kind, ()) if rope.get(name) is not None}
    if lacking := [name for name in REQUIRED.get(kind, ()) if name not in numbers]:
        raise UserError(f"rotary positions of type {kind!r} need {', '.join(lacking)}")
    original = 0
    if kind in ("yarn", "llama3"):
        original = first_of(rope.get(ORIGINAL), settings.get(ORIGINAL), context)
        check(original >= 1, ORIGINAL, original, "1 or more")
    elif kind == "dynamic":
        original = context
    if kind == "yarn" and "factor" not in numbers:
        numbers["factor"] = context / original
    scales = [float(rope.get(name) or 0) for name in ("mscale", "mscale_all_dim")]
    if kind == "yarn" and "attention_factor" not in numbers and all(scales):
        numerator, denominator = (1 + 0.1 * scale * math.log(max(numbers["factor"], 1)) for scale in scales)
        numbers["attention_factor"] = numerator / denominator
    local_theta = first_of(local.get("rope_theta"), settings.get("rope_local_base_freq"), default_local_theta)
    return RopeConfig(
        theta=float(first_of(rope.get("rope_theta"), settings.get("rope_theta"), default_theta)),
        local_theta=float(local_theta) if default_local_theta else 0.0,
        scaling=TYPES[kind],  # type: ignore[arg-type]
        original_context=original,
        **numbers,
    )


def write_rope(config: ModelConfig, has_local_theta: bool) -> dict[str, Any]:
    """The settings that `read_rope` reads, in both forms, of a model whose defaults are spelled out.

    Dynamic scaling is spelled out as a larger theta: in transformers, it would begin only at the longer context.
    """
    rope = config.rope
    kind = next(theirs for theirs, ours in TYPES.items() if ours == rope.scaling)
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {name: getattr(rope, name) for name in NUMBERS.get(kind, ()) if getattr(rope, name)}
    if kind in ("yarn", "llama3"):
        scaling[ORIGINAL] = rope.original_context
    full = scaling | {"rope_theta": rope.theta}
    theirs: dict[str, Any] = {"rope_theta": rope.theta, "rope_parameters": full}
    if kind != "default":
        theirs["rope_scaling"] = scaling
    if has_local_theta:
        local_theta = rope.local_theta or rope.theta
        theirs["rope_local_base_freq"] = local_theta
        local = {"rope_type": "default", "rope_theta": local_theta}
        theirs["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    return theirs
