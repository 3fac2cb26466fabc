"""The reports of a run: progress bar, metrics.jsonl, TensorBoard, Weights & Biases, loss curve."""

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt_jax.config import Config
from gpt_jax.errors import UserError
from gpt_jax.model.flops import flops_per_token
from gpt_jax.run.folder import RunFolder
from gpt_jax.run.records import RecordWriter
from gpt_jax.storage.files import replacing
from gpt_jax.train.step import StepMetrics
from gpt_jax.train.trackers import open_trackers

SHOWN = ("reward", "accuracy", "margin")
"""What is printed of an objective's values, besides the loss."""

SECONDS_TO_PLOT = 10.0
"""Between two drawings of the loss curve. From save to save, a small model trains for less time than one takes."""


class Recorder:
    """Takes the metrics of every step and reports them. A context manager; leaving it closes the files.

    Metrics are read one step late, when the device has the next step to work on and does not wait for the host.
    `start` is the step that the run goes on from. epochs: of each source by its name, after so many steps.
    tokens_per_step: the places of all rows of a step; None: `data.batch_size` rows; 0: what is logged as step_tokens.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        start: int,
        peak_flops: float | None,
        writes: bool = True,
        epochs: Callable[[int], dict[str, float]] = lambda step: {},
        tokens_per_step: int | None = None,
    ) -> None:
        self.epochs = epochs
        self.run, self.config, self.peak_flops, self.writes = run, config, peak_flops, writes
        default = config.data.batch_size * config.model.context_length
        self.tokens_per_step = default if tokens_per_step is None else tokens_per_step
        self.record_writer = RecordWriter(run.metrics_file, start, writes)
        self.trackers = open_trackers(run, config, start) if writes else []

        self.pending: tuple[int, StepMetrics, dict[str, float]] | None = None  # Not yet read.
        self.record: dict[str, Any] | None = None  # Read, not yet written.
        self.compile_seconds: float | None = None  # Time of the first step, mostly compilation.
        self.elapsed, self.timed_steps, self.clock = 0.0, 0, time.perf_counter()
        self.n_tokens = 0.0  # Of the timed steps.
        self.plot_again = time.perf_counter() + SECONDS_TO_PLOT
        self.shown: dict[str, str] = {}
        # When the output is not a terminal, there is no bar (disable=None), and lines are printed instead.
        self.bar = tqdm(
            total=config.train.steps, initial=start, unit="step", disable=None, dynamic_ncols=True, smoothing=0.1
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records of the run so far."""
        return self.record_writer.records

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, exception_type: type | None, *exception: object) -> None:
        try:
            if exception_type is None:
                self.flush()
        finally:
            self.bar.close()
            self.record_writer.close()
            for tracker in self.trackers:
                tracker.close()
            if self.writes:
                failed = exception_type is not None and issubclass(exception_type, Exception)
                with suppress(UserError) if failed else nullcontext():  # It must not replace the first error.
                    self.run.upload()

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def submit(self, step: int, metrics: StepMetrics, facts: Mapping[str, float] | None = None) -> None:
        """Takes the metrics of a dispatched step, and what is known of its batch, and reports those of the step
        before."""
        self.flush()
        self.pending = (step, metrics, dict(facts or {}))
        if self.compile_seconds is None:
            self.settle()
            self.compile_seconds, self.elapsed, self.timed_steps = self.elapsed, 0.0, 0
            self.n_tokens = 0.0
            self.say(f"first step: {self.compile_seconds:.1f} s, compilation included")

    def settle(self) -> None:
        """Waits for the metrics of the last step. Raises UserError when its loss or gradient is not finite."""
        if self.pending is None:
            return
        (step, metrics, facts), self.pending = self.pending, None
        loss, grad_norm, lr = float(metrics.loss), float(metrics.grad_norm), float(metrics.learning_rate)
        now = time.perf_counter()
        self.elapsed, self.timed_steps, self.clock = self.elapsed + now - self.clock, self.timed_steps + 1, now
        self.n_tokens += self.tokens_per_step or facts.get("step_tokens", 0)
        check_finite(step, loss=loss, gradient_norm=grad_norm)
        self.record = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            **({"tokens": step * self.tokens_per_step} if self.tokens_per_step else {}),
            **self.epochs_after(step),
            **facts,
            **{name: float(value) for name, value in metrics.logged.items()},
        }
        self.shown["loss"] = f"{loss:.3f}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def epochs_after(self, step: int) -> dict[str, float]:
        """The epochs of the data after `step` steps: one number or, of several folders, one for each by its name."""
        epochs = self.epochs(step)
        return {"epoch" if len(epochs) == 1 else f"epoch/{name}": value for name, value in epochs.items()}

    def add_evaluation(self, val_loss: float, **values: float) -> None:
        """Adds an evaluation to the record of the settled step: the loss on held-out data, and other values of them.
        Raises UserError when the loss is not finite."""
        assert self.record is not None
        check_finite(self.record["step"], validation_loss=val_loss)
        self.record |= {"val_loss": val_loss, **values}
        self.shown["val"] = f"{val_loss:.3f}"

    def val_loss(self, step: int) -> float | None:
        """The validation loss after `step`; None when it was not evaluated then."""
        last = self.records[-1] if self.records else {}
        return last.get("val_loss") if last.get("step") == step else None

    def flush(self) -> None:
        """Settles the last step and writes its record, if it is due."""
        self.settle()
        record, self.record = self.record, None
        if record is None:
            return
        every, steps = self.config.train.log_every, self.config.train.steps
        if record["step"] % every == 0 or record["step"] in (1, steps) or "val_loss" in record:
            self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Adds the speed since the last record, and writes the record to metrics.jsonl and all trackers."""
        seconds = self.elapsed / self.timed_steps if self.timed_steps else None
        rate = self.n_tokens / self.elapsed if seconds else None
        flops = flops_per_token(self.config.model)
        is_plain = self.config.objective.name == "next_token"  # Others have passes that the formula does not count.
        mfu = rate * flops / self.peak_flops if rate and self.peak_flops and is_plain else None
        record |= {"tokens_per_second": rate, "step_ms": seconds and seconds * 1e3, "mfu": mfu}
        self.elapsed, self.timed_steps, self.n_tokens = 0.0, 0, 0.0
        self.record_writer.append(record)
        scalars = {name: value for name, value in record.items() if name != "step" and value is not None}
        for tracker in self.trackers:
            tracker.log(record["step"], scalars)

        if rate:
            self.shown["tok/s"] = f"{rate:,.0f}"
        if mfu:
            self.shown["mfu"] = f"{mfu:.1%}"
        if self.bar.disable or "val_loss" in record:
            self.say(describe(record, self.config.train.steps))

    def sync(self) -> None:
        """Forces the records to the disk, and those of a remote run to its place, since a checkpoint must not survive a
        crash that loses earlier records."""
        self.flush()
        self.record_writer.sync()
        if self.writes:
            self.run.upload()

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Excludes the time spent inside from the step times."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.clock += time.perf_counter() - begin

    def plot(self, always: bool) -> None:
        """Draws loss.png, if matplotlib is installed; unless `always`, not again within SECONDS_TO_PLOT."""
        is_due = always or time.perf_counter() >= self.plot_again
        if is_due and self.writes and self.records and importlib.util.find_spec("matplotlib") is not None:
            plot_curve(self.records, self.run.loss_curve)
            self.plot_again = time.perf_counter() + SECONDS_TO_PLOT


def check_finite(step: int, **values: float) -> None:
    """Raises UserError naming the step when a value is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"step {step}: the {name.replace('_', ' ')} is {value}, so training stops and this state is not saved; "
                "resume from the last checkpoint with a lower optimizer.learning_rate"
            )


