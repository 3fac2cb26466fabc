"""Decoding, side by side: python -m benchmarks decode [--batch 1 8 64]

A row for each batch with a short prompt, and for one sequence one with a long prompt, too. GPT-2 124M with random
weights, the same for all, in float32 on CPU and in bfloat16 on accelerators; the vocabulary is padded to 50304 tokens.
All compile and warm up, all must choose the same tokens, and then they take turns, while the others wait.

100% of the roofline is to read all the weights once a token, at the best bandwidth of all rounds; with many sequences
the products and caches need time of their own, so that it is out of reach. Peak memory is counted from when the weights
are there, what is left over of loading them given back.
"""

import dataclasses
import tempfile
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


class Case(NamedTuple):
    """What a row measures: so many sequences, tokens of each prompt, and new tokens."""

    batch: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        """The name of the row."""
        return f"decode/{self.batch}" + (f", prompt {self.prompt}" if self.prompt != PROMPT else "")


def run(
    results: Results, machine: Row, rounds: int, batches: tuple[int, ...] = (1, 8, 64), model: ModelConfig = GPT2
) -> None:
    """Ours against PyTorch's and transformers', a row for each case; each with processes of its own."""
    on_cpu = machine["platform"] == "cpu"
    model = dataclasses.replace(model, dtype="float32" if on_cpu else "bfloat16")
    cases = [Case(batch, PROMPT, NEW_SLOW if on_cpu and batch >= SLOW_BATCH else NEW) for batch in batches]
    cases += [Case(1, LONG_PROMPT, NEW_SLOW)] if 1 in batches else []
    for case in cases:
        line = f"batch {case.batch}, prompts of {case.prompt} tokens, {case.new} new ones, {model.dtype}"
        results.measure(case.name, line, compare, model, machine["platform"], case, rounds)


def enter(contest: Contest, model: ModelConfig, platform: str, path: str, without_cache: bool) -> None:
    """gpt_jax enters a contest, then the others, whose weights are those that it writes to `path`."""
    spec: Row = {"model": dataclasses.asdict(model)}
    contest.add(OURS, "benchmarks.ours:Decoding", **spec).ask("write_parameters", path=path)
    if platform != "tpu":
        spec["parameters"] = path
        contest.add(TRANSFORMERS, "benchmarks.theirs:HuggingFaceDecoding", **spec)
        contest.add(CACHE, "benchmarks.theirs:Decoding", **spec)
        if without_cache:
            contest.add(NO_CACHE, "benchmarks.theirs:Decoding", **spec, cached=False)


def compare(model: ModelConfig, platform: str, case: Case, rounds: int) -> Row:
    """The row of a case. Raises UserError when the contestants do not compute the same, and as `Contest.turns`."""
    slow = platform == "cpu"
    with tempfile.TemporaryDirectory() as folder, Contest() as contest:
        path = str(Path(folder) / "parameters.npz")
        enter(contest, model, platform, path, without_cache=not slow or case.name == "decode/1")
        contest.once("ready")
        answers = contest.once("greedy", batch=case.batch, prompt=case.prompt, new=PARITY_TOKENS)
        differences = check_parity(model.dtype, answers)
        time_turns(contest, case, 1, slow, "warm-up")
        peaks, kinds = contest.once("peak_bytes"), contest.once("memory", **case._asdict())
        if platform != "tpu":
            contest.add(MEMORY, "benchmarks.machine:TorchProbe")
        turns = time_turns(contest, case, rounds, slow, "round")
    bandwidths = turns.pop(MEMORY, None)
    notes = ["the cache of gpt_jax has a power of two of places for tokens, the others' as many as there are tokens"]
    if NO_CACHE in turns and slow:
        notes.append(f"{NO_CACHE}: greedy and one sequence only, because on CPU it takes long")
    # A token needs all the weights but the positions; the token embeddings are the head.
    n_weights = model.n_params - model.context_length * model.d_model
    return {
        "preset": "gpt2",
        "dtype": model.dtype,
        **case._asdict(),
        "rounds": len(turns[OURS]),
        "parity": differences,
        "bandwidth": spread(bandwidths) if bandwidths else None,
        "weight_bytes": n_weights * (4 if model.dtype == "float32" else 2),
        "notes": notes,
        "failed": contest.failed,
        "modes": {mode: figures(mode, turns, case) for mode in MODES},
        "peak_bytes": {name: peaks[name] for name in turns},
        "memory": {name: kinds[name] for name in turns},
    }


