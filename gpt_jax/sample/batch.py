"""Batch jobs: prompts from a file, answers to another as they are ready, and a job that goes on where it stopped."""

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.sample.engine import Engine, check_request
from gpt_jax.sample.generate import Row, check_known, encode_prompt, write
from gpt_jax.sample.replicas import Replicas
from gpt_jax.sample.settings import Settings, changed
from gpt_jax.storage.files import locked
from gpt_jax.tokenizer.chat_template import checked
from gpt_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A line of a file of prompts."""

    line: int  # Its number, from 1.
    content: str | list[dict[str, Any]]  # A text to continue, or messages to answer.
    settings: Settings
    id: Any = None  # What the line calls itself.
    own: Mapping[str, Any] = field(default_factory=dict)  # The settings that the line has, as they stand there.

    @property
    def named(self) -> dict[str, Any]:
        """What tells an answer's prompt: fields of NAMED."""
        name = "prompt" if isinstance(self.content, str) else "messages"
        fields = {"line": self.line, "id": self.id, name: self.content, "settings": self.own or None}
        return {name: value for name, value in fields.items() if value is not None}


NAMED = ("line", "id", "prompt", "messages", "settings")
"""Fields of an answer that tell its prompt. Those of which a prompt has none are left out."""


def read_prompts(text: str, where: str, settings: Settings) -> list[Prompt]:
    """The prompts in a text: JSON Lines if its first line is a JSON object, else one a line. Empty lines are none.

    An object has a "prompt" or "messages", and may have an "id", and fields of Settings and Filters that differ from
    `settings`. Raises UserError naming the line for all else.
    """
    text = text.removeprefix("\ufeff")  # The mark with which some editors begin UTF-8.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{where} has no prompts: every line is empty")
    if not isinstance(parsed(lines[0][1]), dict):
        if objects := [number for number, line in lines if isinstance(parsed(line), dict)]:
            first, other = f"{where}, line {lines[0][0]}", f"line {objects[0]} is one"
            raise UserError(f"{first}: this is no JSON object, and {other}; write all lines alike")
        return [Prompt(number, line.removesuffix("\r"), settings) for number, line in lines]
    return [prompt_of(parsed(line), number, f"{where}, line {number}", settings) for number, line in lines]


def parsed(line: str) -> Any:
    """The JSON of a line, or None when it has none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def prompt_of(value: Any, line: int, where: str, settings: Settings) -> Prompt:
    """The prompt that a JSON value stands for. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: this is no JSON object, and the first line is one; write all lines alike")
    rest = {name: field for name, field in value.items() if name not in ("prompt", "messages", "id")}
    if ("prompt" in value) == ("messages" in value):
        raise UserError(f'{where}: a prompt has either "prompt", a text, or "messages", a list of them')
    try:
        json.dumps(value, ensure_ascii=False).encode()
        json.dumps(value.get("id"), allow_nan=False)  # Answers have it, too.
        if "messages" in value:
            content = checked(value["messages"], plain=str)
            return Prompt(line, content, changed(settings, rest), value.get("id"), rest)
        if not isinstance(value["prompt"], str):
            raise UserError(f"the prompt is {value['prompt']!r:.40}, which is no text")
        return Prompt(line, value["prompt"], changed(settings, rest), value.get("id"), rest)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: there is half a character, {e.object[e.start]!a}, which is no text") from e
    except ValueError as e:
        raise UserError(f"{where}: the id has a number that JSON does not have; take another") from e


def tokens_of(prompt: Prompt, tokenizer: Tokenizer, engine: Engine | Replicas) -> list[int]:
    """The tokens to go on from. Raises UserError when they do not fit into the context."""
    if isinstance(prompt.content, str):
        return encode_prompt(prompt.content, tokenizer, engine.model.config.context_length)
    tokens, T = tokenizer.encode_chat(prompt.content), engine.model.config.context_length
    if len(tokens) > T:
        raise UserError(f"the messages have {len(tokens)} tokens, and the model's context_length is {T}; shorten them")
    return tokens


def job_name(*settings: Any) -> str:
    """A name for a job with these settings, so that no other one goes on with its file."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def run_job(
    engine: Engine | Replicas,
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    num_samples: int,
    done: Container[tuple[int, int]],
) -> Iterator[dict[str, Any]]:
    """Yields the answers to all prompts whose (line, sample) is not done, as soon as they are ready.

    Raises UserError naming the line for a prompt that cannot be answered, after those before it were.
    """
    asked: list[tuple[Prompt, int]] = []
    refused: list[UserError] = []

    def rows() -> Iterator[Row]:
        for prompt in prompts:
            missing = [sample for sample in range(num_samples) if (prompt.line, sample) not in done]
            if not missing:
                continue
            try:
                tokens = tokens_of(prompt, tokenizer, engine)
                check_known(tokens, engine.model, tokenizer)
                request = Row(tokens, tokenizer, prompt.settings).request(engine.model.config.context_length)
                check_request(request, engine.model, engine.n_tokens)
            except UserError as e:
                refused.append(UserError(f"line {prompt.line}: {e}"))
                return
            for sample in missing:
                asked.append((prompt, sample))
                yield Row(tokens, tokenizer, prompt.settings, sample)

    for number, row in write(engine, rows()):
        prompt, sample = asked[number]
        yield {**prompt.named, "sample": sample, **dataclasses.asdict(row.result)}
    if refused:
        raise refused[0]


class Answers:
    """The file of a job's answers, JSON Lines, to which answers are added as they come; open it by `open_answers`."""

    def __init__(self, path: Path, job: str) -> None:
        """Reads what is there. Raises UserError when it is another job's, or cannot be read."""
        self.path, self.job = path, job
        self.done: dict[tuple[int, int], dict[str, Any]] = {}  # By line and sample.
        self.whole = 0  # Bytes of whole lines; the job was stopped within what follows.
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror}") from e
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            answer = parsed(line.decode(errors="replace"))
            if not isinstance(answer, dict) or not {"job", "line", "sample"} <= answer.keys():
                raise UserError(f"{path}, line {number}: this is no answer of such a job; take another --out")
            if answer["job"] != job:
                raise UserError(f"{path} has the answers of another model, or of other settings; take another --out")
            self.done[answer["line"], answer["sample"]] = answer
            self.whole += len(line)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raises UserError when an answer that is there belongs to another prompt, or other settings of a line."""
        asked = {prompt.line: prompt.named for prompt in prompts}
        for (line, _), answer in self.done.items():
            if asked.get(line) != {name: answer[name] for name in NAMED if name in answer}:
                found = f"answers another prompt, or one with other settings, at line {line}"
                raise UserError(f"{self.path} {found}; take another --out")

    def add(self, answer: dict[str, Any]) -> None:
        """Writes an answer. Raises UserError when it cannot be written; those before it stay."""
        line = json.dumps({"job": self.job, **answer}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.truncate(self.whole)
                file.seek(self.whole)
                file.write(line)
        except OSError as e:
            raise UserError(f"{self.path} could not be written ({e.strerror}); the answers before stay") from e
        self.whole += len(line)


@contextmanager
def open_answers(path: Path, job: str, prompts: Iterable[Prompt]) -> Iterator[Answers]:
    """The file of a job's answers, which no other job can open until it is closed. Raises UserError when it has the
    answers to another job or to other prompts."""
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{path} cannot be written: --out is a file, in a folder that is there")
    with locked(path.with_name(f".{path.name}.lock"), f"another job writes {path}; wait for it, or stop it"):
        answers = Answers(path, job)
        answers.check(prompts)
        yield answers
