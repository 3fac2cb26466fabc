"""From conversations to a data folder: each one whole, what is to be learnt marked, and what is left out counted."""

import itertools
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.cli.prepare import command
from gpt_jax.config import CleanConfig
from gpt_jax.data import tuning
from gpt_jax.data.conversations import examples
from gpt_jax.data.messages import Content, Conversation, Preference, Problem
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import Dataset, Meta, load_meta, open_dataset
from gpt_jax.data.tuning import Division, divide, hash_of, line_of
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import TEMPLATE
from tests.commands import refused_here, run_here

Messages = list[dict[str, Any]]
CHATML = """{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content + '<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"""


def conversations(n: int) -> list[Messages]:
    rng = random.Random(0)
    words = ["写", "learns\n", "▁", "🙂", " indented", "2024", "<|end|>", "<|endoftext|>", "the"]

    def content() -> str:
        return "x" + " ".join(rng.choices(words, k=rng.randrange(1, 40)))

    def messages() -> Messages:
        turns = rng.randrange(1, 4)
        system = [{"role": "system", "content": content()}] * rng.randrange(2)
        return system + [{"role": role, "content": content()} for role in ("user", "assistant") * turns]

    return [messages() for _ in range(n)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def prepared(source: Path, out: Path, n_workers: int = 1, **settings: Any) -> Meta:
    settings = {"tokenizer": "bytes", "workers": n_workers, **settings}
    return prepare(PrepareArgs(source=(str(source),), out=out, **settings))


def documents(data: Dataset) -> Counter[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The tokens of all examples of both splits, and which are to be learnt."""
    found = Counter[tuple[tuple[int, ...], tuple[bool, ...]]]()
    for files in (data.train, data.val):
        for start, end in itertools.pairwise([*files.document_starts.tolist(), len(files)]):
            tokens, learnt = files.read(start, end - start), files.read_learnt(start, end - start)
            found[tuple(tokens.tolist()), tuple(learnt.tolist())] += 1
    return found


def test_every_conversation_is_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of workers, and any size of their tasks, to the byte."""
    rows = conversations(200)
    source = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in rows])
    meta = prepared(source, tmp_path / "one")
    monkeypatch.setattr(tuning, "TASK_BYTES", 3000)
    assert prepared(source, tmp_path / "many", n_workers=3) == meta
    folders = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "many")]
    assert folders[0] == folders[1]

    data = open_dataset(tmp_path / "one")
    expected = [example for messages in rows for example in examples(data.tokenizer, messages)]
    assert documents(data) == Counter((tuple(e.tokens), tuple(e.learnt)) for e in expected)
    assert (meta.format, meta.format_version) == ("chat", 2)
    assert (data.train.n_learnt or 0) + (data.val.n_learnt or 0) == sum(sum(e.learnt) for e in expected)
    answers = [m["content"] for messages in rows for m in messages if m["role"] == "assistant"]
    assert data.train.n_bytes + data.val.n_bytes == sum(len(answer.encode()) for answer in answers)
    assert sum(meta.report[split]["answers"] for split in meta.splits) == len(answers)
    assert sum(meta.report[split]["conversations"] for split in meta.splits) == 200
    assert 0.02 < len(data.val) / (len(data.train) + len(data.val)) < 0.2
    # The tokenizer has our template now, and stops where an answer ends.
    assert data.tokenizer.chat_template == TEMPLATE
    assert data.tokenizer.stop_ids == {256, data.tokenizer.special_tokens["<|end|>"]}


def test_calls_and_tools_are_written_in_the_order_of_their_fields(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"b": 1, "a": 2}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"z": 1, "y": {"b": 2, "a": "\u2028é"}}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    source = write(tmp_path / "chat.jsonl", [{"messages": messages, "tools": [tool]}] * 4)
    prepared(source, tmp_path / "out")
    data = open_dataset(tmp_path / "out")
    text = data.tokenizer.decode(data.val.read(0, len(data.val)).tolist())
    assert json.dumps(tool) in text
    assert json.dumps(call["function"], ensure_ascii=False) in text


