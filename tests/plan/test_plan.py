"""Plans: what formulas and programs tell, and, where libtpu is, that whole training steps compile for TPUs."""

import dataclasses
import importlib.util
import re
from collections import Counter

import jax
import numpy as np
import pytest

from gpt_jax.config import Config, DataConfig, LoraConfig, ModelConfig, ParallelConfig, load_config
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import choose_placement
from gpt_jax.plan import estimate
from gpt_jax.plan.planner import Planner
from gpt_jax.plan.program import Program, abstract_state, collectives, compile_step, out_of_memory
from gpt_jax.plan.report import describe
from gpt_jax.plan.targets import parse_target
from tests.commands import ROOT, refused, run

MODEL = ModelConfig(
    vocab_size=256, context_length=128, n_layer=4, n_head=8, d_model=64, dtype="float32", attention="block_causal"
)
CONFIG = Config(model=MODEL, data=DataConfig(batch_size=32))


@pytest.mark.parametrize(
    ("name", "n_devices", "topology"),
    [("v5e-16", 16, "4x4"), ("v5p-32", 16, "2x2x4"), ("v6e-8", 8, "2x4"), ("v4-8", 4, "2x2x1"), ("H100x8", 8, "")],
)
def test_targets(name: str, n_devices: int, topology: str) -> None:
    """A v5p's or v4's number counts cores, two a chip."""
    target = parse_target(name)
    assert (target.n_devices, target.topology) == (n_devices, topology)
    assert target.chip.peak > 1e14


@pytest.mark.parametrize("name", ["v5e", "v5e-3", "v9-4", "h100-8", "v5ex4", "h100x0", ""])
def test_targets_that_are_not_there(name: str) -> None:
    with pytest.raises(UserError, match="there is no"):
        parse_target(name)


