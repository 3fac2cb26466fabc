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
RematName = Literal["none", "full", "dots", "dots_no_batch"]
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
class ModelConfig:
    """The GPT itself: GPT-2's architecture by default."""

    vocab_size: int = 0  # Token ids the model knows; 0: as many as the tokenizer has.
    context_length: int = 1024  # Longest sequence, in tokens.
    n_layer: int = 12  # Transformer blocks.
    n_head: int = 12  # Attention heads; must divide d_model.
    d_model: int = 768  # Width of the residual stream.
    d_ff: int = 0  # Width of the feed-forward layer; 0: four times d_model.
    dropout: float = 0.0  # Probability of dropping an embedding, an attention weight or a block's output.
    bias: bool = True  # Biases in linear layers and layer norms, as GPT-2 has them.
    norm_eps: float = 1e-5  # Added to the variance in layer norms.
    dtype: DTypeName = "auto"  # Compute type; auto: bfloat16 on accelerators, float32 on CPU. Parameters are float32.
    attention: AttentionName = "auto"  # Attention backend; auto: cudnn on GPU, splash on TPU, block_causal on CPU.
    unroll: bool = True  # Unroll the layers (faster steps) or scan over them (compile time independent of depth).
    remat: RematName = "none"  # What the backward pass recomputes: nothing, whole blocks, or all but matrix products.
    loss_chunk: int = 8192  # Tokens whose logits exist at one time while training.

    def __post_init__(self) -> None:
        check_types(self, "model")
        for name in ("context_length", "n_layer", "n_head", "d_model", "loss_chunk"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "1 or more")
        check(self.vocab_size >= 0, "model.vocab_size", self.vocab_size, "0 (the tokenizer's) or more")
        check(self.d_ff >= 0, "model.d_ff", self.d_ff, "0 (four times d_model) or more")
        check(
            self.d_model % self.n_head == 0,
            "model.n_head",
            self.n_head,
            f"a divisor of model.d_model = {self.d_model}",
        )
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0 and less than 1")
        check(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "more than 0")

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.d_model // self.n_head

    @property
    def ff_dim(self) -> int:
        """Width of the feed-forward layer, F."""
        return self.d_ff or 4 * self.d_model

    @property
    def n_params(self) -> int:
        """Number of parameters, the tied head counted once."""
        d, f, bias = self.d_model, self.ff_dim, int(self.bias)
        attention = 4 * d * d + bias * 4 * d
        feed_forward = 2 * d * f + bias * (f + d)
        norm = d + bias * d
        return (self.vocab_size + self.context_length) * d + self.n_layer * (attention + feed_forward + 2 * norm) + norm


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
    weight_decay: float = 0.1  # Decoupled weight decay, times the learning rate; on matrices and embeddings only.
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
    sample_every: int = 0  # Steps between samples written by the model; 0: none.
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
    """Placement on devices."""

    devices: int = 0  # Devices to train on; 0: all local ones, and on CPU one a core for small models, else one.

    def __post_init__(self) -> None:
        check_types(self, "parallel")
        check(self.devices >= 0, "parallel.devices", self.devices, "0 (all) or more")


@dataclass(frozen=True)
class Config:
    """An experiment: everything that decides the outcome of a run."""

    out_dir: str = ""  # The run's folder; empty: runs/ and the configuration file's name.
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