def test_messages_in_a_field_with_another_name(tmp_path: Path) -> None:
    rows = conversations(20)
    named = write(tmp_path / "named.jsonl", [{"talk": messages, "text": "no"} for messages in rows])
    plain = write(tmp_path / "plain.jsonl", [{"messages": messages} for messages in rows])
    meta = prepared(named, tmp_path / "named", messages_field="talk")
    assert meta.report["format"] == "chat (talk)"
    assert meta.source_fingerprint == prepared(plain, tmp_path / "plain").source_fingerprint
    refused_here("prepare", plain, "--out", tmp_path / "x", "--format", "text", "--messages-field", "talk")


def test_what_does_not_fit_is_said_before_anything_is_read(tmp_path: Path) -> None:
    chat = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in conversations(4)])
    (tmp_path / "wrong.jinja").write_text("{{ messages[0].content }}\n{% if %}")
    flags = ["prepare", chat, "--out", tmp_path / "out", "--tokenizer", "bytes"]
    error = refused_here(*flags, "--template", tmp_path / "wrong.jinja")
    assert "wrong.jinja cannot be used: Expected an expression, got 'end of statement block', in line 2" in error
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{')
    error = refused_here("prepare", tmp_path / "text.jsonl", *flags[2:], "--skip-broken")
    assert "skip_broken = True is not possible: it must be left out with texts" in error


def test_copies_are_on_one_side(tmp_path: Path) -> None:
    rows = conversations(61)
    source = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in rows * 3])
    prepared(source, tmp_path / "out", val_fraction=0.3)
    assert {*documents(open_dataset(tmp_path / "out")).values()} == {3}
    sides = []
    for files in ((data := open_dataset(tmp_path / "out")).train, data.val):
        bounds = itertools.pairwise([*files.document_starts.tolist(), len(files)])
        sides.append({tuple(files.read(a, b - a).tolist()) for a, b in bounds})
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_of_few_conversations_the_last_ones_are_for_validation(n: int, tmp_path: Path) -> None:
    source = write(tmp_path / "chat.jsonl", [{"prompt": f"question {i}", "completion": "x"} for i in range(n)])
    meta = prepared(source, tmp_path / "out")
    assert (meta.format, meta.val.documents, meta.settings["split"]) == ("completion", 1, "by position")
    data = open_dataset(tmp_path / "out")
    assert f"question {n - 1}" in data.tokenizer.decode(data.val.read(0, len(data.val)).tolist())


def test_the_formats_are_found_by_looking(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    kinds: dict[str, dict[str, Any]] = {
        "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "conversations": {"conversations": turns},
        "instruction, output": {"instruction": "q", "output": "a"},
        "prompt, completion": {"prompt": "q", "completion": "a"},
    }
    folders = []
    for i, (fields, row) in enumerate(kinds.items()):
        source = write(tmp_path / f"{i}.jsonl", [row] * 4)
        prepared(source, tmp_path / f"out{i}")
        assert load_meta(tmp_path / f"out{i}").report["format"] == f"{'completion' if i == 3 else 'chat'} ({fields})"
        folders.append(documents(open_dataset(tmp_path / f"out{i}")))
    assert all(folder == folders[0] for folder in folders)
    # A field of texts makes them texts, and so does asking for it.
    write(tmp_path / "text.jsonl", [{"text": "a b", **kinds["messages"]}] * 4)
    assert prepared(tmp_path / "text.jsonl", tmp_path / "text").format == "text"
    write(tmp_path / "long.jsonl", [{"prompt": "some words " * 9, "completion": "a"}] * 4)
    assert prepared(tmp_path / "long.jsonl", tmp_path / "prompts", text_field="prompt").format == "text"
    with pytest.raises(UserError, match=r"has no field 'text'; choose one of its fields"):
        prepared(tmp_path / "3.jsonl", tmp_path / "error", format="text")


def test_what_is_left_out_is_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    bad: dict[str, Messages] = {
        "roles out of order": [{"role": "assistant", "content": "a"}],
        "no answer to learn": [{"role": "user", "content": "q"}],
        "a message without content": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}],
        "unknown role": [{"role": "wizard", "content": "q"}],
    }
    rows = [good] * 10 + [{"messages": messages} for messages in bad.values()] * 2
    source = write(tmp_path / "chat.jsonl", rows)
    meta = prepared(source, tmp_path / "out")
    assert meta.report["left out"] == dict.fromkeys(bad, 2)
    told = capsys.readouterr().err
    for reason in bad:
        assert f"passed over 2 records ({reason}): {source}, line 1" in told
    assert sum(meta.report[split]["conversations"] for split in meta.splits) == 10


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    source = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in conversations(80)])
    (tmp_path / "chat.jinja").write_text(CHATML)
    prepared(source, tmp_path / "out", template=str(tmp_path / "chat.jinja"))
    data = open_dataset(tmp_path / "out")
    assert data.tokenizer.chat_template == CHATML
    assert data.tokenizer.decode(data.train.read(0, 9).tolist()).startswith("<|user|>")
    # Another preparation takes it from there.
    prepared(source, tmp_path / "again", tokenizer=str(tmp_path / "out"))
    assert documents(open_dataset(tmp_path / "again")) == documents(data)
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}" + CHATML
    )
    meta = prepared(source, tmp_path / "strict", template=str(tmp_path / "strict.jinja"))
    [(reason, n)] = meta.report["left out"].items()
    assert reason == "the chat template refuses this conversation: No system"
    assert n == sum(messages[0]["role"] == "system" for messages in conversations(80))


