"""On a mesh that divides the state, the step gives what it gives on one device, and no device holds what is not its
part."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.errors import UserError
from gpt_jax.model.forward import forward, init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.model.kernels import causal_attention, causal_by_mask, causal_by_splash
from gpt_jax.placement import MeshPlacement, Placement, choose_placement, mesh_array
from gpt_jax.run.checkpoint import Checkpoints
from gpt_jax.run.checksums import checksum
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import StepMetrics, TrainState, init_state, make_eval_step, make_train_step
from tests import tiny
from tests.cases import EXHAUSTIVE, cases
from tests.packed import random_batch, random_documents

# A loss_chunk of 40, so that the loss goes over several chunks.
SIZES: dict[str, Any] = {"vocab_size": 85, "vocab_multiple": 88, "d_model": 64, "loss_chunk": 40}
GPT2 = dataclasses.replace(tiny.GPT2, **SIZES, n_head=8)
LLAMA = dataclasses.replace(tiny.LLAMA, **SIZES, n_layer=3, n_head=16, n_kv_head=8, d_ff=96, unroll=False)
GEMMA = dataclasses.replace(
    LLAMA,
    window=8,
    window_pattern="ssf",
    n_layer=4,  # So that the scan leaves a layer over.
    post_norm=True,
    qk_norm=True,
    activation="gelu_tanh",
    scale_embeddings=True,
    tied_head=True,
)
MODELS = {"gpt2": GPT2, "llama": LLAMA}
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (2, 2, 1, 2), (4, 2, 1, 1), (1, 1, 8, 1), (1, 2, 2, 2)]
FEW = [("gpt2", (1, 2, 2, 2)), ("llama", (2, 2, 1, 2)), ("gpt2", None)]  # Which stand for all.
BATCH, STEPS, SEED = 16, 5, 3
# Steps large enough for a wrong gradient to show, eps large enough for Adam not to blow up the rounding of tiny ones.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, eps=1e-4)


def placement(mesh: tuple[int, int, int, int] | None, model: ModelConfig, n_devices: int = 8) -> Placement:
    config = ParallelConfig() if mesh is None else ParallelConfig(0, *mesh)
    return choose_placement(config, model, jax.devices()[: n_devices if mesh is None else int(np.prod(mesh))])


class Run:
    """A model, its step and its state on some devices."""

    def __init__(self, config: ModelConfig, on: Placement) -> None:
        self.on, self.model = on, GPT(config)
        self.optimizer = make_optimizer(OPTIMIZER, STEPS)
        schedule = learning_rate_schedule(OPTIMIZER, STEPS)
        step = make_train_step(next_token, self.model, self.optimizer, schedule, SEED, on.axis_name)
        self.step = on.jit(step, donate=True)
        self.state: TrainState = on.make(self.first_state)

    def first_state(self) -> TrainState:
        return init_state(self.model, self.optimizer, SEED)

    def batch(self, step: int, n_micro: int = 1) -> Batch:
        rng = np.random.default_rng(step)
        shape = (BATCH, self.model.config.context_length + 1)
        rows = rng.integers(0, self.model.config.vocab_size, shape, dtype=np.int32)
        return self.on.split(Batch(rows[self.on.rows(BATCH, n_micro)]), n_micro)

    def train(self, n_micro: int = 1) -> tuple[TrainState, list[StepMetrics]]:
        metrics = []
        for step in range(STEPS):
            self.state, m = self.step(self.state, self.batch(step, n_micro))
            jax.block_until_ready(self.state)
            metrics.append(jax.device_get(m))
        return jax.device_get(self.state), metrics


def assert_same(ours: tuple[TrainState, list[StepMetrics]], expected: tuple[TrainState, list[StepMetrics]]) -> None:
    """Equal within 1e-5: loss and gradient norm of every step; parameters and the moments of the gradients after it."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)


@functools.cache
def trained_alone(config: ModelConfig) -> tuple[TrainState, list[StepMetrics]]:
    """What becomes of a model on one device. Not to be called with kernels that are patched."""
    return Run(config, placement(None, config, n_devices=1)).train()


