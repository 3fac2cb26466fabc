"""Scores on a mesh are those of one device, and no device holds more than its share of the parameters."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt_jax.config import LoraConfig, ModelConfig, ParallelConfig
from gpt_jax.errors import UserError
from gpt_jax.evaluate import score
from gpt_jax.evaluate.score import Score, Scorer
from gpt_jax.evaluate.windows import Window
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.sharding import dimensions
from gpt_jax.placement import Placement, choose_placement
from gpt_jax.run.load import config_to_load, load_model, open_source
from tests import tiny
from tests.cases import cases
from tests.export.test_streaming import save_adapters, save_run
from tests.interop.models import publish

SIZES: dict[str, Any] = {"vocab_multiple": 88, "d_model": 96, "context_length": 48}
GPT2 = dataclasses.replace(tiny.GPT2, **SIZES, n_head=8)
LLAMA = dataclasses.replace(tiny.LLAMA, **SIZES, n_head=16, n_kv_head=8, d_ff=96, unroll=False)

MESHES: dict[str, dict[str, int]] = {
    "pmap": {},
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 8": {"tensor": 8},
    "2 x 2 x 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "context 4": {"context": 4, "fsdp": 2},
    "context 3": {"context": 3, "tensor": 2},  # Windows are cut into three parts: 48 tokens in place of 16 and 32.
}


def placement_of(mesh: dict[str, int], config: ModelConfig) -> Placement:
    parallel = ParallelConfig(**mesh)
    return choose_placement(parallel, config, jax.devices()[: parallel.n_asked or 8])


def some_windows() -> list[Window]:
    """Windows of all lengths, of which some tokens count."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 49, 21)
    return [
        Window(rng.integers(0, 261, n + 1).astype(np.int32), int(rng.integers(0, n) if i % 3 else 0))
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module", params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def expected(request: pytest.FixtureRequest) -> tuple[ModelConfig, Params, list[Window], list[Score]]:
    """A model, windows, and their scores on one device. Half of the windows end with the most probable token."""
    params, windows = tiny.uneven_params(request.param, 4), some_windows()
    model = GPT(resolve(request.param, "cpu"))
    scorer = Scorer(model, params, Placement(jax.devices()[:1]), 4)
    for i in range(0, len(windows), 2):
        window = windows[i]._replace(seen=len(windows[i].tokens) - 2)
        tried = [Window(np.append(window.tokens[:-1], token).astype(np.int32), window.seen) for token in range(261)]
        windows[i] = next(tried[s.number] for s in scorer(tried) if s.greedy)
    return request.param, params, windows, sorted(scorer(windows))


@pytest.mark.parametrize("mesh", cases(MESHES, ["2 x 2 x 2", "context 3"]))
def test_scores_are_those_of_one_device(
    expected: tuple[ModelConfig, Params, list[Window], list[Score]], mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5 of each and 1e-5 nats, as logits are rounded; with the same tokens as the most probable ones, of which a
    part of the vocabulary has each."""
    config, params, windows, scores = expected
    monkeypatch.setattr(score, "CHUNK", 24)  # Neither divides a device's tokens nor is divided by them.
    scorer = Scorer(GPT(resolve(config, "cpu")), params, placement_of(MESHES[mesh], config), 3)
    got = sorted(scorer(windows))
    assert [g.number for g in got] == list(range(len(windows)))
    np.testing.assert_allclose([g.nats for g in got], [s.nats for s in scores], rtol=1e-5, atol=1e-5)
    assert [g.greedy for g in got] == [s.greedy for s in scores]
    assert 10 < sum(s.greedy for s in scores) < 21


def share_of(mesh: dict[str, int], params: Params) -> float:
    """The bytes of the parameters that one device of the mesh should hold, by the letters of their dimensions."""
    parts = {letter: mesh.get("tensor", 1) for letter in "HFV"} | {"D": mesh.get("fsdp", 1) * mesh.get("context", 1)}
    total = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        total += x.nbytes / np.prod([parts.get(letter, 1) for letter in dimensions(path) or ""])
    return total


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    save_run(folder / "run", GPT2, tiny.random_params(GPT2))
    publish(folder / "published", LLAMA)
    save_adapters(folder / "adapted", folder / "published", LoraConfig(rank=2))
    save_adapters(folder / "twice", folder / "adapted", LoraConfig(rank=3))
    return folder


@pytest.mark.parametrize("mesh", cases([name for name in MESHES if name != "pmap"], ["2 x 2 x 2", "context 3"]))
@pytest.mark.parametrize("name", ["run", "published", "adapted", "twice"])
def test_no_device_holds_more_than_its_share(sources: Path, name: str, mesh: str) -> None:
    """With a shorter context, too, for which learned positions are cut."""
    source = open_source(str(sources / name))
    placement = placement_of(MESHES[mesh], config_to_load(source, 24))
    model, params, _ = load_model(source, 24, placement)
    whole = load_model(source, 24)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), params, whole.params)
    held: Counter[jax.Device] = Counter()
    for x in jax.tree.leaves(Scorer(model, params, placement, 1).params):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(held) == placement.n_devices
    assert set(held.values()) == {share_of(MESHES[mesh], whole.params)}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 7}, "model.d_model, 96, does not divide over parallel.fsdp = 7"),
        ({"tensor": 5}, "the number of key/value heads, 8, does not divide over parallel.tensor = 5"),
        ({"context": 5}, "does not divide over parallel.fsdp x context = 5"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_divide_the_model_is_told(mesh: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        placement_of(mesh, GPT2)