def test_white_space_and_unicode_forms(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": " q\n"}, {"role": "assistant", "content": "\n e\u0301 "}]
    source = write(tmp_path / "chat.jsonl", [{"messages": messages}] * 4)
    template = tmp_path / "trims.jinja"
    template.write_text(TEMPLATE.replace("message.content }}", "message.content | trim }}"))
    with pytest.raises(UserError, match=r"no conversation is left for training; .* leaves out white space around what"):
        prepared(source, tmp_path / "out", template=str(template))
    clean = CleanConfig(normalize="nfc")
    prepared(source, tmp_path / "out", template=str(template), trim=True, clean=clean)
    data = open_dataset(tmp_path / "out")
    assert data.tokenizer.decode(data.val.read(0, len(data.val)).tolist()) == "<|user|>q<|end|><|assistant|>\xe9<|end|>"


def test_equal_conversations_are_kept_once_if_asked(tmp_path: Path) -> None:
    rows = conversations(30)
    source = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in rows * 2])
    meta = prepared(source, tmp_path / "out", clean=CleanConfig(dedup="exact"))
    assert {*documents(open_dataset(tmp_path / "out")).values()} == {1}
    assert meta.report["clean"]["kept_documents"] == 30


GOOD = '{"prompt": "q", "completion": "a"}'
BROKEN: dict[str, tuple[str, list[str], str]] = {
    "no conversation": ("", [], "is empty"),
    "one conversation": (GOOD, [], "1 conversations are too few for training and validation$"),
    "only refused ones": ('{"prompt": "q", "completion": ""}\n' * 5, [], r"too few .*; passed over 5 records \(a mess"),
    "a broken line": (f"{GOOD}\n" * 3 + "{", [], "line 4 is not JSON"),
    "no template": (f"{GOOD}\n" * 5, ["--template", "no"], r"the template .*/no cannot be read \(No such file"),
    "a template that fails": (f"{GOOD}\n" * 5, ["--template", "bad"], "no conversation is left for .*; passed over 5 "),
    "no template of texts": ("some words", ["--template", "bad"], "template = .* is not possible: it must be left out"),
    "a text as chat": ("some words", ["--format", "chat"], "holds no records; JSON Lines"),
    "no such format": (f"{GOOD}\n" * 5, ["--format", "poem"], "invalid choice 'poem' for argument '--format'"),
}


@pytest.mark.parametrize(("content", "flags", "told"), BROKEN.values(), ids=BROKEN)
def test_bad_input_is_one_line(content: str, flags: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "bad").write_text("{{ 1 / 0 }}")
    flags = [str(tmp_path / flag) if flag in ("no", "bad") else flag for flag in flags]
    out, status = tmp_path / "out", 2 if "poem" in flags else 1
    error = refused_here("prepare", tmp_path / "a.json", "--out", out, "--tokenizer", "bytes", *flags, status=status)
    assert re.search(told, error)
    assert not out.exists()


