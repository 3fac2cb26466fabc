"""A run on a GPU that goes on from a checkpoint, bit for bit, where XLA's programs are deterministic."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.commands import records, run, run_here
from tests.train.test_resume import final_state, losses

STEPS = 20


def test_a_run_goes_on_bit_for_bit(
    device: jax.Device, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint in its middle, with --xla_gpu_deterministic_ops=true, in processes of their own, since JAX
    reads the flag when it starts: the same as without the interruption. On CPU, programs always are deterministic."""
    gpu = device.platform != "cpu"
    command = run if gpu else run_here
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true")
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    out, _ = command(
        "train",
        f"--data.dir={tiny_data}",
        f"--out-dir={whole}",
        f"--train.steps={STEPS}",
        f"--train.eval-every={STEPS // 2}",
        "--train.log-every=1",
        "--data.batch-size=8",
        "--optimizer.warmup-steps=2",
        "--model.n-layer=2",
        "--model.n-head=2",
        "--model.d-model=128",
        "--model.context-length=64",
        "--parallel.devices=1",
    )
    assert ("bfloat16, attention xla (not cudnn: XLA_FLAGS ask" if gpu else "float32, attention block_causal") in out

    shutil.copytree(whole, interrupted)
    shutil.rmtree(interrupted / "checkpoints" / str(STEPS))
    out, _ = command("train", "--resume", f"--out-dir={interrupted}")
    assert f"resuming after step {STEPS // 2}" in out
    assert len(records(whole)) == STEPS
    assert losses(interrupted) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, final_state(interrupted), final_state(whole))