@pytest.mark.parametrize(
    ("name", "mesh"),
    cases(itertools.product(MODELS, [*MESHES, None]), FEW),
    ids=str,
)
def test_every_mesh_and_pmap_agree_with_one_device(
    name: str, mesh: tuple[int, int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MODELS[name]
    expected = trained_alone(config)
    if mesh and mesh[2] > 1:
        monkeypatch.setattr("gpt_jax.model.kernels.QUERY_BLOCK", 6)  # Several, of which the last is not whole.
    run = Run(config, placement(mesh, config))
    first = jax.device_get(run.state.params["tokens_VD"])
    ours = run.train()
    assert_same(ours, expected)
    assert str(run.on).startswith("pmap" if mesh is None else "mesh")
    assert not np.allclose(ours[0].params["tokens_VD"], first, atol=1e-3)  # Something was learnt.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "unroll"), cases([("none", True), ("full", False), ("dots", True)], standing=[("full", False)])
)
def test_microbatches_dropout_and_rematerialisation_agree(remat: Any, unroll: bool) -> None:
    config = dataclasses.replace(GPT2, dropout=0.2)
    other = dataclasses.replace(config, remat=remat, unroll=unroll)
    assert_same(Run(other, placement((2, 2, 1, 2), other)).train(n_micro=2), trained_alone(config))
    # The one that drops weights where sequences are divided. It draws those of all queries at one time.
    of_parts = dataclasses.replace(other, attention="xla")
    expected = trained_alone(dataclasses.replace(config, attention="xla"))
    assert_same(Run(of_parts, placement((1, 2, 2, 2), of_parts)).train(n_micro=2), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "unroll"),
    cases(itertools.product([(2, 2, 1, 2), (2, 1, 4, 1)], [True, False]), standing=[((2, 1, 4, 1), False)]),
)
def test_windows_and_norms_of_heads_agree(
    mesh: tuple[int, int, int, int], unroll: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(GEMMA, unroll=unroll)
    expected = trained_alone(config)
    if mesh[2] > 1:
        monkeypatch.setattr("gpt_jax.model.kernels.QUERY_BLOCK", 3)
    assert_same(Run(config, placement(mesh, config)).train(), expected)


@pytest.mark.parametrize("window", [0, pytest.param(40, marks=EXHAUSTIVE)])
@pytest.mark.parametrize("shape", [(2, 2, 1, 2), pytest.param((1, 2, 2, 2), marks=EXHAUSTIVE), (1, 1, 8, 1)])
def test_a_kernel_works_on_the_heads_of_its_device(
    rng: np.random.Generator, shape: tuple[int, int, int, int], window: int
) -> None:
    """Splash, interpreted, on a mesh: what plain attention gives, with its gradients."""
    mesh = placement(shape, GPT2).mesh
    q, k, v, out = (rng.standard_normal((4, 128 * shape[2], heads, 64), np.float32) for heads in (4, 2, 2, 4))
    splash = functools.partial(causal_by_splash, window=window, interpret=True)

    def loss(attend: Any, *qkv: jax.Array) -> jax.Array:
        return jnp.vdot(attend(*qkv), out)

    plain = functools.partial(causal_by_mask, window=window, dropout_rate=0, keys_B=None)
    expected = jax.jit(jax.grad(functools.partial(loss, plain), argnums=(0, 1, 2)))(q, k, v)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(lambda *qkv: loss(splash, *qkv), argnums=(0, 1, 2)))(q, k, v)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "shape"),
    [
        ("xla", (1, 2, 2, 2)),
        ("block_causal", (1, 2, 2, 2)),
        ("block_causal", (2, 2, 1, 2)),
        ("splash", (1, 2, 2, 2)),
        ("cudnn", (2, 2, 1, 2)),
    ],
)
def test_segments_that_are_divided_are_those_of_one_device(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, attention: Any, shape: tuple[int, int, int, int]
) -> None:
    """By every attention, Splash interpreted and cuDNN's computed by XLA: the gradients of the plain mask."""
    monkeypatch.setattr("gpt_jax.model.kernels.QUERY_BLOCK", 48)
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_xla(jax.nn.dot_product_attention))
    config = dataclasses.replace(GPT2, attention=attention)
    q, k, v, out = (rng.standard_normal((4, 256, heads, 64), np.float32) for heads in (4, 2, 2, 4))
    segments, _ = random_documents(rng, 4, 256)

    def attend(q: Any, k: Any, v: Any) -> jax.Array:
        if attention == "splash":
            return causal_by_splash(q, k, v, 40, jnp.asarray(segments), interpret=True)
        return causal_attention(q, k, v, config, 40, segments_BT=jnp.asarray(segments))

    def gradients(attend: Any) -> Any:
        return jax.jit(jax.grad(lambda *qkv: jnp.vdot(attend(*qkv), out), argnums=(0, 1, 2)))(q, k, v)

    plain = functools.partial(causal_by_mask, window=40, dropout_rate=0, keys_B=None, segments_BT=jnp.asarray(segments))
    expected = gradients(plain)
    with jax.set_mesh(placement(shape, GPT2).mesh):
        found = gradients(attend)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def as_xla(attend: Any) -> Any:
    """JAX's attention, computed by XLA whatever is asked for."""
    return lambda *qkv, **options: attend(*qkv, **{**options, "implementation": "xla"})


