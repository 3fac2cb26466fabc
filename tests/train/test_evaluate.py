"""An evaluation is over the whole validation set, each token once: against one window at a time, in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import Dataset, open_dataset
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params, forward, init_params
from gpt_jax.placement import Placement
from gpt_jax.train.evaluate import make_evaluate

T, BATCH = 16, 8
MODEL = ModelConfig(
    vocab_size=261, context_length=T, n_layer=1, n_head=2, d_model=16, dtype="float32", attention="block_causal"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose validation split, of several documents, ends within a window and within a batch."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["on", "a", "mat", "语言", "rain"], 12)), encoding="utf-8")
    args = PrepareArgs(source=(str(folder),), out=folder / "prepared", tokenizer="bytes", val_fraction=0.2)
    prepare(args, n_workers=1)
    return folder / "prepared"


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return open_dataset(folder)


@pytest.fixture(scope="module")
def params() -> Params:
    """Parameters far from their small initial values, so that some tokens are much likelier than others."""
    return jax.tree.map(lambda x: 8 * x, init_params(GPT(MODEL), jax.random.key(0)))


def brute_force(folder: Path, params: Params) -> tuple[float, float]:
    """(nats a token, bits a byte), from the bytes of the file."""
    tokens = np.fromfile(folder / "val-00000-of-00001.bin", "<u2").astype(np.int32)
    losses = []
    for start in range(0, len(tokens) - 1, T):
        inputs, targets = tokens[start : start + T], tokens[start + 1 : start + T + 1]
        hidden = forward(GPT(MODEL), params, jnp.asarray(inputs[None, : len(targets)]))[0]
        logits = np.asarray(hidden, np.float64) @ np.asarray(params["tokens_VD"], np.float64).T
        logits -= logits.max(axis=-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses += [-row[target] for row, target in zip(log_probabilities, targets, strict=True)]
    assert len(losses) == len(tokens) - 1
    assert len(losses) % T != 0
    assert -(-len(losses) // T) % BATCH != 0
    assert (tokens == 256).sum() > 2
    # Every token of the text, its ends of documents included, has to be told; the first, which nothing predicts, is
    # counted as the others are on average. Bytes are those of the text alone: as ids they are themselves.
    nats = np.mean(losses) * len(tokens)
    return float(np.mean(losses)), float(nats / np.log(2) / (tokens < 256).sum())


@pytest.mark.parametrize("n_devices", [1, 4])
def test_it_is_the_mean_over_every_token(folder: Path, data: Dataset, params: Params, n_devices: int) -> None:
    config = Config(model=MODEL, train=TrainConfig(eval_batch_size=BATCH))
    placement = Placement(jax.devices()[:n_devices])
    evaluate = make_evaluate(GPT(MODEL), placement, data, config)
    on_devices = jax.device_put(params, placement.state_shardings(params))
    result = evaluate(on_devices)
    loss, bits_per_byte = brute_force(folder, params)
    np.testing.assert_allclose(result["val_loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(result["val_bits_per_byte"], bits_per_byte, rtol=1e-6)
    assert evaluate(on_devices) == result


@pytest.mark.parametrize(
    ("eval_batch_size", "batch_size", "microbatch_size"), [(1, 32, 0), (3, 32, 0), (64, 32, 0), (0, 6, 0), (0, 32, 4)]
)
def test_the_batch_does_not_matter(
    folder: Path, data: Dataset, params: Params, eval_batch_size: int, batch_size: int, microbatch_size: int
) -> None:
    config = Config(
        model=MODEL,
        data=DataConfig(batch_size=batch_size, microbatch_size=microbatch_size),
        train=TrainConfig(eval_batch_size=eval_batch_size),
    )
    result = make_evaluate(GPT(MODEL), Placement(jax.devices()[:1]), data, config)(params)
    np.testing.assert_allclose(list(result.values()), brute_force(folder, params), rtol=1e-6)


def test_a_batch_that_does_not_divide_over_the_devices_is_named(data: Dataset) -> None:
    config = Config(model=MODEL, train=TrainConfig(eval_batch_size=6))
    with pytest.raises(UserError, match=r"train.eval_batch_size = 6 does not divide over 4 devices"):
        make_evaluate(GPT(MODEL), Placement(jax.devices()[:4]), data, config)