def check_parity(dtype: str, answers: dict[str, Row]) -> Row:
    """Compares the greedy tokens of all with ours, and their log-probabilities; what was found, by contestant.

    In float32 the tokens must be the same. In bfloat16, where logits tie, sequences may part: log-probabilities count
    up to and including the token at which they do, and two tokens that tie have the same one. Raises UserError.
    """
    found = {name: difference(answers[OURS], theirs) for name, theirs in answers.items() if name != OURS}
    for name, of in found.items():
        result = (
            f"{of['same_tokens']:.1%} of the tokens are the same, and log-probabilities differ by {of['logprobs']:.1e}"
        )
        if (dtype == "float32" and of["same_tokens"] < 1) or not of["logprobs"] <= TOLERANCES[dtype]:
            raise UserError(
                f"gpt_jax and {name} do not compute the same, so they are not timed: {result}, where "
                f"{TOLERANCES[dtype]:.0e} is allowed in {dtype}"
            )
        print(f"  {name}: {result}", flush=True)
    return found


def difference(ours: Row, theirs: Row) -> dict[str, float]:
    """The share of tokens up to which sequences are the same, and the difference of their log-probabilities, root mean
    square, up to and including the first token that is not."""
    differs_BN = np.array(ours["tokens"]) != np.array(theirs["tokens"])
    parted_BN = np.logical_or.accumulate(differs_BN, axis=1)
    counts_BN = ~np.pad(parted_BN, ((0, 0), (1, 0)))[:, :-1]
    of_logprobs = (np.array(ours["logprobs"]) - np.array(theirs["logprobs"]))[counts_BN]
    return {"same_tokens": float(1 - parted_BN.mean()), "logprobs": float(np.sqrt(np.mean(of_logprobs**2)))}


def time_turns(contest: Contest, case: Case, rounds: int, slow: bool, what: str) -> dict[str, list[Any]]:
    """By contestant, what its rounds came to: of each mode the seconds of an answer of one token and of all; and of
    the memory, bytes a second.

    slow: without a cache, answer greedily only; what: the word for a round when it is shown.
    """

    def ask(worker: Worker) -> Any:
        if worker is contest.workers.get(MEMORY):
            return worker.ask("bandwidth")
        greedy_only = slow and worker is contest.workers.get(NO_CACHE)
        return {
            mode: [
                worker.ask("seconds", batch=case.batch, prompt=case.prompt, new=new, top_k=top_k)
                for new in (1, case.new)
            ]
            for mode, top_k in MODES.items()
            if mode == "greedy" or not greedy_only
        }

    def show(turn: int, name: str, answer: Any) -> None:
        if name == MEMORY:
            shown = f"{answer / 1e9:.1f} GB/s"
        else:
            rates = {mode: case.batch * case.new / whole for mode, (_, whole) in answer.items()}
            shown = ", ".join(f"{mode} {rate:.1f} tokens/s" for mode, rate in rates.items())
        print(f"  {what} {turn + 1}: {name:18} {shown}", flush=True)

    return contest.turns(rounds, ask, show)


def figures(mode: str, turns: dict[str, list[Any]], case: Case) -> Row:
    """The contestants' figures in a mode, and how many times as fast as each of the others ours is."""
    found = {
        name: [list(values) for values in zip(*(turn[mode] for turn in rounds), strict=True)]
        for name, rounds in turns.items()
        if mode in rounds[0]
    }
    return {
        "contestants": {
            name: {
                "first_token_ms": spread([1e3 * value for value in first]),
                "tokens_per_second": spread([case.batch * case.new / value for value in whole]),
            }
            for name, (first, whole) in found.items()
        },
        "times_as_fast": {name: ratios(whole, found[OURS][1]) for name, (_, whole) in found.items() if name != OURS},
    }
