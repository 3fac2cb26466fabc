"""The model: its architecture, and how it runs."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt_jax.config.check import check, check_types

AttentionName = Literal["auto", "cudnn", "splash", "block_causal", "xla"]
DTypeName = Literal["auto", "float32", "bfloat16"]
StoredDType = Literal["float32", "float16", "bfloat16"]
CacheDTypeName = Literal["auto", "int8"]
QuantizeName = Literal["none", "int8"]
"""What matrices are rounded to for sampling and evaluation; see run/quantized.py."""

RematName = Literal["none", "full", "dots", "dots_no_batch"]
PositionsName = Literal["learned", "rotary"]
NormName = Literal["layer", "rms"]
ActivationName = Literal["gelu_tanh", "gelu", "silu", "relu"]
RopeScalingName = Literal["none", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021), and how they are stretched beyond the context of the training."""

    theta: float = 10_000.0  # Base of the wavelengths.
    local_theta: float = 0.0  # Base in sliding-window layers, which are not stretched then; 0: as in all layers.
    scaling: RopeScalingName = "none"  # How wavelengths are stretched; dynamic is NTK-aware scaling of the base.
    factor: float = 1.0  # Ratio of the longer context to the original one.
    original_context: int = 0  # Context before stretching, in tokens; 0: context_length.
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original_context / this are stretched fully.
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original_context / this are not stretched.
    beta_fast: float = 32.0  # yarn: pairs with at least this many turns in the original context are not stretched.
    beta_slow: float = 1.0  # yarn: pairs with at most this many turns in the original context are stretched fully.
    attention_factor: float = 0.0  # yarn: multiplies queries and keys; 0: 0.1 ln(factor) + 1.

    def __post_init__(self) -> None:
        check_types(self, "model.rope")
        # Frequencies are float64 and at last float32: the largest numbers leave room for their products.
        check(1 < self.theta < 1e30, "model.rope.theta", self.theta, "more than 1 and less than 1e30")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            number = getattr(self, name)
            check(2**-31 < number < 2**31, f"model.rope.{name}", number, "more than 2**-31 and less than 2**31")
        for name in ("local_theta", "original_context", "attention_factor"):
            number, most = getattr(self, name), {"local_theta": 1e30}.get(name, 2**31)
            check(0 <= number < most, f"model.rope.{name}", number, f"0 or more, and less than {most:.0f}")
        check(
            self.scaling != "llama3" or self.high_freq_factor > self.low_freq_factor,
            "model.rope.high_freq_factor",
            self.high_freq_factor,
            f"more than model.rope.low_freq_factor = {self.low_freq_factor}",
        )

    def dynamic_theta(self, context_length: int, head_dim: int) -> float:
        """Theta raised by dynamic scaling (bloc97 2023) as for texts that fill the context, for texts of any length."""
        ratio = context_length / (self.original_context or context_length)
        return self.theta * max(1.0, self.factor * ratio - (self.factor - 1)) ** (head_dim / (head_dim - 2))

    def spelled_out(self, context_length: int, head_dim: int, sliding: bool) -> "RopeConfig":
        """The same rotation for a model with this context: defaults are spelled out, and unused fields are reset.

        sliding: whether the model has sliding-window layers. With a scaling, their theta may stay 0: no plain theta
        rotates as they do then, since the scaling holds for them, too.
        """
        if self.scaling == "dynamic":
            theta = self.dynamic_theta(context_length, head_dim)
            return RopeConfig(theta, self.local_theta).spelled_out(context_length, head_dim, sliding)
        used = {
            "linear": ("factor",),
            "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "attention_factor"),
            "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
        }.get(self.scaling, ())
        values = {name: getattr(self, name) for name in ("theta", "scaling", *used)}
        if "original_context" in used and not self.original_context:
            values["original_context"] = context_length
        default = self.theta if self.scaling == "none" else 0.0
        return RopeConfig(**values, local_theta=self.local_theta or default if sliding else 0.0)


# Fields of ModelConfig that change how the model is run, trained and stored, but not the function that it computes.
HOW_IT_RUNS = (
    "vocab_multiple",
    "dropout",
    "lora",
    "dtype",
    "attention",
    "cache_dtype",
    "unroll",
    "remat",
    "loss_chunk",
)

