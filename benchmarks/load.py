"""Serving over HTTP: python -m benchmarks load --gguf FILE [--llama-cpp FOLDER] [--models FOLDER] [--rates RATE ...]

`gpt-jax serve`, llama.cpp's `llama-server` and `transformers serve` with the same model: in float32, and ours in int8,
cache included, beside llama.cpp's Q8_0, whose cache is float16. Three questions, each with rows of its own. Requests:
64 of mixed lengths, which arrive at fixed times whether or not the others are answered, at each rate. A chat: the first
token of an answer, turn by turn, with a history that grows. A start: from starting the process to the first token of an
answer, with empty and with filled caches. A server that is not here is told in the row, and is no error.
"""

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import llama_cpp, parity, servers
from benchmarks.contest import INT8, OURS, TRANSFORMERS, Contest
from benchmarks.measure import ratios, run_command, spread
from benchmarks.results import Results, Row
from benchmarks.serve import LLAMA_CPP
from benchmarks.servers import Answer, How, Server
from benchmarks.worker import FailedError, time_is_over, too_late
from gpt_jax.data.corpora import python_docs
from gpt_jax.storage.files import replacing

WEIGHTS = {"float32": OURS, "8 bits": INT8}
"""The types of weights, and ours among the contestants that have them."""

LLAMA_CPP_Q8 = f"{LLAMA_CPP}, Q8_0"

RATES = (0.5, 1.0, 4.0)
"""Requests a second: about half of what two cores can answer with SmolLM2-135M in float32, about all of it, and more
than they can with 8 bits, so that tokens/s are those of a server that always has work."""

REQUESTS, PROMPTS, ANSWERS = 64, (64, 2000), (8, 256)
"""How many requests, the characters of a prompt, and the tokens of an answer: at least, and at most."""

SLOTS, CONTEXT = 8, 2048
"""Texts that a server writes at the same time, and the tokens of each at most."""

TURNS, MESSAGE, REPLY = 8, 240, 64
"""The turns of a chat, the characters of a message, and the tokens of an answer to it."""

WARM_UP, WARM_TOKENS = 16, 32
"""Requests at once before anything is timed, and the most tokens of their answers, which are compared."""

SAME, TOLERANCES = 20, {"prompt tokens": 0.0, "answers": 0.5}
"""Characters with which answers begin, and how much may differ: the tokens of all prompts, and the share of answers.
Caches and products are rounded in other ways, after which greedy answers go ways of their own."""


class Request(NamedTuple):
    """What is asked for."""

    prompt: str
    max_tokens: int


class Models:
    """A GGUF file, and what is made of it for the others, when it is first needed."""

    def __init__(self, gguf: Path, programs: Path | None, folder: Path, cores: int) -> None:
        """programs: the folder of llama.cpp's, else PATH; folder: where what is made is looked for and kept."""
        self.gguf, self.folder, self.cores = gguf.absolute(), folder.absolute(), cores
        self.programs = llama_cpp.find_programs(programs, llama_cpp.SERVER)
        missing = [name for name in llama_cpp.SERVER if name not in self.programs]
        self.notes = [f"{LLAMA_CPP}: not here: {' and '.join(missing)} in {programs or 'PATH'}"] if missing else []

    @cached_property
    def contestants(self) -> dict[str, dict[str, How]]:
        """By weights and by name. Raises UserError when the file cannot be read, and FailedError."""
        here = not self.notes
        own = self.as_type("F32") if here else self.gguf
        found = {
            "float32": {OURS: servers.ours(own, SLOTS, CONTEXT)},
            "8 bits": {INT8: servers.ours(own, SLOTS, CONTEXT, "--quantize", "int8", "--cache-dtype", "int8")},
        }
        if here:
            program = self.programs["llama-server"]
            for weights, name, kind in (("float32", LLAMA_CPP, "F32"), ("8 bits", LLAMA_CPP_Q8, "Q8_0")):
                how = servers.llama_server(program, self.as_type(kind), SLOTS, CONTEXT, self.cores)
                found[weights][name] = how
        if not (folder := self.folder / self.gguf.stem).exists():
            servers.write_for_transformers(self.gguf, folder)
        found["float32"][TRANSFORMERS] = servers.transformers_serve(folder, SLOTS, CONTEXT, self.cores)
        return found

    def as_type(self, kind: str) -> Path:
        """The file with its tensors in a type of llama.cpp's."""
        path = self.folder / f"{self.gguf.stem}.{kind}.gguf"
        if not path.exists():
            with replacing(path) as unfinished:
                command = ("--allow-requantize", str(self.gguf), str(unfinished), kind)
                run_command(*command, program=self.programs["llama-quantize"])
        return path


