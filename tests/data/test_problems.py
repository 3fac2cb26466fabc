"""Problems: the prompt as sampling makes it, and the fields of the record."""

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from gpt_jax.cli.eval import EvalArgs, open_text
from gpt_jax.cli.prepare import command
from gpt_jax.config import DataConfig
from gpt_jax.data import tuning
from gpt_jax.data.folders import together
from gpt_jax.data.problems import ProblemFiles, documents
from gpt_jax.data.records import RecordError
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.chat_template import TEMPLATE
from tests.data.prepared import prepared
from tests.data.test_conversations import AROUND, conversations, named, of_template

OURS = ByteTokenizer().with_chat_template(TEMPLATE)


def arithmetic(n: int) -> list[dict[str, Any]]:
    """n sums, each with its answer as a text."""
    rng = random.Random(0)
    terms = [rng.choices(range(1000), k=rng.randrange(2, 5)) for _ in range(n)]
    return [{"question": f"{' + '.join(map(str, t))} = ?", "answer": str(sum(t)), "terms": t} for t in terms]


@pytest.mark.parametrize("name", AROUND)
def test_prompts_are_those_of_sampling(name: str, llama_cpp_vocabularies: Path, smollm2_gguf: Path) -> None:
    tokenizer = named(name, llama_cpp_vocabularies, smollm2_gguf)
    made = 0
    for messages in conversations(100, list(tokenizer.special_tokens)[:40]):
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        try:
            [document], counts = documents(tokenizer, tokenizer.chat, {"prompt": prompt, "tools": None, "fields": {}})
        except RecordError:
            assert name == "Mistral"
            continue
        made += 1
        assert document.tokens == tokenizer.encode_chat(prompt)
        n_bytes = sum(len(message["content"].encode()) for message in prompt)
        assert (counts["problems"], counts["bytes"]) == (1, n_bytes)
    assert made > 60


texts = st.text(st.characters(codec="utf-8"), max_size=8)
prompts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn"])).filter(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def test_what_goes_in_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TASK_BYTES", 3000)
    records: list[dict[str, Any]] = []

    @given(prompts, st.dictionaries(texts, values, max_size=4))
    def collect(prompt: str, fields: dict[str, Any]) -> None:
        if not {*fields} & {"system", "tools", "images", "videos", "audios"} and not prompt.startswith("\n\n"):
            records.append({**fields, "prompt": prompt})

    collect()
    data = prepared(tmp_path, records, format="problem")
    assert (data.meta.format, data.meta.format_version, data.train.masked) == ("problem", 3, False)
    splits = [ProblemFiles(data, "train"), ProblemFiles(data, "val")]
    found = [split.problem(i) for split in splits for i in range(len(split))]
    assert [problem.number for problem in found] == [i for split in splits for i in range(len(split))]

    def line(prompt: list[int], fields: dict[str, Any]) -> str:
        return json.dumps((prompt, fields), sort_keys=True)

    wanted = []
    for record in records:
        prompt = OURS.encode_chat([{"role": "user", "content": record.pop("prompt")}])
        wanted.append(line(prompt, {name: value for name, value in record.items() if value is not None}))
    assert sorted(line(problem.prompt.tolist(), problem.fields) for problem in found) == sorted(wanted)
    for split in splits:
        assert [len(split.problem(i).prompt) for i in range(len(split))] == split.lengths.tolist()
        for outside in (len(split), -1):
            with pytest.raises(IndexError):
                split.problem(outside)


