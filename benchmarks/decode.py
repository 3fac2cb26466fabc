"""Decoding, side by side: python -m benchmarks decode [--batch 1 8 64]

A row for each batch with a short prompt, and for one sequence one with a long prompt, too. GPT-2 124M with random
weights, the same for all, in float32 on CPU and in bfloat16 on accelerators; the vocabulary is padded to 50304 tokens.
All compile and warm up, all must choose the same tokens, and then they take turns, while the others wait. Ours takes
part with int8 weights, too, which are other weights, and so choose other tokens.

100% of the roofline is to read all the weights once a token, at the best bandwidth that was measured; with many
sequences the products and caches need time of their own. Peak memory is counted from when the weights are there.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks import parity
from benchmarks.contest import INT8, OURS, TRANSFORMERS, Contest
from benchmarks.contestants import MODES
from benchmarks.markdown import with_range
from benchmarks.measure import ratios, spread
from benchmarks.results import Results, Row
from benchmarks.worker import Worker
from gpt_jax.config import ModelConfig
from gpt_jax.model.presets import GPT2

CACHE, NO_CACHE = "pytorch, cache", "pytorch, no cache"
PROMPT, LONG_PROMPT = 16, 512
NEW, NEW_SLOW, SLOW_BATCH = 128, 32, 64
"""Tokens of an answer; those after a long prompt, and on CPU from so many sequences on."""
PARITY_TOKENS = 32

TOLERANCES = {
    "float32": {"tokens": 0.0, "log-probabilities": 1e-4},
    "bfloat16": {"tokens": 1.0, "log-probabilities": 0.015},
}
"""Of the share of tokens, and of the log-probabilities of chosen tokens, in nats, root mean square. bfloat16, to which
the logits are rounded, too, comes to 0.007 to 0.008, and a cache that is read one token short to 0.026 to 0.046."""


Answer = tuple[np.ndarray, np.ndarray]
"""Tokens (B, new), and their log-probabilities in nats."""

Seconds = dict[str, tuple[float, float]]
"""By mode, the seconds of an answer of one token, and of all."""


class Case(NamedTuple):
    """What a row measures: so many sequences, tokens of each prompt, and new tokens."""

    batch: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        """The name of the row."""
        return f"decode/{self.batch}" + (f", prompt {self.prompt}" if self.prompt != PROMPT else "")


def run(results: Results, machine: Row, rounds: int, batches: Sequence[int], model: ModelConfig = GPT2) -> None:
    """Ours against PyTorch's and transformers', a row for each case; each with processes of its own."""
    on_cpu = machine["platform"] == "cpu"
    model = dataclasses.replace(model, dtype="float32" if on_cpu else "bfloat16")
    cases = [Case(batch, PROMPT, NEW_SLOW if on_cpu and batch >= SLOW_BATCH else NEW) for batch in batches]
    cases += [Case(1, LONG_PROMPT, NEW_SLOW)] if 1 in batches else []
    for case in cases:
        line = f"batch {case.batch}, prompts of {case.prompt} tokens, {case.new} new ones, {model.dtype}"
        results.measure(case.name, line, compare, model, machine["platform"], case, rounds)


def compare(model: ModelConfig, platform: str, case: Case, rounds: int) -> Row:
    """The row of a case. Raises UserError when the contestants do not compute the same, and as `Contest.turns`."""

    def show(turn: int, name: str, answer: Seconds) -> None:
        rates = (f"{mode} {case.batch * case.new / whole:.1f} tokens/s" for mode, (_, whole) in answer.items())
        print(f"  round {turn + 1}: {name:18} {', '.join(rates)}", flush=True)

    notes = [f"{case.new} tokens after a prompt of {case.prompt}, {model.dtype}"]
    notes += ["the cache of gpt_jax has a power of two of places for tokens, the others' as many as there are tokens"]
    with Contest() as contest:
        parameters = contest.add(OURS, "benchmarks.ours:Decoding", model=model).ask("initial")
        contest.add(INT8, "benchmarks.ours:Decoding", model=model, quantize=True)
        if platform != "tpu":
            contest.add(TRANSFORMERS, "benchmarks.theirs:HuggingFaceDecoding", model=model)
            contest.add(CACHE, "benchmarks.theirs:Decoding", model=model)
        if platform == "gpu":
            contest.add(NO_CACHE, "benchmarks.theirs:Decoding", model=model, cached=False)
        elif platform == "cpu" and case.name == "decode/1":
            contest.add(NO_CACHE, "benchmarks.theirs:Decoding", model=model, cached=False, modes=("greedy",))
            notes.append(f"{NO_CACHE}: greedy and one sequence only, because on CPU it takes long")
        contest.once("begin")  # They are made before there are arrays, so that what libraries hold is known.
        contest.once("ready", parameters=parameters)
        contest.once("begin")  # Once more, when what came with that message is gone.
        answers = contest.once("greedy", batch=case.batch, prompt=case.prompt, new=PARITY_TOKENS)
        answers.pop(INT8, None)
        differences = check_parity(model.dtype, answers)
        contest.once("seconds", **case._asdict())  # To warm up.
        memory = contest.once("memory", **case._asdict())
        turns: dict[str, list[Seconds]] = contest.turns(rounds, lambda w: w.ask("seconds", **case._asdict()), show)
    bandwidth = None
    if platform != "tpu":
        with Worker("benchmarks.machine:TorchProbe") as probe:
            bandwidth = spread([probe.ask("bandwidth") for _ in range(rounds)])
    # A token needs all the weights but the positions; the token embeddings are the head.
    n_weights = model.n_params - model.context_length * model.d_model
    notes += of_int8(turns)
    return {
        "preset": "gpt2",
        "dtype": model.dtype,
        **case._asdict(),
        "rounds": len(turns[OURS]),
        "parity": differences,
        "bandwidth": bandwidth,
        "weight_bytes": n_weights * (4 if model.dtype == "float32" else 2),
        "notes": notes,
        "failed": contest.failed,
        "modes": {mode: figures(mode, turns, case) for mode in MODES},
        **{what: {name: memory[name][what] for name in turns} for what in ("peak_bytes", "memory")},
    }


def check_parity(dtype: str, answers: dict[str, Answer]) -> Row:
    """Compares the greedy tokens of all with ours, and their log-probabilities; what was found, by contestant.

    In float32 the tokens must be the same. In bfloat16, where logits tie, sequences may part: log-probabilities count
    up to and including the token at which they do, and two tokens that tie have the same one. Raises UserError.
    """
    found = {name: difference(answers[OURS], theirs) for name, theirs in answers.items() if name != OURS}
    for name, of in found.items():
        differences = {"tokens": 1 - of["same_tokens"], "log-probabilities": of["logprobs"]}
        parity.check(differences, TOLERANCES[dtype], name)
        print(f"  {name}: {', '.join(f'{what} differ by {x:.1e}' for what, x in differences.items())}", flush=True)
    return found


def difference(ours: Answer, theirs: Answer) -> dict[str, float]:
    """The share of tokens up to which sequences are the same, and the difference of their log-probabilities, root mean
    square, up to and including the first token that is not."""
    (tokens_BN, logprobs_BN), (their_tokens_BN, their_logprobs_BN) = ours, theirs
    parted_BN = np.logical_or.accumulate(tokens_BN != their_tokens_BN, axis=1)
    counts_BN = ~np.pad(parted_BN, ((0, 0), (1, 0)))[:, :-1]
    of_logprobs = (logprobs_BN - their_logprobs_BN)[counts_BN]
    return {"same_tokens": float(1 - parted_BN.mean()), "logprobs": float(np.sqrt(np.mean(of_logprobs**2)))}


def figures(mode: str, turns: dict[str, list[Seconds]], case: Case) -> Row:
    """The contestants' figures in a mode, and how many times as fast as each of the others ours is."""
    row: Row = {"contestants": {}, "times_as_fast": {}}
    for name, answers in turns.items():
        if mode in answers[0]:
            first, whole = zip(*(answer[mode] for answer in answers), strict=True)
            row["contestants"][name] = {
                "first_token_ms": spread([1e3 * value for value in first]),
                "tokens_per_second": spread([case.batch * case.new / value for value in whole]),
            }
            if name not in (OURS, INT8):
                row["times_as_fast"][name] = ratios(whole, [answer[mode][1] for answer in turns[OURS]])
    return row


def of_int8(turns: dict[str, list[Seconds]]) -> list[str]:
    """How many times as fast as transformers ours with int8 weights is, a line for each mode."""
    if not {INT8, TRANSFORMERS} <= set(turns):
        return []
    seconds = {mode: [[answer[mode][1] for answer in turns[name]] for name in (TRANSFORMERS, INT8)] for mode in MODES}
    found = {mode: ratios(*both) for mode, both in seconds.items()}
    return [f"{mode}: {INT8} is {with_range(ratio)} times as fast as {TRANSFORMERS}" for mode, ratio in found.items()]
