"""The demonstration data of LLaMA-Factory (Apache-2.0), from the sources of the package llamafactory (5 MB): records in
the formats that people train on, and as they are published, a few of them broken."""

import os
import tarfile
from pathlib import Path

import pytest

from tests.packaged import downloaded

PACKAGE = "llamafactory==0.9.5"


@pytest.fixture(scope="session")
def llamafactory_data(pytestconfig: pytest.Config) -> Path:
    """A folder with the files: the one that the variable LLAMAFACTORY_DATA names, or `downloaded`."""
    if given := os.environ.get("LLAMAFACTORY_DATA"):
        return Path(given)
    return downloaded(pytestconfig, "llamafactory", PACKAGE, _unpack, "--no-binary=llamafactory")


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and Path(member.name).match("data/*.json*"):
                member.name = Path(member.name).name
                tar.extract(member, folder, filter="data")
