"""What is reported is what was measured, by formulas that a reader can check."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.model.flops import flops_per_token
from gpt_jax.model.presets import GPT2
from gpt_jax.run.folder import RunFolder
from gpt_jax.run.records import RecordWriter, read_records
from gpt_jax.train import metrics as metrics_module
from gpt_jax.train.metrics import Recorder
from gpt_jax.train.step import StepMetrics

CONFIG = Config(
    model=ModelConfig(vocab_size=11, context_length=8, n_layer=1, n_head=1, d_model=4),
    data=DataConfig(batch_size=3),
    optimizer=OptimizerConfig(warmup_steps=1),
    train=TrainConfig(steps=100, log_every=2),
)
TOKENS_PER_STEP = 3 * 8


# FLOPs.


def product(n: float, k: int, m: int) -> float:
    """FLOPs of a matrix product (n, k) by (k, m): a multiplication and an addition each."""
    return 2 * n * k * m


def test_flops_are_those_of_the_matrix_products_layer_by_layer() -> None:
    V, T, D, F = 10, 8, 4, 24
    config = ModelConfig(vocab_size=V, context_length=T, n_layer=2, n_head=2, d_model=D, d_ff=F, bias=False)
    layer = (
        product(T, D, 3 * D)  # Queries, keys and values.
        + product(T / 2, D, T)  # Scores of all heads together: of the T x T, half are of the past.
        + product(T / 2, T, D)  # Their weighted sums of the values.
        + product(T, D, D)
        + product(T, D, F)
        + product(T, F, D)
    )
    forward = layer + layer + product(T, D, V)
    backward = 2 * forward  # One product for the gradient of each factor.
    # N also counts the scales of the five norms, which are no matrices.
    assert flops_per_token(config) == (forward + backward) / T + 6 * 5 * D


def test_flops_of_gpt2() -> None:
    T, D, V = 1024, 768, 50_304
    matrices = 12 * (3 * D * D + D * D + 4 * D * D + 4 * D * D) + V * D
    attention = 12 * 2 * (2 * D * T / 2)
    by_hand = 3 * (2 * matrices + attention)
    assert by_hand == 798_031_872
    # Biases and norms, a thousandth of the parameters, are the difference.
    np.testing.assert_allclose(flops_per_token(GPT2), by_hand, rtol=1e-3)
    assert flops_per_token(dataclasses.replace(GPT2, bias=False)) == by_hand + 6 * 25 * D


# Reading metrics.jsonl.


def test_a_full_disk_is_told_with_the_file_when_it_is_closed_too(tmp_path: Path) -> None:
    """Closing tries again to write what is left: its error must not hide the first one behind one without a name."""
    writer = RecordWriter(tmp_path / "metrics.jsonl", 0)
    writer.file.close()
    writer.file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    for fails in (lambda: writer.append({"step": 1}), writer.sync, writer.close):
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: "):
            fails()


def test_no_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 3, "lo',
        b"{",
        b"3\n",
        b"[3]\n",
        b"null\n",
        b'{"loss": 1.0}\n',
        b'{"step": "3"}\n',
        b'{"step": 3, "text": "\xff"}\n',
        b"\0\0\0\0",
    ],
)
@pytest.mark.parametrize("following", [b"", b'\n{"step": 4}\n'], ids=["at the end", "within"])
def test_records_end_at_the_first_line_that_is_not_whole(tmp_path: Path, damaged: bytes, following: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2}\n' + damaged + following)
    assert read_records(path) == [{"step": 1, "loss": 2.5}, {"step": 2}]


# Recording. Time passes where the test says so.


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module.time, "perf_counter", clock)
    return clock


class OnDevice:
    """A scalar that the host must wait for."""

    def __init__(self, clock: Clock, ready_at: float, value: float) -> None:
        self.clock, self.ready_at, self.value = clock, ready_at, value

    def __float__(self) -> float:
        self.clock.now = max(self.clock.now, self.ready_at)
        return self.value


class Device:
    """Computes one step after the other, each in some seconds, while the host goes on."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.busy_until = clock, clock.now

    def step(self, seconds: float, loss: float = 2.5, grad_norm: float = 0.5, **logged: Any) -> StepMetrics:
        self.busy_until = max(self.busy_until, self.clock.now) + seconds
        on_device = (OnDevice(self.clock, self.busy_until, value) for value in (loss, grad_norm, 1e-3))
        a, b, c = (cast(Any, value) for value in on_device)
        return StepMetrics(a, b, c, logged)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_records_are_written_when_due(tmp_path: Path, clock: Clock) -> None:
    config = dataclasses.replace(CONFIG, train=TrainConfig(steps=11, log_every=4))
    device = Device(clock)
    with Recorder(RunFolder(tmp_path), config, 0, None) as recorder:
        for step in range(1, 12):
            recorder.submit(step, device.step(1.0, loss=1 / step, grad_norm=step / 7, accuracy=step / 13))
            if step == 6:
                recorder.settle()
                recorder.add_evaluation(val_loss=1.25, val_bits_per_byte=0.75)
                assert recorder.val_loss(6) is None  # Not yet written.
                recorder.sync()
                assert recorder.val_loss(6) == 1.25
                assert recorder.val_loss(5) is None
    records = lines(tmp_path)
    assert [record["step"] for record in records] == [1, 4, 6, 8, 11]  # First, last, every fourth, and evaluations.
    for record in records:
        step = record["step"]
        assert (record["loss"], record["grad_norm"], record["lr"]) == (1 / step, step / 7, 1e-3)  # To the last digit.
        assert record["accuracy"] == step / 13  # What the objective reports.
        assert record["tokens"] == step * TOKENS_PER_STEP
        assert record["mfu"] is None
        assert ("val_loss" in record) == ("val_bits_per_byte" in record) == (step == 6)
    assert (records[2]["val_loss"], records[2]["val_bits_per_byte"]) == (1.25, 0.75)


