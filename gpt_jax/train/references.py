"""The model that a run starts from, as what preferences and rewards are compared with."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gpt_jax import hosts
from gpt_jax.config import Config, LoraConfig
from gpt_jax.data.batch import Batch
from gpt_jax.data.preferences import PairRows, preference_eval_batches
from gpt_jax.data.shards import SplitName
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.run.load import fingerprint_of, open_source
from gpt_jax.storage.arrays import load_array, save_array
from gpt_jax.train.logprobs import make_logprobs_step
from gpt_jax.train.step import TrainState

FORMAT_VERSION = 1


def reference_model(
    config: Config, model: GPT, placement: Placement, state: TrainState, fingerprint: str, keep: bool
) -> tuple[GPT, Callable[[TrainState], Params]]:
    """The model to start from, and what gives its parameters on this run's devices, at any state of the run; with
    keep=False, only at the present one.

    Those below adapters are part of the state, and before the first step so are all. Otherwise they are loaded, and lie
    beside the trained ones.

    fingerprint: what the run's checkpoints say of that model. Raises UserError when it is missing or has changed.
    """
    if model.config.lora.rank:
        return without_adapters(model), lambda state: state.frozen
    if int(state.step) == 0 and not keep:
        return model, lambda state: state.params
    source = open_source(config.init_from)
    params = source.load_params(model.config, placement)
    if fingerprint_of(source, params) != fingerprint:
        raise UserError(f"the run began with another model than {config.init_from} now is, and is compared with it")
    return model, lambda state: params


def without_adapters(model: GPT) -> GPT:
    """The model below adapters."""
    return GPT(dataclasses.replace(model.config, lora=LoraConfig()))


def make_answer_logprobs(model: GPT) -> Callable[[Params, Batch], jax.Array]:
    """The step that computes the log-probabilities of whole answers, `(params, batch)` to (A, B, K); see
    `make_logprobs_step`."""
    logprobs = make_logprobs_step(model)
    return lambda params, batch: jnp.sum(logprobs(params, batch), axis=-1)


def pair_logprobs(
    folder: Path,
    split: SplitName,
    fingerprint: str,
    rows: PairRows,
    batch_size: int,
    sizes: tuple[int, ...],
    placement: Placement,
    reference: Callable[[], tuple[GPT, Params]],
    model: GPT,
) -> np.ndarray:
    """The log-probabilities of both answers of all pairs that fit, under the reference model, float32 (pairs, 2).

    They are read from a file in the folder if they are there, of these pairs and these weights, and else computed and
    written there, if that can be. fingerprint: that of the weights and of the pairs. model: how it is computed.
    """
    key = [FORMAT_VERSION, fingerprint, len(rows), json.dumps(dataclasses.asdict(without_adapters(model).config))]
    file = folder / f"{split}-reference-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.bin"
    saved = load_array(file, key)
    if hosts.any_of(saved is None):
        computed = compute_pair_logprobs(rows, batch_size, sizes, placement, *reference())
        if hosts.is_first():
            with contextlib.suppress(OSError):  # On a read-only folder, they are computed anew each time.
                save_array(file, key, None, computed)
        return computed
    assert saved is not None
    return saved[1].reshape(-1, 2)


def compute_pair_logprobs(
    rows: PairRows, batch_size: int, sizes: tuple[int, ...], placement: Placement, model: GPT, params: Params
) -> np.ndarray:
    """See `pair_logprobs`. batch_size: pairs at one time, over all devices. sizes: see `PreferenceBatches`."""
    step = placement.jit(make_answer_logprobs(model), donate=False, divided=True)
    own = placement.rows(batch_size)
    found = np.zeros((len(rows), 2), np.float32)
    with tqdm(desc="reference", total=len(rows), unit=" pairs", disable=None) as bar:
        for numbers, batch in preference_eval_batches(rows, batch_size, sizes):
            said = placement.gather(step(params, placement.split(jax.tree.map(lambda x: x[own], batch), 1)))
            found[numbers] = said[: len(numbers)]
            bar.update(len(numbers))
    return found
