"""Decoding, side by side: python -m benchmarks decode [--batch 1 8 64]

A row for each batch with a short prompt, and for one sequence one with a long prompt, too, for the time to the first
token.

GPT-2 124M with random weights, the same for all contestants, held in float32 on CPU and in bfloat16 on accelerators.
All compile and warm up, all must choose the same tokens, and then they take turns, while the others wait. The
vocabulary is GPT-2's, padded to 50304 tokens, for which matrix units are made; with random weights the padding is
tokens like all others.

The share of the roofline is the time that it takes to read all the weights from memory, once a token, at the best
bandwidth of all rounds, of the time that a token takes. Sequences read the weights together, but the products and the
caches need time of their own, so that with many of them 100% is out of reach.

Peak memory is counted from when the weights are there, what is left over of loading them given back: compilation,
caches and answers, and the weights themselves.
"""

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.contest import OURS, TRANSFORMERS, Contest
from benchmarks.measure import ratios, spread
from benchmarks.results import Results, Row
from benchmarks.worker import Worker
from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.presets import GPT2

CACHE, NO_CACHE, MEMORY = "pytorch, cache", "pytorch, no cache", "memory"
MODES = {"greedy": 0, "top_50": 50}
PROMPT, LONG_PROMPT = 16, 512
NEW = 128
NEW_SLOW = 32
"""After a long prompt, and on CPU from SLOW_BATCH sequences on."""
SLOW_BATCH = 64
PARITY_TOKENS = 32

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.015}
"""Of the log-probabilities of chosen tokens, in nats, root mean square. bfloat16, to which the logits are rounded, too,
comes to 0.007 to 0.008, and a cache that is read one token short to 0.026 to 0.046."""

Turn = dict[str, dict[str, float]]
"""By mode, seconds of an answer of one token, "first", and of all, "whole"."""


class Case(NamedTuple):
    """What a row measures: so many sequences, tokens of each prompt, and new tokens."""

    batch: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        """The name of the row."""
        return f"decode/{self.batch}" + (f", prompt {self.prompt}" if self.prompt != PROMPT else "")


def cases(batches: Iterable[int], platform: str) -> list[Case]:
    """The rows of the batches, the most telling first."""
    found = []
    for batch in batches:
        slow = platform == "cpu" and batch >= SLOW_BATCH
        found.append(Case(batch, PROMPT, NEW_SLOW if slow else NEW))
    return found + ([Case(1, LONG_PROMPT, NEW_SLOW)] if 1 in batches else [])


def run(
    results: Results, machine: Row, rounds: int, batches: tuple[int, ...] = (1, 8, 64), model: ModelConfig = GPT2
) -> None:
    """Ours against PyTorch's and transformers', a row for each case; each with processes of its own."""
    model = dataclasses.replace(model, dtype="float32" if machine["platform"] == "cpu" else "bfloat16")
    for case in cases(batches, machine["platform"]):
        line = f"batch {case.batch}, prompts of {case.prompt} tokens, {case.new} new ones, {model.dtype}"
        results.measure(case.name, line, compare, model, machine["platform"], case, rounds)


