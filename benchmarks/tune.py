"""Tuning: python -m benchmarks tune [--conversations FILE ...]

Two questions, each with rows of its own. Conversations: the tokens learnt a second, with rows that are packed, with a
conversation a row, and by transformers' `Trainer`. Rewards: a step of group relative policy optimisation, from the
problems to the new parameters, and the same by TRL with transformers' `generate`. All start with the same parameters.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks import parity
from benchmarks.contest import OURS, TRANSFORMERS, Contest
from benchmarks.contestants import Conversations, Tuned
from benchmarks.corpora import write_conversations
from benchmarks.data import files_of, preparation
from benchmarks.decode import TOLERANCES
from benchmarks.letters import PROMPT
from benchmarks.measure import ratios, spread
from benchmarks.presets import Preset
from benchmarks.results import Results, Row
from benchmarks.train import as_chosen
from gpt_jax.config import ModelConfig
from gpt_jax.data.shards import open_dataset
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer

PADDED, TRL = "gpt_jax, padded", "TRL"

PARITY_STEPS = 3
"""Optimizer steps whose losses must be the same."""

ANSWERS = 8
"""To each problem, which is TRL's default, too."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured of conversations."""

    text: int = 700_000  # Bytes of those that are made.
    vocab_size: int = 4096


def run(
    results: Results, machine: Row, rounds: int, conversations: Sequence[Path] = (), sizes: Sizes = Sizes()
) -> None:
    """Measures the rows. conversations: files of them."""
    name = conversations[0].stem if conversations else "docstrings"
    preset = conversing(machine["platform"], sizes.vocab_size)
    line = f"{preset.describe()}, packed and padded"
    results.measure(
        f"tune/conversations/{name}", line, tune_conversations, preset, machine, rounds, conversations, sizes
    )
    for preset, new in rewarded(machine["platform"]):
        line = f"problems: {preset.batch_size}, answers to each: {ANSWERS} of {new} tokens, {preset.describe()}"
        results.measure(f"tune/rewards/{preset.name}", line, tune_rewards, preset, machine, rounds, ANSWERS, new)


def conversing(platform: str, vocab_size: int) -> Preset:
    """The model that is tuned on conversations."""
    return Preset("conversations", gpt2(platform, vocab_size, 4, 4, 256, 512), 8, 10 if platform == "cpu" else 100)


def rewarded(platform: str) -> list[tuple[Preset, int]]:
    """The models that are tuned on rewards, whose batches are of problems, and the tokens of an answer. A batch of one
    problem is TRL's default, as are 512 tokens."""
    steps, V = 5 if platform == "cpu" else 20, ByteTokenizer().vocab_size
    return [
        (Preset("nano", gpt2(platform, V, 4, 4, 64, 128), 1, 8 * steps), 64),
        (Preset("tiny-long", gpt2(platform, V, 4, 4, 128, 528), 1, steps), 512),
        (Preset("tiny", gpt2(platform, V, 4, 4, 128, 128), 8, steps), 64),
        (Preset("baby", gpt2(platform, V, 6, 6, 384, 128), 8, steps), 64),
    ]


def gpt2(platform: str, vocab_size: int, n_layer: int, n_head: int, d_model: int, context_length: int) -> ModelConfig:
    """GPT-2's architecture, with its biases, in these sizes."""
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        n_layer=n_layer,
        n_head=n_head,
        d_model=d_model,
        dtype="float32" if platform == "cpu" else "bfloat16",
    )


