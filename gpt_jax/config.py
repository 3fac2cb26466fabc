"""The configuration: frozen dataclasses, built by a file in `configs/`, changed by flags, saved with the run.

Every field is checked when the object is built, so a `Config` that exists is one that can run, as far as can be told
without looking at the data or the devices. Nothing here imports JAX: the runtime is set up from the configuration.
"""

import dataclasses
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gpt_jax.errors import UserError

AttentionName = Literal["auto", "cudnn", "splash", "block_causal", "xla"]
DTypeName = Literal["auto", "float32", "bfloat16"]
StoredDType = Literal["float32", "float16", "bfloat16"]
RematName = Literal["none", "full", "dots", "dots_no_batch"]
PositionsName = Literal["learned", "rotary"]
NormName = Literal["layer", "rms"]
ActivationName = Literal["gelu_tanh", "gelu", "silu", "relu"]
RopeScalingName = Literal["none", "linear", "dynamic", "yarn", "llama3"]
ScheduleName = Literal["cosine", "linear", "wsd", "constant"]
TokenizerType = Literal["bpe", "unigram", "char"]


def check(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises UserError naming the field, its value and what is allowed, unless `holds`."""
    if not holds:
        raise UserError(f"{name} = {value!r} is not possible: it must be {allowed}")


def check_types(section: object, prefix: str) -> None:
    """Raises UserError unless every field is of its type, or one of its fixed values. An int may stand for a float."""
    for name, annotation in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if get_origin(annotation) is Literal:
            check(value in get_args(annotation), f"{prefix}.{name}", value, " or ".join(get_args(annotation)))
            continue
        expected = get_origin(annotation) or annotation
        good = type(value) is expected or (expected is float and type(value) is int)
        check(good, f"{prefix}.{name}", value, f"of type {expected.__name__}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021), and how they are stretched beyond the context that they were trained with."""

    theta: float = 10_000.0  # Base of the wavelengths.
    local_theta: float = 0.0  # Base in sliding-window layers, where nothing is stretched; 0: as in all layers.
    scaling: RopeScalingName = "none"  # How wavelengths are stretched; dynamic is NTK-aware scaling of the base.
    factor: float = 1.0  # How many times longer the context becomes.
    original_context: int = 0  # Context before stretching, in tokens; 0: context_length.
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original_context / this are stretched wholly.
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original_context / this are not stretched.
    beta_fast: float = 32.0  # yarn: turns within the original context from which on nothing is stretched.
    beta_slow: float = 1.0  # yarn: turns within the original context up to which all is stretched.
    attention_factor: float = 0.0  # yarn: multiplies queries and keys; 0: 0.1 ln(factor) + 1.

    def __post_init__(self) -> None:
        check_types(self, "model.rope")
        check(self.theta > 1, "model.rope.theta", self.theta, "more than 1")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check(getattr(self, name) > 0, f"model.rope.{name}", getattr(self, name), "more than 0")
        for name in ("local_theta", "original_context", "attention_factor"):
            check(getattr(self, name) >= 0, f"model.rope.{name}", getattr(self, name), "0 or more")
        check(
            self.scaling != "llama3" or self.high_freq_factor > self.low_freq_factor,
            "model.rope.high_freq_factor",
            self.high_freq_factor,
            f"more than model.rope.low_freq_factor = {self.low_freq_factor}",
        )

    def dynamic_theta(self, context_length: int, head_dim: int) -> float:
        """Theta as dynamic scaling raises it for texts that fill the context (bloc97 2023), whatever their length."""
        times = context_length / (self.original_context or context_length)
        return self.theta * max(1.0, self.factor * times - (self.factor - 1)) ** (head_dim / (head_dim - 2))

    def spelled_out(self, context_length: int, head_dim: int, sliding: bool) -> "RopeConfig":
        """The same for a model with this context, every default spelled out, and what has no effect at its default.

        sliding: whether the model has sliding-window layers. Their theta stays 0 where there is a scaling that holds
        for them, too, since then they rotate with no plain theta.
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


# Fields of ModelConfig that do not decide what the model computes, only how it is run, trained and stored.
HOW_IT_RUNS = ("vocab_multiple", "dropout", "lora", "dtype", "attention", "unroll", "remat", "loss_chunk")

LORA_TARGETS = ("qkv", "out", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2022): the matrices that training starts from stay as they are, and each target gets
    a trainable product of two thin ones beside it."""

    rank: int = 0  # Inner width of the adapters; 0: none, all parameters are trained.
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
    """The GPT itself: GPT-2's architecture by default, and the Llama family's by other values of the same fields."""

    vocab_size: int = 0  # Token ids the model knows; 0: as many as the tokenizer has.
    # Rows of the embedding are filled up to a multiple of this, for speed; the padding is never predicted.
    vocab_multiple: int = 1
    context_length: int = 1024  # Longest sequence, in tokens.
    n_layer: int = 12  # Transformer blocks.
    n_head: int = 12  # Attention heads.
    n_kv_head: int = 0  # Key/value heads, each shared by a group of attention heads; 0: as many as attention heads.
    d_model: int = 768  # Width of the residual stream.
    d_head: int = 0  # Width of one attention head; 0: d_model / n_head.
    d_ff: int = 0  # Width of the feed-forward layer; 0: four times d_model.
    positions: PositionsName = "learned"  # Position embeddings, or rotation of queries and keys.
    rope: RopeConfig = field(default_factory=RopeConfig)
    window: int = 0  # Tokens that a sliding-window layer sees, its own included; 0: all layers see all.
    window_pattern: str = "s"  # Which layers slide (s) and which see all (f), repeated over the layers.
    norm: NormName = "layer"  # Layer norm, or RMS norm, which has no mean and no bias.
    norm_eps: float = 1e-5  # Added to the variance in norms.
    post_norm: bool = False  # Also norm what attention and the feed-forward layer give, as Gemma does.
    qk_norm: bool = False  # RMS norm of each query and key head.
    query_scale: float = 0.0  # Queries are multiplied by this; 0: 1 / sqrt(width of a head).
    activation: ActivationName = "gelu_tanh"  # Of the feed-forward layer; gelu_tanh is GPT-2's approximation.
    gated: bool = False  # Multiply the activation with a second projection: SwiGLU with silu, GeGLU with gelu.
    bias: bool = True  # Biases in linear layers and layer norms, as GPT-2 has them.
    biases: tuple[str, ...] = ()  # Linear layers with biases although bias is off: any of qkv, out, mlp.
    tied_head: bool = True  # Logits come from the token embeddings, and not from a matrix of their own.
    scale_embeddings: bool = False  # Multiply token embeddings by sqrt(d_model), as Gemma does.
    dropout: float = 0.0  # Probability of dropping an embedding, an attention weight or a block's output.
    lora: LoraConfig = field(default_factory=LoraConfig)
    dtype: DTypeName = "auto"  # Compute type; auto: bfloat16 on accelerators, float32 on CPU. Parameters are float32.
    attention: AttentionName = "auto"  # Attention backend; auto: cudnn on GPU, splash on TPU, block_causal on CPU.
    unroll: bool = True  # Unroll the layers (faster steps) or scan over them (compile time independent of depth).
    remat: RematName = "none"  # What the backward pass recomputes: nothing, whole blocks, or all but matrix products.
    loss_chunk: int = 8192  # Tokens whose logits exist at one time while training.

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
        check(self.query_scale >= 0, "model.query_scale", self.query_scale, "0 (1 / sqrt(d_head)) or more")
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
        check(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "more than 0")

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
        """For each layer, whether it sees a sliding window only."""
        pattern = self.window_pattern if self.window else "f"
        return tuple(pattern[i % len(pattern)] == "s" for i in range(self.n_layer))

    @property
    def drops(self) -> bool:
        """Whether training drops anything, and so needs random keys."""
        return self.dropout > 0 or (self.lora.rank > 0 and self.lora.dropout > 0)

    def has_bias(self, layer: str) -> bool:
        """Whether linear layer `layer` (qkv, out or mlp) has a bias."""
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
        """What decides which parameters a checkpoint of the model has, and what they mean: by name, as values."""
        lora = dataclasses.replace(self.lora, dropout=0.0)
        stored: dict[str, Any] = {"vocab_multiple": self.vocab_multiple, "lora": lora}
        return dataclasses.asdict(dataclasses.replace(self.architecture(), **stored))

    def architecture(self) -> "ModelConfig":
        """What decides the function that the model computes, every default spelled out; what only decides how it is
        run, trained or stored is left at its default. Equal for models that can take each other's parameters."""
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


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how many make a step."""

    dir: str = ""  # Folder made by `prepare`.
    batch_size: int = 32  # Sequences in one optimizer step, over all devices and microbatches.
    microbatch_size: int = 0  # Sequences that a device handles at one time; 0: its whole share of the batch.
    source: tuple[str, ...] = ()  # What to prepare `dir` from when it is not there: files, folders, corpora.
    tokenizer: str = "sentencepiece"  # For that: sentencepiece, bytes, or the path of a tokenizer.
    model_type: TokenizerType = "bpe"  # For that: kind of SentencePiece model.
    vocab_size: int = 4096  # For that: number of tokens in the vocabulary.
    val_fraction: float = 0.1  # For that: share of the documents kept for validation.

    def __post_init__(self) -> None:
        check_types(self, "data")
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")
        check(self.microbatch_size >= 0, "data.microbatch_size", self.microbatch_size, "0 (the whole share) or more")
        check(self.vocab_size >= 1, "data.vocab_size", self.vocab_size, "1 or more")
        check(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "more than 0 and less than 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    learning_rate: float = 6e-4  # Peak learning rate.
    schedule: ScheduleName = "cosine"  # Shape after the warmup; wsd: constant, then linear decay at the end.
    warmup_steps: int = 100  # Steps over which the learning rate rises linearly from 0.
    final_fraction: float = 0.1  # Learning rate at the last step, as a fraction of the peak.
    decay_fraction: float = 0.2  # Share of all steps that wsd decays over.
    beta1: float = 0.9  # Decay of the first moment.
    beta2: float = 0.95  # Decay of the second moment.
    eps: float = 1e-8  # Added to the root of the second moment.
    # Decoupled weight decay, times the learning rate; on matrices (adapters too) and embeddings only.
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # Largest global norm of the gradient; 0: no clipping.

    def __post_init__(self) -> None:
        check_types(self, "optimizer")
        check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "more than 0")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        for name in ("final_fraction", "decay_fraction"):
            check(0 <= getattr(self, name) <= 1, f"optimizer.{name}", getattr(self, name), "between 0 and 1")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "at least 0 and less than 1")
        check(self.eps > 0, "optimizer.eps", self.eps, "more than 0")
        for name in ("weight_decay", "clip_norm"):
            check(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to report and keep on the way."""

    steps: int = 1000  # Optimizer steps.
    seed: int = 0  # Decides the initial parameters, the order of the data and the dropout.
    log_every: int = 10  # Steps between lines of metrics.jsonl.
    eval_every: int = 250  # Steps between evaluations on the whole validation set; 0: only after the last step.
    eval_batch_size: int = 0  # Sequences evaluated at one time, over all devices; 0: as many as train at one time.
    checkpoint_every: int = 0  # Steps between checkpoints; 0: after each evaluation.
    keep_checkpoints: int = 2  # How many of the latest checkpoints to keep, besides the best.
    # Steps between samples written by the model, for which it has to fit one device; 0: none.
    sample_every: int = 0
    sample_prompt: str = ""  # What those samples go on from; empty: the start of a document.
    sample_tokens: int = 64  # Length of those samples, in tokens.
    tensorboard: bool = False  # Write TensorBoard event files to the run's folder.
    wandb_project: str = ""  # Log to this Weights & Biases project; empty: do not.

    def __post_init__(self) -> None:
        check_types(self, "train")
        for name in ("steps", "log_every", "keep_checkpoints", "sample_tokens"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        for name in ("eval_every", "eval_batch_size", "checkpoint_every", "sample_every"):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        check(0 <= self.seed < 2**31, "train.seed", self.seed, "at least 0 and less than 2**31")


@dataclass(frozen=True)
class ParallelConfig:
    """Placement on devices: by pmap, each with the whole state; or on a mesh of data x fsdp x context x tensor, if one
    is set."""

    # Devices of each host to train on; 0: all it has, and on CPU one a core for small models, else one.
    devices: int = 0
    data: int = 0  # Mesh: parts of the batch, each with the whole state; 0: what the others leave of the devices.
    fsdp: int = 0  # Mesh: parts of the batch among which the state is divided; 0: 1.
    context: int = 0  # Mesh: parts of each sequence, and of the state; 0: 1.
    tensor: int = 0  # Mesh: parts of heads, feed-forward and vocabulary; 0: 1.

    def __post_init__(self) -> None:
        check_types(self, "parallel")
        for name, zero in (
            ("devices", "all"),
            ("data", "what is left"),
            ("fsdp", "1"),
            ("context", "1"),
            ("tensor", "1"),
        ):
            check(getattr(self, name) >= 0, f"parallel.{name}", getattr(self, name), f"0 ({zero}) or more")

    @property
    def uses_mesh(self) -> bool:
        """Whether a mesh was asked for."""
        return any((self.data, self.fsdp, self.context, self.tensor))

    def mesh_shape(self, n_devices: int) -> tuple[int, int, int, int]:
        """The sizes of data, fsdp, context and tensor. Raises UserError unless their product is the number of
        devices."""
        fsdp, context, tensor = self.fsdp or 1, self.context or 1, self.tensor or 1
        data = self.data or max(1, n_devices // (fsdp * context * tensor))
        product = data * fsdp * context * tensor
        if product != n_devices:
            raise UserError(
                f"parallel.data x fsdp x context x tensor = {data} x {fsdp} x {context} x {tensor} = {product}, but "
                f"there are {n_devices} devices; the product must be their number"
            )
        return data, fsdp, context, tensor


@dataclass(frozen=True)
class Config:
    """An experiment: everything that decides the outcome of a run."""

    out_dir: str = ""  # The run's folder; empty: runs/ and the configuration file's name.
    # Model to start from: a folder with safetensors, a .gguf file, a name on the hub. It decides the architecture.
    init_from: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check(
            self.optimizer.warmup_steps < self.train.steps or self.optimizer.warmup_steps == 0,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"less than train.steps = {self.train.steps}",
        )
        has_base = self.model.lora.rank == 0 or self.init_from != ""
        check(has_base, "model.lora.rank", self.model.lora.rank, "0 without init_from, a model to put adapters on")


def load_config(path: Path) -> Config:
    """The `config` that a Python file defines. Raises UserError when there is no such file, or no such name in it."""
    if not path.is_file():
        raise UserError(f"no configuration file {path}; those that come with the project are in configs/")
    spec = importlib.util.spec_from_file_location(f"gpt_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a configuration is one that defines `config = Config(...)`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except Exception as e:
        raise UserError(f"{path} could not be run: {type(e).__name__}: {e}") from e
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"{path} does not define `config = Config(...)`")
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: dict[str, Any], where: str) -> Config:
    """Inverse of `config_to_dict`. Raises UserError naming `where` and a field that is unknown or of another type.

    Fields that are missing take their defaults, so a run saved by an older version can be read.
    """

    def build(cls: type, values: Any, prefix: str) -> Any:
        if not isinstance(values, dict):
            raise UserError(f"{where}: {prefix or 'the configuration'} must be an object, not {values!r}")
        defaults = cls()
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{where}: unknown field {prefix}{unknown[0]}; was it saved by a newer version?")
        built = {}
        for name, value in values.items():
            default = getattr(defaults, name)
            if dataclasses.is_dataclass(default):
                built[name] = build(type(default), value, f"{prefix}{name}.")
                continue
            if isinstance(default, tuple) and isinstance(value, list):
                value = tuple(value)
            if isinstance(default, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(default):
                raise UserError(f"{where}: {prefix}{name} = {value!r} must be of type {type(default).__name__}")
            built[name] = value
        try:
            return cls(**built)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e

    return build(Config, values, "")


def load_saved_config(path: Path) -> Config:
    """Reads a run's `config.json`. Raises UserError when it is missing, damaged or holds an impossible value."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run: it has no {path.name}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e})") from e
    return config_from_dict(values, str(path))


def with_vocabulary(config: Config, n_tokens: int) -> Config:
    """The configuration with a tokenizer's number of tokens in the place of a vocabulary size of 0.

    Raises UserError when the model's vocabulary is smaller than the tokenizer's.
    """
    if config.model.vocab_size == 0:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=n_tokens))
    allowed = f"at least the {n_tokens} tokens of the tokenizer in {config.data.dir}, or 0"
    check(config.model.vocab_size >= n_tokens, "model.vocab_size", config.model.vocab_size, allowed)
    return config
