"""A model whose parameters exceed what one device may have is evaluated on a mesh, as it is sampled there."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest

from gpt_jax.config import ParallelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.evaluate.score import Scorer
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import choose_placement
from tests import tiny
from tests.sample.test_mesh import LLAMA, bytes_of


@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "scanned"])
def test_a_model_that_exceeds_a_device_is_evaluated(unroll: bool) -> None:
    """The model, the mesh, the limit and the order of operations of the test in sample/test_mesh: two fifths of the
    parameters on each of eight devices, for all that is there while the program runs. It is a fifth where layers are
    unrolled, and a third where they are scanned. No more is gathered at once than a device's part of one matrix."""
    config = dataclasses.replace(LLAMA, n_layer=8, d_ff=512, unroll=unroll)
    placement = choose_placement(ParallelConfig(fsdp=4, tensor=2), config, jax.devices())
    scorer = Scorer(GPT(config), tiny.initial_params(config), placement, 1)
    limit = 0.4 * bytes_of(scorer.params)
    shape = scorer.batch_size, 64
    batch = Batch(np.zeros((shape[0], shape[1] + 1), np.int32), np.ones(shape, bool))
    lowered = scorer.step.lower(scorer.params, placement.split(batch))
    program: Any = lowered.compile({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < limit
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program.as_text())
    sizes = [4 * np.prod([int(n) for n in dims.split(",")]) for dims in gathered]
    assert 0 < max(sizes) <= 4 * config.d_model * config.ff_dim // 2