def one_gpu() -> Row:
    """Variables by which PyTorch sees one GPU, as ours takes one; else, its trainers would take all."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}


def tune_conversations(preset: Preset, machine: Row, rounds: int, files: Sequence[Path], sizes: Sizes) -> Row:
    """The row of conversations. Raises UserError where the losses differ, and as `Contest.turns`."""
    with tempfile.TemporaryDirectory() as name, Contest() as contest:
        folder = Path(name, "data")
        source = files or partial(write_conversations, n_bytes=sizes.text)
        preparation(
            files_of(source, Path(name)), folder, "--tokenizer=sentencepiece", f"--vocab-size={sizes.vocab_size}"
        )
        opened = open_dataset(folder)
        model = dataclasses.replace(preset.model, vocab_size=opened.tokenizer.vocab_size)
        preset = dataclasses.replace(preset, model=model)
        assert preset.steps is not None
        # Each turn trains a batch that is not timed, and those that are.
        n_batches = max(PARITY_STEPS, rounds * (1 + preset.steps))
        chosen = in_order(conversations_in(folder, model.context_length), n_batches * preset.batch_size)
        how: Row = {"preset": preset, "parallel": as_chosen(machine)}
        ours = contest.add(OURS, "benchmarks.ours:Packed", folder=str(folder), **how)
        contest.add(PADDED, "benchmarks.ours:Padded", conversations=chosen, **how)
        if machine["platform"] != "tpu":
            theirs = "benchmarks.trainers:Conversing"
            contest.add(TRANSFORMERS, theirs, environment=one_gpu(), preset=preset, conversations=chosen)
        parameters = ours.ask("initial")
        contest.once("warm")
        losses = contest.once("losses", parameters=parameters, count=PARITY_STEPS)
        differences = check_losses(preset, losses)
        row = times_of_tuning(contest, rounds, preset.steps)
    notes = [
        f"{preset.describe()}; rows of gpt_jax, padded, have a quarter, half, three quarters or all of the context, "
        "those of transformers the length of the longest of their batch",
        "tokens learnt are counted from the end of a turn's first step to the end of its last one; learnt and text are "
        "the shares of the places of all batches whose target is learnt, and that hold a token of a conversation",
        "transformers is its own Trainer; all start with the same parameters",
    ]
    return {"dtype": model.dtype, "parity": differences, **row, "notes": notes}


def conversations_in(folder: Path, most: int) -> Conversations:
    """The training conversations of a prepared folder that have so many tokens at most. Raises UserError for none."""
    split = open_dataset(folder).train
    begins = [*split.document_starts.tolist(), len(split)]
    places = [(begin, end - begin) for begin, end in pairwise(begins) if end - begin <= most]
    if not places:
        raise UserError(f"no conversation has {most} tokens or fewer")
    return [(split.read(*place), split.read_learnt(*place)) for place in places]


def in_order(conversations: Conversations, count: int) -> Conversations:
    """So many of them in an order of their own, over and over."""
    order = np.random.default_rng(0).permutation(len(conversations))
    return [conversations[i] for i in np.resize(order, count).tolist()]


def check_losses(preset: Preset, losses: dict[str, list[float]]) -> Row:
    """How far the losses of transformers are from ours on the same batches, relative. Raises UserError where that is
    too far."""
    if not {PADDED, TRANSFORMERS} <= losses.keys():
        return {}
    differences = {"losses": float(np.abs(np.divide(losses[PADDED], losses[TRANSFORMERS]) - 1).max())}
    parity.check(differences, parity.TOLERANCES[preset.model.dtype], TRANSFORMERS)
    print(f"  {TRANSFORMERS}: losses differ by {differences['losses']:.1e}", flush=True)
    return {TRANSFORMERS: differences}


def times_of_tuning(contest: Contest, rounds: int, steps: int) -> Row:
    """What the row of conversations has of its rounds, of so many batches each. Raises as `Contest.turns`."""

    def show(turn: int, name: str, tuned: Tuned) -> None:
        rate = tuned.learnt / tuned.seconds
        print(f"  round {turn + 1}: {name:16} {tuned.seconds:.3f} s, {rate:.1f} tokens learnt/s", flush=True)

    def figures(turns: Sequence[Tuned]) -> Row:
        places = sum(tuned.places for tuned in turns)
        return {
            "learnt_per_second": spread([tuned.learnt / tuned.seconds for tuned in turns]),
            "step_ms": spread([1e3 * tuned.seconds / steps for tuned in turns]),
            "learnt_share": sum(tuned.learnt for tuned in turns) / places,
            "text_share": sum(tuned.text for tuned in turns) / places,
        }

    turns = contest.turns(rounds, lambda worker: worker.ask("tune", count=steps), show)
    each = {name: [tuned.seconds / tuned.learnt for tuned in tuned_all] for name, tuned_all in turns.items()}
    return {
        "rounds": len(turns[OURS]),
        "failed": contest.failed,
        "contestants": {name: figures(tuned_all) for name, tuned_all in turns.items()},
        "times_as_fast": {name: ratios(times, each[OURS]) for name, times in each.items() if name != OURS},
    }


def tune_rewards(preset: Preset, machine: Row, rounds: int, answers: int, new: int) -> Row:
    """The row of a model that is tuned on rewards; answers: to each problem, of so many new tokens. Raises UserError
    where log-probabilities differ, and as `Contest.turns`."""
    steps = preset.steps
    how: Row = {"preset": preset, "answers": answers, "new": new}
    with Contest() as contest:
        ours = contest.add(OURS, "benchmarks.ours:Rewards", parallel=as_chosen(machine), **how)
        if machine["platform"] != "tpu":
            contest.add(TRL, "benchmarks.trainers:Rewards", environment=one_gpu(), **how)
        contest.once("start", parameters=ours.ask("initial"))
        differences = check_logprobs(preset, contest)
        contest.once("seconds", first=0, count=1)  # All is warm then.

        def show(turn: int, name: str, seconds: list[float]) -> None:
            print(f"  round {turn + 1}: {name:16} {1e3 * np.median(seconds):9.1f} ms a step", flush=True)

        turns = contest.turns(rounds, lambda worker: worker.ask("seconds", first=0, count=steps), show)
        parts = ours.ask("parts", first=0, count=steps)
    medians = {name: [float(np.median(seconds)) for seconds in turn] for name, turn in turns.items()}
    found = {name: {"step_ms": spread([1e3 * each for each in of])} for name, of in medians.items()}
    found[OURS] |= parts
    counted = f"problems a step: {preset.batch_size} of {PROMPT} tokens; answers to each: {answers} of {new} tokens"
    notes = [
        f"{preset.describe()}, {counted}; the median step of a turn without its first one, from the end of a step to "
        "the end of the next: answers, rewards and training",
        "the shares of answers, waiting for rewards and training, and the tokens of answers a second, are of steps of "
        "their own, each part of which is waited for; without judges, the same answers are only written",
    ]
    if TRL in found:
        notes.append(
            f"TRL {version('trl')}, which writes answers with transformers; all start with the same parameters"
        )
    return {
        "dtype": preset.model.dtype,
        "rounds": len(turns[OURS]),
        "parity": differences,
        "failed": contest.failed,
        "contestants": found,
        "times_as_fast": {name: ratios(of, medians[OURS]) for name, of in medians.items() if name != OURS},
        "notes": notes,
    }


def check_logprobs(preset: Preset, contest: Contest) -> Row:
    """How far the log-probabilities of random tokens are from ours in nats, root mean square, by contestant. Raises
    UserError where that is too far."""
    c = preset.model
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (preset.batch_size, c.context_length), dtype=np.int32)
    said = contest.once("logprobs", tokens=tokens)
    found = {}
    for name in said.keys() - {OURS}:
        found[name] = {"log-probabilities": float(np.sqrt(np.mean((said[name] - said[OURS]) ** 2)))}
        parity.check(found[name], TOLERANCES[c.dtype], name)
        print(f"  {name}: log-probabilities differ by {found[name]['log-probabilities']:.1e}", flush=True)
    return found