def test_problems_with_one_prompt_are_on_one_side(tmp_path: Path) -> None:
    data = prepared(tmp_path, [{"question": f"q{i % 5}", "answer": str(i)} for i in range(40)])
    splits = [ProblemFiles(data, "train"), ProblemFiles(data, "val")]
    train, val = ({tuple(split.problem(i).prompt.tolist()) for i in range(len(split))} for split in splits)
    assert len(train) + len(val) == 5
    assert not train & val
    assert data.meta.report["train"]["problems"] + data.meta.report["val"]["problems"] == 40


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"answer": "4"}, "question is missing"),
        ({"prompt": " ", "answer": "4"}, "prompt (user) has no content"),
        ({"question": "2 + 2", "answer": "\ud800"}, "the record has half of a surrogate pair"),
        ({"question": "2 + 2", "images": ["x.png"]}, "it has images beside its text"),
    ],
)
def test_records_that_are_refused(
    tmp_path: Path, bad: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^0 problems are too few for training and validation; passed over 2") as e:
        prepared(tmp_path, [bad] * 2, format="problem")
    assert reason in str(e.value)
    assert "\n" not in str(e.value)
    capsys.readouterr()
    data = prepared(tmp_path, [bad, *arithmetic(20)], format="problem")
    assert sum(data.meta.report["left out"].values()) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"a.jsonl, line 1: {reason}" in line


def test_what_the_template_refuses() -> None:
    tokenizer = of_template("{{ raise_exception('no') }}", [])
    with pytest.raises(RecordError, match="the chat template refuses this conversation: no") as caught:
        documents(tokenizer, tokenizer.chat, {"prompt": conversations(1, [])[0], "tools": None, "fields": {}})
    assert caught.value.reason == "a template refuses it"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in arithmetic(30)))
    assert command([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    assert capsys.readouterr().out.endswith("  problem (question): 30 problems\n")


def test_a_problem_set_is_not_text(tmp_path: Path) -> None:
    data = prepared(tmp_path, arithmetic(30))
    with pytest.raises(
        UserError,
        match=r"/out is a problem set; its objective is grpo, and next_token needs text or chat",
    ):
        together([data], DataConfig(dir="out"))
    with pytest.raises(UserError, match="/out is a problem set; its objective is grpo"):
        open_text(EvalArgs(model="SOME", data=str(data.folder)), cast(Any, None))
    text = prepared(tmp_path, [{"text": "some text " * 20}] * 4)
    with pytest.raises(UserError, match="/out is a text set; its objective is next_token, and grpo needs problem"):
        ProblemFiles(text, "train")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    data = prepared(tmp_path, arithmetic(30))
    folder = data.folder
    assert isinstance(folder, Path)
    (folder / "train-fields.jsonl").write_bytes((folder / "train-fields.jsonl").read_bytes().replace(b"{", b"!", 1))
    with pytest.raises(UserError, match=r"train-fields.jsonl, line 1, is damaged .*; prepare the data again"):
        ProblemFiles(data, "train").problem(0)
    assert ProblemFiles(data, "train").problem(1).fields
    with (folder / "train-fields.jsonl").open("ab") as f:
        f.write(b"x")
    with pytest.raises(UserError, match=r"train-fields.jsonl has \d+ bytes instead of \d+; prepare the data again"):
        ProblemFiles(data, "train")
    (folder / "train-fields.bin").write_bytes(b"12345678")
    with pytest.raises(UserError, match=r"train-fields.bin has 8 bytes instead of \d+; prepare the data again"):
        ProblemFiles(data, "train")
    prepared(tmp_path, [{**record, "answer": f"{record['answer']}."} for record in arithmetic(30)])
    with pytest.raises(UserError, match="/out was replaced while it was opened; start again"):
        ProblemFiles(data, "train")


def test_other_answers_are_other_data(tmp_path: Path) -> None:
    """Though the tokens are the same, a run does not go on with them."""
    one = prepared(tmp_path, arithmetic(30)).meta
    other = prepared(tmp_path, [{**record, "answer": "0"} for record in arithmetic(30)]).meta
    assert one.train.fingerprint != other.train.fingerprint


def test_problems_of_reasoning_gym(tmp_path: Path) -> None:
    gym = pytest.importorskip("reasoning_gym")
    made = list(gym.create_dataset("chain_sum", size=40, seed=0))
    data = prepared(tmp_path, made)
    splits = [ProblemFiles(data, "train"), ProblemFiles(data, "val")]
    found = [split.problem(i) for split in splits for i in range(len(split))]
    answers = {tuple(problem.prompt.tolist()): problem.fields for problem in found}
    for item in made:
        fields = answers[tuple(OURS.encode_chat([{"role": "user", "content": item["question"]}]))]
        assert fields == json.loads(json.dumps({name: item[name] for name in ("answer", "metadata")}))
