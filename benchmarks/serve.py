"""Serving: python -m benchmarks serve [--gguf FILE ...] [--llama-cpp FOLDER]

Three questions, each with rows of its own. Many requests: 64 of mixed lengths through eight slots, continuously, in
batches that wait for their longest, and in such batches by transformers; GPT-2 124M as in `decode`. A long chat: the
first token of an answer with the history read before, and without. llama.cpp: the same GGUF file by both, a row each
for one sequence, for eight, and for reading a prompt; without the file or the programs that is told, and no error.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import llama_cpp, parity
from benchmarks.contest import INT8, OURS, TRANSFORMERS, Contest
from benchmarks.contestants import Asked
from benchmarks.decode import PARITY_TOKENS, TOLERANCES
from benchmarks.measure import ratios, spread
from benchmarks.results import Results, Row
from benchmarks.worker import Worker
from gpt_jax.config import ModelConfig, RopeConfig
from gpt_jax.config.model import DTypeName
from gpt_jax.model.presets import GPT2

BATCHES, NOTHING_CACHED, LLAMA_CPP = "gpt_jax, in batches", "gpt_jax, nothing cached", "llama.cpp"

FROM_FILE: Mapping[str, Row] = {OURS: {}, INT8: {"quantize": "int8"}}
"""Ours that load a GGUF file, and the options with which they do."""

SLOTS = 8
REQUESTS, PROMPTS, ANSWERS = 64, (16, 512), (8, 256)
"""How many requests, and the tokens of a prompt and of an answer: at least, and at most."""

SMOLLM2 = ModelConfig(
    vocab_size=49152,
    context_length=8192,
    n_layer=30,
    n_head=9,
    n_kv_head=3,
    d_model=576,
    d_ff=1536,
    positions="rotary",
    rope=RopeConfig(theta=100_000.0),
    norm="rms",
    activation="silu",
    gated=True,
    bias=False,
)
"""The architecture of SmolLM2-135M, for the chat."""


WARM_UP = 1
"""Answers that are not timed."""


class Chat(NamedTuple):
    """The tokens of a chat: its history, the new turn, and the most of the answer."""

    history: int = 2000
    turn: int = 30
    new: int = 200


class Case(NamedTuple):
    """What is asked of a GGUF file: so many sequences, tokens of each prompt, and new tokens. With one, it is read."""

    batch: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """The tokens that count: those that are read, or those that are written."""
        return self.prompt if self.new == 1 else self.batch * self.new


CHAT = Chat()
CASES = {"batch 1": Case(1, 1, 128), "batch 8": Case(8, 1, 128), "reading 512 tokens": Case(1, 512, 1)}


def run(
    results: Results,
    machine: Row,
    rounds: int,
    files: Sequence[Path] = (),
    programs: Path | None = None,
    models: tuple[ModelConfig, ModelConfig] = (GPT2, SMOLLM2),
    chat: Chat = CHAT,
) -> None:
    """Measures the rows. files: GGUF; programs: the folder of llama.cpp's, else PATH; models: for requests and chat."""
    dtype: DTypeName = "float32" if machine["platform"] == "cpu" else "bfloat16"
    of_requests, of_chat = (dataclasses.replace(model, dtype=dtype) for model in models)
    line = f"{REQUESTS} requests of mixed lengths, {SLOTS} at a time, {dtype}"
    results.measure("serve/requests", line, serve_requests, of_requests, machine["platform"], rounds)
    line = f"a chat of {chat.history} tokens and a turn of {chat.turn}, {dtype}"
    results.measure("serve/chat", line, answer_chat, of_chat, chat, rounds)
    if not files:
        print(f"{LLAMA_CPP}: not here: --gguf names no file to compare with", flush=True)
    for path in files:
        for name, case in CASES.items():
            line = f"{path.name}, {name}"
            results.measure(f"serve/{path.stem}, {name}", line, read_file, path, case, machine, programs, rounds)


def requests(vocab_size: int) -> Asked:
    """The requests, of random tokens; the logarithms of the lengths are uniform."""
    rng = np.random.default_rng(0)

    def lengths(least: int, most: int) -> list[int]:
        logs = rng.uniform(np.log(least), np.log(most), REQUESTS)
        return [round(length) for length in np.exp(logs).tolist()]

    sizes = zip(lengths(*PROMPTS), lengths(*ANSWERS), strict=True)
    return [(rng.integers(0, vocab_size, prompt).tolist(), new) for prompt, new in sizes]


