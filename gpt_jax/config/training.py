"""Sections of the configuration for training: the data, the optimizer, the duration and the devices."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from os.path import normpath
from typing import Literal, get_args

from gpt_jax.config.check import check, check_types
from gpt_jax.errors import UserError

ScheduleName = Literal["cosine", "linear", "wsd", "constant"]
TokenizerType = Literal["bpe", "unigram", "char"]
PackingName = Literal["auto", "stream", "documents"]


@dataclass(frozen=True)
class TextConfig:
    """How text becomes tokens: settings of `prepare`, which training calls when the data folder is missing."""

    tokenizer: str = "sentencepiece"  # sentencepiece, bytes, or an existing tokenizer: file, folder, model's name.
    model_type: TokenizerType = "bpe"  # Kind of SentencePiece model to train.
    vocab_size: int = 4096  # Number of tokens in its vocabulary; for char, the largest number.
    val_fraction: float = 0.1  # Share of the text kept for validation.

    def check_values(self, prefix: str = "") -> None:
        """Raises UserError naming an impossible value and its field, with `prefix` before the field's name."""
        model_types = get_args(TokenizerType)
        check(self.model_type in model_types, f"{prefix}model_type", self.model_type, " or ".join(model_types))
        check(self.vocab_size >= 1, f"{prefix}vocab_size", self.vocab_size, "1 or more")
        allowed = "more than 0 and less than 1"
        check(0 < self.val_fraction < 1, f"{prefix}val_fraction", self.val_fraction, allowed)


