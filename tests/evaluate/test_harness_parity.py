"""gpt_jax in lm_eval against lm_eval's own `hf` model, with the same files of a GPT-2 and of a Llama."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
for package in ("accelerate", "peft"):  # What `hf` needs besides.
    pytest.importorskip(package)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from gpt_jax.evaluate.harness import HarnessModel  # noqa: E402
from tests.cases import cases  # noqa: E402

pytestmark = pytest.mark.parity

T = 32
TEXTS = ["", "the cat sat", "on a mat, and saw 语言 in the rain ", "rain " * 40, "👩‍🚀 and a cat  "]
CONTINUATIONS = [" on", " a mat", "语", " saw the cat in the rain on a mat", "."]


def save_model(family: str, folder: Path) -> None:
    """A small random model with a byte-level tokenizer, as published ones are."""
    import tokenizers
    import torch

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS * 3, vocab_size=320, special_tokens=["<|endoftext|>", "<s>"])
    names = {"eos_token": "<|endoftext|>"}
    if family == "llama":
        names["bos_token"] = "<s>"
        begin = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer._tokenizer.post_processor = begin
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 1, "eos_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(n_positions=T, n_embd=32, n_layer=2, n_head=2, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=T,
            **sizes,
        )
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=cases(["gpt2", "llama"], ["llama"]))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, HarnessModel]:
    folder = tmp_path_factory.mktemp(request.param)
    save_model(request.param, folder)
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=2, dtype="float32")
    return theirs, HarnessModel.create_from_arg_string(f"model={folder}", {"batch_size": 8, "device": "cpu"})


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihood(both: tuple[Any, HarnessModel]) -> None:
    theirs, ours = both
    asked = requests("loglikelihood", [(context, more) for context in TEXTS for more in CONTINUATIONS])
    expected, got = theirs.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([nats for nats, _ in got], [nats for nats, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_loglikelihood_rolling(both: tuple[Any, HarnessModel]) -> None:
    theirs, ours = both
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked, disable_tqdm=True), expected, rtol=1e-5)


def test_generate_until(both: tuple[Any, HarnessModel]) -> None:
    theirs, ours = both
    arguments = {"until": ["\n", "cat"], "max_gen_toks": 12}
    asked = requests("generate_until", [(text, arguments) for text in TEXTS[1:]])  # One of them is cut.
    assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)