def serve_requests(model: ModelConfig, platform: str, rounds: int) -> Row:
    """The row of many requests. Raises UserError where the answers differ, and as `Contest.turns`."""
    asked = requests(model.vocab_size)
    n_tokens = sum(new for _, new in asked)
    with Contest() as contest:
        ours = contest.add(OURS, "benchmarks.ours:Serving", model=model, continuous=True)
        contest.add(BATCHES, "benchmarks.ours:Serving", model=model, continuous=False)
        if platform != "tpu":
            contest.add(TRANSFORMERS, "benchmarks.theirs:HuggingFaceDecoding", model=model)
        contest.once("ready", parameters=ours.ask("initial"))
        answers = {name: tokens for name, (_, tokens) in contest.once("serve", asked=asked, slots=SLOTS).items()}
        differences = check_answers(model.dtype, answers)  # And all is warm.
        row = times(contest, rounds, n_tokens, lambda worker: worker.ask("serve", asked=asked, slots=SLOTS)[0])
    lengths = f"prompts of {PROMPTS[0]} to {PROMPTS[1]} tokens, answers of {ANSWERS[0]} to {ANSWERS[1]}"
    note = f"{len(asked)} requests, {lengths}, {n_tokens} in all, which alone are counted; {SLOTS} at a time, greedily"
    return {"dtype": model.dtype, "parity": differences, **row, "notes": [f"{note}; GPT-2 124M, {model.dtype}"]}


def check_answers(dtype: str, answers: Mapping[str, list[list[int]]]) -> Row:
    """The share of tokens at which the others' first answers differ from ours, by contestant. Raises UserError where
    that is more than it may be."""

    def first(tokens: list[list[int]]) -> list[int]:
        return [token for answer in tokens[:SLOTS] for token in answer[:PARITY_TOKENS]]

    found = {}
    for name in answers.keys() - {OURS}:
        pairs = zip(first(answers[OURS]), first(answers[name]), strict=True)
        found[name] = {"tokens": float(np.mean([a != b for a, b in pairs]))}
        parity.check(found[name], TOLERANCES[dtype], name)
    return found


def answer_chat(model: ModelConfig, chat: Chat, rounds: int) -> Row:
    """The row of a chat. Raises UserError where the first tokens differ, and as `Contest.turns`."""
    with Contest() as contest:
        ours = contest.add(OURS, "benchmarks.ours:Chat", model=model, cached=True)
        contest.add(NOTHING_CACHED, "benchmarks.ours:Chat", model=model, cached=False)
        contest.once("ready", parameters=ours.ask("initial"))
        warm = contest.turns(WARM_UP, lambda worker: worker.ask("first_token", **chat._asdict()))
        tokens = {token for found in warm.values() for _, token in found}
        parity.check({"first tokens": len(tokens) - 1}, {"first tokens": 0}, NOTHING_CACHED)
        row = times(contest, rounds, None, lambda worker: worker.ask("first_token", **chat._asdict())[0])
    note = f"a history of {chat.history} tokens, of which gpt_jax has read the whole chunks, and a turn of {chat.turn}"
    note += f"; the architecture of SmolLM2-135M, random weights, {model.dtype}"
    return {"dtype": model.dtype, **row, "notes": [note]}


def read_file(path: Path, case: Case, machine: Row, folder: Path | None, rounds: int) -> Row:
    """The row of a GGUF file and a case. llama.cpp is left out where its programs are not there."""
    gguf, programs = str(path.absolute()), llama_cpp.find_programs(folder)
    notes = ["activations and cache are float32, llama.cpp's cache float16; llama.cpp reads random tokens, not its own"]
    with Contest() as contest:
        for name, how in FROM_FILE.items():
            worker = contest.enter_context(Worker("benchmarks.ours:FromFile", path=gguf, **how))
            contest.contestants[name] = partial(worker.ask, "greedy_seconds", **case._asdict())
        if missing := [name for name in llama_cpp.PROGRAMS if name not in programs]:
            notes = [f"{LLAMA_CPP}: not here: {' and '.join(missing)} in {folder or 'PATH'}"]
            print(f"  {notes[0]}", flush=True)
        else:
            theirs = partial(llama_cpp.seconds, programs, gguf, machine["cores"], **case._asdict())
            contest.contestants[LLAMA_CPP] = theirs
        contest.turns(WARM_UP, lambda measure: measure())
        return {**times(contest, rounds, case.tokens, lambda measure: measure()), "notes": notes}


def times(contest: Contest, rounds: int, n_tokens: int | None, ask: Callable[[Any], float]) -> Row:
    """What a row has of its rounds, in which `ask` gives the seconds of a contestant: tokens a second, of so many, or
    the milliseconds of the first token for None. Raises as `Contest.turns`."""

    def show(turn: int, name: str, seconds: float) -> None:
        rate = f", {n_tokens / seconds:.1f} tokens/s" if n_tokens else ""
        print(f"  round {turn + 1}: {name:24} {seconds:.3f} s{rate}", flush=True)

    def figures(seconds: list[float]) -> Row:
        if n_tokens is None:
            return {"first_token_ms": spread([1e3 * value for value in seconds])}
        return {"tokens_per_second": spread([n_tokens / value for value in seconds])}

    turns = contest.turns(rounds, ask, show)
    return {
        "rounds": len(turns[OURS]),
        "failed": contest.failed,
        "contestants": {name: figures(seconds) for name, seconds in turns.items()},
        "times_as_fast": {name: ratios(seconds, turns[OURS]) for name, seconds in turns.items() if name != OURS},
    }
