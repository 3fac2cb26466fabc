"""Formulas for a training step: activations, memory traffic, collectives, and the bounds of its time.

The formulas serve targets without a compiler, and choose what is worth compiling. Activations are counted, not
guessed: they are the arrays that JAX's reverse mode keeps from the model's own forward pass.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.config import AttentionName, Config, ModelConfig
from gpt_jax.model import lora
from gpt_jax.model.flops import flops_per_token, keys_seen
from gpt_jax.model.forward import forward, init_params
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.kernels import QUERY_BLOCK, SPLASH_BLOCKS
from gpt_jax.placement import Placement
from gpt_jax.plan.program import Traffic, abstract_state, bytes_on_a_device
from gpt_jax.plan.targets import Target

ITEM = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Sizes:
    """The layout of a step: bytes on one device, sequences in a device's microbatch, number of microbatches."""

    params: float
    frozen: float  # Parameters that are not trained.
    optimizer: float
    sequences: int
    n_micro: int
    fsdp: int
    context: int
    tensor: int

    @property
    def state(self) -> float:
        """Bytes of everything that is kept from step to step."""
        return self.params + self.frozen + self.optimizer


def recomputed(config: ModelConfig) -> float:
    """The FLOPs that rematerialisation repeats, as a share of those of a step: the forward products of the layers,
    which are a third of all products, or half of them when matrices have no gradients."""
    return (1 / 2 if config.lora.rank else 1 / 3) if config.remat == "full" else 0.0


def sizes_of(model: GPT, config: Config, placement: Placement) -> Sizes:
    """The layout of a configuration in a placement. Raises UserError when the batch does not divide."""
    state = abstract_state(model, config)
    A = placement.microbatches(config.data.batch_size, config.data.microbatch_size)
    return Sizes(
        bytes_on_a_device(state.params, placement.state_shardings(state.params)),
        bytes_on_a_device(state.frozen, placement.state_shardings(state.frozen)),
        bytes_on_a_device(state.opt_state, placement.state_shardings(state.opt_state)),
        config.data.batch_size // placement.n_shares // A,
        A,
        placement.mesh.shape.get("fsdp", 1),
        placement.context,
        placement.mesh.shape.get("tensor", 1),
    )


@cache
def activations(config: ModelConfig, tensor: int = 1) -> float:
    """Bytes that the forward pass of one sequence keeps for its backward pass, on one of `tensor` devices that divide
    heads and feed-forward layers: those of a model with 1/tensor of both, and the whole residual stream.

    All fused attentions keep the same arrays, so Splash, which can be traced on any machine, stands for all of them.
    """
    c = config
    fused: AttentionName = "block_causal" if c.context_length % SPLASH_BLOCKS[-1] or c.dropout else "splash"
    part = dataclasses.replace(
        c,
        n_head=c.n_head // tensor,
        n_kv_head=c.kv_heads // tensor,
        d_head=c.head_dim,
        d_ff=c.ff_dim // tensor,
        attention="xla" if c.attention == "xla" else fused,
        unroll=False,
    )
    model = GPT(part)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    trained, frozen = lora.split(params) if c.lora.rank else (params, {})

    def kept(batch: int) -> int:
        tokens_BT = jnp.zeros((batch, c.context_length), jnp.int32)

        def backward(trained: Params, frozen: Params) -> Any:
            return jax.vjp(lambda p: forward(model, lora.join(p, frozen), tokens_BT), trained)[1]

        shapes = jax.tree.leaves(jax.eval_shape(backward, trained, frozen))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)

    return float(kept(2) - kept(1))  # Without the parameters, which do not grow with the batch.


def attended(config: ModelConfig, sizes: Sizes) -> float:
    """Bytes that one layer's attention needs when sequences are divided: all keys and values with their gradients, and
    the scores and weights of a block of queries with their gradients."""
    c, block_causal = config, config.attention == "block_causal"
    keys = 2 * sizes.sequences * c.context_length * c.kv_heads * c.head_dim * (4 if block_causal else ITEM[c.dtype])
    scores = 4 * 4 * sizes.sequences * c.n_head * QUERY_BLOCK * c.context_length if block_causal else 0
    return (2 * keys + scores) / sizes.tensor if sizes.context > 1 else 0


