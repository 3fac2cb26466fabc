"""Decoding, side by side: python -m benchmarks decode [--batch 1 8 64]

GPT-2 124M with random weights, the same for all contestants, held in float32 on CPU and in bfloat16 on accelerators.
All compile and warm up, all must choose the same tokens, and then they take turns, while the others wait. The
vocabulary is GPT-2's, padded to 50304 tokens, for which matrix units are made; with random weights the padding is
tokens like all others.

The share of the roofline is the time that it takes to read all the weights from memory, once a token, at the bandwidth
measured in the same rounds, of the time that a token takes. Sequences read the weights together, but the products and
the caches need time of their own, so that with many of them 100% is out of reach.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import Results, Row, ratios, spread
from benchmarks.worker import FailedError, Worker, take_turns
from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.presets import GPT2

OURS, NO_CACHE, MEMORY = "gpt_jax", "pytorch, no cache", "memory"
MODES = {"greedy": 0, "top_50": 50}
PROMPT = 16
NEW = 128
NEW_SLOW = 32
"""On CPU, from SLOW_BATCH sequences on."""
SLOW_BATCH = 64
PARITY_TOKENS = 32

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.015}
"""Of the log-probabilities of chosen tokens, in nats, root mean square. bfloat16, to which the logits are rounded, too,
comes to 0.007 to 0.008, and a cache that is read one token short to 0.026 to 0.046."""

Turn = dict[str, dict[str, float]]
"""By mode, seconds of an answer of one token, "first", and of all, "whole"."""


def run(
    results: Results, machine: Row, rounds: int, batches: tuple[int, ...] = (1, 8, 64), model: ModelConfig = GPT2
) -> None:
    """A row for each batch, so many sequences at a time: ours against PyTorch's and transformers'.

    Raises UserError when the contestants do not compute the same, or ours fails.
    """
    # Ascending: peak memory is that since a contestant's start, and so the largest batch's until now.
    missing = [batch for batch in sorted(batches) if results.missing(f"decode/{batch}")]
    if not missing:
        return
    model = dataclasses.replace(model, dtype="float32" if machine["platform"] == "cpu" else "bfloat16")
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        parameters = str(Path(name) / "parameters.npz")
        workers = contestants(model, machine["platform"], parameters)
        try:
            workers[OURS].ask("write_parameters", path=parameters)
            for batch in missing:
                row = compare(model, machine["platform"], batch, rounds, workers, failed)
                results.put(f"decode/{batch}", row)
                show_table(batch, row)
        except FailedError as e:
            raise UserError(f"decode: gpt_jax failed: {e}") from e
        finally:
            for worker in workers.values():
                worker.close()


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


def compare(
    model: ModelConfig, platform: str, batch: int, rounds: int, workers: dict[str, Worker], failed: dict[str, str]
) -> Row:
    """The row of a batch. A contestant that fails is out of this batch and those that follow: it leaves `workers`."""
    slow = platform == "cpu"
    new = NEW_SLOW if slow and batch >= SLOW_BATCH else NEW
    notes = []
    if new != NEW:
        notes.append(f"{new} new tokens, not {NEW}: on CPU they take long")
    if slow:
        notes.append(f"{NO_CACHE}: greedy and one sequence only, because on CPU it takes long")
        notes.append("peak memory is that of the whole process, the loading of libraries and weights included")
    print(f"decode/{batch}: {batch} prompts of {PROMPT} tokens, {new} new ones, {model.dtype}", flush=True)
    notes.append(
        "the cache of gpt_jax has a power of two of places for tokens, the others' as many as there are tokens"
    )
    if slow and batch > 1 and NO_CACHE in workers:
        workers.pop(NO_CACHE).close()  # Batches ascend: it has no more to do.
    differences = check_parity(model.dtype, batch, workers, failed)
    turns = time_turns(batch, new, rounds, workers, failed, greedy_only=(NO_CACHE,) if slow else ())
    peaks = once(workers, failed, "peak_bytes")
    bandwidth = spread(turns.pop(MEMORY)) if MEMORY in turns else None
    row: Row = {
        "preset": "gpt2",
        "dtype": model.dtype,
        "batch": batch,
        "prompt": PROMPT,
        "new": new,
        "rounds": rounds,
        "parity": differences,
        "bandwidth": bandwidth,
        "weight_bytes": weight_bytes(model),
        "notes": notes,
        "failed": dict(failed),
    }
    seconds_at_best = row["weight_bytes"] / bandwidth["median"] if bandwidth else None
    modes = {mode: figures(mode, turns, batch, new, seconds_at_best) for mode in MODES}
    return {**row, "modes": modes, "peak_bytes": {name: peak for name, peak in peaks.items() if name in turns}}


def once(workers: dict[str, Worker], failed: dict[str, str], method: str, **arguments: Any) -> dict[str, Any]:
    """The answer of each contestant to one question. Raises FailedError when ours fails."""
    asked = {name: worker for name, worker in workers.items() if name != MEMORY}
    answers = take_turns(asked, 1, lambda worker: worker.ask(method, **arguments), lambda *_: None, failed)
    drop_failed(workers, failed)
    return {name: values[0] for name, values in answers.items()}


def drop_failed(workers: dict[str, Worker], failed: dict[str, str]) -> None:
    """Takes those that failed out of `workers`. Raises FailedError when ours is one."""
    for name in [name for name in workers if name in failed]:
        del workers[name]
    if OURS in failed:
        raise FailedError(failed[OURS])


def check_parity(dtype: str, batch: int, workers: dict[str, Worker], failed: dict[str, str]) -> Row:
    """Compares the greedy tokens of all with ours, and their log-probabilities; what was found, by contestant.

    In float32 the tokens must be the same. In bfloat16, where logits tie, sequences may part: log-probabilities count
    up to and including the token at which they do, and two tokens that tie have the same one. Raises UserError.
    """
    answers = once(workers, failed, "greedy", batch=batch, prompt=PROMPT, new=PARITY_TOKENS)
    ours = answers.pop(OURS)
    found = {}
    for name, theirs in answers.items():
        found[name] = differences = difference(ours, theirs)
        tolerance = TOLERANCES[dtype]
        if (dtype == "float32" and differences["same_tokens"] < 1) or not differences["logprobs"] <= tolerance:
            raise UserError(
                f"decode/{batch}: gpt_jax and {name} do not compute the same, so they are not timed: "
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
    batch: int,
    new: int,
    rounds: int,
    workers: dict[str, Worker],
    failed: dict[str, str],
    greedy_only: tuple[str, ...],
) -> dict[str, list[Any]]:
    """What each contestant's rounds came to, Turns, and those of the memory, bytes a second; without a round to warm
    up. Raises FailedError when ours fails."""

    def ask(worker: Worker) -> Any:
        name = next(name for name in workers if workers[name] is worker)
        if name == MEMORY:
            return worker.ask("bandwidth")
        return {
            mode: {
                part: worker.ask("seconds", batch=batch, prompt=PROMPT, new=n, top_k=top_k)
                for part, n in (("first", 1), ("whole", new))
            }
            for mode, top_k in MODES.items()
            if mode == "greedy" or name not in greedy_only
        }

    def show(turn: int, name: str, answer: Any) -> None:
        if name == MEMORY:
            what = f"{answer / 1e9:.1f} GB/s"
        else:
            what = ", ".join(f"{mode} {batch * new / answer[mode]['whole']:.1f} tokens/s" for mode in answer)
        print(f"  {f'round {turn}' if turn else 'warm-up'}: {name:18} {what}", flush=True)

    turns = take_turns(workers, rounds + 1, ask, show, failed)
    drop_failed(workers, failed)
    return {name: values[1:] for name, values in turns.items()}


def figures(mode: str, turns: dict[str, list[Turn]], batch: int, new: int, seconds_at_best: float | None) -> Row:
    """A mode's figures. seconds_at_best: a token's where only the reading of the weights takes time, if known."""
    first, whole = (
        {name: [turn[mode][part] for turn in values] for name, values in turns.items() if mode in values[0]}
        for part in ("first", "whole")
    )
    by_name: Row = {}
    for name, seconds in whole.items():
        by_name[name] = {
            "first_token_ms": spread([1e3 * value for value in first[name]]),
            "tokens_per_second": spread([batch * new / value for value in seconds]),
        }
        if mode == "greedy" and seconds_at_best:
            by_name[name]["roofline"] = spread([seconds_at_best * new / value for value in seconds])
    times_as_fast = {name: ratios(seconds, whole[OURS]) for name, seconds in whole.items() if name != OURS}
    return {"contestants": by_name, "times_as_fast": times_as_fast}


def show_table(batch: int, row: Row) -> None:
    """Prints a row's medians."""
    for mode, found in row["modes"].items():
        for name, values in found["contestants"].items():
            line = (
                f"decode/{batch} {mode:6} {name:18} {values['first_token_ms']['median']:8.1f} ms to the first token "
                f"{values['tokens_per_second']['median']:9.1f} tokens/s"
            )
            if "roofline" in values:
                line += f"  {values['roofline']['median']:4.0%} of the roofline"
            if name in found["times_as_fast"]:
                line += f"  gpt_jax: {found['times_as_fast'][name]['median']:.2f} times as fast"
            print(line, flush=True)