@dataclass(frozen=True)
class DataConfig(TextConfig):
    """Where tokens come from, and how many make a step. A missing folder is prepared from `source`."""

    dir: str = ""  # Folder made by `prepare`.
    source: tuple[str, ...] = ()  # Text to prepare a missing `dir` from: files, folders, corpora.
    # Several folders in place of `dir`, each with its weight, by tokens to learn: data/web=0.7 data/chat=0.3.
    mixture: tuple[str, ...] = ()
    curriculum: tuple[str, ...] = ()  # Other weights of the mixture's folders from a step on: 5000:0.5,0.5.
    # How documents fill the windows: stream (one after the other, cut anywhere), documents (side by side, none sees
    # another); auto: documents for conversations, else stream.
    packing: PackingName = "auto"
    batch_size: int = 32  # Sequences in one optimizer step, over all devices and microbatches.
    microbatch_size: int = 0  # Sequences that a device handles at one time; 0: its whole share of the batch.

    def __post_init__(self) -> None:
        check_types(self, "data")
        self.check_values("data.")
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")
        check(self.microbatch_size >= 0, "data.microbatch_size", self.microbatch_size, "0 (the whole share) or more")
        check(self.packing in get_args(PackingName), "data.packing", self.packing, " or ".join(get_args(PackingName)))
        paths = [normpath(folder) for folder in self.folders if folder]  # They are empty where runs are compared.
        check(len(paths) == len({*paths}), "data.mixture", self.mixture, "of different folders")
        no_stages = not self.curriculum or len(self.mixture) > 1
        check(no_stages, "data.curriculum", self.curriculum, "empty without a data.mixture of several folders")
        self.stages()

    @property
    def folders(self) -> tuple[str, ...]:
        """The data folders: those of the mixture or, without one, `dir`."""
        return tuple(entry.rpartition("=")[0] for entry in self.mixture) or (self.dir,)

    def with_folders(self, change: Callable[[str], str]) -> "DataConfig":
        """The same with other paths of the folders."""
        parts = (entry.rpartition("=") for entry in self.mixture)
        mixture = tuple(f"{change(folder)}={weight}" for folder, _, weight in parts)
        return replace(self, dir=change(self.dir) if self.dir else self.dir, mixture=mixture)

    def stages(self) -> list[tuple[int, tuple[float, ...]]]:
        """The weights of all folders from each step on at which they change, the first of which is 0.

        Raises UserError naming the entry that cannot be read. What the weights may be is decided by the mixture.
        """

        def numbers(name: str, entry: str, values: list[str], allowed: str) -> tuple[float, ...]:
            try:
                return tuple(map(float, values))
            except ValueError:
                raise UserError(f"{name} = {entry!r} is not possible: it must be {allowed}") from None

        of_folder, of_stage = "FOLDER=WEIGHT, as in data/web=0.7", "STEP:WEIGHT,WEIGHT..., as in 5000:0.5,0.5"
        first = [numbers("data.mixture", entry, [entry.rpartition("=")[2]], of_folder)[0] for entry in self.mixture]
        stages = [(0, tuple(first) or (1.0,))]
        for entry in self.curriculum:
            start, _, values = entry.partition(":")
            is_step = start.isdecimal() and len(start) <= 10 and int(start) < 2**31
            check(is_step, "data.curriculum", entry, f"{of_stage}, with a step below 2**31")
            stages.append((int(start), numbers("data.curriculum", entry, values.split(","), of_stage)))
        return stages


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    learning_rate: float = 6e-4  # Peak learning rate.
    schedule: ScheduleName = "cosine"  # Shape after the warmup; wsd: constant, then linear decay at the end.
    warmup_steps: int = 100  # Steps over which the learning rate rises linearly from 0; in shorter runs, all but one.
    final_fraction: float = 0.1  # Learning rate at the last step, as a fraction of the peak.
    decay_fraction: float = 0.2  # Share of all steps over which wsd decays.
    beta1: float = 0.9  # Decay of the first moment.
    beta2: float = 0.95  # Decay of the second moment.
    eps: float = 1e-8  # Added to the root of the second moment.
    weight_decay: float = 0.1  # Decoupled, times the learning rate; on matrices, adapters and embeddings only.
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

    def warmup_of(self, steps: int) -> int:
        """The steps of warmup in a run of `steps` steps, of which at least the last is none of them."""
        return min(self.warmup_steps, steps - 1)


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to report and keep on the way."""

    steps: int = 1000  # Optimizer steps.
    seed: int = 0  # Decides the initial parameters, the order of the data and the dropout.
    log_every: int = 10  # Steps between lines of metrics.jsonl.
    eval_every: int = 250  # Steps between evaluations on the whole validation set; 0: only after the last step.
    eval_batch_size: int = 0  # Sequences evaluated at one time, over all devices; 0: as many as train at one time.
    checkpoint_every: int = 0  # Steps between checkpoints; 0: after each evaluation.
    keep_checkpoints: int = 2  # Number of latest checkpoints to keep, besides the best.
    sample_every: int = 0  # Steps between samples; 0: no samples.
    sample_prompt: str = ""  # Text that those samples continue; empty: the start of a document.
    sample_tokens: int = 64  # Length of those samples, in tokens.
    tensorboard: bool = False  # Write TensorBoard event files to the run's folder.
    wandb_project: str = ""  # Weights & Biases project to log to; empty: none.

    def __post_init__(self) -> None:
        check_types(self, "train")
        for name in ("steps", "log_every", "keep_checkpoints", "sample_tokens"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        for name in ("eval_every", "eval_batch_size", "checkpoint_every", "sample_every"):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        check(0 <= self.seed < 2**31, "train.seed", self.seed, "at least 0 and less than 2**31")


@dataclass(frozen=True)
class ParallelConfig:
    """Placement on devices: by pmap, each with the whole state, or on a mesh of data x fsdp x context x tensor, if any
    of them is set."""

    # Devices of each host to use; 0: all. On CPU, training then takes one per core for small models, and otherwise one.
    devices: int = 0
    data: int = 0  # Mesh: parts of the batch, each with the whole state; 0: the devices that the other axes leave.
    fsdp: int = 0  # Mesh: parts of the batch, over which the state is sharded; 0: 1.
    context: int = 0  # Mesh: parts of each sequence, over which the state is sharded, too; 0: 1.
    tensor: int = 0  # Mesh: parts of the heads, the feed-forward layer and the vocabulary; 0: 1.

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
        """True when an axis of the mesh is set."""
        return any((self.data, self.fsdp, self.context, self.tensor))

    @property
    def n_asked(self) -> int:
        """Number of devices that `devices` or the axes of the mesh ask for; 0 when none of them is set."""
        if self.devices or not self.uses_mesh:
            return self.devices
        return prod(max(n, 1) for n in (self.data, self.fsdp, self.context, self.tensor))

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
