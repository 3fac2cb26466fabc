"""Rotary position embeddings (Su et al. 2021), and methods to stretch them to contexts longer than the trained one."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import ModelConfig, RopeConfig


def frequencies(config: ModelConfig, sliding: bool) -> tuple[np.ndarray, float]:
    """The angle per position of each pair of dimensions, float64 (K / 2,), and a factor for queries and keys."""
    rope, K = config.rope, config.head_dim
    if sliding and rope.local_theta:
        return plain(rope.local_theta, K), 1.0
    context = rope.original_context or config.context_length
    if rope.scaling == "linear":  # Positions interpolated (Chen et al. 2023).
        return plain(rope.theta, K) / rope.factor, 1.0
    if rope.scaling == "dynamic":  # NTK-aware.
        return plain(rope.dynamic_theta(config.context_length, K), K), 1.0
    if rope.scaling == "yarn":
        return yarn(rope, K, context), rope.attention_factor or 1 + 0.1 * float(np.log(max(rope.factor, 1)))
    if rope.scaling == "llama3":
        return llama3(rope, K, context), 1.0
    return plain(rope.theta, K), 1.0


def plain(theta: float, K: int) -> np.ndarray:
    """theta ** (-2 i / K) for pair i."""
    return theta ** -(np.arange(0, K, 2) / K)


def yarn(rope: RopeConfig, K: int, context: int) -> np.ndarray:
    """Stretches low frequencies, keeps high ones, blends linearly by dimension (Peng et al. 2024, section 3.2)."""

    def dimension(turns: float) -> float:
        """The index of the pair, as a real number, that makes so many turns in the original context."""
        return K * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(rope.theta))

    low, high = max(np.floor(dimension(rope.beta_fast)), 0), min(np.ceil(dimension(rope.beta_slow)), K - 1)
    stretched = np.clip((np.arange(K // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain(rope.theta, K) * (1 - stretched + stretched / rope.factor)


def llama3(rope: RopeConfig, K: int, context: int) -> np.ndarray:
    """Stretches long wavelengths, keeps short ones, and blends linearly by turns (Llama 3.1's released code)."""
    frequency = plain(rope.theta, K)
    turns = context * frequency / (2 * np.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return frequency * (kept + (1 - kept) / rope.factor)


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, config: ModelConfig, sliding: bool) -> jax.Array:
    """Rotates the pairs (i, i + K / 2) of each head by position * frequency: float32 angles, result in x's dtype."""
    frequency, factor = frequencies(config, sliding)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequency.astype(np.float32)
    cos, sin = (jnp.cos(angles) * factor).astype(x_BTHK.dtype), (jnp.sin(angles) * factor).astype(x_BTHK.dtype)
    first, second = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
