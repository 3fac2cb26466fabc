"""How many CPU devices a run takes, and what a device can do at best."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from gpt_jax import runtime
from gpt_jax.config import Config, DataConfig, ModelConfig, ParallelConfig
from gpt_jax.runtime import choose_cpu_devices, peak_flops
from tests.commands import ROOT, TINY, records, run_here

SMALL = ModelConfig(vocab_size=100, n_layer=1, n_head=2, d_model=16)
LARGE = ModelConfig(vocab_size=50_304)  # 124 million parameters.


def config(model: ModelConfig, devices: int = 0, **data: Any) -> Config:
    return Config(model=model, data=DataConfig(**data), parallel=ParallelConfig(devices=devices))


@pytest.mark.parametrize(
    ("cores", "batch_size", "microbatch_size", "expected"),
    [
        (1, 32, 0, 1),
        (8, 32, 0, 8),
        (8, 12, 0, 6),
        (6, 32, 0, 4),  # Six devices cannot share 32 sequences equally.
        (8, 7, 0, 7),
        (4, 7, 0, 1),
        (8, 3, 0, 3),
        (8, 1, 0, 1),
        (8, 32, 8, 4),  # Each of four devices gets a microbatch of eight.
        (8, 24, 8, 3),
        (8, 12, 8, 1),  # No number of devices makes whole microbatches, which the run then says.
    ],
)
def test_a_small_model_takes_as_many_cores_as_divide_the_batch(
    monkeypatch: pytest.MonkeyPatch, cores: int, batch_size: int, microbatch_size: int, expected: int
) -> None:
    monkeypatch.setattr(runtime, "available_cores", lambda: cores)
    chosen = choose_cpu_devices(config(SMALL, batch_size=batch_size, microbatch_size=microbatch_size))
    assert chosen == expected


def test_a_large_model_takes_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available_cores", lambda: 8)
    assert choose_cpu_devices(config(LARGE, batch_size=32)) == 1


@pytest.mark.parametrize("model", [SMALL, LARGE], ids=["small", "large"])
def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, model: ModelConfig) -> None:
    monkeypatch.setattr(runtime, "available_cores", lambda: 8)
    for devices in (1, 3, 16):
        assert choose_cpu_devices(config(model, devices=devices, batch_size=32)) == devices


@pytest.mark.parametrize(
    ("device_kind", "tflops"),
    [
        # Google counts by the chip, which has two JAX devices in versions 2, 3 and 7.
        ("TPU v2", 22.5),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_peak_of_a_device_that_is_known(device_kind: str, tflops: float) -> None:
    assert peak_flops(device_kind) == pytest.approx(tflops * 1e12, rel=1e-12)


@pytest.mark.parametrize(
    "device_kind",
    [
        "",
        "cpu",
        "TPU",
        "TPU v4 lite",
        "TPU v55",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100 80GB PCIe MIG 3g.40gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A1000",
        "Tesla V100-SXM2-16GB",
    ],
)
def test_a_device_that_only_sounds_known_has_no_peak(device_kind: str) -> None:
    assert peak_flops(device_kind) is None


@pytest.mark.parametrize("name", runtime.MEMORY_FRACTION_VARIABLES)
def test_a_share_of_memory_that_the_user_sets_is_the_only_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """jaxlib refuses to start a GPU when both of its names are set."""
    for variable in runtime.MEMORY_FRACTION_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "0.5")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    runtime.setup()
    assert {v: os.environ.get(v) for v in runtime.MEMORY_FRACTION_VARIABLES if v in os.environ} == {name: "0.5"}


def test_settings_of_jax_that_change_numbers_have_no_say(tiny_data: Path, tmp_path: Path) -> None:
    """Training with dropout, sampling and evaluation, in a process of its own with such settings, give the same. They
    even are the same programs, which that process finds compiled."""

    def commands(out: Path) -> list[list[str]]:
        train = [*TINY, f"--data.dir={tiny_data}", "--train.steps=4", "--model.dropout=0.1", "--parallel.devices=1"]
        run = [f"--run={out}"]
        return [
            ["train", *train, f"--out-dir={out}"],
            ["sample", *run, "--json", "--max-new-tokens=8", "--top-k=9"],
            ["eval", *run, "--json"],
        ]

    ours = [run_here(*command)[0] for command in commands(tmp_path / "ours")]
    code = f"import json, sys; from gpt_jax import runtime; runtime.setup({jax.device_count()})\n"
    code += "from tests.commands import run_here\n"
    code += "print(json.dumps([run_here(*command)[0] for command in json.loads(sys.argv[1])]))"
    changed = {
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(jax.config.values["jax_disable_most_optimizations"])),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands(tmp_path / "theirs"))],
        cwd=ROOT,
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = [text.replace("theirs", "ours") for text in json.loads(done.stdout)]
    assert theirs[1:] == ours[1:]
    logged = [[(r["loss"], r["grad_norm"], r["lr"]) for r in records(tmp_path / name)] for name in ("ours", "theirs")]
    assert logged[0] == logged[1]
