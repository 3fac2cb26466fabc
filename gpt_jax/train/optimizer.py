"""AdamW with a learning rate schedule, clipping by global norm, and decay on matrices and embeddings only."""

from typing import Any

import jax
import optax

from gpt_jax.config import OptimizerConfig

DECAYED = ("kernel", "lora_a", "lora_b", "tokens_VD", "positions_TD", "head_VD")
"""Names of the parameters with weight decay. The number of dimensions does not tell them apart, since stacking the
layers makes the biases and norm scales of all layers look like matrices."""


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at each step: linear warmup from 0, then the configured shape down to `final_fraction` of the peak.

    Step s, counted from 0, has the rate of s + 1, so that the first step moves the parameters and the last one has the
    final rate. Shapes: cosine (Loshchilov and Hutter 2017), linear, wsd (Hu et al. 2024), constant.
    """
    peak, final, warmup = config.learning_rate, config.learning_rate * config.final_fraction, config.warmup_of(steps)
    after_warmup = max(1, steps - warmup)
    if config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(peak, after_warmup, config.final_fraction)
    elif config.schedule == "linear":
        shape = optax.linear_schedule(peak, final, after_warmup)
    elif config.schedule == "wsd":
        decay = max(1, min(after_warmup, round(config.decay_fraction * steps)))
        shape = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [after_warmup - decay]
        )
    else:
        shape = optax.constant_schedule(peak)
    schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), shape], [warmup]) if warmup else shape
    return lambda step: schedule(step + 1)


def is_decayed(params: Any) -> Any:
    """A tree like `params` that is True for each parameter with weight decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (Pascanu et al. 2013), then AdamW (Loshchilov and Hutter 2019)."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=is_decayed,
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw)
