"""gpt_jax as a model of lm_eval, on tasks defined here: against probabilities computed plainly, and lm_eval's `hf`."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests import tiny
from tests.commands import ROOT, TINY, environment, run_here
from tests.evaluate.model import log_probabilities_TV, make_params, nats
from tests.evaluate.tasks import DOCUMENTS, TASKS, write_tasks

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from gpt_jax.evaluate.harness import HarnessModel, generation_settings  # noqa: E402
from gpt_jax.sample.settings import Filters  # noqa: E402

T = 32
MODEL = GPT(dataclasses.replace(tiny.ONE_LAYER, context_length=T))
TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_text


@pytest.fixture(scope="module")
def params() -> Params:
    return make_params(MODEL)


@pytest.fixture(scope="module")
def harness_model(params: Params) -> HarnessModel:
    return HarnessModel(MODEL, params, TOKENIZER, batch_size=8, placement=Placement(jax.devices()[:1]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def results(harness_model: HarnessModel, tasks: Path) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(harness_model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


def samples(results: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def test_multiple_choice(results: dict[str, Any], params: Params) -> None:
    n_right = 0
    for document, sample in zip(DOCUMENTS, samples(results, "choices"), strict=True):
        expected = []
        for choice in TASKS["choices"]["doc_to_choice"]:
            context, continuation = str(document["question"]).rstrip(), f" {choice}"
            spaces = str(document["question"])[len(context) :]
            target = (spaces + continuation).encode()
            tokens = np.array([*(context.encode() or [END]), *target])[-(T + 1) :]
            expected.append(-nats(params, tokens, len(target), MODEL))
        got = [response[0][0] for response in sample["resps"]]
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        n_right += int(np.argmax(expected) == document["answer"])
    assert results["results"]["choices"]["acc,none"] == n_right / 4


def test_greedy_continuations_are_known(harness_model: HarnessModel, params: Params) -> None:
    context = list(b"as the model")
    greedy: list[int] = []
    for _ in range(3):
        greedy.append(int(log_probabilities_TV(params, np.array(context + greedy), MODEL)[-1].argmax()))
    asked: list[Any] = [
        (None, context, continuation) for continuation in (greedy, [*greedy[:2], (greedy[2] + 1) % 261])
    ]
    answers = harness_model._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in answers] == [True, False]


def test_rolling(results: dict[str, Any], params: Params) -> None:
    total, n_bytes = 0.0, 0
    for document, sample in zip(DOCUMENTS, samples(results, "rolling"), strict=True):
        text = str(document["text"]).encode()
        expected = 0.0
        for pair in get_rolling_token_windows(list(text), END, max_seq_len=T, context_len=1):
            context, continuation = make_disjoint_window(pair)
            expected -= nats(params, np.array(context + continuation), len(continuation), MODEL)
        assert sample["resps"][0][0] == pytest.approx(expected, rel=1e-5)
        total, n_bytes = total + expected, n_bytes + len(text)
    assert results["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(-total / n_bytes / np.log(2), rel=1e-5)


def test_generation(results: dict[str, Any], params: Params) -> None:
    for document, sample in zip(DOCUMENTS, samples(results, "writing"), strict=True):
        tokens = list(str(document["question"]).encode()[-(T - 10) :]) or [END]
        written: list[int] = []
        while len(written) < 10 and b"e" not in bytes(written):
            token = int(log_probabilities_TV(params, np.array(tokens + written), MODEL)[-1].argmax())
            if token == END:
                break
            written.append(token)
        assert sample["resps"][0][0] == bytes(t for t in written if t < 256).decode(errors="replace").split("e")[0]


def ask(context: str, **arguments: Any) -> Instance:
    return Instance("generate_until", {}, (context, arguments), 0)


def test_samples_differ_and_come_back(harness_model: HarnessModel) -> None:
    asked = [ask("on", do_sample=True, temperature=1.5, max_gen_toks=8)] * 3
    asked.append(ask("on", do_sample=False, max_gen_toks=8))
    texts = harness_model.generate_until(asked, disable_tqdm=True)
    assert len(set(texts)) == 4
    assert harness_model.generate_until(asked, disable_tqdm=True) == texts


def test_a_task_draws_from_all_tokens_unless_it_says_otherwise() -> None:
    """As in transformers."""
    asked = {"do_sample": True, "temperature": 1.5}
    assert generation_settings(asked, 0).filters == Filters(1.5, top_p=1.0)
    assert generation_settings({**asked, "top_p": 0.5}, 0).filters == Filters(1.5, top_p=0.5)


def test_an_answer_may_be_longer_than_the_context(harness_model: HarnessModel) -> None:
    [text] = harness_model.generate_until([ask("on", max_gen_toks=2 * T)], disable_tqdm=True)
    assert len(text.encode()) > T


def test_what_cannot_be_is_told(harness_model: HarnessModel) -> None:
    with pytest.raises(UserError, match="the task asks for num_beams in generation, which gpt_jax does not have"):
        harness_model.generate_until([ask("on", num_beams=4)], disable_tqdm=True)
    with pytest.raises(UserError, match="a continuation has 50 tokens, and the model's context_length is 32"):
        harness_model.loglikelihood([Instance("loglikelihood", {}, ("a", "b" * 50), 0)], disable_tqdm=True)
    with pytest.raises(UserError, match="there is no model argument pretrained; there are run, checkpoint, model"):
        HarnessModel.create_from_arg_string("pretrained=gpt2", {"batch_size": 1, "device": "cuda:0"})
    with pytest.raises(UserError, match="context_length = 'long' is not possible: it must be a whole number"):
        HarnessModel.create_from_arg_string("run=runs/mine,context_length=long")
    with pytest.raises(UserError, match="missing is not a run: it has no config"):
        HarnessModel.create_from_arg_string("run=missing")


@pytest.mark.exhaustive
def test_a_mesh_scores_and_writes(tiny_data: Path, tmp_path: Path) -> None:
    """As one device does; scores to 1e-5."""
    run_here("train", *TINY, f"--data.dir={tiny_data}", f"--out-dir={tmp_path / 'run'}", "--train.steps=20")
    asked = [Instance("loglikelihood", {}, (f"the cat{' sat' * i}", " on a mat"), 0) for i in range(20)]
    one, mesh = (
        HarnessModel.create_from_arg_string(f"run={tmp_path / 'run'}{axes}", {"batch_size": "2"})
        for axes in ("", ",data=2,fsdp=2,context=2")
    )
    assert {shard.data.shape for shard in mesh.params["tokens_VD"].addressable_shards} == {(261, 4)}
    expected, got = (np.array(model.loglikelihood(asked, disable_tqdm=True)) for model in (one, mesh))
    np.testing.assert_allclose(got[:, 0], expected[:, 0], rtol=1e-5)
    assert (got[:, 1] == expected[:, 1]).all()
    tasks = [ask(text, max_gen_toks=8) for text in ("on", "the cat", "rain")]
    assert mesh.generate_until(tasks, disable_tqdm=True) == one.generate_until(tasks, disable_tqdm=True)
    with pytest.raises(UserError, match=r"key/value heads, 2, does not divide over parallel\.tensor = 8"):
        HarnessModel.create_from_arg_string(f"run={tmp_path / 'run'},tensor=8")


@pytest.mark.slow
def test_the_command_line_of_lm_eval(tiny_data: Path, tasks: Path, tmp_path: Path) -> None:
    run_here("train", *TINY, f"--data.dir={tiny_data}", f"--out-dir={tmp_path / 'run'}", "--train.steps=20")
    command = [sys.executable, "-m", "gpt_jax.evaluate", "run", "--model", "gpt_jax", "--include_path", str(tasks)]
    command += ["--tasks", "choices,rolling", "--output_path", str(tmp_path / "results.json"), "--batch_size", "2"]
    command += ["--model_args", f"run={tmp_path / 'run'},context_length=16"]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    [written] = tmp_path.glob("results*.json")
    results = json.loads(written.read_text())["results"]
    assert 2 < results["rolling"]["bits_per_byte,none"] < 9
    assert results["choices"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