def describe(record: dict[str, Any], steps: int) -> str:
    """A record as a line of text."""
    line = f"step {record['step']:>{len(str(steps))}}/{steps}  loss {record['loss']:.4f}"
    line += "".join(f"  {name} {record[name]:.3f}" for name in SHOWN if name in record)
    if "val_loss" in record:
        line += f"  val loss {record['val_loss']:.4f}"
        line += f" ({record['val_bits_per_byte']:.3f} bits/byte)" if "val_bits_per_byte" in record else ""
        line += "".join(f"  val {name} {record[f'val_{name}']:.3f}" for name in SHOWN if f"val_{name}" in record)
    if record["step_ms"] is not None:
        line += f"  {record['step_ms']:.1f} ms/step  {record['tokens_per_second']:,.0f} tok/s"
    if record["mfu"]:
        line += f"  mfu {record['mfu']:.1%}"
    return line


def plot_curve(records: list[dict[str, Any]], path: Path) -> None:
    """The training and validation loss by step, or the rewards if there are any, as a PNG."""
    from matplotlib.figure import Figure  # Without pyplot, which takes longer to import than a small plot to draw.

    name, label = ("reward", "mean reward") if "reward" in records[-1] else ("loss", "loss (nats a token)")
    if "margin" in records[-1]:
        label = "loss (a pair)"
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    drawn = [r for r in records if name in r]
    axes.plot([r["step"] for r in drawn], [r[name] for r in drawn], color="#9ecae1", label="training batch")
    evaluated = [(r["step"], r[f"val_{name}"]) for r in records if f"val_{name}" in r]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="#08519c", label="validation set")
        step, last = evaluated[-1]
        axes.annotate(f"{last:.3f}", (step, last), (0, 8), textcoords="offset points", ha="right")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
