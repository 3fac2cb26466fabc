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

from benchmarks.results import Results, Row, ratios, spread
from benchmarks.worker import FailedError, Worker, take_turns
from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.presets import GPT2

OURS, NO_CACHE, MEMORY = "gpt_jax", "pytorch, no cache", "memory"
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


def contestants(model: ModelConfig, platform: str, path: str) -> dict[str, Worker]:
    """The contestants, ours first, and what measures the memory. The weights are those that ours writes to `path`."""
    spec: Row = {"model": dataclasses.asdict(model)}
    workers = {OURS: Worker("benchmarks.decode_ours:Decoding", **spec)}
    if platform != "tpu":
        theirs = {**spec, "parameters": path}
        workers["transformers"] = Worker("benchmarks.decode_theirs:HuggingFaceDecoding", **theirs)
        workers["pytorch, cache"] = Worker("benchmarks.decode_theirs:Decoding", **theirs)
        workers[NO_CACHE] = Worker("benchmarks.decode_theirs:Decoding", **theirs, cached=False)
        workers[MEMORY] = Worker("benchmarks.machine:TorchProbe")
    return workers


def prompts(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Random prompts, int32 (B, T); the same for all contestants."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length), dtype=np.int32)


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of the weights that a token needs: all but the positions; the token embeddings are the head."""
    n_weights = model.n_params - model.context_length * model.d_model
    return n_weights * (4 if model.dtype == "float32" else 2)


def compare(model: ModelConfig, platform: str, case: Case, rounds: int) -> Row:
    """The row of a case.

    Raises UserError when the contestants do not compute the same, FailedError when ours fails, and OutOfTimeError.
    """
    slow = platform == "cpu"
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        parameters = str(Path(name) / "parameters.npz")
        workers = contestants(model, platform, parameters)
        try:
            if slow and (case.batch > 1 or case.prompt != PROMPT) and NO_CACHE in workers:
                workers.pop(NO_CACHE).close()
            workers[OURS].ask("write_parameters", path=parameters)
            once(workers, failed, "ready")
            differences = check_parity(model.dtype, case, workers, failed)
            greedy_only = (NO_CACHE,) if slow else ()
            time_turns(case, 1, workers, failed, greedy_only, "warm-up")
            peaks = once(workers, failed, "peak_bytes")
            held = once(workers, failed, "memory", **case._asdict())
            turns = time_turns(case, rounds, workers, failed, greedy_only, "round")
        finally:
            for worker in workers.values():
                worker.close()
    bandwidth = spread(turns.pop(MEMORY)) if MEMORY in turns else None
    notes = ["the cache of gpt_jax has a power of two of places for tokens, the others' as many as there are tokens"]
    if NO_CACHE in turns and slow:
        notes.append(f"{NO_CACHE}: greedy and one sequence only, because on CPU it takes long")
    row = {
        "preset": "gpt2",
        "dtype": model.dtype,
        **case._asdict(),
        "rounds": len(turns[OURS]),
        "parity": differences,
        "bandwidth": bandwidth,
        "weight_bytes": weight_bytes(model),
        "notes": notes,
        "failed": failed,
        "modes": {mode: figures(mode, turns, case) for mode in MODES},
        "peak_bytes": {name: peak for name, peak in peaks.items() if name in turns},
        "memory": {name: kinds for name, kinds in held.items() if name in turns},
    }
    show_table(case, row)
    return row


def once(workers: dict[str, Worker], failed: dict[str, str], method: str, **arguments: Any) -> dict[str, Any]:
    """The answer of each contestant to one question. Raises FailedError when ours fails."""
    asked = {name: worker for name, worker in workers.items() if name != MEMORY}
    answers = take_turns(asked, 1, lambda worker: worker.ask(method, **arguments), lambda *_: None, failed)
    for name in failed:
        workers.pop(name, None)
    raise_for_ours(failed)
    return {name: values[0] for name, values in answers.items()}


def raise_for_ours(failed: dict[str, str]) -> None:
    """Raises FailedError when ours is among those that failed."""
    if OURS in failed:
        raise FailedError(f"gpt_jax failed: {failed[OURS]}")


def check_parity(dtype: str, case: Case, workers: dict[str, Worker], failed: dict[str, str]) -> Row:
    """Compares the greedy tokens of all with ours, and their log-probabilities; what was found, by contestant.

    In float32 the tokens must be the same. In bfloat16, where logits tie, sequences may part: log-probabilities count
    up to and including the token at which they do, and two tokens that tie have the same one. Raises UserError.
    """
    answers = once(workers, failed, "greedy", batch=case.batch, prompt=case.prompt, new=PARITY_TOKENS)
    ours = answers.pop(OURS)
    found = {}
    for name, theirs in answers.items():
        found[name] = differences = difference(ours, theirs)
        tolerance = TOLERANCES[dtype]
        if (dtype == "float32" and differences["same_tokens"] < 1) or not differences["logprobs"] <= tolerance:
            raise UserError(
                f"gpt_jax and {name} do not compute the same, so they are not timed: "
                f"{differences['same_tokens']:.1%} of the tokens are the same, and log-probabilities differ by "
                f"{differences['logprobs']:.1e}, where {tolerance:.0e} is allowed in {dtype}"
            )
        print(
            f"  {name}: {differences['same_tokens']:.1%} of {PARITY_TOKENS} tokens are gpt_jax's, log-probabilities "
            f"{differences['logprobs']:.1e} apart",
            flush=True,
        )
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
    case: Case,
    rounds: int,
    workers: dict[str, Worker],
    failed: dict[str, str],
    greedy_only: tuple[str, ...],
    what: str,
) -> dict[str, list[Any]]:
    """What each contestant's rounds came to, Turns, and those of the memory, bytes a second.

    Raises FailedError when ours fails. what: what a round is called when it is shown.
    """

    def ask(worker: Worker) -> Any:
        name = next(name for name in workers if workers[name] is worker)
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

    turns = take_turns(workers, rounds, ask, show, failed)
    raise_for_ours(failed)
    return turns


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


def show_table(case: Case, row: Row) -> None:
    """Prints a row's medians."""
    for mode, found in row["modes"].items():
        for name, values in found["contestants"].items():
            line = (
                f"  {mode:6} {name:18} {values['first_token_ms']['median']:8.1f} ms to the first token "
                f"{values['tokens_per_second']['median']:9.1f} tokens/s"
            )
            if name in found["times_as_fast"]:
                line += f"  gpt_jax: {found['times_as_fast'][name]['median']:.2f} times as fast"
            print(line, flush=True)
