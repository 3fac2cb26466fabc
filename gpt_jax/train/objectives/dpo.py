"""Makes chosen answers more probable against rejected ones than a reference model does: direct preference optimisation
(Rafailov et al. 2023), which needs neither a reward model nor answers of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.config import DpoConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.train.logprobs import token_logprobs
from gpt_jax.train.objectives import Objective, Sums


class Reference(NamedTuple):
    """What the objective needs besides the pairs, as `Batch.extra`."""

    logprobs: Any  # float32 (B, 2): of the chosen and the rejected answer under the reference model, in nats.


def preference_loss(config: DpoConfig, drifts_B2: jax.Array, lengths_B2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of each pair, and the margin of its implicit rewards, (B,) both.

    drifts_B2: log-probabilities of both answers, chosen first, less those under the reference. lengths_B2: their
    learnt tokens.

    With z = beta (drift of the chosen answer - drift of the rejected one), the loss is -log sigmoid(z) (equation 7 of
    Rafailov et al. 2023). Smoothed, it is (1 - s) of that and s of -log sigmoid(-z) (Mitchell 2023). sigmoid_norm takes
    drifts a token (Lambert et al. 2024), and so does ipo, whose loss is (difference of drifts - 1 / (2 beta))^2
    (equation 17 of Azar et al. 2023).
    """
    if config.loss != "sigmoid":
        drifts_B2 = drifts_B2 / jnp.maximum(lengths_B2, 1)
    difference_B = drifts_B2[:, 0] - drifts_B2[:, 1]
    z_B = config.beta * difference_B
    if config.loss == "ipo":
        return (difference_B - 1 / (2 * config.beta)) ** 2, z_B
    s = config.label_smoothing
    return (1 - s) * jax.nn.softplus(-z_B) + s * jax.nn.softplus(z_B), z_B


def make_dpo(config: DpoConfig) -> Objective:
    """The objective: the sum of the pairs' losses, and their number.

    Its batch has pairs, chosen answer first, (B, 2, T + 1), and a `Reference`. Pairs without a target count as none.
    With `sft_weight` w, w times the nats a token of each chosen answer are added (Pang et al. 2024).
    """

    def dpo(model: GPT, params: Params, batch: Batch, keys_B: jax.Array | None) -> Sums:
        logprobs_B2 = jnp.sum(token_logprobs(model, params, batch, keys_B), axis=2)
        lengths_B2 = jnp.sum(batch.mask, axis=2, dtype=jnp.float32)
        drifts_B2 = logprobs_B2 - batch.extra.logprobs
        losses_B, margins_B = preference_loss(config, drifts_B2, lengths_B2)
        if config.sft_weight:
            losses_B -= config.sft_weight * logprobs_B2[:, 0] / jnp.maximum(lengths_B2[:, 0], 1)
        is_pair_B = jnp.any(batch.mask, axis=(1, 2))
        n = jnp.sum(is_pair_B, dtype=jnp.float32)
        # A tie is half right. At the start all are ties, but for the rounding of two sums of log-probabilities.
        rounding_B = config.beta * 1e-6 * jnp.sum(jnp.abs(logprobs_B2), axis=1)
        is_right_B = jnp.where(jnp.abs(margins_B) <= rounding_B, 0.5, margins_B > 0)
        values = {
            "accuracy": is_right_B,
            "margin": margins_B,
            "chosen_logprob": logprobs_B2[:, 0],
            "rejected_logprob": logprobs_B2[:, 1],
            "chosen_drift": drifts_B2[:, 0],
            "rejected_drift": drifts_B2[:, 1],
        }
        logged = {name: (jnp.sum(jnp.where(is_pair_B, value_B, 0)), n) for name, value_B in values.items()}
        return Sums(jnp.sum(jnp.where(is_pair_B, losses_B, 0)), n, logged, largest={})

    return dpo
