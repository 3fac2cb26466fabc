"""What nanoGPT draws at random: its initial parameters and windows, in the order in which its train.py draws them.

With the same seed and PyTorch's generator, a recipe then runs as it does there, and its losses are nanoGPT's.
https://github.com/karpathy/nanoGPT, model.py and train.py
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.learn import Recipe, read_text
from benchmarks.torch_gpt import to_ours
from gpt_jax.config import ModelConfig


class Draws:
    """A contestant in form only: PyTorch has a process of its own here, too."""

    def write(self, recipe: dict[str, Any], path: str, out: str) -> None:
        """Writes the draws for a recipe's fields and a text to an .npz file.

        "parameters/PATH": the initial parameters, by their paths in our tree. The starts of windows, int64: "train"
        (steps + 1, B), of which the last is not used; "train_eval" and "val_eval" (evaluations, batches, B).
        """
        r, text = Recipe(**recipe), read_text(path)
        torch.manual_seed(r.seed)
        parameters = draw_parameters(r.model(text.vocab_size))

        def draw(tokens: np.ndarray) -> np.ndarray:
            return torch.randint(len(tokens) - r.context_length, (r.batch_size,)).numpy()

        train, evaluations = [draw(text.train)], []
        for iterations in range(r.steps + 1):
            if r.evaluates(iterations):
                splits = (text.train, text.val)
                evaluations.append([[draw(split) for _ in range(r.eval_batches)] for split in splits])
            train.append(draw(text.train))
        train_eval, val_eval = np.array(evaluations).swapaxes(0, 1)
        with Path(out).open("wb") as file:
            np.savez(
                file,
                train=np.array(train[: r.steps + 1]),
                train_eval=train_eval,
                val_eval=val_eval,
                **{f"parameters/{name}": array for name, array in parameters.items()},  # type: ignore[arg-type]
            )


def draw_parameters(c: ModelConfig) -> dict[str, np.ndarray]:
    """The initial parameters of a model without biases and with a tied head, by their paths in our tree.

    Every module draws its own when it is made. Then all are drawn again, the tied matrix twice, and last those that
    add to the residual stream, with a smaller deviation.
    """
    tokens, positions = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.context_length, c.d_model)
    sizes = {
        "qkv": (c.d_model, 3 * c.d_model),
        "out": (c.d_model, c.d_model),
        "up": (c.d_model, c.ff_dim),
        "down": (c.ff_dim, c.d_model),
    }
    layers = [{name: nn.Linear(*size, bias=False) for name, size in sizes.items()} for _ in range(c.n_layer)]
    head = nn.Linear(c.d_model, c.vocab_size, bias=False)
    tokens.weight = head.weight
    for module in (tokens, positions, *(linear for layer in layers for linear in layer.values()), head):
        nn.init.normal_(module.weight, std=0.02)
    for layer in layers:
        for name in ("out", "down"):
            nn.init.normal_(layer[name].weight, std=0.02 / math.sqrt(2 * c.n_layer))
    named = {"tokens.weight": tokens.weight, "positions.weight": positions.weight}
    ones = torch.ones(c.d_model)
    named["final_norm.weight"] = ones
    for i, layer in enumerate(layers):
        named |= {f"blocks.{i}.{name}.weight": linear.weight for name, linear in layer.items()}
        named |= {f"blocks.{i}.{name}.weight": ones for name in ("norm_1", "norm_2")}
    return to_ours(named, c)