class Servers(ExitStack):
    """The servers of the contestants, which start when they are first needed. Leaving it ends them."""

    def __init__(self, models: Models, caches: Path) -> None:
        super().__init__()
        self.models, self.caches = models, caches

    @cached_property
    def by_weights(self) -> dict[str, dict[str, Server]]:
        """By weights and by name. Raises as `Models.contestants`."""
        return {
            weights: {name: self.enter_context(Server(how, self.caches)) for name, how in hows.items()}
            for weights, hows in self.models.contestants.items()
        }


def run(
    results: Results,
    machine: Row,
    rounds: int,
    files: Sequence[Path],
    programs: Path | None = None,
    folder: Path | None = None,
    rates: Sequence[float] = RATES,
) -> None:
    """Measures the rows. files: GGUF; programs: the folder of llama.cpp's, else PATH; folder: where the other forms of
    the models are looked for and kept, None: they are made anew; rates: requests a second."""
    if not files:
        print("nothing to serve: --gguf names no file", flush=True)
    for path in files:
        with tempfile.TemporaryDirectory() as temporary:
            models = Models(path, programs, folder or Path(temporary), machine["cores"])
            for note in models.notes:
                print(note, flush=True)
            caches = Path(temporary) / "caches"
            with Servers(models, caches) as started:
                for weights in WEIGHTS:
                    for rate in rates:
                        line = f"{path.name}, {weights}, {REQUESTS} requests, {rate:g} a second"
                        name = f"load/requests/{path.stem}, {weights}, {rate:g} a second"
                        results.measure(name, line, answer_requests, started, weights, rate, rounds)
                    line = f"{path.name}, {weights}, a chat of {TURNS} turns"
                    results.measure(f"load/chat/{path.stem}, {weights}", line, answer_chat, started, weights, rounds)
            for weights, kind in itertools.product(WEIGHTS, ("empty", "filled")):
                line, kept = f"{path.name}, {weights}, {kind} caches", caches if kind == "filled" else None
                name = f"load/start/{path.stem}, {weights}, {kind} caches"
                results.measure(name, line, start, models, weights, kept, rounds)


def excerpt(rng: np.random.Generator, n_characters: int) -> str:
    """So many characters of Python's documentation, from the beginning of a word that is drawn."""
    text = documentation()
    begin = text.index(" ", int(rng.integers(len(text) - 2 * n_characters))) + 1
    return text[begin : begin + n_characters]


@cache
def documentation() -> str:
    """Python's documentation as one text."""
    return "\n".join(python_docs())


def requests(*seed: int) -> list[Request]:
    """The requests; their lengths are the same for every seed, and their logarithms are uniform. Texts of other seeds
    begin elsewhere, so that no server has read them before."""
    rng, of_texts = np.random.default_rng(0), np.random.default_rng(seed)

    def lengths(least: int, most: int) -> list[int]:
        return np.exp(rng.uniform(np.log(least), np.log(most), REQUESTS)).round().astype(int).tolist()

    sizes = zip(lengths(*PROMPTS), lengths(*ANSWERS), strict=True)
    return [Request(excerpt(of_texts, n_characters), n_tokens) for n_characters, n_tokens in sizes]


def arrivals(rate: float) -> list[float]:
    """Seconds after which the requests arrive: as a Poisson process, whose last one arrives when `rate` says."""
    at = np.random.default_rng(1).exponential(size=REQUESTS).cumsum()
    return (at * (REQUESTS / rate / at[-1])).tolist()


