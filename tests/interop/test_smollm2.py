"""A real chat model: SmolLM2-135M-Instruct, as a GGUF file of four-bit numbers, from the command to the answer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.interop.gguf import GGUFWeights
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.run.load import load_model, open_source
from gpt_jax.sample.generate import generate
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.cases import EXHAUSTIVE
from tests.commands import ROOT, environment, run_here

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first man on the moon",
    "Dear Sir or Madam,",
    "The most important thing about friendship is",
    "1, 2, 3, 4,",
    "Photosynthesis is the process by which",
]


@pytest.fixture(scope="module")
def ours(smollm2_gguf: Path) -> tuple[GPT, Params, Tokenizer]:
    return load_model(open_source(str(smollm2_gguf)), 512)


@pytest.fixture(scope="module")
def theirs(smollm2_gguf: Path) -> Any:
    """The same file as transformers loads it: the same numbers, dequantised."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


@pytest.mark.parity
def test_weights_and_settings_are_what_transformers_loads(smollm2_gguf: Path, theirs: Any) -> None:
    weights = GGUFWeights(smollm2_gguf)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert weights.shapes == {name: tensor.shape for name, tensor in state.items()}
    for name, tensor in state.items():
        np.testing.assert_array_equal(weights.read(name), tensor, err_msg=name)
    config = theirs.config.to_dict() | {"rope_theta": theirs.config.rope_parameters["rope_theta"], "rms_norm_eps": 1e-5}
    assert weights.config == {name: config[name] for name in weights.config}


@pytest.mark.parity
def test_logits_equal_transformers(ours: tuple[GPT, Params, Tokenizer], theirs: Any) -> None:
    """Within 2e-3, over 200 tokens of real text and 200 random ones."""
    import torch

    model, params, tokenizer = ours
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    tokens = np.stack([tokenizer.encode(text)[:200], np.random.default_rng(0).integers(0, tokenizer.vocab_size, 200)])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    hidden = jax.jit(lambda params: forward(model, params, jnp.asarray(tokens)))(params)
    logits = np.stack([logits_NV(model, params, row)[:, : model.config.vocab_size] for row in hidden])
    np.testing.assert_allclose(logits, expected, atol=2e-3, rtol=0)


@pytest.mark.parity
def test_greedy_continuations_equal_transformers(ours: tuple[GPT, Params, Tokenizer], theirs: Any) -> None:
    """Ten prompts, 64 tokens each, token for token, with the one that ends a text; both in one batch, ours ragged,
    theirs padded on the left."""
    import torch

    model, params, tokenizer = ours
    settings = Settings(max_new_tokens=64, filters=Filters(temperature=0))
    results = generate(model, params, tokenizer, PROMPTS, settings)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    continuations = theirs.generate(
        torch.tensor([[tokenizer.end_of_text] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=sorted(tokenizer.stop_ids),
        pad_token_id=tokenizer.end_of_text,
    )[:, longest:].tolist()
    for prompt, result, continuation in zip(PROMPTS, results, continuations, strict=True):
        n = next((i for i, token in enumerate(continuation, 1) if token in tokenizer.stop_ids), len(continuation))
        assert result.tokens == continuation[:n], prompt


def test_chat_answers(smollm2_gguf: Path) -> None:
    """A conversation through a pipe, a line a message: it knows a capital, and what was said before."""
    process = subprocess.run(
        [
            sys.executable,
            "sample.py",
            "--model",
            smollm2_gguf,
            "--chat",
            "--temperature",
            "0",
            "--max-new-tokens",
            "40",
        ],
        cwd=ROOT,
        env=environment(),
        input="What is the capital of France?\nAnd of Italy?\n",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert "Paris" in process.stdout
    assert "Rome" in process.stdout


@EXHAUSTIVE
def test_evaluation(smollm2_gguf: Path, tmp_path: Path) -> None:
    """English is easier for it than random letters are, and a byte of it takes about a bit."""
    rng = np.random.default_rng(0)
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")[:3000]
    (tmp_path / "english.txt").write_text(licence, encoding="utf-8")
    # Of about as many tokens, which the same programs score.
    (tmp_path / "noise.txt").write_text("".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), 1050)))
    options = ["--context-length=512", "--batch-size=1", "--json"]
    bits = {}
    for name in ("english.txt", "noise.txt"):
        out, _ = run_here("eval", "--model", smollm2_gguf, "--text", tmp_path / name, *options)
        bits[name] = json.loads(out)["bits_per_byte"]
    assert bits["english.txt"] < 1.5 < 3 < bits["noise.txt"]