@pytest.mark.parametrize(
    "parallel", [pytest.param(ParallelConfig(fsdp=8), marks=pytest.mark.exhaustive), ParallelConfig(fsdp=4, context=2)]
)
@pytest.mark.parametrize("n_micro", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_formula_and_program_agree_on_what_is_gathered(n_micro: int, parallel: ParallelConfig) -> None:
    """The kernels of scanned layers, and keys and values of divided sequences, for the forward and the backward pass of
    each microbatch: loops count as often as they turn."""
    config = dataclasses.replace(
        CONFIG,
        parallel=parallel,
        data=DataConfig(batch_size=4 * parallel.fsdp, microbatch_size=4 // n_micro),
        model=dataclasses.replace(MODEL, remat="full", unroll=False),
    )
    model = GPT(config.model)
    placement = choose_placement(config.parallel, config.model, jax.devices())
    formula = estimate.traffic(config.model, estimate.sizes_of(model, config, placement), 8)["all-gather"]
    program = compile_step(model, config, placement)
    assert program.traffic["all-gather"].bytes == pytest.approx(formula.bytes, rel=0.1)
    assert not program.unknown


ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
"""


def test_collectives_of_a_text() -> None:
    text = """HloModule step

%all-reduce-scatter.1 (input: f32[64,8]) -> f32[8,8] {
  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}

%condition (x: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather-start.3 = (bf16[8]{0}, bf16[64]{0}) all-gather-start(%p), channel_id=1, dimensions={0}
  %all-gather-done.3 = bf16[64]{0} all-gather-done(%all-gather-start.3)
  %fusion.1 = f32[8,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

%branch (y: s64[4]) -> s64[4] {
  %permuted = s64[4]{0} collective-permute(%y), channel_id=5, source_target_pairs={{0,1}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%tuple), condition=%condition, body=%body
  %while.2 = f32[8] while(%x), condition=%unclear, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %all-reduce.2 = (f32[], f32[3,5]{1,0}) all-reduce(%a, %b), to_apply=%add
  %chosen = s64[4] conditional(%i, %y, %y), branch_computations={%branch, %add}
}
"""
    traffic, unknown = collectives(ADD + text)
    assert {kind: (t.count, t.bytes) for kind, t in traffic.items()} == {
        "all-gather": (14, 14 * 128),
        "all-reduce": (1, 64),
        "reduce-scatter": (14, 14 * 2048),
        "collective-permute": (1, 32),
    }
    assert not unknown


def test_what_is_not_understood_in_a_text_is_told() -> None:
    """An operation of a new name, one in a loop of unknown length, one in a computation that is elsewhere."""
    text = """%somewhere (x: f32[8]) -> pred[] {
}

%body (x: f32[8]) -> f32[8] {
  %sum = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = f32[8] while(%x), condition=%somewhere, body=%body
  %cast = f32[8]{0} collective-broadcast(%x), channel_id=1, replica_groups={{0,1}}
  %sent = (f32[8], u32[], token[]) send(%x, %token), channel_id=2
  %done = token[] send-done(%sent), channel_id=2
  %call = f32[8] fusion(%x), calls=%elsewhere
}
"""
    traffic, unknown = collectives(ADD + text)
    assert (traffic["all-reduce"].count, traffic["all-reduce"].bytes) == (1, 32)
    assert unknown == {
        "collective-broadcast": 1,
        "send": 1,
        "computation that is not in the text": 1,
        "loop of which the number of iterations is not told": 1,
    }
    assert collectives("stablehlo.all_reduce") == ({}, {"computation that is not in the text": 1})


@pytest.mark.parametrize(
    ("target", "text", "unknown", "expected"),
    [
        ("v5e-4", "a text", {}, r"1 all-reduce \([\d.]+ GB\), by formula: in the compiler's text none was found"),
        ("v5e-4", "a text", {"send": 3}, r"none was found; not counted, since it is not understood: 3 send"),
        ("v5e-1", "a text", {}, "none"),
        ("v5e-4", "", {}, r"1 all-reduce \([\d.]+ GB\)"),  # It does not fit: there is no text.
    ],
)
def test_collectives_that_are_not_found_are_not_none(
    target: str, text: str, unknown: dict[str, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several devices exchange something in every step."""
    program = Program(1e6, 0 if text else 1e9, {}, text, Counter(unknown))
    monkeypatch.setattr("gpt_jax.plan.planner.compile_step", lambda *_: program)
    planner = Planner(CONFIG, parse_target(target), compiles=False)
    plan = planner.by_compiler(CONFIG)
    assert re.fullmatch(f".*{expected}", describe(plan, planner)["collectives a step"])
    assert (plan.bounds.network > 0) == (target == "v5e-4")


def test_activations_are_those_that_the_backward_pass_needs() -> None:
    """Recomputing all of a layer leaves its input; a product is kept once by `dots`; and nothing grows by itself."""
    full, dots, none = (
        estimate.activations(dataclasses.replace(MODEL, remat=remat)) for remat in ("full", "dots", "none")
    )
    tokens, D = MODEL.context_length, MODEL.d_model
    assert tokens * D * 4 * MODEL.n_layer <= full <= tokens * D * 4 * (MODEL.n_layer + 4)
    assert full < dots < none
    longer = dataclasses.replace(MODEL, context_length=256, remat="none")
    assert estimate.activations(longer) == pytest.approx(2 * none, rel=0.1)


def test_a_plan_by_formula() -> None:
    """Where there is no compiler; the faster way that fits is recommended, in the form of flags."""
    out, _ = run("plan", "configs/gpt2_xl.py", "--target=h100x8", "--parallel.fsdp=8")
    assert "8 x NVIDIA H100 80GB HBM3, by mesh data 1 x fsdp 8 x tensor 1" in out
    assert "1,557" in out
    assert re.search(r"how it is known +by formula\n", out)
    assert re.search(r"memory +[\d.]+ GiB of 71.64 GiB that can be used: fits", out)
    assert re.search(r"recommended: --data.microbatch-size \d+ --model.remat none", out)


def test_a_plan_that_does_not_fit_says_what_is_lacking() -> None:
    out, _ = run("plan", "configs/gpt2_xl.py", "--target=a100x2", "--model.n-layer=400", status=1)
    assert re.search(r"does NOT fit: [\d.]+ GiB a device are lacking", out)
    assert "recommended: none of what was tried fits" in out


def test_a_plan_for_adapters_counts_the_model_beside_them() -> None:
    config = dataclasses.replace(
        CONFIG,
        init_from="a model",
        model=dataclasses.replace(MODEL, lora=LoraConfig(rank=4)),
        data=DataConfig(batch_size=8),
    )
    planner = Planner(config, parse_target("h100x8"), compiles=False)
    plan = planner.by_formula(config)
    assert plan.sizes.frozen == MODEL.n_params * 4
    assert plan.sizes.params < plan.sizes.frozen / 4
    assert "that are not trained" in describe(plan, planner)["parameters"]
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    assert planner.by_formula(full).bounds.flops == pytest.approx(1.5 * plan.bounds.flops)
    placement = choose_placement(config.parallel, config.model, jax.devices())
    assert compile_step(planner.model(config), config, placement).temporaries > 0


def test_tensor_parallelism_leaves_the_residual_stream_whole() -> None:
    for remat, most in (("full", 1.0), ("none", 0.9)):
        config = dataclasses.replace(MODEL, remat=remat)  # type: ignore[arg-type]
        share = estimate.activations(config, 4) / estimate.activations(config)
        assert 0.25 < share <= most
        assert (share == 1) == (remat == "full")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target=v5e-5"], "there is no slice 'v5e-5' among those known here; there are v5e-1, v5e-4"),
        (["--target=h100x8", "--parallel.fsdp=3"], "but there are 8 devices"),
        (["--target=h100x8", "--data.batch-size=12"], "data.batch_size = 12 does not divide over 8 devices"),
        (["nowhere.py", "--target=h100x8"], "no configuration file nowhere.py"),
    ],
)
def test_impossible_plans(args: list[str], message: str) -> None:
    assert message in refused("plan", *args)


def test_the_compilers_word_on_memory_is_understood() -> None:
    G = 2**30
    told = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded by 4.50G."
    program = out_of_memory(ValueError(told), state_bytes=2 * G)
    assert (program.temporaries, program.lacking) == (18.25 * G, 4.5 * G)
    told = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (57.25G) exceeds "
        "available HBM (15.75G)."
    )
    program = out_of_memory(ValueError(told), state_bytes=2 * G)
    assert (program.temporaries, program.lacking) == (57.25 * G, 43.5 * G)
    with pytest.raises(UserError, match="does not compile: something else"):
        out_of_memory(ValueError("something else\nand more"), 0)


def test_libtpu_that_serves_another_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> None:
        raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", busy)
    with pytest.raises(UserError, match="another process is using libtpu"):
        parse_target("v5e-4").devices()


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'tpu'")

GPT2_124M = ModelConfig(vocab_size=50304, unroll=False)
GPT2_XL = dataclasses.replace(GPT2_124M, n_layer=48, n_head=25, d_model=1600, remat="full")
LLAMA_7B = load_config(ROOT / "configs" / "llama2_7b.py")
TPU_PLANS = {
    "v5e-4": Config(model=GPT2_124M, data=DataConfig(batch_size=32)),
    "v5e-16": Config(model=GPT2_XL, data=DataConfig(batch_size=64), parallel=ParallelConfig(fsdp=16)),
    "v5p-32": LLAMA_7B,
    "v5p-16": dataclasses.replace(
        LLAMA_7B,
        model=dataclasses.replace(LLAMA_7B.model, context_length=32_768),
        data=DataConfig(batch_size=2),
        parallel=ParallelConfig(fsdp=2, context=4),
    ),
}


@needs_libtpu
@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", TPU_PLANS)
def test_a_training_step_compiles_for_a_slice_and_fits_it(target: str) -> None:
    """GPT-2 124M by pmap, GPT-2 XL divided over 16, a Llama of 7 billion over 8 x 2, and its sequences, when they are
    long, over 4; Splash attention in each."""
    config = TPU_PLANS[target]
    planner = Planner(config, parse_target(target), compiles=True)
    plan = planner.by_compiler(config)
    assert plan.program.lacking == 0
    assert "tpu_custom_call" in plan.program.text  # Splash's kernels.
    assert planner.model_config.attention == "splash"
    state = abstract_state(planner.model(config), config)
    whole = sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(state.params))
    parallel = config.parallel
    parts = max(1, parallel.fsdp) * max(1, parallel.context) * max(1, parallel.tensor)
    assert plan.sizes.params == pytest.approx(whole / parts, rel=0.05)
    assert plan.program.traffic["all-reduce"].count > 0
    assert plan.program.counted
    assert not plan.program.unknown
    if parallel.fsdp:
        by_formula = estimate.traffic(planner.model(config).config, plan.sizes, planner.target.n_devices)
        assert plan.program.traffic["all-gather"].bytes == pytest.approx(by_formula["all-gather"].bytes, rel=0.05)
    rows = describe(plan, planner)
    assert "fits" in rows["memory"]
    assert "libtpu" in rows["how it is known"]


@needs_libtpu
@pytest.mark.libtpu
@pytest.mark.slow
def test_a_step_that_cannot_fit_is_reported_with_what_it_lacks() -> None:
    config = dataclasses.replace(TPU_PLANS["v5e-4"], data=DataConfig(batch_size=256))
    planner = Planner(config, parse_target("v5e-4"), compiles=True)
    plan = planner.by_compiler(config)
    assert plan.program.lacking > 2**30
    assert re.search(r"does NOT fit: [\d.]+ GiB a device are lacking", describe(plan, planner)["memory"])