def answer_requests(started: Servers, weights: str, rate: float, rounds: int) -> Row:
    """The row of the requests at a rate. Raises UserError where the first answers differ, and as `Contest.turns`."""
    rounds_of: Counter[Server] = Counter()

    def ask(server: Server) -> Row:
        number = rounds_of[server]
        rounds_of[server] += 1
        with server.awake():
            found = measure(server, requests(round(1000 * rate), number), arrivals(rate))
            return found | {"peak_bytes": server.memory("VmHWM"), "resident_bytes": server.memory("VmRSS")}

    def show(turn: int, name: str, found: Row) -> None:
        first = f"{found['first_token_ms']:.0f} ms to the first token (99%: {found['first_token_ms_p99']:.0f})"
        each = f"{found['token_ms']:.1f} ms a token (99%: {found['token_ms_p99']:.1f})"
        line = f"{found['tokens_per_second']:.1f} tokens/s, {first}, {each}, {found['failed']} failed"
        print(f"  round {turn + 1}: {name:16} {line}", flush=True)

    with contest_of(started.by_weights[weights], weights) as contest:
        differences = warm_up(contest, weights)
        row = figures(contest, weights, rounds, ask, show, "answer_seconds")
    busy = max(found["client_share"]["max"] for found in row["contestants"].values())
    total = sum(request.max_tokens for request in requests(0))
    notes = [
        f"{REQUESTS} requests, which arrive as a Poisson process would let them, the same for all; answers of "
        f"{ANSWERS[0]} to {ANSWERS[1]} tokens, {total} in all, greedily, to prompts of {PROMPTS[0]} to {PROMPTS[1]} "
        "characters of Python's documentation, of which no two rounds have the same",
        f"a server writes {SLOTS} texts at a time, of {CONTEXT} tokens at most; it has all cores, with its client",
        "times begin when a request is due; a token's is from the first to the last of an answer; percentiles are over "
        "the requests; s an answer is the mean, and times as fast is by it",
        f"the client took up to {busy:.0%} of a core",
    ]
    return {**row, "parity": differences, "notes": [*notes, *started.models.notes]}


def answer_chat(started: Servers, weights: str, rounds: int) -> Row:
    """The row of a chat. Raises as `answer_requests`."""
    rounds_of: Counter[Server] = Counter()

    def ask(server: Server) -> Row:
        rng = np.random.default_rng([2, rounds_of[server]])
        rounds_of[server] += 1
        messages: list[Row] = []
        firsts = []
        with server.awake():
            for _ in range(TURNS):
                messages.append({"role": "user", "content": excerpt(rng, MESSAGE)})
                answer = server.ask("/v1/chat/completions", messages=messages, max_tokens=REPLY)
                messages.append({"role": "assistant", "content": answer.text})
                firsts.append(1e3 * answer.first)
        each = {turn_key(turn): ms for turn, ms in enumerate(firsts, 1)}
        return {**each, "first_token_ms": float(np.mean(firsts)), "prompt_tokens": answer.prompt_tokens}

    def show(turn: int, name: str, found: Row) -> None:
        each = " ".join(f"{found[turn_key(i)]:.0f}" for i in range(1, TURNS + 1))
        print(f"  round {turn + 1}: {name:16} {each} ms to the first token", flush=True)

    with contest_of(started.by_weights[weights], weights) as contest:
        differences = warm_up(contest, weights)
        row = figures(contest, weights, rounds, ask, show, "first_token_ms")
    longest = max(found["prompt_tokens"]["max"] for found in row["contestants"].values())
    note = f"messages of {MESSAGE} characters, answers of {REPLY} tokens, at last to {longest:.0f} tokens of history"
    notes = [f"{note}, of which each keeps what it does by itself; times as fast is by the mean of the turns"]
    return {**row, "parity": differences, "notes": [*notes, *started.models.notes]}


def turn_key(turn: int) -> str:
    """The name of a turn's figure; the first turn is 1."""
    return f"turn_{turn}_ms"


def start(models: Models, weights: str, caches: Path | None, rounds: int) -> Row:
    """The row of starting. caches: the folder of the caches, which is filled first; None: an empty one each time.
    Raises as `answer_requests`."""

    def ask(how: How) -> Row:
        with tempfile.TemporaryDirectory() as empty, Server(how, caches or Path(empty)) as server:
            begin = time.perf_counter()
            server.start()
            ready = time.perf_counter() - begin
            message = {"role": "user", "content": "Hello"}
            answer = server.ask("/v1/chat/completions", due=begin, messages=[message], max_tokens=ANSWERS[0])
            return {"ready_seconds": ready, "seconds": answer.first, "resident_bytes": server.memory("VmRSS")}

    def show(turn: int, name: str, found: Row) -> None:
        print(f"  round {turn + 1}: {name:16} {found['seconds']:.1f} s to the first token", flush=True)

    with contest_of(models.contestants[weights], weights) as contest:
        if caches:
            contest.turns(1, ask)
        row = figures(contest, weights, rounds, ask, show, "seconds")
    return {**row, "notes": ["the files of models and programs are in the system's page cache", *models.notes]}