def test_speed_is_the_mean_since_the_last_record(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    peak = 1e4
    device = Device(clock)
    with Recorder(RunFolder(tmp_path), CONFIG, 0, peak) as recorder:
        for step, seconds in enumerate((30.0, 1.0, 2.0, 3.0, 0.25, 0.75), 1):
            recorder.submit(step, device.step(seconds))
    assert "first step: 30.0 s, compilation included" in capsys.readouterr().out
    first, *others = lines(tmp_path)
    assert (first["step"], first["step_ms"], first["tokens_per_second"], first["mfu"]) == (1, None, None, None)
    assert [record["step_ms"] for record in others] == pytest.approx([1000, 2500, 500])
    for record in others:
        seconds = record["step_ms"] / 1000
        assert record["tokens_per_second"] * seconds == pytest.approx(TOKENS_PER_STEP)
        assert record["mfu"] == pytest.approx(TOKENS_PER_STEP / seconds * flops_per_token(CONFIG.model) / peak)


def test_the_device_works_while_the_host_reports(tmp_path: Path, clock: Clock) -> None:
    """Metrics are read one step late, so that time on the host is not added to that of a step."""
    device = Device(clock)
    with Recorder(RunFolder(tmp_path), CONFIG, 0, None) as recorder:
        for step in range(1, 42):
            metrics = device.step(1.0)
            clock.now += 0.9  # What the host has to do for a step, after it was dispatched.
            recorder.submit(step, metrics)
    # At first the host is ahead of the device; then it waits for it.
    assert [record["step_ms"] for record in lines(tmp_path)[-5:]] == pytest.approx(5 * [1000])


def test_time_off_the_clock_is_not_counted(tmp_path: Path, clock: Clock) -> None:
    device = Device(clock)
    with Recorder(RunFolder(tmp_path), CONFIG, 0, None) as recorder:
        for step in range(1, 9):
            recorder.submit(step, device.step(1.0))
            if step in (3, 4, 7):
                recorder.settle()
                with recorder.off_the_clock():
                    clock.now += 50
                    if step == 4:
                        recorder.sync()  # As the loop does before a checkpoint.
    assert [record["step_ms"] for record in lines(tmp_path)[1:]] == pytest.approx([1000, 1000, 1000, 1000])


def test_time_off_the_clock_ends_with_an_error(tmp_path: Path, clock: Clock) -> None:
    with Recorder(RunFolder(tmp_path), CONFIG, 0, None) as recorder:
        before = recorder.clock

        def fail() -> None:
            with recorder.off_the_clock():
                clock.now += 50
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert recorder.clock == before + 50


def test_records_after_the_step_that_is_resumed_are_dropped(tmp_path: Path, clock: Clock) -> None:
    older = "".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in range(1, 7))
    (tmp_path / "metrics.jsonl").write_text(older + '{"step": 7, "lo')
    device = Device(clock)
    with Recorder(RunFolder(tmp_path), CONFIG, 4, None) as recorder:
        assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4]
        for step in range(5, 9):
            recorder.submit(step, device.step(1.0))
    records = lines(tmp_path)
    assert [(record["step"], record["loss"]) for record in records] == [
        *((step, float(step)) for step in range(1, 5)),
        (6, 2.5),
        (8, 2.5),
    ]
    assert records[-1]["tokens"] == 8 * TOKENS_PER_STEP


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": float("nan")}, "the loss is nan"),
        ({"loss": float("inf")}, "the loss is inf"),
        ({"grad_norm": float("nan")}, "the gradient norm is nan"),
        ({"grad_norm": float("inf")}, "the gradient norm is inf"),
    ],
)
def test_a_step_that_is_not_finite_is_named_and_not_written(
    tmp_path: Path, clock: Clock, values: dict[str, float], message: str
) -> None:
    device = Device(clock)

    def train() -> None:
        with Recorder(RunFolder(tmp_path), CONFIG, 0, None) as recorder:
            recorder.submit(1, device.step(1.0))
            recorder.submit(2, device.step(1.0, **values))
            recorder.submit(3, device.step(1.0))

    with pytest.raises(UserError, match=f"^step 2: {message}, so training stops and this state is not saved; resume"):
        train()
    assert [record["step"] for record in lines(tmp_path)] == [1]


