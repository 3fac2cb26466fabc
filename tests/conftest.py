"""Runs the suite on eight simulated CPU devices, set up as a user's run is."""

import os

import numpy as np
import pytest

from gpt_jax import runtime

if "CI" in os.environ:
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True, deadline=None)
    settings.load_profile("ci")

runtime.setup(cpu_devices=8)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
