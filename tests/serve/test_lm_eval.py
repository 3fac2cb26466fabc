"""lm_eval's clients of a server: they score what our model of lm_eval scores without one."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt_jax.placement import Placement
from tests.evaluate.tasks import DOCUMENTS, TASKS, write_tasks
from tests.serve.servers import CHAT, Running

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from gpt_jax.evaluate.harness import HarnessModel  # noqa: E402


def evaluate(model: Any, folder: Path, names: list[str], **options: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Scores by task and metric; and by task, what was answered to each request."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    scores = {
        f"{name}/{key}": value
        for name in names
        for key, value in found["results"][name].items()
        if "," in key and "std" not in key
    }
    answers = {
        name: [s["resps"] for s in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])]
        for name in names
    }
    return scores, answers


def shown(scores: dict[str, Any]) -> dict[str, float]:
    """Scores to the last digit that lm_eval shows, without the perplexities, of which bits_per_byte is the logarithm:
    for weights that were drawn they have dozens of digits before the point."""
    return {name: round(float(score), 4) for name, score in scores.items() if "perplexity" not in name}


def test_completions(server: Running, tmp_path: Path) -> None:
    folder, engine = write_tasks(tmp_path), server.engine
    own = HarnessModel(engine.model, engine.params, CHAT, batch_size=4, placement=Placement(jax.devices()[:1]))
    expected, their = evaluate(own, folder, list(TASKS))
    sizes = f"base_url={server.url}/v1/completions,max_length={own.context_length + 1}"
    for concurrent, batch_size in ((8, 1), (1, 4)):
        arguments = f"model=tiny,{sizes},num_concurrent={concurrent}"
        options: dict[str, Any] = {"model_args": arguments, "batch_size": batch_size}
        scores, answers = evaluate("local-completions", folder, list(TASKS), **options)
        assert shown(scores) == shown(expected)
        assert scores == pytest.approx(expected, rel=1e-5)
        assert answers["writing"] == their["writing"]
        for name in ("choices", "rolling"):
            np.testing.assert_allclose(flat(answers[name]), flat(their[name]), rtol=1e-5)


def flat(answers: list[Any]) -> list[float]:
    """The log-probabilities, and 1 where a continuation is what greedy decoding gives, 0 where not."""
    return [float(x) for of in answers for [one] in of for x in (one if isinstance(one, tuple | list) else [one])]


def test_chats(server: Running, tmp_path: Path) -> None:
    """Only tasks that write, since the protocol of chats has no log-probabilities of prompts."""
    sizes = f"model=tiny,base_url={server.url}/v1/chat/completions,num_concurrent=4"
    folder = write_tasks(tmp_path)
    _, answers = evaluate("local-chat-completions", folder, ["writing"], model_args=sizes, apply_chat_template=True)
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "stop": ["e"]}
    for document, [[text]] in zip(DOCUMENTS, answers["writing"], strict=True):
        messages = [{"role": "user", "content": document["question"]}]
        plain = server.post("/v1/chat/completions", messages=messages, **asked)
        assert text == plain["choices"][0]["message"]["content"]