def contest_of(contestants: Mapping[str, Any], weights: str) -> Contest:
    """A contest of them, in which ours is needed."""
    contest = Contest(needs=WEIGHTS[weights])
    contest.contestants |= contestants
    return contest


def warm_up(contest: Contest, weights: str) -> Row:
    """Lets each answer some requests at once; returns and raises as `check_answers`, and raises as `Contest.turns`."""
    asked = [Request(prompt, min(n_tokens, WARM_TOKENS)) for prompt, n_tokens in requests(0)[:WARM_UP]]

    def ask(server: Server) -> list[Answer]:
        with server.awake():
            answers, failures = send(server, asked, [0.0] * len(asked))
        if failures:
            raise FailedError(failures[0])
        return answers

    answers = {name: found[0] for name, found in contest.turns(1, ask).items()}
    return check_answers(answers.pop(WEIGHTS[weights]), answers)


def check_answers(ours: Sequence[Answer], others: Mapping[str, Sequence[Answer]]) -> Row:
    """What `TOLERANCES` is about, by contestant. Raises UserError where that is more than it may be."""
    found = {}
    for name, theirs in others.items():
        pairs = list(zip(ours, theirs, strict=True))
        found[name] = {
            "prompt tokens": float(sum(abs(a.prompt_tokens - b.prompt_tokens) for a, b in pairs)),
            "answers": float(np.mean([a.text[:SAME] != b.text[:SAME] for a, b in pairs])),
        }
        parity.check(found[name], TOLERANCES, name)
    return found


def send(server: Server, asked: Sequence[Request], times: Sequence[float]) -> tuple[list[Answer], list[str]]:
    """The answers to requests that are sent after so many seconds each, and why there are no others.

    Raises OutOfTimeError when that is because the time of the whole run is over.
    """
    begin = time.perf_counter()

    def ask(request: Request, at: float) -> Answer | str:
        time.sleep(max(0.0, begin + at - time.perf_counter()))
        try:
            return server.ask("/v1/completions", due=begin + at, **request._asdict())
        except FailedError as e:
            return str(e)

    with ThreadPoolExecutor(len(asked)) as pool:  # Threads, in which the standard library reads the responses.
        found = list(pool.map(ask, asked, times))
    failures = [answer for answer in found if isinstance(answer, str)]
    if failures and time_is_over():
        raise too_late(0)
    return [answer for answer in found if isinstance(answer, Answer)], failures


def measure(server: Server, asked: Sequence[Request], times: Sequence[float]) -> Row:
    """The figures of these requests. Raises FailedError where none is answered, and OutOfTimeError."""
    begin, cpu = time.perf_counter(), time.process_time()
    answers, failures = send(server, asked, times)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if not answers:
        raise FailedError(failures[0])
    if failures:
        print(f"  {len(failures)} failed, the first of them: {failures[0]}", flush=True)
    return {**statistics(answers, seconds - times[0]), "failed": len(failures), "client_share": cpu / seconds}


def statistics(answers: Sequence[Answer], seconds: float) -> Row:
    """Tokens a second of all answers together, within so many seconds, and medians and 99th percentiles over them."""
    first = [1e3 * answer.first for answer in answers]
    each = [1e3 * (answer.seconds - answer.first) / (answer.tokens - 1) for answer in answers]
    return {
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "first_token_ms": float(np.median(first)),
        "first_token_ms_p99": float(np.percentile(first, 99)),
        "token_ms": float(np.median(each)),
        "token_ms_p99": float(np.percentile(each, 99)),
        "answer_seconds": float(np.mean([answer.seconds for answer in answers])),
    }


def figures(
    contest: Contest,
    weights: str,
    rounds: int,
    ask: Callable[[Any], Row],
    show: Callable[[int, str, Row], None],
    compared: str,
) -> Row:
    """What a row has of its rounds, in which `ask` gives the figures of a contestant; `compared` is the one by which
    ours is times as fast. Raises as `Contest.turns`."""
    turns, own = contest.turns(rounds, ask, show), WEIGHTS[weights]
    of_rounds = {name: {key: [found[key] for found in rows] for key in rows[0]} for name, rows in turns.items()}
    return {
        "rounds": len(turns[own]),
        "failed": contest.failed,
        "contestants": {
            name: {key: spread(values) for key, values in found.items()} for name, found in of_rounds.items()
        },
        "times_as_fast": {
            name: ratios(found[compared], of_rounds[own][compared]) for name, found in of_rounds.items() if name != own
        },
    }