@pytest.mark.parametrize(
    ("name", "mesh", "n_micro"),
    [
        ("gpt2", (1, 2, 2, 2), 2),
        pytest.param("llama", (2, 1, 2, 2), 1, marks=EXHAUSTIVE),
        ("llama", None, 2),
    ],
)
def test_packed_documents_agree(name: str, mesh: tuple[int, int, int, int] | None, n_micro: int) -> None:
    """Steps on batches with masks, segments and positions, on a mesh and under pmap; the last has no target."""
    config = MODELS[name]

    def train(on: Placement, n_micro: int) -> tuple[TrainState, list[StepMetrics]]:
        run, rows, metrics = Run(config, on), on.rows(BATCH, n_micro), []
        for step in range(2):
            batch = random_batch(np.random.default_rng(step), BATCH, config.context_length, config.vocab_size)
            batch = on.split(jax.tree.map(lambda x: x[rows], batch), n_micro)
            run.state, m = run.step(run.state, batch)
            jax.block_until_ready(run.state)
            metrics.append(jax.device_get(m))
        empty = batch._replace(mask=jnp.zeros_like(batch.mask))
        state, m = run.step(run.state, empty)  # Changes nothing.
        assert (float(m.loss), float(m.grad_norm)) == (0, 0)
        return jax.device_get(state), metrics

    assert_same(train(placement(mesh, config), n_micro), train(placement(None, config, n_devices=1), 1))


def test_a_mesh_tells_its_shape() -> None:
    assert str(placement((4, 2, 1, 1), GPT2)) == "mesh data 4 x fsdp 2 x tensor 1"
    assert str(placement((1, 2, 2, 2), GPT2)) == "mesh data 1 x fsdp 2 x context 2 x tensor 2"


