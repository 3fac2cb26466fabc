"""Loads a model, its parameters and its tokenizer by name: the folder of a run, or a published model.

Sampling and evaluation load all three, on one device or in a placement. Training that starts from the model loads the
parameters in its own placement, and export reads them part by part, on no device.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from gpt_jax.config import HOW_IT_RUNS, CacheDTypeName, Config, LoraConfig, ModelConfig, QuantizeName, check
from gpt_jax.data.shards import Meta
from gpt_jax.errors import UserError
from gpt_jax.interop import hub
from gpt_jax.interop import load as interop
from gpt_jax.interop.agreement import agreeing
from gpt_jax.interop.layout import ReadPart, n_parts
from gpt_jax.interop.load import open_named
from gpt_jax.interop.model_files import ModelFiles
from gpt_jax.model.backend import resolve_for
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.lora import ADAPTERS, fold, join, split
from gpt_jax.placement import MeshPlacement, Placement
from gpt_jax.run.checkpoint import (
    Checkpoints,
    check_data,
    choose_step,
    data_facts,
    latest_step,
)
from gpt_jax.run.checksums import fingerprint, leaf_shapes, named_checksums_of_parts, tree_fingerprint
from gpt_jax.run.folder import RunFolder, newest_run, run_folder
from gpt_jax.run.quantized import kept_file, load_quantized, state_of_files
from gpt_jax.runtime import local_devices
from gpt_jax.storage.remote import is_remote, location
from gpt_jax.system import user_path
from gpt_jax.tokenizer.tokenizer import Tokenizer

KEPT_FIELDS = (*HOW_IT_RUNS, "context_length")
"""Fields of ModelConfig that keep their configured values when training starts from another model."""


Base = TypeVar("Base")


class Source(Protocol):
    """A model on the disk. Its parameters are read by `load_params` only."""

    @property
    def where(self) -> str:
        """The folder or file, for messages."""

    @property
    def config(self) -> ModelConfig:
        """Its configuration, with its own context, and without adapters, since they are folded into the matrices."""

    @property
    def pinned(self) -> str:
        """A name that stands for the same model in any working folder and at any later time."""

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises UserError when it is missing or damaged, or has ids that the model does not have."""

    def vocab_multiple(self, asked: int) -> int:
        """The multiple to which embedding rows are padded. asked: the configured multiple, 1 for any.

        Raises UserError when the parameters cannot be loaded with the configured multiple.
        """

    def check(self) -> None:
        """Raises UserError when parameters are missing, or have other shapes than the configuration asks for."""

    def ingredients(self) -> str | None:
        """A hash of what the parameters are computed from, where adapters are folded into them: products are rounded in
        other ways on other devices and meshes, so that their values cannot be compared. None: they can."""

    def identity(self) -> str:
        """What changes when the parameters do, found without reading them."""

    def load_params(self, config: ModelConfig, placement: Placement) -> Params:
        """The parameters for `config` without its adapters, float32, placed like those of a training state. `config`
        has the architecture of the source, and may have another context. Raises UserError."""

    def open_params(self, config: ModelConfig) -> ReadPart:
        """The parameters of `load_params`, to be read part by part, without a device. A checkpoint is compared with its
        checksums now. Raises UserError, and so does the reader."""


@dataclass(frozen=True)
class PublishedSource:
    """A published model."""

    name: str  # A folder, a file, or a repository on the hub with the commit of its files.
    files: ModelFiles

    @property
    def where(self) -> str:
        """See Source."""
        return self.files.where

    @property
    def pinned(self) -> str:
        """See Source."""
        path = user_path(self.name)
        return str(path.absolute()) if path.exists() else self.name

    @property
    def config(self) -> ModelConfig:
        """See Source."""
        return interop.their_config(self.files)

    def tokenizer(self) -> Tokenizer:
        """See Source."""
        tokenizer = self.files.tokenizer()
        interop.check_tokenizer(tokenizer, self.config, self.where)
        return tokenizer

    def vocab_multiple(self, asked: int) -> int:
        """See Source."""
        return interop.PADDED_TO if asked == 1 else asked

    def check(self) -> None:
        """See Source."""
        interop.check_files(self.files)

    def ingredients(self) -> str | None:
        """See Source."""
        return None

    def identity(self) -> str:
        """See Source. Names, sizes and times of the files."""
        return json.dumps(state_of_files(Path(self.where)))

    def load_params(self, config: ModelConfig, placement: Placement) -> Params:
        """See Source."""
        return interop.load_params(self.files, config, placement.state_shardings)

    def open_params(self, config: ModelConfig) -> ReadPart:
        """See Source."""
        return interop.open_parts(self.files, config)