def temporaries(config: ModelConfig, sizes: Sizes) -> float:
    """Bytes besides the state: gradients, activations, logits and their gradient, and gathered arrays."""
    c, item = config, ITEM[config.dtype]
    tokens = min(c.loss_chunk, sizes.sequences * c.context_length // sizes.context)
    gathered = 2 * item * (c.n_params - c.embedding_rows * c.d_model) / c.n_layer / sizes.tensor
    gathered += 2 * 4 * c.embedding_rows * c.d_model / sizes.tensor
    return (
        sizes.params * (2 if sizes.n_micro > 1 else 1)
        + activations(config, sizes.tensor) * sizes.sequences / sizes.context
        + 2 * 4 * tokens * c.embedding_rows / sizes.tensor
        + (gathered if sizes.fsdp * sizes.context > 1 else 0)
        + attended(config, sizes)
    )


def traffic(config: ModelConfig, sizes: Sizes, n_devices: int) -> dict[str, Traffic]:
    """The collectives of a step that model/sharding.py asks for, one a layer for all of its matrices."""
    c, item, A = config, ITEM[config.dtype], sizes.n_micro
    whole = c.n_params / sizes.tensor  # Parameters of a tensor shard.
    collectives: dict[str, Traffic] = {}
    n_parts = sizes.fsdp * sizes.context  # Shards of a gathered array.
    if n_parts > 1:
        collectives["all-gather"] = Traffic(2 * A * c.n_layer, 2 * A * whole * item)
        collectives["reduce-scatter"] = Traffic(A * c.n_layer, A * whole * item)
    if sizes.context > 1:  # Keys and values, again for the backward pass, and their gradients.
        array_bytes = 2 * sizes.sequences * c.context_length * c.kv_heads * c.head_dim / sizes.tensor * item
        collectives["all-gather"] += Traffic(4 * A * c.n_layer, 2 * A * c.n_layer * array_bytes)
        collectives["reduce-scatter"] += Traffic(2 * A * c.n_layer, A * c.n_layer * array_bytes)
    if n_devices // sizes.tensor > n_parts:
        collectives["all-reduce"] = Traffic(A, A * 4 * whole / n_parts)
    if sizes.tensor > 1:
        array_bytes = sizes.sequences * c.context_length / sizes.context * c.d_model * item
        n = A * c.n_layer * (5 if c.remat == "full" else 4)  # Recomputation repeats the forward ones but the last.
        collectives["all-reduce"] = collectives.get("all-reduce", Traffic()) + Traffic(n, n * array_bytes)
    return collectives


def most_keys_scored(config: ModelConfig, context: int) -> float:
    """Keys that a query of the busiest device is multiplied with on average, summed over layers. With Splash, that
    device has the last part of a sequence; attentions that mask the future multiply with all keys."""
    T = config.context_length
    if context == 1:
        return keys_seen(config)
    if config.attention != "splash":
        return config.n_layer * T
    return keys_seen(config) + sum(not sliding for sliding in config.sliding) * T / 2 * (1 - 1 / context)


@dataclass(frozen=True)
class Bounds:
    """Lower bounds of a step's seconds by compute, memory and network, and the FLOPs and memory bytes of a device."""

    compute: float
    memory: float
    network: float
    flops: float
    memory_bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte of memory traffic."""
        return self.flops / self.memory_bytes

    @property
    def name(self) -> str:
        """The name of the largest bound, which bounds the step."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """The least time of a step, when the other two are hidden behind the largest bound."""
        return max(self.compute, self.memory, self.network)


def bounds(config: Config, model: ModelConfig, sizes: Sizes, target: Target, moved: dict[str, Traffic]) -> Bounds:
    """The roofline of a step (Williams, Waterman and Patterson 2009), with a third roof for the network.

    Memory traffic: parameters read for the forward and the backward pass of each microbatch, in the compute type;
    activations written and read, three times all of them; trained parameters and optimizer state read and written
    once, gradients twice. An all-reduce sends its array twice, a reduce-scatter and an all-gather once. When sequences
    are divided, a step takes as long as on the device with the most attention to compute.
    """
    A, item = sizes.n_micro, ITEM[model.dtype]
    tokens = config.data.batch_size * model.context_length / target.n_devices
    recomputed_share = recomputed(model)
    uneven = 12 * model.n_head * model.head_dim * (most_keys_scored(model, sizes.context) - keys_seen(model))
    flops = tokens * (flops_per_token(model) + uneven) * (1 + recomputed_share)
    used = model.n_params / sizes.tensor * item
    kept = activations(dataclasses.replace(model, remat="none"), sizes.tensor) * sizes.sequences / sizes.context
    memory = A * (3 * used + 3 * kept * (1 + recomputed_share)) + 6 * sizes.params + 2 * sizes.optimizer
    sent = sum(t.bytes * (2 if kind == "all-reduce" else 1) for kind, t in moved.items())
    return Bounds(
        flops / target.chip.peak,
        memory / target.chip.memory_bandwidth,
        sent / target.network_bandwidth,
        flops,
        memory,
    )
