"""PyTorch as a contestant in learning, eager or compiled: run as a process by benchmarks.learn."""

import itertools
import json
import sys
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (as everybody calls it)

from benchmarks.learn import Recipe, Windows, initial_parameters, read_text, say, whole_val
from benchmarks.machine import torch_device
from benchmarks.theirs import bytes_of_state
from benchmarks.torch_gpt import TorchGPT, load, make_adamw, mean_loss
from benchmarks.worker import peak_memory, resident_memory


def main(recipe: Recipe, path: str, draws: str, compiled: bool) -> None:
    """Trains, and tells the referee of each evaluation.

    path: the text; draws: the file with the initial parameters and the windows.
    """
    text = read_text(path)
    windows = Windows(recipe, text, draws)
    device, _ = torch_device()
    libraries = resident_memory()
    model = TorchGPT(recipe.model(text.vocab_size))
    load(model, initial_parameters(draws))
    model.to(device).train()
    optimizer = make_adamw(model, recipe.optimizer())
    loss_fn = torch.compile(mean_loss) if compiled else mean_loss

    def put(tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tokens).to(device, non_blocking=True).long()

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    everything_BT = np.ones((recipe.batch_size, recipe.context_length), bool)

    @torch.no_grad()
    def whole_loss(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        """Mean loss of batches and masks. Eager: it is too seldom called for a program of its own to pay."""
        model.eval()
        total, count = torch.zeros((), device=device, dtype=torch.float64), 0
        for tokens_BS, mask_BT in batches:
            tokens = put(tokens_BS)
            targets_BT = tokens[:, 1:].masked_fill(~torch.from_numpy(mask_BT).to(device), -1)
            with autocast():
                logits_BTV = model(tokens[:, :-1])
                total += F.cross_entropy(
                    logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction="sum"
                )
            count += int(mask_BT.sum())
        model.train()
        return total.item() / count

    def evaluate(number: int, iterations: int) -> None:
        _, val_loss = (
            whole_loss((tokens, everything_BT) for tokens in split)
            for split in windows.evaluation(number)  # nanoGPT estimates that of the training split, too.
        )
        say(iterations=iterations, tokens=iterations * recipe.batch_size * recipe.context_length, val_loss=val_loss)

    evaluate(0, 0)
    numbers = itertools.count(1)
    for iterations in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(iterations - 1)
        tokens = put(windows.train(iterations - 1))
        with autocast():
            loss = loss_fn(model, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if recipe.evaluates(iterations):
            evaluate(next(numbers), iterations)

    peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
    memory = {"libraries": libraries, "state": bytes_of_state(model, optimizer)}
    say(whole_val_loss=whole_loss(whole_val(recipe, text)), peak_bytes=peak_bytes, memory=memory)


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    main(**{**spec, "recipe": Recipe(**spec["recipe"])})
