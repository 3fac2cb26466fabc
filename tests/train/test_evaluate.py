"""An evaluation is over the whole validation set, each token once: against one window at a time, in float64."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gpt_jax.config import Config, DataConfig, TrainConfig
from gpt_jax.data.folders import DataFolders
from gpt_jax.data.shards import Dataset, open_dataset
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.train.evaluate import make_evaluate
from tests import tiny
from tests.evaluate.model import jitted_forward

MODEL = tiny.ONE_LAYER
T, BATCH = MODEL.context_length, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose validation split, of several documents, ends within a window and within a batch."""
    return tiny.byte_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return open_dataset(folder)


@pytest.fixture(scope="module")
def params() -> Params:
    return tiny.uneven_params(MODEL)


@pytest.fixture(scope="module")
def expected(folder: Path, params: Params) -> tuple[float, float]:
    """(nats a token, bits a byte), from the bytes of the file."""
    tokens = np.fromfile(folder / "val-00000-of-00001.bin", "<u2").astype(np.int32)
    losses = []
    for start in range(0, len(tokens) - 1, T):
        inputs, targets = tokens[start : start + T], tokens[start + 1 : start + T + 1]
        hidden = jitted_forward(GPT(MODEL), params, inputs[None, : len(targets)])[0]
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
def test_it_is_the_mean_over_every_token(
    expected: tuple[float, float], data: Dataset, params: Params, n_devices: int
) -> None:
    config = Config(model=MODEL, train=TrainConfig(eval_batch_size=BATCH))
    placement = Placement(jax.devices()[:n_devices])
    evaluate = make_evaluate(GPT(MODEL), placement, DataFolders({"data": data}, config.data), config)
    on_devices = jax.device_put(params, placement.state_shardings(params))
    result = evaluate(on_devices)
    np.testing.assert_allclose(result["val_loss"], expected[0], rtol=1e-6)
    np.testing.assert_allclose(result["val_bits_per_byte"], expected[1], rtol=1e-6)
    assert evaluate(on_devices) == result


@pytest.mark.parametrize(
    ("eval_batch_size", "batch_size", "microbatch_size"), [(1, 32, 0), (3, 32, 0), (64, 32, 0), (0, 6, 0), (0, 32, 4)]
)
def test_the_batch_does_not_matter(
    expected: tuple[float, float],
    data: Dataset,
    params: Params,
    eval_batch_size: int,
    batch_size: int,
    microbatch_size: int,
) -> None:
    config = Config(
        model=MODEL,
        data=DataConfig(batch_size=batch_size, microbatch_size=microbatch_size),
        train=TrainConfig(eval_batch_size=eval_batch_size),
    )
    folders = DataFolders({"data": data}, config.data)
    result = make_evaluate(GPT(MODEL), Placement(jax.devices()[:1]), folders, config)(params)
    np.testing.assert_allclose(list(result.values()), expected, rtol=1e-6)


def test_a_batch_that_does_not_divide_over_the_devices_is_named(data: Dataset) -> None:
    config = Config(model=MODEL, train=TrainConfig(eval_batch_size=6))
    with pytest.raises(UserError, match=r"train.eval_batch_size = 6 does not divide over 4 devices"):
        make_evaluate(GPT(MODEL), Placement(jax.devices()[:4]), DataFolders({"data": data}, config.data), config)
