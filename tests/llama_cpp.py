"""The vocabularies and texts with which llama.cpp tests its tokenizers, and the chat templates of published models that
it tests with, from the sources of the package llama-cpp-python (77 MB, MIT licence). The texts alone are beside the
tests."""

import os
import tarfile
from pathlib import Path

import pytest

from tests.packaged import downloaded

PACKAGE = "llama-cpp-python==0.3.36"
FOLDER = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/"
# Those of kinds that `gpt_jax.tokenizer.published` names.
# fmt: off
TEMPLATES = (
    "Apertus-8B-Instruct", "Apriel-1.6-15b-Thinker-fixed", "Bielik-11B-v3.0-Instruct", "ByteDance-Seed-OSS",
    "Cohere2MoE", "CohereForAI-c4ai-command-r-plus-tool_use", "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "GLM-4.6", "GLM-4.7-Flash", "GigaChat3-10B-A1.8B", "GigaChat3.1-10B-A1.8B", "HuggingFaceTB-SmolLM3-3B",
    "Kimi-K2-Instruct", "Kimi-K2-Thinking", "Kimi-K3", "LFM2-8B-A1B", "LFM2.5-8B-A1B", "LFM2.5-Instruct", "MiMo-VL",
    "MiniMax-M1", "MiniMax-M2", "MiniMax-M3", "Mistral-Small-3.2-24B-Instruct-2506",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "NVIDIA-Nemotron-Nano-v2", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-QwQ-32B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B",
    "Qwen3-Coder", "Qwen3.5-4B", "Reka-Edge", "Spark2.5", "StepFun3.5-Flash",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.1", "deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4",
    "deepseek-ai-DeepSeek-V4-Flash-0731", "fireworks-ai-llama-3-firefunction-v2", "google-gemma-2-2b-it",
    "google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved", "ibm-granite-granite-3.3-2B-Instruct",
    "ibm-granite-granite-4.0", "ibm-granite-granite-4.1", "inclusionai-ling-3.0-flash", "llama-cpp-deepseek-r1",
    "llama-cpp-rwkv-world", "meetkai-functionary-medium-v3.1", "meetkai-functionary-medium-v3.2",
    "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    "microsoft-Phi-3.5-mini-instruct", "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai-Mistral-Nemo-Instruct-2407", "moonshotai-Kimi-K2", "muse-glimmer", "openai-gpt-oss-120b",
    "openbmb-MiniCPM5-1B", "poolside-Laguna-S-2.1", "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2", "tencent-Hy3",
    "unsloth-Apriel-1.5", "unsloth-mistral-Devstral-Small-2507", "upstage-Solar-Open-100B",
)
# fmt: on
VOCABULARIES = ("command-r", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "refact", "starcoder")


def texts(content: str) -> list[str]:
    """The texts in a file .inp, 46 of them; each is followed by a line of its own."""
    return content.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")


TEXTS = texts((Path(__file__).parent / "tokenizer" / "llama_cpp_texts.inp").read_bytes().decode())


@pytest.fixture(scope="session")
def llama_cpp_vocabularies(pytestconfig: pytest.Config) -> Path:
    """A folder of llama.cpp's ggml-vocab-*.gguf with their .inp and .out, and templates/*.jinja: the one that the
    variable LLAMA_CPP_VOCABULARIES names, or `downloaded`."""
    if given := os.environ.get("LLAMA_CPP_VOCABULARIES"):
        return Path(given)
    return downloaded(pytestconfig, "llama_cpp", PACKAGE, _unpack)


def _unpack(archive: Path, folder: Path) -> None:
    names = {f"{FOLDER}ggml-vocab-{name}.gguf{kind}" for name in VOCABULARIES for kind in ("", ".inp", ".out")}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in names or member.name.endswith(".jinja"):
                member.name = member.name.removeprefix(FOLDER)
                tar.extract(member, folder, filter="data")