def test_an_evaluation_that_is_not_finite_is_named_and_not_written(tmp_path: Path, clock: Clock) -> None:
    device = Device(clock)

    def train() -> None:
        with Recorder(RunFolder(tmp_path), CONFIG, 0, None) as recorder:
            recorder.submit(1, device.step(1.0))
            recorder.submit(2, device.step(1.0))
            recorder.settle()
            recorder.add_evaluation(val_loss=float("nan"), val_bits_per_byte=float("nan"))

    with pytest.raises(UserError, match=r"^step 2: the validation loss is nan, so training stops"):
        train()
    assert [record["step"] for record in lines(tmp_path)] == [1]


def test_the_losses_are_drawn_now_and_then_and_at_the_end(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(metrics_module, "plot_curve", lambda records, path: drawn.append(records[-1]["step"]))
    device = Device(clock)
    with Recorder(RunFolder(tmp_path), CONFIG, 0, None) as recorder:
        for step in range(1, 41):
            recorder.submit(step, device.step(1.0))  # Seconds.
            recorder.flush()
            recorder.plot(always=step == 38)
    assert drawn == [10, 20, 30, 38]


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_losses_are_drawn(tmp_path: Path, clock: Clock, evaluated: bool) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import image

    device = Device(clock)
    with Recorder(RunFolder(tmp_path), CONFIG, 0, None) as recorder:
        for step in range(1, 9):
            recorder.submit(step, device.step(1.0, loss=4 / step))
            if evaluated and step % 4 == 0:
                recorder.settle()
                recorder.add_evaluation(val_loss=5 / step, val_bits_per_byte=1.0)
        recorder.flush()
        recorder.plot(always=True)
    picture = image.imread(tmp_path / "loss.png", format="png")
    assert picture.shape == (504, 840, 4)
    dark_blue = np.abs(picture[..., :3] - np.array([0x08, 0x51, 0x9C]) / 255).max(axis=-1) < 0.02
    assert dark_blue.any() == evaluated  # The curve of the validation loss.
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}
