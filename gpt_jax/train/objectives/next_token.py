"""Predicts each token from those before it: the objective of pretraining, and of fine-tuning on texts."""

import jax
import jax.numpy as jnp

from gpt_jax.data.batch import Batch
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import head_VD
from gpt_jax.model.loss import sum_of_nats
from gpt_jax.train.objectives import Sums


def next_token(model: GPT, params: Params, batch: Batch, keys_B: jax.Array | None) -> Sums:
    """The cross-entropy of the targets in nats, weighted by the mask, and the sum of the weights."""
    inputs_BT, targets_BT = batch.tokens[:, :-1], batch.tokens[:, 1:]
    hidden_BTD = forward(model, params, inputs_BT, keys_B, batch.segments, batch.positions)
    if batch.mask is not None:
        targets_BT = jnp.where(batch.mask != 0, targets_BT, 0)  # 0 times the infinite loss of an unknown id is NaN.
    c = model.config
    mask_BT = jnp.ones(targets_BT.shape) if batch.mask is None else batch.mask.astype(jnp.float32)
    loss = sum_of_nats(hidden_BTD, head_VD(params), targets_BT, mask_BT, c.vocab_size, c.loss_chunk)
    return Sums(loss, jnp.sum(mask_BT), logged={}, largest={})