@dataclass(frozen=True)
class RunSource:
    """A checkpoint of a run. Only `load_params` uses devices, so they can be set up after all else has been read."""

    folder: RunFolder
    saved: Config  # The run's configuration.
    checkpoint: str  # "latest", "best" (the lowest validation loss) or a step.

    @property
    def where(self) -> str:
        """See Source."""
        return str(self.folder)

    @property
    def pinned(self) -> str:
        """See Source. The folder of one checkpoint, since the run may go on and write newer ones."""
        step = self.checkpoint if self.checkpoint.isdecimal() else str(latest_step(self.folder.checkpoints))
        path = self.folder.checkpoints / step
        return str(path.absolute() if isinstance(path, Path) else path)

    @property
    def config(self) -> ModelConfig:
        """See Source. The attention is chosen again, since the one used in training may not run on this machine."""
        return dataclasses.replace(self.saved.model, attention="auto", lora=LoraConfig())

    def tokenizer(self) -> Tokenizer:
        """See Source."""
        return self.folder.load_tokenizer()

    def vocab_multiple(self, asked: int) -> int:
        """See Source."""
        own = self.saved.model.vocab_multiple
        check(asked in (1, own), "model.vocab_multiple", asked, f"{own}, with which {self.folder} was trained, or 1")
        return own

    def check(self) -> None:
        """See Source. Checkpoints are checked when they are read."""

    def check_data(self, *metas: Meta) -> None:
        """Raises UserError when data folders are not what the checkpoint was trained on. metas: of all of them."""
        with Checkpoints(self.folder.checkpoints, read_only=True) as checkpoints:
            step = choose_step(checkpoints, self.checkpoint)
            check_data(checkpoints.folder / str(step), checkpoints.meta(step), data_facts(*metas))

    def identity(self) -> str:
        """See Source. The checksums of the parameters, and of the model below adapters."""
        with Checkpoints(self.folder.checkpoints, read_only=True) as checkpoints:
            _, meta = self.chosen(checkpoints)
        lora = self.saved.model.lora
        return json.dumps([meta["checksums"]["params"], meta.get("base"), lora.rank, lora.alpha], sort_keys=True)

    def load_params(self, config: ModelConfig, placement: Placement) -> Params:
        """See Source."""
        model, T = self.saved.model, config.context_length
        with Checkpoints(self.folder.checkpoints, read_only=True) as checkpoints:
            step, meta = self.chosen(checkpoints)
            target = placement.abstract(self.saved_shapes())
            params = placement.from_checkpoint(checkpoints.restore(step, "params", target))
        if model.lora.rank:

            def load(source: Source) -> Params:
                return source.load_params(self.config, placement)

            base = self.base(load, tree_fingerprint, meta.get("base"))
            params = placement.make(lambda base, own: fold(join(base, own), model.lora), base, params, donate=(0,))
        if model.positions == "learned" and model.context_length > T:
            params |= placement.make(lambda x_TD: {"positions_TD": x_TD[:T]}, params["positions_TD"])
        return params

    def open_params(self, config: ModelConfig) -> ReadPart:
        """See Source. Adapters are in memory, and each is folded into its matrix when that is read."""
        with Checkpoints(self.folder.checkpoints, read_only=True) as checkpoints:
            step, meta = self.chosen(checkpoints)
            read = checkpoints.open_parts(step, "params", self.saved_shapes())
        if self.saved.model.lora.rank:

            def values(base: ReadPart) -> str:
                return fingerprint(named_checksums_of_parts(base, leaf_shapes(interop.param_shapes(self.config))))

            base = self.base(lambda source: source.open_params(self.config), values, meta.get("base"))
            shapes = leaf_shapes(self.saved_shapes())
            adapters = {leaf: [read(leaf, i) for i in range(n_parts(leaf, shape))] for leaf, shape in shapes.items()}
            read = folded_parts(base, adapters, self.saved.model.lora)
        T = config.context_length
        return lambda leaf, i: read(leaf, i)[:T] if leaf == "positions_TD" else read(leaf, i)

    def saved_shapes(self) -> Params:
        """The shapes of the parameters in a checkpoint: of the adapters alone, if the run trained those."""
        model = self.saved.model
        shapes = jax.eval_shape(lambda: init_params(GPT(model), jax.random.key(0)))
        return split(shapes)[0] if model.lora.rank else shapes

    def chosen(self, checkpoints: Checkpoints) -> tuple[int, dict[str, Any]]:
        """The step of the checkpoint, and the facts saved with it. Raises UserError when there is none, or it was
        trained with another tokenizer than the run's."""
        step = choose_step(checkpoints, self.checkpoint)
        meta = checkpoints.meta(step)
        if meta["tokenizer"] != self.tokenizer().fingerprint:
            raise UserError(f"the tokenizer in {self.folder} is not the one that checkpoint {step} was trained with")
        return step, meta

    def base(self, load: Callable[[Source], Base], values: Callable[[Base], str], fingerprint: str | None) -> Base:
        """The model that the run's adapters were trained on, and whose fingerprint was saved with them.

        load: loads it. values: gives the fingerprint of its values, which earlier versions always saved, see
        `fingerprint_of`. Raises UserError when it is missing or has changed.
        """
        name = self.saved.init_from
        try:
            source = open_source(name)
            base = load(source)
            is_same = fingerprint == source.ingredients() or fingerprint == values(base)
        except UserError as e:
            raise UserError(f"the run's adapters need the model that they were trained on: {e}") from e
        if not is_same:
            raise UserError(f"the adapters in {self.folder} were trained on another model than {name} now is")
        return base

    def ingredients(self) -> str | None:
        """See Source."""
        return hashlib.sha256(self.identity().encode()).hexdigest() if self.saved.model.lora.rank else None