def test_devices_of_several_hosts_or_slices_are_taken_in_order() -> None:
    """What the last axis divides stays within a host, whatever the order in which the devices are given."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        process_index: int
        slice_index: int
        platform: str = "cuda"

    devices = [Device(id=i, process_index=i // 4, slice_index=i // 4) for i in range(8)]
    mesh = mesh_array(devices[::-1], (2, 2, 1, 2))
    assert [[d.process_index for d in group.ravel()] for group in mesh] == [[0] * 4, [1] * 4]
    assert [d.id for d in mesh.ravel()] == list(range(8))


@pytest.mark.slow
def test_adapters_agree() -> None:
    """Those of all matrices, beside a base that is divided, too."""
    config = dataclasses.replace(LLAMA, lora=LoraConfig(rank=4))
    base = jax.device_get(tiny.initial_params(LLAMA))

    def train(mesh: tuple[int, int, int, int] | None) -> tuple[TrainState, list[StepMetrics]]:
        run = Run(config, placement(mesh, config, n_devices=1))
        frozen = jax.device_put(base, run.on.state_shardings(base))
        run.state = run.state._replace(frozen=frozen)
        return run.train()

    expected = train(None)
    for mesh in ((2, 2, 1, 2), (1, 2, 4, 1)):
        ours = train(mesh)
        assert_same((ours[0]._replace(frozen={}), ours[1]), (expected[0]._replace(frozen={}), expected[1]))


def bytes_on(device: jax.Device, tree: Any) -> int:
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device]
    return sum(s.data.nbytes for s in shards)


@pytest.mark.parametrize("mesh", [pytest.param((1, 8, 1, 1), marks=EXHAUSTIVE), (1, 2, 4, 1)])
def test_an_eighth_of_the_state_is_on_each_of_eight_devices(mesh: tuple[int, int, int, int]) -> None:
    """Within 5%, before and after a step, of a model of the usual shape; and the state comes back as it was divided."""
    config = dataclasses.replace(LLAMA, d_model=128, d_ff=512, n_layer=4)
    run = Run(config, placement(mesh, config))
    whole = sum(x.nbytes for x in jax.tree.leaves(run.state))
    shardings = jax.tree.map(lambda x: x.sharding, run.state)
    for _ in range(2):
        for device in jax.devices():
            assert bytes_on(device, run.state) == pytest.approx(whole / 8, rel=0.05)
        run.state, _ = run.step(run.state, run.batch(0))
    equivalent = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), run.state, shardings)
    assert all(jax.tree.leaves(equivalent))


def largest_buffer(program: str | None) -> int:
    """Elements of the largest array in the text of a compiled program."""
    assert program is not None
    shapes = re.findall(r"\b(?:f32|u32|s32|bf16)\[([\d,]*)\]", program)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes if shape)


@pytest.mark.parametrize("mesh", [pytest.param((1, 8, 1, 1), marks=EXHAUSTIVE), (1, 2, 4, 1)])
def test_no_device_ever_has_a_whole_matrix_at_the_beginning_and_in_checksums(mesh: tuple[int, int, int, int]) -> None:
    config = dataclasses.replace(LLAMA, d_model=128, d_ff=512, n_layer=4)
    run = Run(config, placement(mesh, config))
    largest = max(x.size for x in jax.tree.leaves(run.state))
    shardings = run.on.state_shardings(jax.eval_shape(run.first_state))
    init = jax.jit(run.first_state, out_shardings=shardings).lower().compile()
    sums = [checksum.lower(leaf).compile() for leaf in jax.tree.leaves(run.state) if leaf.size > largest / 8]
    for program in (init, *sums):
        assert largest_buffer(program.as_text()) <= largest / 8


def test_logits_are_never_gathered() -> None:
    """No array in the program has all of the vocabulary, but for what is as wide as the model."""
    config = dataclasses.replace(LLAMA, vocab_multiple=104)
    run = Run(config, placement((2, 2, 1, 2), config))
    program = run.step.lower(run.state, run.batch(0)).compile().as_text()
    with_vocabulary = set(re.findall(r"f32\[[\d,]*\b104\b[\d,]*\]", program))
    assert with_vocabulary == set()
    assert re.search(r"f32\[[\d,]*\b52\b[\d,]*\]", program)  # Half of it, on each of two devices.


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "block_causal"])
def test_a_long_sequence_takes_each_device_a_part_of_the_memory(
    attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eighth of its tokens is all that there is of it on a device, but for ids, and for keys and values."""
    config = dataclasses.replace(LLAMA, context_length=1024, n_kv_head=8, d_head=8, d_ff=192, attention=attention)
    step = {}
    for name, mesh in {"whole": (1, 1, 1, 1), "parts": (1, 1, 8, 1)}.items():
        if name == "parts":  # The whole has larger blocks, since each takes a part of a second to compile.
            monkeypatch.setattr("gpt_jax.model.kernels.QUERY_BLOCK", 16)
        run = Run(config, placement(mesh, config))
        batch = run.on.split(Batch(np.zeros((1, 1025), np.int32)), 1)
        step[name] = run.step.lower(run.state, batch).compile()
    temporaries = {name: program.memory_analysis().temp_size_in_bytes for name, program in step.items()}
    assert temporaries["parts"] < temporaries["whole"] / 4
    shapes = [shape.split(",") for shape in re.findall(r"f32\[([\d,]+)\]", step["parts"].as_text())]
    assert ["1", "1024", "8", "8"] in shapes  # Keys and values.
    assert not any("1024" in shape and {"64", "192"} & {*shape} for shape in shapes)  # Hidden states.
    scores_of_all_layers = any(shape[0] == "3" and shape[-2:] in (["128", "1024"], ["16", "1024"]) for shape in shapes)
    assert scores_of_all_layers == (attention == "xla")


def test_gathered_keys_are_not_kept_for_the_backward_pass() -> None:
    """Of no layer, though Splash wants them in another order; nor anything else of which each device would have all."""
    config = dataclasses.replace(LLAMA, context_length=1024, n_head=8, d_head=8, attention="splash", unroll=True)
    model = GPT(config)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def kept(params: Any) -> Any:
        return jax.vjp(lambda p: forward(model, p, jnp.zeros((2, 1024), jnp.int32)), params)[1]

    with jax.set_mesh(placement((1, 1, 8, 1), config).mesh):
        sizes = [x.size for x in jax.tree.leaves(jax.eval_shape(kept, params))]
    assert 2 * 1024 * config.ff_dim in sizes
    assert 8 * (2 * 1024 * 8 * 8) not in sizes


