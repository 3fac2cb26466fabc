"""A run that was killed, stopped or moved to other devices goes on as if nothing had happened."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt_jax.config import load_saved_config
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import Placement
from gpt_jax.run.checkpoint import Checkpoints
from gpt_jax.train.optimizer import make_optimizer
from gpt_jax.train.step import init_state
from gpt_jax.train.stop import StopSignals
from tests.commands import TINY, records, run, run_here, start
from tests.train.killed import kill_when, train_killed

STEPS = 300
NO_CHECKPOINTS = "--train.checkpoint-every=1000"
"""None but after the last step, or after a signal: thirty take twice as long as the steps do."""


def arguments(data: Path, *more: object) -> list[object]:
    return [
        *TINY,
        f"--data.dir={data}",
        f"--train.steps={STEPS}",
        "--train.eval-every=50",
        "--train.checkpoint-every=10",
        "--model.dropout=0.1",
        # The gradient of a key's bias is zero but for rounding, which Adam blows up to steps of full size: harmless,
        # but not the same on another number of devices.
        "--model.no-bias",
        "--parallel.devices=2",
        *more,
    ]


@pytest.fixture(scope="module")
def uninterrupted(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run("train", *arguments(tiny_data, f"--out-dir={out}"), NO_CHECKPOINTS)
    return out


def final_state(out: Path) -> Any:
    """Parameters and optimizer state of the last checkpoint."""
    config = load_saved_config(out / "config.json")
    model = GPT(resolve(config.model, "cpu"))
    target = jax.eval_shape(lambda: init_state(model, make_optimizer(config.optimizer, config.train.steps), 0))
    placement = Placement(jax.devices()[:1])
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == config.train.steps
        return [
            checkpoints.restore(config.train.steps, item, placement.abstract(getattr(target, item)))
            for item in ("params", "opt_state")
        ]


def losses(out: Path) -> list[tuple[Any, ...]]:
    """All that is logged, but for how long it took."""
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"], r["tokens"], r.get("val_loss")) for r in records(out)]


def assert_same(out: Path, expected: Path) -> None:
    """Everything that was logged, and the state after the last step, bit for bit."""
    assert losses(out) == losses(expected)
    assert len(losses(out)) == STEPS
    jax.tree.map(np.testing.assert_array_equal, final_state(out), final_state(expected))


@pytest.mark.slow
def test_ten_times_killed_and_resumed_is_bit_for_bit_the_same(
    tiny_data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    for out in train_killed(tmp_path, arguments(tiny_data), 25, NO_CHECKPOINTS):
        assert_same(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_a_signal_saves_and_ends_and_the_run_goes_on(
    tiny_data: Path, uninterrupted: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    out = tmp_path / "stopped"
    process = start("train", *arguments(tiny_data, f"--out-dir={out}"), NO_CHECKPOINTS)
    assert kill_when(process, lambda: any(step >= 60 for step, *_ in losses(out)), signum)
    assert process.returncode == 128 + signum
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        assert 60 <= checkpoints.steps()[-1] < STEPS
    stdout, _ = run("train", "--resume", f"--out-dir={out}")  # The rest of the configuration is the run's own.
    assert "resuming after step" in stdout
    assert_same(out, uninterrupted)


IN_C = "import ctypes; mutex = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock"
"""Defines `lock(mutex)`, which at its second call never returns, and lets Python handle no signal: as compilers do."""


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_a_signal_before_the_first_step_ends_at_once(tiny_data: Path, tmp_path: Path, signum: signal.Signals) -> None:
    """While the step compiles, which takes minutes. There is nothing to save."""
    block = "(print('now', flush=True), lock(mutex), lock(mutex))"
    compiles = f"{IN_C}; from gpt_jax.train import loop; loop.Trace = lambda *_: {block}"
    process = start("train", *arguments(tiny_data, f"--out-dir={tmp_path / 'out'}"), first=compiles)
    assert process.stdout is not None
    assert "now\n" in iter(process.stdout.readline, "")
    process.send_signal(signum)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (128 + signum, "\ninterrupted\n")


def test_signals_are_taken_from_the_first_step_on_and_given_back() -> None:
    """And in another thread than the main one, where Python allows no handlers, they are left alone."""

    def handlers() -> list[object]:
        return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with StopSignals() as stop:
        assert handlers() == before
        assert stop.after(1) == 0
        assert handlers() == [stop.handle] * 2
        signal.raise_signal(signal.SIGTERM)
        assert stop.after(2) == signal.SIGTERM
        # What ends a process that does not notice a signal looks whether a handler that interrupts is in place.
        assert handlers() == [stop.handle] * 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert handlers() == before
    with StopSignals() as stop, ThreadPoolExecutor(1) as pool:
        assert pool.submit(stop.after, 1).result() == 0
        assert handlers() == before


@pytest.mark.slow
def test_resuming_on_another_number_of_devices(tiny_data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Begun on two, ended on one: within 1e-5."""
    out = tmp_path / "moved"
    process = start("train", *arguments(tiny_data, f"--out-dir={out}"), NO_CHECKPOINTS)
    assert kill_when(process, lambda: any(step >= 60 for step, *_ in losses(out)), signal.SIGTERM)
    run("train", "--resume", f"--out-dir={out}", "--parallel.devices=1")
    for ours, expected in zip(losses(out), losses(uninterrupted), strict=True):
        np.testing.assert_allclose(np.array(ours, float), np.array(expected, float), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        final_state(out),
        final_state(uninterrupted),
    )


def test_resuming_passes_over_damaged_checkpoints_and_says_so(tiny_data: Path, tmp_path: Path) -> None:
    """One with a byte changed in an array, and one whose facts are not whole."""
    out = tmp_path / "damaged"
    run_here("train", *arguments(tiny_data, f"--out-dir={out}"), "--train.steps=40", "--train.keep-checkpoints=3")
    largest = max((out / "checkpoints" / "40" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    meta = out / "checkpoints" / "30" / "meta" / "metadata"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "checksums": {}}))
    stdout, stderr = run_here("train", "--resume", f"--out-dir={out}")
    assert "checkpoints/40 is damaged: params" in stderr
    assert "checkpoints/30 is damaged: meta is not whole; going back to the one before" in stderr
    assert stderr.count("\n") == 2
    assert "resuming after step 20" in stdout
    assert [step for step, *_ in losses(out)] == list(range(1, 41))
    aside = next((out / "damaged").glob("40-*"))  # Kept, since it may be whole.
    assert (aside / largest.relative_to(out / "checkpoints" / "40")).read_bytes() == content