def fingerprint_of(source: Source, params: Params) -> str:
    """What a checkpoint of adapters says of the model that they were trained on: a hash of its values, or of what they
    were computed from. params: as `source` loaded them."""
    return source.ingredients() or tree_fingerprint(params)


fold_layer = jax.jit(fold, static_argnums=1)


def folded_parts(read: ReadPart, adapters: Mapping[str, Sequence[np.ndarray]], lora: LoraConfig) -> ReadPart:
    """`read`, with the adapters of each layer, by the names of their leaves, folded into that layer's matrices."""

    def read_part(leaf: str, i: int) -> np.ndarray:
        layer = leaf.removesuffix("kernel")
        own = {name: adapters[layer + name][i] for name in ADAPTERS if layer + name in adapters}
        part = read(leaf, i)
        return np.asarray(fold_layer({"kernel": part, **own}, lora)["kernel"]) if own else part

    return read_part


def open_source(name: str, checkpoint: str = "latest") -> Source:
    """The model in a run's or model's folder, in RUN/checkpoints/STEP or in a .gguf file, or with a name on the hub.

    checkpoint: of a run, "latest", "best" (the lowest validation loss) or a step. Raises UserError when there is no
    such model, or a part is missing or damaged.
    """
    path = location(name) if is_remote(name) else user_path(name)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return open_run(run_folder(path.parent.parent), path.name)
    if (path / "checkpoints").is_dir():
        return open_run(run_folder(path), checkpoint)
    if not isinstance(path, Path):
        raise UserError(f"{name} is not a run with checkpoints; a published model must be in a local folder")
    files, notes = agreeing(open_named(name))
    for note in notes:
        print(f"{files.where}: {note}", file=sys.stderr)
    return PublishedSource(name if path.exists() else hub.pinned(name, Path(files.where)), files)