def test_gradients_of_keys_are_added_up_in_float32(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the blocks of queries: the sum of many, taken in bfloat16, would lose what is small."""
    monkeypatch.setattr("gpt_jax.model.kernels.QUERY_BLOCK", 2)
    config = dataclasses.replace(GPT2, attention="block_causal", dtype="bfloat16")
    q, k, v, out = (jnp.asarray(rng.standard_normal((1, 1024, 2, 16)), jnp.bfloat16) for _ in range(4))

    def gradients(attend: Any, *qkv: jax.Array) -> Any:
        return jax.grad(lambda *qkv: jnp.vdot(attend(*qkv), out).astype(jnp.float32), argnums=(1, 2))(*qkv)

    plain = functools.partial(causal_by_mask, window=0, dropout_rate=0, keys_B=None)
    expected = jax.jit(functools.partial(gradients, plain))(*(x.astype(jnp.float32) for x in (q, k, v)))
    with jax.set_mesh(placement((1, 1, 8, 1), config).mesh):
        found = jax.jit(functools.partial(gradients, functools.partial(causal_attention, config=config)))(q, k, v)
    for ours, exact in zip(found, expected, strict=True):
        assert jnp.linalg.norm(ours.astype(jnp.float32) - exact) < 0.005 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(
    "mesh", [(1, 8, 1, 1), *(pytest.param(m, marks=EXHAUSTIVE) for m in ((2, 1, 2, 2), None))], ids=str
)
def test_a_checkpoint_of_one_placement_is_restored_by_another(tmp_path: Path, mesh: Any) -> None:
    run = Run(GPT2, placement((4, 2, 1, 1), GPT2))
    meta: dict[str, Any] = {"config": {}, "tokenizer": "", "data": ""}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, run.state.params, run.state.opt_state, meta, None)
    other = placement(mesh, GPT2)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        params = checkpoints.restore(1, "params", other.abstract(jax.eval_shape(run.first_state).params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(run.state.params))
    expected = other.checkpoint_shardings(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, params, expected)))


def test_evaluation_agrees(rng: np.random.Generator) -> None:
    tokens = rng.integers(0, GPT2.vocab_size, (8, 33), dtype=np.int32)
    mask = rng.random((8, 32)) < 0.5
    sums = []
    for on in (placement(None, GPT2, n_devices=1), placement((2, 1, 2, 2), GPT2)):
        run = Run(GPT2, on)
        eval_step = on.jit(make_eval_step(next_token, run.model, on.axis_name), donate=False)
        rows = on.rows(8)
        sums.append(jax.device_get(eval_step(run.state.params, on.split(Batch(tokens[rows], mask[rows])))))
    np.testing.assert_allclose(sums[1][:2], sums[0][:2], rtol=1e-5)


@pytest.mark.parametrize("mesh", [(2, 1, 2, 2), None], ids=str)
def test_each_replica_of_a_state_is_found_where_it_is(mesh: tuple[int, int, int, int] | None) -> None:
    run = Run(LLAMA, placement(mesh, LLAMA, n_devices=2))
    size = 1 if mesh is None else 4
    replicas = run.on.replicas(run.state.params)
    assert list(replicas) == [0, 1]
    for number, params in replicas.items():
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(run.state.params))
        devices = set(jax.devices()[number * size : (number + 1) * size])
        assert all(x.devices() == devices for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("mesh", "model", "message"),
    [
        ((2, 2, 1, 1), GPT2, "parallel.data x fsdp x context x tensor = 2 x 2 x 1 x 1 = 4, but there are 8 devices"),
        ((0, 3, 1, 1), GPT2, "parallel.data x fsdp x context x tensor = 2 x 3 x 1 x 1 = 6, but there are 8 devices"),
        (
            (1, 1, 1, 8),
            dataclasses.replace(LLAMA, n_kv_head=4),
            "key/value heads, 4, does not divide over parallel.tensor",
        ),
        (
            (1, 1, 8, 1),
            dataclasses.replace(GPT2, context_length=30),
            "context_length, 30, does not divide over parallel.",
        ),
        ((1, 1, 1, 8), dataclasses.replace(LLAMA, d_ff=100), "feed-forward width, 100, does not divide"),
        (
            (1, 1, 1, 8),
            dataclasses.replace(GPT2, vocab_multiple=1),
            "vocabulary, 85, does not divide over parallel.tensor",
        ),
        (
            (1, 8, 1, 1),
            dataclasses.replace(GPT2, n_head=1, d_model=60),
            "model.d_model, 60, does not divide over parallel.",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: tuple[int, int, int, int], model: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        MeshPlacement(jax.devices(), ParallelConfig(0, *mesh), model)
