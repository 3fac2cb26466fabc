"""A small model whose probabilities are far from even, and what it says, computed plainly: one text at a time, in
float64."""

import jax
import numpy as np

from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from tests import tiny

CONFIG = tiny.ONE_LAYER
T = CONFIG.context_length
MODEL = GPT(CONFIG)


def make_params(model: GPT = MODEL) -> Params:
    return tiny.uneven_params(model.config)


jitted_forward = jax.jit(forward, static_argnums=0)


def log_probabilities_TV(params: Params, tokens: np.ndarray, model: GPT = MODEL) -> np.ndarray:
    """log softmax of the logits after each of the tokens, of which the model sees all at once, float64."""
    padded = np.zeros((1, model.config.context_length), np.int32)
    padded[0, : len(tokens)] = tokens  # Padded at the end, which no token sees: one program for all lengths.
    hidden_TD = jitted_forward(model, params, padded)[0, : len(tokens)]
    logits_TV = np.asarray(hidden_TD, np.float64) @ np.asarray(params["tokens_VD"], np.float64).T
    logits_TV -= logits_TV.max(axis=-1, keepdims=True)
    return logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))


def nats(params: Params, tokens: np.ndarray, n_scored: int, model: GPT = MODEL) -> float:
    """-log probability of the last n_scored tokens after those before them."""
    rows_TV = log_probabilities_TV(params, tokens[:-1], model)
    losses_T = -rows_TV[np.arange(len(tokens) - 1), tokens[1:]]
    return float(losses_T[len(losses_T) - n_scored :].sum())