def stands_for(pinned: str, name: str) -> bool:
    """True when `name` may be what the user called a model that was pinned as `pinned`; see Source."""
    if is_remote(name):
        url = str(location(name))
        return pinned == url or pinned.rpartition("/")[0] == f"{url}/checkpoints"
    path = os.path.normpath(user_path(name).absolute())
    there = Path(os.path.normpath(pinned))
    on_hub = not there.is_absolute() and pinned.partition("@")[0] == name
    return on_hub or pinned == name or there == Path(path) or there.parent == Path(path, "checkpoints")


def open_run(folder: RunFolder, checkpoint: str = "latest") -> RunSource:
    """A checkpoint of the run in a folder. Raises UserError when the folder is not a run."""
    return RunSource(folder, folder.load_config(), checkpoint)


def choose_source(run: str, model: str, checkpoint: str = "latest") -> Source:
    """The model that --run or --model names, of which at most one is given; by default, that of the newest run.

    Raises UserError as `open_source` does.
    """
    return open_source(model) if model else open_run(run_folder(run) if run else newest_run(), checkpoint)


class LoadedModel(NamedTuple):
    """A model that is ready for use."""

    model: GPT
    params: Params
    tokenizer: Tokenizer


def load_model(
    source: Source,
    context_length: int = 0,
    placement: Placement | None = None,
    quantize: QuantizeName = "none",
    cache_dtype: CacheDTypeName = "auto",
) -> LoadedModel:
    """The model, its parameters, and its tokenizer.

    context_length: in tokens; 0: the model's own. placement: where the parameters are; None: on this machine's first
    device. quantize: "int8" rounds the matrices, see run/quantized.py. cache_dtype: "auto": that of the configuration.
    Raises UserError naming what is missing, damaged or not supported.
    """
    placement = placement or Placement(local_devices()[:1])
    config = resolve_for(config_to_load(source, context_length), placement.devices[0], placement.context)
    if cache_dtype != "auto":
        config = dataclasses.replace(config, cache_dtype=cache_dtype)
    tokenizer = source.tokenizer()
    if quantize == "none":
        return LoadedModel(GPT(config), source.load_params(config, placement), tokenizer)
    if isinstance(placement, MeshPlacement):
        raise UserError("int8 parameters are not divided over a mesh: leave out --parallel.*, or --quantize int8")
    config = dataclasses.replace(config, unroll=True)  # The layers are apart.
    params = load_quantized(lambda: source.open_params(config), config, kept_file(source.identity(), config))
    return LoadedModel(GPT(config), jax.device_put(params, placement.state_shardings(params)), tokenizer)


def config_to_load(source: Source, context_length: int = 0) -> ModelConfig:
    """The configuration with which a source is loaded, not yet resolved for a device. Raises UserError.

    context_length: in tokens; 0: the model's own.
    """
    config = with_context(source.config, context_length or source.config.context_length, source.where)
    return dataclasses.replace(config, vocab_multiple=source.vocab_multiple(config.vocab_multiple))


def with_context(config: ModelConfig, context_length: int, where: str, name: str = "context_length") -> ModelConfig:
    """The configuration with a context of that many tokens. Raises UserError, naming `name`, when the model in `where`
    has learned fewer positions."""
    check(context_length >= 1, name, context_length, "1 or more")
    if context_length == config.context_length:
        return config
    if config.positions == "learned":
        allowed = f"at most {config.context_length}, the positions that {where} has learned"
        check(context_length <= config.context_length, name, context_length, allowed)
    rope = dataclasses.replace(config.rope, original_context=config.rope.original_context or config.context_length)
    return dataclasses.replace(config, context_length=context_length, rope=rope)


def adopt(source: Source, config: ModelConfig, asks_context: bool = True) -> ModelConfig:
    """`config` with the architecture of `source`. The fields of how the model is run, and the context, are kept.

    asks_context: True when the user asked for that context; otherwise it is capped at the model's own. Raises UserError
    when the family or a setting of the model is not supported, or the model has learned fewer positions.
    """
    source_config = source.config
    T = config.context_length if asks_context else min(config.context_length, source_config.context_length)
    kept: dict[str, Any] = {name: getattr(config, name) for name in HOW_IT_RUNS}
    kept["vocab_multiple"] = source.vocab_multiple(config.vocab_multiple)
    return dataclasses.replace(with_context(source_config, T, source.where, "model.context_length"), **kept)
