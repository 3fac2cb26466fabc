"""Preferences: a prompt as sampling makes it, two answers after it, and each pair once an epoch, whole or counted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from gpt_jax.cli.prepare import command
from gpt_jax.data import tuning
from gpt_jax.data.batch import Batch
from gpt_jax.data.preferences import (
    Pair,
    PairCounts,
    PairRows,
    PreferenceBatches,
    PreferenceFiles,
    documents,
    preference_eval_batches,
)
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.records import RecordError
from gpt_jax.data.shards import open_dataset
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.chat_template import TEMPLATE
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.data.prepared import prepared
from tests.data.test_conversations import AROUND, CHATML, Messages, conversations, named, of_template, text_of

OURS = ByteTokenizer().with_chat_template(TEMPLATE)
ANSWERS = ("chosen", "rejected")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def record(prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": None}


def pair_of(tokenizer: Tokenizer, record: Mapping[str, Any]) -> Pair:
    """The pair that becomes of a record. Raises RecordError."""
    [document], counts = documents(tokenizer, tokenizer.chat, record)
    assert counts["preferences"] == 1
    assert sum(document.lengths) == len(document.tokens) == len(document.learnt)
    borders = np.cumsum(document.lengths)[:-1].tolist()
    not_learnt, *learnt = np.split(np.array(document.learnt, bool), borders)
    assert not not_learnt.any()
    return Pair(*np.split(np.array(document.tokens, np.int32), borders), *learnt)


@pytest.mark.parametrize("name", AROUND)
def test_answers_are_what_sampling_after_the_prompt_would_give(
    name: str, llama_cpp_vocabularies: Path, smollm2_gguf: Path
) -> None:
    tokenizer = named(name, llama_cpp_vocabularies, smollm2_gguf)
    names = list(tokenizer.special_tokens)[:40]
    prompts = [m[:-1] if m[-1]["role"] == "assistant" else m for m in conversations(150, names)]
    answers = [m[-1] for m in conversations(400, names, 1) if m[-1]["role"] == "assistant"]
    made = 0
    for prompt, *both in zip(prompts, answers, answers[150:], strict=False):
        if both[0] == both[1]:
            continue
        try:
            pair = pair_of(tokenizer, record(prompt, both[:1], both[1:]))
        except RecordError:
            continue
        made += 1
        assert pair.prompt.tolist() == tokenizer.encode_chat(prompt)
        for message, tokens, learnt in zip(both, pair[1:3], pair[3:], strict=True):
            sequence, n = [*pair.prompt.tolist(), *tokens.tolist()], len(pair.prompt)
            learnt_text, content = text_of(tokenizer, sequence, n, len(sequence)), message["content"]
            assert learnt.all()
            assert np.flatnonzero(np.isin(tokens, list(tokenizer.stop_ids))).tolist() == [len(tokens) - 1]
            assert learnt_text in {f"{before}{content}{after}" for before, after in AROUND[name]}
    assert made > (120 if name in ("ours", "ChatML", "Mistral Nemo") else 20)


def test_messages_between_answers_are_not_learnt() -> None:
    chosen = [assistant("a"), user("b"), {**assistant("c"), "train": False}, user("d"), assistant("e"), user("f")]
    pair = pair_of(OURS, record([user("q")], chosen, [assistant("x")]))
    assert OURS.decode(pair.prompt.tolist()) == "<|user|>q<|end|><|assistant|>"
    turns = "a<|end|><|user|>b<|end|><|assistant|>c<|end|><|user|>d<|end|><|assistant|>e<|end|>"
    assert OURS.decode(pair.chosen.tolist()) == turns
    assert OURS.decode(pair.chosen[pair.chosen_learnt].tolist()) == "a<|end|>e<|end|>"
    assert OURS.decode(pair.rejected.tolist()) == "x<|end|>"


def test_answers_in_the_prompt_are_not_learnt() -> None:
    prompt = [user("a"), assistant("b"), user("c")]
    pair = pair_of(OURS, record(prompt, [assistant("d")], [assistant("e")]))
    assert pair.prompt.tolist() == OURS.encode_chat(prompt)
    assert OURS.decode(pair.chosen[pair.chosen_learnt].tolist()) == "d<|end|>"


THINKS = CHATML.replace("message.content +", "(message.content if loop.last else message.content.split('~')[-1]) +")
REWRITES = CHATML.replace("message.content +", "(message.content + messages | length | string) +")
TRIMS = CHATML.replace("message.content +", "message.content | trim +")
LOWERS = CHATML.replace("message.content +", "message.content | lower +")


@pytest.mark.parametrize(
    ("template", "chosen", "reason", "message"),
    [
        (CHATML, [assistant("b")], "chosen equals rejected", "become the same tokens"),
        (CHATML, [assistant("b"), user("c")], "chosen equals rejected", "become the same tokens"),
        (
            THINKS,
            [assistant("Hm~c"), user("d"), assistant("e")],
            "the template rewrites an answer that goes on",
            "chosen: the template rewrites an answer that goes on, so no sequence has all of it",
        ),
        (
            REWRITES,
            [{**assistant("c"), "train": False}, user("d"), assistant("e")],
            "the template writes this answer otherwise than it asks for it",
            "chosen: message 4: ",
        ),
        (TRIMS, [assistant(" c")], "the template leaves out white space around what this answer says", "chosen: "),
        (LOWERS, [assistant("C")], "the template changes what this answer says", "chosen: message 2: "),
        (CHATML, [{**assistant("c"), "train": False}], "no answer to learn", "chosen: there is no answer to learn"),
        ("{{ raise_exception('no') }}", [assistant("c")], "a template refuses it", "refuses this conversation: no"),
    ],
)
def test_pairs_that_are_refused(template: str, chosen: Messages, reason: str, message: str) -> None:
    tokenizer = of_template(template, ["<|im_start|>", "<|im_end|>"])
    with pytest.raises(RecordError, match=message) as caught:
        documents(tokenizer, tokenizer.chat, record([user("a")], chosen, [assistant("b")]))
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_a_prompt_that_the_template_rewrites_later_is_refused() -> None:
    """The first answer is not learnt, so nothing else would notice."""
    template = CHATML.replace("message.content +", "(message.content + '!' * (messages | length == 1)) +")
    tokenizer = of_template(template, ["<|im_start|>", "<|im_end|>"])
    chosen = [{**assistant("b"), "train": False}, user("c"), assistant("d")]
    with pytest.raises(RecordError, match="chosen: the template rewrites a prompt that is answered"):
        documents(tokenizer, tokenizer.chat, record([user("a")], chosen, [assistant("b")]))


contents = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn"]), min_size=1, max_size=8)
messages = contents.filter(str.strip)


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    turns = draw(st.lists(messages, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1))
    prompt = [user(text) if i % 2 == 0 else assistant(text) for i, text in enumerate(turns)]
    chosen, rejected = draw(st.lists(messages, min_size=2, max_size=2, unique=True))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def said(pair: Pair) -> tuple[str, str, str]:
    """The texts of a pair."""
    prompt, chosen, rejected = (OURS.decode(ids.tolist()) for ids in pair[:3])
    return prompt, chosen, rejected


def expected(record: Mapping[str, Any]) -> tuple[str, str, str]:
    prompt = OURS.decode(OURS.encode_chat(record["prompt"]))
    return prompt, f"{record['chosen']}<|end|>", f"{record['rejected']}<|end|>"


def test_what_goes_in_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TASK_BYTES", 3000)
    given_records: list[dict[str, Any]] = []

    @given(records())
    def collect(record: dict[str, Any]) -> None:
        given_records.append(record)

    collect()
    data = prepared(tmp_path, [*given_records, *given_records[:20]])
    assert (data.meta.format, data.meta.format_version) == ("preference", 3)
    files = {name: PreferenceFiles(data, name) for name in ("train", "val")}
    found = {name: [said(split.pair(i)) for i in range(len(split))] for name, split in files.items()}
    assert sorted(found["train"] + found["val"]) == sorted(map(expected, [*given_records, *given_records[:20]]))
    assert not {prompt for prompt, *_ in found["train"]} & {prompt for prompt, *_ in found["val"]}
    for split in files.values():
        with pytest.raises(IndexError):
            split.pair(len(split))
        with pytest.raises(IndexError):
            split.pair(-1)
        assert split.lengths.sum() == len(data.train if split is files["train"] else data.val)
    counts = data.meta.report
    assert counts["train"]["preferences"] + counts["val"]["preferences"] == len(given_records) + 20
    assert data.meta.train.documents == counts["train"]["preferences"] == len(files["train"])
    answers = [answer.removesuffix("<|end|>") for _, *both in found["train"] for answer in both]
    assert data.meta.train.bytes == sum(len(answer.encode()) for answer in answers)
    assert data.meta.train.learnt == sum(len(answer.encode()) + 1 for answer in answers)


def test_preferences_of_a_prompt_are_on_one_side(tmp_path: Path) -> None:
    lines = [{"prompt": f"q{i % 7}", "chosen": f"good {i}", "rejected": "bad"} for i in range(70)]
    data = prepared(tmp_path, lines)
    sides = [
        {said(split.pair(i))[0] for i in range(len(split))}
        for split in (PreferenceFiles(data, "train"), PreferenceFiles(data, "val"))
    ]
    assert len(sides[0]) + len(sides[1]) == 7
    assert not sides[0] & sides[1]
    assert data.meta.settings["split"] == "by prompt"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected is missing"),
        ({"prompt": "a", "rejected": "b"}, "chosen is missing"),
        ({"chosen": "b", "rejected": "c"}, "it has no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}, "it has images beside its text"),
    ],
)
def test_records_that_are_refused(tmp_path: Path, bad: Any, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="0 preferences are too few for training and validation; passed over 3") as e:
        prepared(tmp_path, [bad] * 3, format="preference")
    assert reason in str(e.value)
    assert "\n" not in str(e.value)
    good = [{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(9)]
    capsys.readouterr()
    data = prepared(tmp_path, [bad, *good], format="preference")
    assert sum(data.meta.report["left out"].values()) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("passed over 1 record (")
    assert f"a.jsonl, line 1: {reason}" in line


def test_one_prompt_gives_no_validation(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "chosen": str(i), "rejected": "c"} for i in range(3)]
    with pytest.raises(UserError, match=r"3 preferences are too few .*; those with one prompt stay together"):
        prepared(tmp_path, lines)


def test_what_the_template_refuses_is_counted(tmp_path: Path) -> None:
    lines = [{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(9)]
    (tmp_path / "t.jinja").write_text(TEMPLATE.replace("message.content", "(message.content | lower)"))
    bad = {"prompt": "5", "chosen": "B", "rejected": "c"}
    data = prepared(tmp_path, [bad, *lines], template=str(tmp_path / "t.jinja"))
    reason = "the template changes what this answer says"
    assert data.meta.report["left out"] == {reason: 1}
    assert data.train.n_learnt is not None
    with pytest.raises(UserError, match=f"no preference is left for .*{reason}.*a.jsonl, line 1: chosen: message 2: "):
        prepared(tmp_path, [{**bad, "prompt": "6"}, bad], template=str(tmp_path / "t.jinja"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0], "prompt": ""}]))
    arguments = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert command(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith(
        "  preference (chosen, rejected): 9 preferences with 18 answers to learn; records left out: 1\n"
    )
    assert "passed over 1 record (a message without content): " in printed.err


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    lines = [{"prompt": str(i), "chosen": "b" * i, "rejected": "c"} for i in range(1, 9)]
    data = prepared(tmp_path, lines)
    file = data.folder / "train-lengths.bin"
    lengths = np.frombuffer(file.read_bytes(), "<u4")
    assert isinstance(file, Path)
    before = data.meta.train.fingerprint
    file.write_bytes(np.roll(lengths, 3).tobytes())
    with pytest.raises(UserError, match=r"train-lengths.bin does not fit the tokens beside it; prepare the data again"):
        PreferenceFiles(data, "train")
    file.write_bytes(lengths[:-1].tobytes())
    with pytest.raises(UserError, match=r"train-lengths.bin has \d+ bytes instead of"):
        PreferenceFiles(data, "train")
    file.unlink()
    with pytest.raises(UserError, match=r"train-lengths.bin cannot be read"):
        PreferenceFiles(data, "train")
    again = prepared(tmp_path, lines)
    assert again.meta == data.meta
    assert again.meta.train.fingerprint == before
    prepared(tmp_path, [{**line, "chosen": "d" * i} for i, line in enumerate(lines, 1)])
    with pytest.raises(UserError, match="was replaced while it was opened; start again"):
        PreferenceFiles(again, "train")


def test_another_format_is_refused(tmp_path: Path) -> None:
    data = prepared(tmp_path, [{"prompt": str(i), "completion": "b"} for i in range(9)], format="completion")
    with pytest.raises(UserError, match=r"out is a completion set; its objective is next_token, and dpo needs pref"):
        PreferenceFiles(data, "train")


def test_the_demonstration_data(llamafactory_data: Path, tmp_path: Path) -> None:
    for language in ("en", "zh"):
        source, out = llamafactory_data / f"dpo_{language}_demo.json", tmp_path / language
        args = PrepareArgs(source=(str(source),), out=out, tokenizer="bytes", workers=2)
        assert prepare(args).report["left out"] == {}
        data = open_dataset(out)
        splits = [PreferenceFiles(data, "train"), PreferenceFiles(data, "val")]
        found = [said(split.pair(i))[1:] for split in splits for i in range(len(split))]
        given_records = json.loads(source.read_text())
        wanted = [tuple(f"{r[name]['value']}<|end|>" for name in ANSWERS) for r in given_records]
        assert sorted(found) == sorted(wanted)


# From here on, batches.


class InMemory:
    """Pairs whose tokens are all different but for the prompt, so that they tell where they are from."""

    def __init__(self, lengths: list[tuple[int, int, int]]) -> None:
        self.lengths = np.array(lengths, np.int64).reshape(-1, 3)

    def pair(self, index: int) -> Pair:
        prompt, chosen, rejected = self.lengths[index].tolist()
        ids = np.arange(prompt + chosen + rejected, dtype=np.int32) + 1000 * (index + 1)
        prompt_ids, *answers = np.split(ids, [prompt, prompt + chosen])
        return Pair(prompt_ids, *answers, *(answer % 3 != 1 for answer in answers))


pairs = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=12).map(InMemory)
T = 11


def fitting(source: InMemory) -> PairRows:
    """The rows of pairs, of which there are some."""
    rows = PairRows(source, T)
    assume(len(rows) > 0)
    return rows


@given(pairs)
def test_rows_hold_pairs_and_padding_is_nothing(source: InMemory) -> None:
    rows = PairRows(source, T)
    assert rows.numbers.tolist() == [
        i for i, (p, c, r) in enumerate(source.lengths.tolist()) if p + c <= T + 1 and p + r <= T + 1
    ]
    used = 0
    for index, number in enumerate(rows.numbers.tolist()):
        row, pair = rows.row(index), source.pair(number)
        assert [(x.dtype, x.shape) for x in row[:4]] == [
            (np.int32, (2, T + 1)),
            (bool, (2, T)),
            (np.int32, (2, T)),
            (np.int32, (2, T)),
        ]
        for i, (answer, learnt) in enumerate(zip(pair[1:3], pair[3:], strict=True)):
            tokens, n = np.concatenate((pair.prompt, answer)), len(pair.prompt) + len(answer)
            assert row.tokens[i].tolist() == [*tokens.tolist(), *[0] * (T + 1 - n)]
            assert row.tokens[i, 1:][row.mask[i]].tolist() == answer[learnt].tolist()
            assert (row.segments[i] == 0).tolist() == [t < n for t in range(T)]
            assert row.positions[i].tolist() == [t if t < n else t - n for t in range(T)]
            used += n
    dropped = np.delete(source.lengths, rows.numbers, axis=0)
    expected = PairCounts(len(source.lengths), len(dropped), int(dropped.sum()), used / max(2 * len(rows) * (T + 1), 1))
    assert rows.counts == expected


@given(pairs, st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_every_pair_once_an_epoch(source: InMemory, batch_size: int, seed: int) -> None:
    rows = fitting(source)
    batches, n = PreferenceBatches(rows, batch_size, seed), len(rows)
    firsts = np.concatenate([batches(step).tokens[:, 0, 0] for step in range(-(-3 * n // batch_size))])
    for epoch in range(3):
        assert sorted(firsts[epoch * n : (epoch + 1) * n] // 1000 - 1) == rows.numbers.tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = PairRows(InMemory([(1, 1, 1)] * 50), T)
    one, other = PreferenceBatches(rows, 50, 0), PreferenceBatches(rows, 50, 1)
    orders = [batches(step).tokens[:, 0, 0].tolist() for batches in (one, other) for step in range(2)]
    assert len({tuple(order) for order in orders}) == 4


@given(pairs, st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.integers(0, 2**31 - 1))
def test_a_step_is_the_same_on_any_number_of_hosts(source: InMemory, step: int, n_hosts: int, seed: int) -> None:
    batches = PreferenceBatches(fitting(source), 8, seed)
    whole = batches(step)
    shares = [batches(step, share) for share in np.split(np.arange(8), n_hosts)]
    assert whole.tokens.shape == (8, 2, T + 1)
    for all_rows, *parts in zip(whole[:4], *(share[:4] for share in shares), strict=True):
        assert np.array_equal(np.concatenate(parts), all_rows)
    again = PreferenceBatches(fitting(source), 8, seed)(step)  # As a run that resumes makes it.
    assert all(np.array_equal(a, b) for a, b in zip(whole[:4], again[:4], strict=True))


@given(pairs, st.integers(1, 5), st.sampled_from([(), (T,), (3, 7, T)]))
def test_evaluation_has_every_pair_once(source: InMemory, batch_size: int, sizes: tuple[int, ...]) -> None:
    """Shortest first, each in rows of the first size that holds it; what fills up the last batch is nothing."""
    rows = PairRows(source, T)
    batches = list(preference_eval_batches(rows, batch_size, sizes))
    assert len(batches) == -(-len(rows) // batch_size)
    assert sorted(n for numbers, _ in batches for n in numbers.tolist()) == list(range(len(rows)))
    for numbers, batch in batches:
        assert batch.tokens.shape[:2] == (batch_size, 2)
        size = batch.mask.shape[2]
        longest = max(rows.longest[number] for number in numbers)
        assert size == min(s for s in sizes or (T,) if s + 1 >= longest)
        for b in range(batch_size):
            row = Batch(*(x[b] for x in batch[:4]))
            if b < len(numbers):
                assert all(np.array_equal(a, b) for a, b in zip(row, rows.row(int(numbers[b]), size), strict=True))
            else:
                assert not row.mask.any()
                assert not row.tokens.any()
                assert row.positions.tolist() == [list(range(size))] * 2


@given(pairs, st.integers(1, 5), st.integers(0, 9))
def test_shorter_rows_have_the_same_pairs(source: InMemory, batch_size: int, step: int) -> None:
    """Hosts agree on the size, and nothing but padding is left out."""
    whole = PreferenceBatches(fitting(source), batch_size, 0)
    short = PreferenceBatches(whole.rows, batch_size, 0, (3, 7, T))
    batch, less = whole(step), short(step)
    size = less.mask.shape[2]
    assert short(step, np.array([batch_size - 1])).mask.shape == (1, 2, size)
    assert np.array_equal(batch.tokens[:, :, : size + 1], less.tokens)
    assert not batch.mask[:, :, size:].any()
    for name in ("mask", "segments", "positions"):
        assert np.array_equal(getattr(batch, name)[:, :, :size], getattr(less, name))


def test_pairs_that_are_all_too_long() -> None:
    with pytest.raises(UserError, match=r"none of 2 training pairs fits into model.context_length \+ 1 = 12 tokens"):
        PreferenceBatches(PairRows(InMemory([(9, 9, 9), (9, 1, 9)]), T), 4, 0)
