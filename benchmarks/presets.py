"""The models and batches that are compared, by platform."""

from dataclasses import dataclass, replace

import numpy as np

from gpt_jax.config import ModelConfig, OptimizerConfig
from gpt_jax.model.presets import GPT2, GPT2_MEDIUM

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, schedule="constant", beta2=0.99)
"""Of both sides. A rate as in a warm-up: Adam's first steps move by it even the weights whose gradient is noise."""


@dataclass(frozen=True)
class Preset:
    """A model and batch to train, and how many steps make a round of a few seconds; None: half a second of them."""

    name: str
    model: ModelConfig
    batch_size: int
    steps: int | None
    hugging_face: bool = False  # Whether Hugging Face's GPT-2, which always has biases, is a contestant.
    optimizer: OptimizerConfig = OPTIMIZER
    schedule_steps: int = 1  # Of the learning rate.

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.model.context_length

    def describe(self) -> str:
        """The preset in a line."""
        c = self.model
        return (
            f"{c.n_layer} layers, {c.n_head} heads, width {c.d_model}, context {c.context_length}, "
            f"batch {self.batch_size}, {c.n_params / 1e6:.1f} million parameters, {c.dtype}"
        )


def small(n_layer: int, n_head: int, d_model: int, context_length: int, dtype: str) -> ModelConfig:
    """One of nanoGPT's character models: 65 tokens, no biases."""
    sizes = {"n_layer": n_layer, "n_head": n_head, "d_model": d_model, "context_length": context_length}
    return ModelConfig(vocab_size=65, bias=False, dtype=dtype, **sizes)  # type: ignore[arg-type]


def presets(platform: str) -> dict[str, Preset]:
    """The presets of a platform (cpu, gpu, tpu), the most telling first: on CPU in float32, and one in bfloat16, which
    shows what it would cost; on accelerators in bfloat16."""
    if platform == "cpu":
        gpt2 = replace(GPT2, context_length=256, dtype="float32")
        chosen = [
            Preset("nano", small(4, 4, 128, 64, "float32"), 12, 60),
            Preset("baby", small(6, 6, 384, 256, "float32"), 8, 5),
            Preset("gpt2", gpt2, 2, 3, hugging_face=True),
            Preset("baby-bfloat16", small(6, 6, 384, 256, "bfloat16"), 8, 3),
            Preset("tiny", small(4, 2, 16, 8, "float32"), 2, 2000),  # There is little to its step but the call.
        ]
    else:
        gpt2 = replace(GPT2, dtype="bfloat16")
        medium = replace(GPT2_MEDIUM, dtype="bfloat16", unroll=True)
        chosen = [
            Preset("gpt2", gpt2, 12, 30, hugging_face=True),  # The batch of nanoGPT.
            Preset("gpt2-32", gpt2, 32, 10),
            Preset("baby", small(6, 6, 384, 256, "bfloat16"), 64, 100),
            Preset("nano", small(4, 4, 128, 64, "bfloat16"), 12, 300),
            Preset("gpt2-medium", medium, 8, 15),
        ]
    return {preset.name: preset for preset in chosen}


def random_tokens(preset: Preset, batch: int) -> np.ndarray:
    """The tokens of a batch, int32 (B, T + 1); the same for all contestants."""
    c = preset.model
    rng = np.random.default_rng(batch)
    return rng.integers(0, c.vocab_size, (preset.batch_size, c.context_length + 1), dtype=np.int32)
