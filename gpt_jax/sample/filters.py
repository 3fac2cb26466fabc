"""What happens to logits before a token is drawn from them: pure functions of logits (B, V), in float32.

Each sets the logits of the tokens that it excludes to -inf, and leaves one token at least.
"""

import jax
import jax.numpy as jnp


def penalise_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Divides positive logits of tokens that were seen by `penalty`, multiplies negative ones (Keskar et al. 2019)."""
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Keeps the k most probable tokens (Fan et al. 2018), and those that tie with the last of them."""
    kth_B = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1]
    return jnp.where(logits_BV < kth_B[:, None], -jnp.inf, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest tokens, most probable first, whose probabilities add up to p or more (Holtzman et al. 2020)."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV  # Of all the more probable tokens.
    least_B = jnp.min(jnp.where(before_BV < p, sorted_BV, jnp.inf), axis=-1)
    return jnp.where(logits_BV < least_B[:, None], -jnp.inf, logits_BV)


def keep_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keeps the tokens that are at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    threshold_B = jnp.max(logits_BV, axis=-1) + jnp.log(p)
    return jnp.where(logits_BV < threshold_B[:, None], -jnp.inf, logits_BV)