def enter(contest: Contest, model: ModelConfig, platform: str, path: str, without_cache: bool) -> None:
    """gpt_jax enters a contest, then the others, whose weights are those that it writes to `path`, and what measures
    the memory. Raises FailedError."""
    spec: Row = {"model": dataclasses.asdict(model)}
    contest.add(OURS, "benchmarks.ours:Decoding", **spec).ask("write_parameters", path=path)
    if platform != "tpu":
        theirs = {**spec, "parameters": path}
        contest.add(TRANSFORMERS, "benchmarks.theirs:HuggingFaceDecoding", **theirs)
        contest.add(CACHE, "benchmarks.theirs:Decoding", **theirs)
        if without_cache:
            contest.add(NO_CACHE, "benchmarks.theirs:Decoding", **theirs, cached=False)


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of the weights that a token needs: all but the positions; the token embeddings are the head."""
    n_weights = model.n_params - model.context_length * model.d_model
    return n_weights * (4 if model.dtype == "float32" else 2)


def compare(model: ModelConfig, platform: str, case: Case, rounds: int) -> Row:
    """The row of a case.

    Raises UserError when the contestants do not compute the same, FailedError when ours fails, and OutOfTimeError.
    """
    slow = platform == "cpu"
    greedy_only = (NO_CACHE,) if slow else ()
    with tempfile.TemporaryDirectory() as folder, Contest() as contest:
        path = str(Path(folder) / "parameters.npz")
        enter(contest, model, platform, path, without_cache=not slow or case.name == "decode/1")
        contest.once("ready")
        question = {"batch": case.batch, "prompt": case.prompt, "new": PARITY_TOKENS}
        differences = check_parity(model.dtype, contest.once("greedy", **question))
        time_turns(contest, case, 1, greedy_only, "warm-up")
        peaks = contest.once("peak_bytes")
        held = contest.once("memory", **case._asdict())
        if platform != "tpu":
            contest.add(MEMORY, "benchmarks.machine:TorchProbe")
        turns = time_turns(contest, case, rounds, greedy_only, "round")
    bandwidth = spread(turns.pop(MEMORY)) if MEMORY in turns else None
    notes = ["the cache of gpt_jax has a power of two of places for tokens, the others' as many as there are tokens"]
    if NO_CACHE in turns and slow:
        notes.append(f"{NO_CACHE}: greedy and one sequence only, because on CPU it takes long")
    return {
        "preset": "gpt2",
        "dtype": model.dtype,
        **case._asdict(),
        "rounds": len(turns[OURS]),
        "parity": differences,
        "bandwidth": bandwidth,
        "weight_bytes": weight_bytes(model),
        "notes": notes,
        "failed": contest.failed,
        "modes": {mode: figures(mode, turns, case) for mode in MODES},
        "peak_bytes": {name: peak for name, peak in peaks.items() if name in turns},
        "memory": {name: kinds for name, kinds in held.items() if name in turns},
    }


def check_parity(dtype: str, answers: dict[str, Row]) -> Row:
    """Compares the greedy tokens of all with ours, and their log-probabilities; what was found, by contestant.

    In float32 the tokens must be the same. In bfloat16, where logits tie, sequences may part: log-probabilities count
    up to and including the token at which they do, and two tokens that tie have the same one. Raises UserError.
    """
    tolerance, found = TOLERANCES[dtype], {}
    for name, theirs in answers.items():
        if name == OURS:
            continue
        found[name] = differences = difference(answers[OURS], theirs)
        said = (
            f"{differences['same_tokens']:.1%} of the tokens are the same, and log-probabilities differ by "
            f"{differences['logprobs']:.1e}"
        )
        if (dtype == "float32" and differences["same_tokens"] < 1) or not differences["logprobs"] <= tolerance:
            raise UserError(
                f"gpt_jax and {name} do not compute the same, so they are not timed: {said}, where {tolerance:.0e} is "
                f"allowed in {dtype}"
            )
        print(f"  {name}: {said}", flush=True)
    return found


def difference(ours: Row, theirs: Row) -> dict[str, float]:
    """The share of tokens up to which sequences are the same, and the difference of their log-probabilities, root mean
    square, up to and including the first token that is not."""
    differs_BN = np.array(ours["tokens"]) != np.array(theirs["tokens"])
    parted_BN = np.logical_or.accumulate(differs_BN, axis=1)
    counts_BN = ~np.pad(parted_BN, ((0, 0), (1, 0)))[:, :-1]
    of_logprobs = (np.array(ours["logprobs"]) - np.array(theirs["logprobs"]))[counts_BN]
    return {"same_tokens": float(1 - parted_BN.mean()), "logprobs": float(np.sqrt(np.mean(of_logprobs**2)))}


def time_turns(
    contest: Contest, case: Case, rounds: int, greedy_only: tuple[str, ...], what: str
) -> dict[str, list[Any]]:
    """What each contestant's rounds came to, Turns, and those of the memory, bytes a second.

    what: what a round is called when it is shown. Raises as `Contest.turns`.
    """

    def ask(worker: Worker) -> Any:
        name = next(name for name in contest.workers if contest.workers[name] is worker)
        if name == MEMORY:
            return worker.ask("bandwidth")
        return {
            mode: {
                part: worker.ask("seconds", batch=case.batch, prompt=case.prompt, new=n, top_k=top_k)
                for part, n in (("first", 1), ("whole", case.new))
            }
            for mode, top_k in MODES.items()
            if mode == "greedy" or name not in greedy_only
        }

    def show(turn: int, name: str, answer: Any) -> None:
        if name == MEMORY:
            found = f"{answer / 1e9:.1f} GB/s"
        else:
            rates = {mode: case.batch * case.new / parts["whole"] for mode, parts in answer.items()}
            found = ", ".join(f"{mode} {rate:.1f} tokens/s" for mode, rate in rates.items())
        print(f"  {what} {turn + 1}: {name:18} {found}", flush=True)

    return contest.turns(rounds, ask, show)


def figures(mode: str, turns: dict[str, list[Turn]], case: Case) -> Row:
    """A mode's figures."""
    first, whole = (
        {name: [turn[mode][part] for turn in values] for name, values in turns.items() if mode in values[0]}
        for part in ("first", "whole")
    )
    by_name = {
        name: {
            "first_token_ms": spread([1e3 * value for value in first[name]]),
            "tokens_per_second": spread([case.batch * case.new / value for value in seconds]),
        }
        for name, seconds in whole.items()
    }
    times_as_fast = {name: ratios(seconds, whole[OURS]) for name, seconds in whole.items() if name != OURS}
    return {"contestants": by_name, "times_as_fast": times_as_fast}
