"""Conversations with a small random model and a tokenizer that has a chat template; Ctrl-C in a real process."""

import dataclasses
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("tokenizers")

from gpt_jax.api import Model
from gpt_jax.cli.chat import HELP, chat
from gpt_jax.cli.sample import SampleArgs
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.run.load import LoadedModel
from gpt_jax.sample import chat as chat_module
from gpt_jax.sample.chat import Message, fit
from gpt_jax.sample.engine import Engine
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.hugging_face import HuggingFaceTokenizer, read_settings
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests import commands, tiny
from tests.published import byte_level

TOKENIZER = load_tokenizer(byte_level())
SETTINGS = Settings(max_new_tokens=8, filters=Filters(temperature=0))
MODEL = GPT(dataclasses.replace(tiny.ONE_LAYER, vocab_size=TOKENIZER.vocab_size, context_length=128))
MODEL_OF_512 = GPT(dataclasses.replace(MODEL.config, context_length=512))


@pytest.fixture(scope="module")
def params() -> Params:
    """Random, with a seed for which the answers are words."""
    return jax.jit(MODEL.init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is given to go on from, turn by turn."""
    seen: list[str] = []
    generate_on = chat_module.generate_on

    def recorded(*args: Any, **options: Any) -> Any:
        seen.append(TOKENIZER.decode(args[2][0]))
        return generate_on(*args, **options)

    monkeypatch.setattr(chat_module, "generate_on", recorded)
    return seen


def talk(
    params: Params,
    *lines: str,
    system: str | None = None,
    settings: Settings = SETTINGS,
    tokenizer: Tokenizer = TOKENIZER,
    say: Callable[[str], None] = lambda text: None,
    succeeds: bool = True,
) -> str:
    """Says the lines one after the other, and returns all that was answered. succeeds: False when errors are told."""
    said: list[str] = []
    waiting: Iterator[str] = iter(lines)

    def ask() -> str:
        for line in waiting:
            return line
        raise EOFError

    def both(text: str) -> None:
        said.append(text)
        say(text)

    engine = Engine(MODEL, params, 1, n_tokens=tokenizer.vocab_size)
    assert chat(engine, tokenizer, settings, system, ask, both) is succeeds
    return "".join(said)


def test_an_answer_is_read_while_the_user_writes(params: Params) -> None:
    """So the next prompt finds the conversation, and only what is new, less than a chunk, is read with it."""
    engine = Engine(MODEL_OF_512, tiny.initial_params(MODEL_OF_512.config), 1, n_tokens=TOKENIZER.vocab_size)
    lines = iter(["x" * 150, "and now?"])
    chunks: list[int] = []

    def ask() -> str:
        chunks.append(engine.counts.chunks)
        for line in lines:
            return line
        raise EOFError

    settings = dataclasses.replace(SETTINGS, max_new_tokens=60)
    chat(engine, TOKENIZER, settings, None, ask, lambda text: None)
    held = len(engine.held.tokens)
    assert held % 128 == 0
    assert held > 128
    assert chunks[2] - chunks[1] <= 2  # The rest of the second prompt, and the chunk that its answer fills.


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


BEGIN = "<|im_start|>assistant\n"


def test_the_history_is_part_of_every_prompt(params: Params, prompts: list[str]) -> None:
    said = talk(params, "Hello", "And now?")
    answer = talk(params, "Hello").strip()
    assert answer
    assert prompts[0] == turn("user", "Hello") + BEGIN
    assert prompts[1] == turn("user", "Hello") + turn("assistant", answer) + turn("user", "And now?") + BEGIN
    assert said.startswith(f"{answer}\n")


def test_commands(params: Params, prompts: list[str]) -> None:
    said = talk(
        params, "One", "/reset", "Two", "/system Be kind.", "/reset", "Three", "/system", "/reset", "Four", "/help"
    )
    expected = [turn("user", "One"), turn("user", "Two"), turn("system", "Be kind.") + turn("user", "Three")]
    assert prompts == [text + BEGIN for text in (*expected, turn("user", "Four"))]
    assert said.endswith(f"{HELP}\n")
    prompts.clear()
    talk(params, "", "  ", "/exit", "never said")
    assert prompts == []


LIKE_COMMANDS = ["/no_think", "/etc/passwd is a file", "/", "/Exit", "/exit now", "/resett", "/reset all", "/systemd x"]


@pytest.mark.parametrize("line", LIKE_COMMANDS)
def test_a_line_that_only_looks_like_a_command_is_a_message(params: Params, prompts: list[str], line: str) -> None:
    said = talk(params, line, settings=dataclasses.replace(SETTINGS, max_new_tokens=1))
    assert prompts == [turn("user", line) + BEGIN]
    assert HELP not in said


def test_an_answer_that_is_interrupted_stays_as_far_as_it_was_said(params: Params, prompts: list[str]) -> None:
    pieces: list[str] = []

    def interrupted(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    talk(params, "Hello", "Again", say=interrupted)
    assert prompts[1] == turn("user", "Hello") + turn("assistant", "".join(pieces[:3])) + turn("user", "Again") + BEGIN


def test_a_message_without_any_answer_is_forgotten(
    params: Params, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_on = chat_module.generate_on
    calls: list[int] = []

    def at_once(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate_on(*args, **options)

    monkeypatch.setattr(chat_module, "generate_on", at_once)
    talk(params, "Hello", "Again")
    assert prompts == [turn("user", "Again") + BEGIN]


def test_at_the_prompt_two_interrupts_leave(params: Params, prompts: list[str]) -> None:
    """One may have been meant for an answer that had just ended: the conversation goes on."""
    said: list[str] = []
    inputs: list[str | type[KeyboardInterrupt]] = [
        "Hello",
        KeyboardInterrupt,
        "Again",
        *[KeyboardInterrupt] * 2,
        "Never",
    ]

    def ask() -> str:
        text = inputs.pop(0)
        if not isinstance(text, str):
            raise text
        return text

    chat(Engine(MODEL, params, 1, n_tokens=TOKENIZER.vocab_size), TOKENIZER, SETTINGS, None, ask, said.append)
    assert inputs == ["Never"]
    assert len(prompts) == 2
    assert turn("user", "Hello") in prompts[1]
    assert any(HELP in text for text in said)


def history(n: int) -> list[Message]:
    turns = [[("user", f"Question {i}"), ("assistant", f"Answer {i}")] for i in range(n)]
    return [{"role": role, "content": text} for pair in turns for role, text in pair][:-1]


def test_the_oldest_turns_are_forgotten_and_the_system_prompt_is_kept() -> None:
    kept, tokens = fit(TOKENIZER, "Be brief.", history(10), 128, 16)
    text = TOKENIZER.decode(tokens)
    assert len(tokens) <= 112
    assert text.startswith(turn("system", "Be brief.") + "<|im_start|>user\nQuestion ")
    assert kept == history(10)[-len(kept) :]
    longer = history(10)[-len(kept) - 2 :]
    assert len(TOKENIZER.encode_chat([{"role": "system", "content": "Be brief."}, *longer])) > 112
    assert fit(TOKENIZER, None, history(1), 128, 10**6)[0] == history(1)  # Half of the context is for the prompt.


def test_what_cannot_be_answered_is_told_and_the_talk_goes_on(
    params: Params, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 200
    n = len(TOKENIZER.encode_chat([{"role": "user", "content": long.strip()}]))
    said = talk(params, long, "Hello", succeeds=False)
    told = f"error: the message has {n} tokens, and the context has room for 120 beside the answer; shorten it\n"
    assert capsys.readouterr().err == told
    assert "error" not in said
    assert prompts == [turn("user", "Hello") + BEGIN]


def test_a_system_prompt_that_is_too_long_is_called_so(
    params: Params, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first message; a later one is refused, and the one before it stays."""
    long = ("word " * 200).strip()
    too_long = f"the system prompt has {len(TOKENIZER.encode(long))} tokens, and the context has room for 120"
    with pytest.raises(UserError, match=too_long):
        talk(params, "Hello", system=long)
    talk(params, "/system Be kind.", f"/system {long}", "Hello", succeeds=False)
    assert too_long in capsys.readouterr().err
    assert prompts == [turn("system", "Be kind.") + turn("user", "Hello") + BEGIN]
    with pytest.raises(UserError, match="the system prompt and the message have 1"):
        fit(TOKENIZER, "word " * 25, [{"role": "user", "content": "word " * 25}], 128, 64)


def test_a_template_may_refuse_the_system_prompt(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    settings = {**read_settings(byte_level()), "chat_template": template + "user"}
    tokenizer = HuggingFaceTokenizer((byte_level() / "tokenizer.json").read_bytes(), settings)
    with pytest.raises(UserError, match="refuses this conversation: no system"):
        talk(params, "Hello", system="Be brief.", tokenizer=tokenizer)
    talk(params, "/system x", "Hello", tokenizer=tokenizer, succeeds=False)
    assert capsys.readouterr().err == "error: the chat template refuses this conversation: no system\n"


def test_a_template_may_refuse_a_second_turn(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is told when it is asked for, and not of the answer before it."""
    template = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}user"
    settings = {**read_settings(byte_level()), "chat_template": template}
    tokenizer = HuggingFaceTokenizer((byte_level() / "tokenizer.json").read_bytes(), settings)
    talk(params, "Hello", "/reset", "Hello", tokenizer=tokenizer)
    talk(params, "Hello", "And now?", tokenizer=tokenizer, succeeds=False)
    assert capsys.readouterr().err == "error: the chat template refuses this conversation: one turn\n"


def test_an_answer_stays_when_reading_it_is_interrupted(
    params: Params, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = Engine.read, iter([True, False, False])

    def interrupted(self: Engine, tokens: list[int]) -> None:
        if next(reads):
            raise KeyboardInterrupt
        read(self, tokens)

    monkeypatch.setattr(Engine, "read", interrupted)
    talk(params, "Hello", "And now?")
    assert prompts[1].startswith(turn("user", "Hello") + BEGIN)


def test_programs_give_messages_as_templates_take_them(params: Params) -> None:
    model = Model(LoadedModel(MODEL, params, TOKENIZER))
    texts = {"system": ["Be brief."], "user": ["Hello,", "cat"]}
    parts = [{"role": r, "content": [{"type": "text", "text": t} for t in some]} for r, some in texts.items()]
    plain = [{"role": r, "content": "\n".join(some)} for r, some in texts.items()]
    assert model.chat(parts, max_new_tokens=8, temperature=0) == model.chat(plain, max_new_tokens=8, temperature=0)
    assert model.chat("Hello", max_new_tokens=8) == model.chat([{"role": "user", "content": "Hello"}], max_new_tokens=8)
    wrong: list[tuple[Any, str]] = [
        ([{"content": "Hello"}], "message 1 has the role None"),
        (["Hello"], "message 1 is no object"),
        ([{"role": "user", "content": 5}], "message 1 has a content of type int"),
        (
            [{"role": "system", "content": [{"type": "text", "text": "word " * 200}]}],
            r"the system prompt has \d+ tokens",
        ),
    ]
    for messages, error in wrong:
        with pytest.raises(UserError, match=error):
            model.chat(messages)


def test_without_a_template_there_is_no_chat(params: Params) -> None:
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        talk(params, "Hello", tokenizer=ByteTokenizer())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "text.txt").write_text("the cat sat on the mat and saw the rain. " * 200)
    commands.run_here("prepare", folder / "text.txt", "--out", folder / "data", "--tokenizer", byte_level())
    tiny = [*commands.TINY, "--model.context-length=128", "--train.steps=5"]
    commands.run_here("train", "--data.dir", folder / "data", "--out-dir", folder / "run", *tiny)
    return folder / "run"


def start_chat(run_folder: Path, *args: str) -> "subprocess.Popen[str]":
    return commands.start("sample", f"--run={run_folder}", "--chat", "--temperature=0", *args, stdin=subprocess.PIPE)


def read_some(pipe: IO[str], n: int) -> str:
    """At least n bytes of what a process writes."""
    out, deadline = b"", time.monotonic() + 120
    while len(out) < n:
        assert select.select([pipe], [], [], deadline - time.monotonic())[0], f"only {out!r}"
        part = os.read(pipe.fileno(), 4096)
        assert part, f"it ended after {out!r}"
        out += part
    return out.decode()


def read_until_silent(pipe: IO[str], seconds: float = 3.0) -> None:
    """Reads what a process writes until it has written nothing for so long."""
    while select.select([pipe], [], [], seconds)[0]:
        assert os.read(pipe.fileno(), 4096), "it ended"


@pytest.mark.slow
def test_each_line_of_a_pipe_is_a_message(run_folder: Path) -> None:
    """An error is told on standard error, and by the status; the other messages are answered."""
    process = start_chat(run_folder, "--max-new-tokens=4", "--system=Be brief.")
    out, err = process.communicate(f"Hello\n/reset\n{'word ' * 200}\nHello\n", timeout=120)
    assert process.returncode == 1, err
    assert err.startswith("error: the system prompt and the message have ")
    assert err.count("\n") == 1
    first, second = out[: len(out) // 2], out[len(out) // 2 :]
    assert first == second != "\n"  # After /reset, the same message gets the same answer.


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(run_folder: Path) -> None:
    process = start_chat(run_folder, "--max-new-tokens=1000000")
    assert process.stdin
    assert process.stdout
    for _ in range(2):
        process.stdin.write("Hello\n")
        process.stdin.flush()
        read_some(process.stdout, 20)
        process.send_signal(signal.SIGINT)
        read_until_silent(process.stdout)  # What is left of this answer must not be taken for the next one.
    process.stdin.write("/help\n")
    process.stdin.flush()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    assert HELP in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"chat": True, "json": True}, "--chat goes with none of"), ({"system": "x"}, "--system goes with --chat only")],
    ids=["json", "system"],
)
def test_flags_that_do_not_go_together_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SampleArgs(**arguments)
