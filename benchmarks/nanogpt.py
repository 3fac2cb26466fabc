"""What nanoGPT draws at random: its initial parameters and windows, in the order in which its train.py draws them.

With the same seed and PyTorch's generator, a recipe then runs as it does there, and its losses are nanoGPT's.
https://github.com/karpathy/nanoGPT, model.py and train.py
"""

import math

import numpy as np
import torch
from torch import nn

from benchmarks.contestants import Arrays
from benchmarks.recipe import Recipe, read_text
from benchmarks.torch_gpt import TorchGPT, to_ours
from gpt_jax.config import ModelConfig


class Draws:
    """A contestant in form only: PyTorch has a process of its own here, too."""

    def draw(self, recipe: Recipe, path: str) -> tuple[Arrays, Arrays]:
        """The draws for a recipe and a text: the initial parameters, and the starts of windows.

        The starts are int64: "train" (steps + 1, B), of which the last is not used; "train_eval" and "val_eval"
        (evaluations, batches, B).
        """
        text, c, steps = read_text(path), recipe.preset.model, recipe.preset.schedule_steps
        torch.manual_seed(recipe.seed)
        parameters = draw_parameters(c)

        def starts(tokens: np.ndarray) -> np.ndarray:
            return torch.randint(len(tokens) - c.context_length, (recipe.preset.batch_size,)).numpy()

        train, evaluations = [starts(text.train)], []
        for iterations in range(steps + 1):
            if recipe.evaluates(iterations):
                splits = (text.train, text.val)
                evaluations.append([[starts(split) for _ in range(recipe.eval_batches)] for split in splits])
            train.append(starts(text.train))
        train_eval, val_eval = np.array(evaluations).swapaxes(0, 1)
        return parameters, {"train": np.array(train[: steps + 1]), "train_eval": train_eval, "val_eval": val_eval}


def draw_parameters(c: ModelConfig) -> Arrays:
    """The initial parameters of a model without biases and with a tied head, by their paths in our tree.

    Every module draws its own when it is made, in the order of nanoGPT's. Then all are drawn again, the tied matrix
    twice, and last those that add to the residual stream, with a smaller deviation.
    """
    model = TorchGPT(c)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * c.n_layer))
    return to_ours(model.named(), c)
