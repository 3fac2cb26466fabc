"""Loads the adapters of several runs on one model, to be served beside it together."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.load import check_architecture, leaf_name, param_shapes
from gpt_jax.model.gpt import Params
from gpt_jax.model.lora import Adapters, joined
from gpt_jax.run.checkpoint import Checkpoints
from gpt_jax.run.checksums import fingerprint, leaf_shapes, named_checksums_of_parts
from gpt_jax.run.load import RunSource, Source, open_source
from gpt_jax.tokenizer.tokenizer import Tokenizer


def load_adapters(base: Source, runs: Sequence[str]) -> tuple[Adapters, list[Tokenizer]]:
    """The adapters of runs, which have names as `open_source` takes them, and the tokenizers of the runs, which encode
    as the model's does, and may have chat templates of their own.

    base: the model that they are for, in whatever form it is loaded. Each run must have been trained on the values that
    are there now, which are read for that, a part at a time, and once for runs of one configuration. Raises UserError
    naming a run that has no adapters, or whose adapters were trained on another model or are damaged.
    """

    @functools.cache
    def values(config: ModelConfig) -> str:
        return fingerprint(named_checksums_of_parts(base.open_params(config), leaf_shapes(param_shapes(config))))

    loaded, tokenizers, theirs = [], [], base.tokenizer().fingerprint
    for name in runs:
        run = open_source(name)
        if not isinstance(run, RunSource) or not run.saved.model.lora.rank:
            raise UserError(f"{name} has no adapters: it is not a run that was trained with --model.lora.rank")
        try:
            check_architecture(run.config, base.config, base.where)
        except UserError as e:
            raise UserError(f"the adapters in {name} were trained on another model: {e}") from e
        tokenizer = run.tokenizer()
        if tokenizer.fingerprint != theirs:
            raise UserError(f"the adapters in {name} were trained with another tokenizer than {base.where} has")
        adapters, trained_on = read_adapters(run)
        if trained_on != base.ingredients() and trained_on != values(run.config):
            raise UserError(
                f"the adapters in {name} were trained on {run.saved.init_from}, and {base.where} has other values"
            )
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(adapters)):
            raise UserError(f"the adapters in {name} have values that are no numbers")
        loaded.append((adapters, run.saved.model.lora))
        tokenizers.append(tokenizer)
    return joined(loaded), tokenizers


def read_adapters(run: RunSource) -> tuple[Params, str]:
    """The adapters in a checkpoint, as NumPy arrays, and what it says of the model that they were trained on, see
    `fingerprint_of`. Raises UserError when it is missing or damaged."""
    with Checkpoints(run.folder.checkpoints, read_only=True) as checkpoints:
        step, meta = run.chosen(checkpoints)
        read = checkpoints.open_parts(step, "params", run.saved_shapes())

    def stacked(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.stack([read(leaf_name(path), i) for i in range(shape.shape[0])])

    return jax.tree_util.tree_map_with_path(stacked, run.saved_shapes()), meta["base"]
