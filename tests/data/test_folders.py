"""The data folders of a run: named, of one tokenizer, packed or in a stream, and a batch for each step."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.config import DataConfig
from gpt_jax.data.folders import DataFolders, names_of, together
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import open_dataset
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import TEMPLATE
from tests import tiny
from tests.data.splits import stream_batches

T, SEED = 32, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and with conversations, as bytes."""
    root = tmp_path_factory.mktemp("data")
    tiny.byte_data(root)
    rows = [{"prompt": "question " * (i % 3), "completion": f"answer {i} " + "x" * (i % 50)} for i in range(80)]
    (root / "chat.jsonl").write_text("\n".join(json.dumps({"messages": messages(row)}) for row in rows))
    prepare(PrepareArgs(source=(str(root / "chat.jsonl"),), out=root / "chat", tokenizer="bytes", workers=1))
    return root


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"] or "q"}, {"role": "assistant", "content": row["completion"]}]


def opened(root: Path, **config: object) -> DataFolders:
    data = DataConfig(batch_size=4, **config)  # type: ignore[arg-type]
    return together([open_dataset(Path(folder)) for folder in data.folders], data)


def test_names_are_ends_of_paths_unless_several_end_alike() -> None:
    assert names_of(("data/web", "data/chat")) == ["web", "chat"]
    assert names_of(("a/web", "b/web", "s3://x/chat")) == ["a/web", "b/web", "chat"]


def test_a_text_is_a_stream_and_conversations_are_packed(root: Path) -> None:
    stream = opened(root, dir=str(root / "prepared"))
    [data] = stream.by_name.values()
    expected = stream_batches(data.train, T, 4, SEED)
    for step in (0, 1, 100):
        batch = stream.batches(T, SEED)(step)
        assert np.array_equal(batch.tokens, expected(step).tokens)
        assert batch.mask is batch.segments is None
    assert stream.tokenizer.chat_template is None

    chat = opened(root, dir=str(root / "chat"))
    batch = chat.batches(T, SEED)(0)
    assert batch.mask is not None
    assert batch.segments is not None
    assert chat.tokenizer.chat_template == TEMPLATE
    assert (root / "chat" / f"train-packing-{T}.bin").exists()
    assert "packed into" in chat.describe(T)[0]
    # The other way about, if it is asked for.
    assert opened(root, dir=str(root / "prepared"), packing="documents").batches(T, SEED)(0).segments is not None
    batch = opened(root, dir=str(root / "chat"), packing="stream").batches(T, SEED)(0)
    assert batch.segments is None
    assert batch.mask is not None
    assert 0 < batch.mask.mean() < 1


def test_a_mixture_is_of_both_and_has_the_template(root: Path) -> None:
    mixture = (f"{root / 'prepared'}=3", f"{root / 'chat'}=1")
    data = opened(root, mixture=mixture, curriculum=("2000:0,1",))
    assert data.tokenizer.chat_template == TEMPLATE
    batches = data.batches(T, SEED)
    learnt = np.zeros(2)
    for step in range(1000):
        sources, _ = batches.mixture(np.arange(4 * step, 4 * step + 4))
        np.add.at(learnt, sources, batches(step).mask.sum(axis=1))
    assert learnt[0] / learnt.sum() == pytest.approx(0.75, rel=0.01)
    assert [line.rpartition("; ")[2] for line in data.describe(T)] == ["weight 3", "weight 1"]
    # From the second stage on, the text has no part.
    assert batches.epochs(3000)["prepared"] == batches.epochs(2000)["prepared"]
    for name, folder in data.by_name.items():
        targets = sum(int(batch.mask.sum()) for batch in data.validation(name, T, 4))
        packing = data.rows(folder, "val", T)
        assert targets == (len(folder.val) - 1 if name == "prepared" else round(packing.mean_targets * len(packing)))


def test_what_cannot_be_mixed_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("other words " * 200)
    args = PrepareArgs(source=(str(tmp_path / "text.txt"),), out=tmp_path / "other", vocab_size=280)
    prepare(args)
    with pytest.raises(UserError, match="chat and other were prepared with different tokenizers"):
        opened(root, mixture=(f"{root / 'chat'}=1", f"{tmp_path / 'other'}=1"))
    (tmp_path / "own.jinja").write_text(TEMPLATE + "{# another #}")
    source, template = (str(root / "chat.jsonl"),), str(tmp_path / "own.jinja")
    prepare(PrepareArgs(source=source, out=tmp_path / "own", tokenizer="bytes", template=template))
    with pytest.raises(UserError, match="chat and own were prepared with different chat templates"):
        opened(root, mixture=(f"{root / 'chat'}=1", f"{tmp_path / 'own'}=1"))
    both = f"{root / 'chat'}={{}}", f"{root / 'prepared'}={{}}"
    for weights, told in {
        (0, 0): "all weights of the mixture are 0 from step 0 on",
        (1, -1): "the weight of 'prepared' from step 0 on is -1.0; it must be finite, 0 or more",
        (1, float("inf")): "the weight of 'prepared' from step 0 on is inf",
    }.items():
        with pytest.raises(UserError, match=told):
            opened(root, mixture=tuple(f.format(w) for f, w in zip(both, weights, strict=True))).batches(T, SEED)
    with pytest.raises(UserError, match=r"training split of chat has .* tokens, and no window of model.context_length"):
        opened(root, dir=str(root / "chat")).batches(5, SEED)
    opened(root, mixture=(f"{root / 'prepared'}=1", f"{root / 'chat'}=0")).batches(5, SEED)  # It is not needed.


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"mixture": ("a", "b=1")},
            r"data.mixture = 'a' is not possible: it must be FOLDER=WEIGHT, as in data/web",
        ),
        ({"mixture": ("a=x", "b=1")}, r"data.mixture = 'a=x' is not possible"),
        ({"curriculum": ("5:1,2",)}, r"data.curriculum = .* must be empty without a data.mixture of several folders"),
        (
            {"mixture": ("a=1", "b=1"), "curriculum": ("x:1,2",)},
            r"data.curriculum = 'x:1,2' is not possible: it must",
        ),
        ({"mixture": ("a=1", "b=1"), "curriculum": ("5:1,z",)}, r"data.curriculum = '5:1,z' is not possible"),
        (
            {"mixture": ("a=1", "b=1"), "curriculum": ("2147483648:1,2",)},
            r"data.curriculum = '2147483648:1,2' .* a step below 2\*\*31",
        ),
        ({"mixture": ("a=1", "b=1"), "curriculum": (f"{9**99}:1,2",)}, "a step below"),
        ({"mixture": ("a/b=1", "a//./b=2")}, r"data.mixture = .* it must be of different folders"),
        ({"packing": "tight"}, r"data.packing = 'tight' is not possible: it must be auto or stream or documents"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_read_are_named(fields: dict[str, tuple[str, ...]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        DataConfig(**fields)  # type: ignore[arg-type]


def test_weights_by_stage() -> None:
    config = DataConfig(mixture=("data/a=b=0.5", "c=2"), curriculum=("10:1,0", "20:0.25,3e-1"))
    assert config.folders == ("data/a=b", "c")
    assert config.stages() == [(0, (0.5, 2.0)), (10, (1.0, 0.0)), (20, (0.25, 0.3))]
    assert DataConfig(dir="x").folders == ("x",)
    assert DataConfig(dir="x").stages() == [(0, (1.0,))]
