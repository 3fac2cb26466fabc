"""Makes those answers more probable that were rewarded more than others to the same problem: group relative policy
optimisation (Shao et al. 2024), and what became of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import GrpoConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.loss import Adjust
from gpt_jax.sample.filters import apply, row_filters
from gpt_jax.sample.settings import Filters
from gpt_jax.train.logprobs import token_logprobs
from gpt_jax.train.objectives import Objective, Sums

NO_SPREAD = 1e-6
"""Rewards of a group that differ by no more than this say nothing about its answers."""


class Rewarded(NamedTuple):
    """What the objective needs besides the answers, as `Batch.extra`: of G answers to each of B problems."""

    advantages: Any  # float32 (B, G).
    counts: Any  # bool (B, G): False for answers that are left out.
    drawn: Any  # float32 (B, G, T): log-probabilities of the tokens as they were drawn, in nats.
    old: Any = None  # float32 (B, G, T): those under the parameters that drew them; None: under the present ones.
    reference: Any = None  # float32 (B, G, T): those under the reference model; None: it is not needed.


def advantages(rewards_PG: np.ndarray, config: GrpoConfig) -> tuple[np.ndarray, np.ndarray]:
    """The advantages of G answers to each of P problems, float32 (P, G), and which groups have a spread, bool (P,).

    Each is the reward less the mean of its group, divided by the standard deviation of the group (Shao et al. 2024), of
    the batch, or by nothing (Liu et al. 2025): as in TRL, that of a sample (n - 1), plus 1e-4.
    """
    rewards_PG = rewards_PG.astype(np.float64)
    deviations_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if config.scale == "group":
        deviations_PG = deviations_PG / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    elif config.scale == "batch":
        deviations_PG = deviations_PG / (rewards_PG.std(ddof=1) + 1e-4)
    return deviations_PG.astype(np.float32), np.ptp(rewards_PG, axis=1) > NO_SPREAD


def policy_loss(config: GrpoConfig, logprobs_NT: jax.Array, mask_NT: jax.Array, rewarded: Rewarded) -> Sums:
    """The loss of N answers: its numerator, denominator, and what is logged, of those that count.

    mask_NT: the tokens that were drawn. rewarded: with the axis N in place of B and G.

    With the ratio r = p / p_old of a token, or with gspo the geometric mean of an answer's ratios, and its advantage A,
    a token adds -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) and, if kl_beta is not 0, kl_beta times an estimate
    of log p - log p_reference (Schulman 2020): k1 the difference d itself, k2 d^2 / 2, k3 exp(-d) + d - 1. Tokens are
    summed and divided as `GrpoConfig.loss` says.
    """
    mask_NT = mask_NT & rewarded.counts[:, None]
    lengths_N = jnp.sum(mask_NT, axis=1, dtype=jnp.float32)
    old_NT = jax.lax.stop_gradient(logprobs_NT) if rewarded.old is None else rewarded.old
    log_ratios_NT = jnp.where(mask_NT, logprobs_NT - old_NT, 0)
    if config.loss == "gspo":
        log_ratios_NT = (jnp.sum(log_ratios_NT, axis=1) / jnp.maximum(lengths_N, 1))[:, None] * mask_NT
    ratios_NT, A_N1 = jnp.exp(log_ratios_NT), rewarded.advantages[:, None]
    clipped_NT = jnp.clip(ratios_NT, 1 - config.clip_low, 1 + config.clip_high)
    losses_NT = -jnp.minimum(ratios_NT * A_N1, clipped_NT * A_N1)
    n_tokens, zero = jnp.sum(lengths_N), jnp.zeros(())
    total = lambda x_NT: jnp.sum(jnp.where(mask_NT, x_NT, 0))  # noqa: E731
    logged = {
        "clipped": (total(ratios_NT * A_N1 > clipped_NT * A_N1), n_tokens),
        "entropy": (-total(old_NT), n_tokens),  # Estimated from the tokens that were drawn.
    }
    if rewarded.reference is not None:
        difference_NT = jnp.where(mask_NT, logprobs_NT - rewarded.reference, 0)
        estimates = {
            "k1": difference_NT,
            "k2": difference_NT**2 / 2,
            "k3": jnp.exp(-difference_NT) + difference_NT - 1,
        }
        losses_NT += config.kl_beta * estimates[config.kl_estimator]
        logged["kl"] = total(estimates["k3"]), n_tokens
    losses_NT = jnp.where(mask_NT, losses_NT, 0)
    n_answers = jnp.sum(lengths_N > 0, dtype=jnp.float32)
    if config.loss == "dapo":
        loss, count = jnp.sum(losses_NT), n_tokens
    elif config.loss == "dr_grpo":
        loss, count = jnp.sum(losses_NT), n_answers * config.max_new_tokens
    else:
        loss, count = jnp.sum(jnp.sum(losses_NT, axis=1) / jnp.maximum(lengths_N, 1)), n_answers
    largest = jnp.max(jnp.where(mask_NT, jnp.abs(old_NT - rewarded.drawn), 0), initial=zero)
    return Sums(loss, count, logged, {"sampler_difference": jax.lax.stop_gradient(largest)})


def as_drawn(config: GrpoConfig) -> Adjust | None:
    """What makes logits those of the distribution that answers are drawn from: temperature and filters. None for none.

    A filter keeps what it keeps of the present logits, and the token that was drawn.
    """
    if (config.temperature, config.top_p, config.top_k) == (1, 1, 0):
        return None
    if (config.top_p, config.top_k) == (1, 0):
        return lambda logits_NV, targets_N: logits_NV / config.temperature
    row = row_filters(filters(config))

    def adjust(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(logits_NV), *x.shape)), row)
        is_kept_NV = apply(rows, jax.lax.stop_gradient(logits_NV)) > -jnp.inf
        is_kept_NV |= jnp.arange(logits_NV.shape[1]) == targets_N[:, None]
        return jnp.where(is_kept_NV, logits_NV / config.temperature, -jnp.inf)

    return adjust


def filters(config: GrpoConfig) -> Filters:
    """How answers are drawn."""
    return Filters(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)


def make_grpo(config: GrpoConfig, n_tokens: int) -> Objective:
    """The objective of batches with G answers to each problem, (B, G, T + 1), whose mask has the tokens that were
    drawn, and a `Rewarded`. n_tokens: the size of the tokenizer's vocabulary, from which they were drawn."""
    adjust = as_drawn(config)

    def grpo(model: GPT, params: Params, batch: Batch, keys_B: jax.Array | None) -> Sums:
        logprobs = token_logprobs(model, params, batch, keys_B, n_tokens, adjust)
        B, G, T = logprobs.shape
        rewarded = jax.tree.map(lambda x: x.reshape(B * G, *x.shape[2:]), batch.extra)
        return policy_loss(config, logprobs.reshape(B * G, T), batch.mask.reshape(B * G, T), rewarded)

    return grpo
