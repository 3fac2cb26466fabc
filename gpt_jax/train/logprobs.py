"""Log-probabilities of tokens under a model, for the objectives that compare them: of pairs, and of drawn answers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt_jax.data.batch import Batch
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import head_VD
from gpt_jax.model.loss import Adjust, nats_of_tokens


def token_logprobs(
    model: GPT,
    params: Params,
    batch: Batch,
    keys_B: jax.Array | None = None,
    n_tokens: int | None = None,
    adjust: Adjust | None = None,
) -> jax.Array:
    """The log-probability of each target in nats, float32 (B, K, T), of a batch with K rows for each pair or problem;
    0 where the batch's mask is. Differentiable by the parameters.

    keys_B: dropout keys; None: no dropout. n_tokens: the size of the tokenizer's vocabulary, where tokens beyond it
    have no probability; None: the model's. adjust: changes the logits.
    """
    B, K, T = batch.mask.shape

    def rows(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else x.reshape(B * K, *x.shape[2:])

    if keys_B is not None:
        keys_B = jax.vmap(lambda key: jax.random.split(key, K))(keys_B).reshape(B * K)
    tokens, mask = batch.tokens.reshape(B * K, T + 1), batch.mask.reshape(B * K, T)
    hidden = forward(model, params, tokens[:, :-1], keys_B, rows(batch.segments), rows(batch.positions))
    c = model.config
    targets = jnp.where(mask, tokens[:, 1:], 0)  # What is no target may be an unknown id, whose gradient is NaN.
    nats = nats_of_tokens(
        hidden, head_VD(params), targets, min(n_tokens or c.vocab_size, c.vocab_size), c.loss_chunk, adjust
    )
    return jnp.where(mask, -nats, 0).reshape(B, K, T)


def make_logprobs_step(
    model: GPT, n_tokens: int | None = None, adjust: Adjust | None = None
) -> Callable[[Params, Batch], jax.Array]:
    """The step that computes `token_logprobs` without dropout: `(params, batch)` to (A, B, K, T).

    batch: this device's share, with an axis of microbatches, (A, B, K, ...), which are computed one after the other.
    """
    return lambda params, batch: jax.lax.map(
        lambda micro: token_logprobs(model, params, micro, None, n_tokens, adjust), batch
    )