def test_broken_lines_are_passed_over_if_asked(tmp_path: Path) -> None:
    lines = ['{"prompt": "q", "completion": "a"}'] * 4
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{", '"no object"', *lines]))
    _, err = run_here(
        "prepare", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", "bytes", "--skip-broken"
    )
    assert f"(no JSON): {tmp_path / 'a.jsonl'}, line 5 is not JSON" in err
    assert load_meta(tmp_path / "out").report["left out"] == {"no JSON": 1, "no JSON object": 1}


def test_conversations_that_change_meanwhile_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "chat.jsonl", [{"prompt": str(i), "completion": "a"} for i in range(20)])
    with_template = tuning.with_template

    def change_then_make(*args: Any) -> Any:
        write(source, [{"prompt": str(i), "completion": "b"} for i in range(20)])
        return with_template(*args)

    monkeypatch.setattr("gpt_jax.data.prepare.with_template", change_then_make)
    with pytest.raises(UserError, match="the conversations were changed while they were read; prepare them again"):
        prepared(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_published_tokenizer_without_a_template_needs_one(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from tests.published import gpt2

    source = write(tmp_path / "chat.jsonl", [{"prompt": str(i), "completion": "a"} for i in range(20)])
    with pytest.raises(UserError, match="the tokenizer has no chat template, which writes conversations: --temp"):
        prepared(source, tmp_path / "out", tokenizer=str(gpt2()))


def test_a_tokenizer_is_trained_on_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in conversations(300)])
    command([str(source), "--out", str(tmp_path / "out"), "--vocab-size", "300"])
    data = open_dataset(tmp_path / "out")
    assert data.tokenizer.vocab_size == 300
    assert data.tokenizer.chat_template == TEMPLATE
    assert "300 conversations with" in capsys.readouterr().out


# From here on, the division of preferences and problems.

sides = st.lists(
    st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 5), st.integers(1, 1000)), min_size=2, max_size=30
).filter(lambda drawn: len({h for h, _ in drawn}) > 1)


@given(sides, st.floats(0.01, 0.99))
def test_neither_side_is_empty_and_no_other_border_is_much_nearer(
    drawn: list[tuple[int, int]], fraction: float
) -> None:
    hashes, sizes = map(list, zip(*drawn, strict=True))
    below = divide(hashes, sizes, fraction, by_prompt=True).val_below
    by_hash = defaultdict[int, int](int)
    for h, size in drawn:
        by_hash[h] += size

    def miss(border: int) -> float:
        return abs(sum(size for h, size in by_hash.items() if h < border) / sum(sizes) - fraction)

    assert 0 < sum(h < below for h in hashes) < len(hashes)
    nearest = min(miss(border) for border in sorted(by_hash)[1:])
    assert miss(below) <= max(nearest, min(fraction, 1 - fraction) / 2) + 1e-12


def test_with_many_the_fraction_of_hashes_decides() -> None:
    """So each stays on its side when others are added."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 2000, np.uint64).tolist()
    for by_prompt in (False, True):
        both = divide(hashes, [1] * 2000, 0.25, by_prompt), divide(hashes[:1000], [1] * 1000, 0.25, by_prompt)
        assert both[0] == both[1] == Division("by prompt" if by_prompt else "by conversation", 2**62)


def test_what_a_prompt_says_decides() -> None:
    def user(content: str, **fields: Any) -> dict[str, Any]:
        return {"role": "user", "content": content, **fields}

    one, other = ({"role": "assistant", "content": content} for content in "ab")
    same: list[Content] = [
        Preference((user("q"),), (one,), (other,), None),
        Preference((user("q", name="Ada"),), (other,), (one,), [{"name": "f"}]),
        Problem((user("q"),), {"answer": "4"}, None),
    ]
    different: list[Content] = [Problem((user("r"),), {}, None), Problem(({"role": "tool", "content": "q"},), {}, None)]
    assert len({hash_of(content) for content in same}) == 1
    assert len({hash_of(content) for content in [same[0], *different]}) == 3
    talks = [Conversation((user("q"), answer), None) for answer in (one, other)]
    assert hash_of(talks[0]) != hash_of(talks[1])
    assert line_of(talks[0]) == (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": null}'
    )