LORA_TARGETS = ("qkv", "out", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2022): the original matrices are frozen, and each target gets a trainable product of
    two thin matrices beside it."""

    rank: int = 0  # Inner width of the adapters; 0: no adapters, all parameters are trained.
    alpha: float = 16.0  # The adapters' product is multiplied by alpha / rank.
    # Matrices with adapters: any of qkv, out (attention), gate, up, down (feed-forward).
    targets: tuple[str, ...] = LORA_TARGETS
    dropout: float = 0.0  # Probability of dropping an input of the adapters.

    def __post_init__(self) -> None:
        check_types(self, "model.lora")
        check(self.rank >= 0, "model.lora.rank", self.rank, "0 (no adapters) or more")
        check(self.alpha > 0, "model.lora.alpha", self.alpha, "more than 0")
        known = bool(self.targets) and set(self.targets) <= set(LORA_TARGETS)
        check(known, "model.lora.targets", self.targets, "some of " + ", ".join(LORA_TARGETS))
        check(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "at least 0 and less than 1")


@dataclass(frozen=True)
class ModelConfig:
    """The GPT: GPT-2's architecture by default, the Llama family's with other values of the same fields."""

    vocab_size: int = 0  # Number of token ids; 0: as many as the tokenizer has.
    vocab_multiple: int = 1  # Embedding rows are padded to a multiple of this, for speed; padding is never predicted.
    context_length: int = 1024  # Longest sequence, in tokens.
    n_layer: int = 12  # Transformer blocks.
    n_head: int = 12  # Attention heads.
    n_kv_head: int = 0  # Key/value heads, each shared by a group of attention heads; 0: as many as attention heads.
    d_model: int = 768  # Width of the residual stream.
    d_head: int = 0  # Width of one attention head; 0: d_model / n_head.
    d_ff: int = 0  # Width of the feed-forward layer; 0: four times d_model.
    positions: PositionsName = "learned"  # Position embeddings, or rotation of queries and keys.
    rope: RopeConfig = field(default_factory=RopeConfig)
    window: int = 0  # Tokens that a sliding-window layer sees, the current one included; 0: all layers see all.
    window_pattern: str = "s"  # Sliding-window layers (s) and full ones (f), repeated over all layers.
    norm: NormName = "layer"  # Layer norm, or RMS norm, which subtracts no mean and has no bias.
    norm_eps: float = 1e-5  # Added to the variance in norms.
    post_norm: bool = False  # Also normalise the outputs of attention and feed-forward layer, as Gemma does.
    qk_norm: bool = False  # RMS norm of each query and key head.
    query_scale: float = 0.0  # Queries are multiplied by this; 0: 1 / sqrt(width of a head).
    activation: ActivationName = "gelu_tanh"  # Feed-forward activation; gelu_tanh is GPT-2's approximation.
    gated: bool = False  # Multiply the activation by a second projection: SwiGLU with silu, GeGLU with gelu.
    bias: bool = True  # Biases in linear layers and layer norms, as GPT-2 has them.
    biases: tuple[str, ...] = ()  # Linear layers with biases although bias is off: any of qkv, out, mlp.
    tied_head: bool = True  # Compute logits with the token embeddings instead of a separate matrix.
    scale_embeddings: bool = False  # Multiply token embeddings by sqrt(d_model), as Gemma does.
    dropout: float = 0.0  # Probability of dropping an embedding, an attention weight or a block's output.
    lora: LoraConfig = field(default_factory=LoraConfig)
    dtype: DTypeName = "auto"  # Compute type; auto: bfloat16 on devices that have it. Parameters are float32.
    attention: AttentionName = "auto"  # Attention backend; auto: cudnn on GPU, splash on TPU, block_causal on CPU.
    cache_dtype: CacheDTypeName = "auto"  # Keys and values of sampling; auto: dtype; int8: rounded, with scales.
    unroll: bool = True  # Unroll the layers (faster steps) or scan over them (compile time independent of depth).
    remat: RematName = "none"  # Recomputed in the backward pass: nothing, whole blocks, or all but matrix products.
    loss_chunk: int = 8192  # Tokens whose logits are in memory at one time during training.

    def __post_init__(self) -> None:
        check_types(self, "model")
        for name in ("vocab_multiple", "context_length", "n_layer", "n_head", "d_model", "loss_chunk"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "1 or more")
        defaults = {
            "vocab_size": "the tokenizer's",
            "n_kv_head": "n_head",
            "d_head": "d_model / n_head",
            "d_ff": "four times d_model",
            "window": "none",
        }
        for name, default in defaults.items():
            check(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), f"0 ({default}) or more")
        for name in ("context_length", "n_layer", "n_head", "d_model", *defaults):  # Ids and positions are int32.
            check(getattr(self, name) < 2**31, f"model.{name}", getattr(self, name), "less than 2**31")
        allowed = "0 (1 / sqrt(d_head)) or more, and less than 1e30"
        check(0 <= self.query_scale < 1e30, "model.query_scale", self.query_scale, allowed)
        check(
            self.d_head > 0 or self.d_model % self.n_head == 0,
            "model.n_head",
            self.n_head,
            f"a divisor of model.d_model = {self.d_model}, where model.d_head is not set",
        )
        check(
            self.n_head % self.kv_heads == 0,
            "model.n_kv_head",
            self.n_kv_head,
            f"a divisor of model.n_head = {self.n_head}",
        )
        rotary = self.positions == "rotary"
        check(not rotary or self.head_dim % 2 == 0, "model.d_head", self.head_dim, "even, with rotary positions")
        dynamic = rotary and self.rope.scaling == "dynamic"
        check(not dynamic or self.head_dim > 2, "model.d_head", self.head_dim, "more than 2, with dynamic scaling")
        pattern_is_known = self.window_pattern != "" and set(self.window_pattern) <= {"s", "f"}
        check(pattern_is_known, "model.window_pattern", self.window_pattern, "of the letters s and f, such as sssssf")
        check(set(self.biases) <= {"qkv", "out", "mlp"}, "model.biases", self.biases, "some of qkv, out, mlp")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0 and less than 1")
        check(0 < self.norm_eps < 1e30, "model.norm_eps", self.norm_eps, "more than 0 and less than 1e30")

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.d_head or self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, G."""
        return self.n_kv_head or self.n_head

    @property
    def ff_dim(self) -> int:
        """Width of the feed-forward layer, F."""
        return self.d_ff or 4 * self.d_model

    @property
    def embedding_rows(self) -> int:
        """Number of token embeddings, V: the vocabulary and its padding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def sliding(self) -> tuple[bool, ...]:
        """For each layer, True if it sees a sliding window only."""
        pattern = self.window_pattern if self.window else "f"
        return tuple(pattern[i % len(pattern)] == "s" for i in range(self.n_layer))

    @property
    def drops(self) -> bool:
        """True when training uses dropout, and so needs random keys."""
        return self.dropout > 0 or (self.lora.rank > 0 and self.lora.dropout > 0)

    def has_bias(self, layer: str) -> bool:
        """True when linear layer `layer` (qkv, out or mlp) has a bias."""
        return self.bias or layer in self.biases

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied head is counted once, adapters are not."""
        d, f, h, g, k = self.d_model, self.ff_dim, self.n_head, self.kv_heads, self.head_dim
        norm = d * (2 if self.bias and self.norm == "layer" else 1)
        qkv_width = (h + 2 * g) * k
        attention = d * qkv_width + h * k * d + self.has_bias("qkv") * qkv_width + self.has_bias("out") * d
        up = 2 if self.gated else 1
        feed_forward = (up + 1) * d * f + self.has_bias("mlp") * (up * f + d)
        block = attention + feed_forward + (4 if self.post_norm else 2) * norm + self.qk_norm * 2 * k
        embeddings = self.embedding_rows * (1 if self.tied_head else 2) + self.n_positions
        return embeddings * d + self.n_layer * block + norm

    @property
    def n_positions(self) -> int:
        """Number of learned position embeddings."""
        return self.context_length if self.positions == "learned" else 0

    def deciding(self) -> dict[str, Any]:
        """The fields that decide which parameters a checkpoint of the model has, and their meaning."""
        lora = dataclasses.replace(self.lora, dropout=0.0)
        stored: dict[str, Any] = {"vocab_multiple": self.vocab_multiple, "lora": lora}
        return dataclasses.asdict(dataclasses.replace(self.architecture(), **stored))

    def architecture(self) -> "ModelConfig":
        """The fields that decide the function that the model computes, every default spelled out; those in HOW_IT_RUNS
        are reset. Models with equal architectures can take each other's parameters."""
        biases = () if self.bias else ("qkv", "out", "mlp")
        sliding = any(self.sliding)
        spelled_out: dict[str, Any] = {
            "n_kv_head": self.kv_heads,
            "d_head": self.head_dim,
            "d_ff": self.ff_dim,
            "query_scale": self.query_scale or float(self.head_dim) ** -0.5,
            "biases": tuple(name for name in biases if name in self.biases),
            "rope": self.rope.spelled_out(self.context_length, self.head_dim, sliding)
            if self.positions == "rotary"
            else RopeConfig(),
            "window": self.window if sliding else 0,
            "window_pattern": "".join("s" if s else "f" for s in self.sliding) if sliding else "s",
        }
        default = ModelConfig()
        return dataclasses.replace(self, **spelled_out | {name: getattr(default, name) for name in HOW_IT_RUNS})
