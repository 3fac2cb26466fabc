"""PyTorch's contestants: our PyTorch GPT, eager or compiled, with or without a cache, and Hugging Face's GPT-2."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (as everybody calls it)

from benchmarks import contestants
from benchmarks.contestants import MODES, Arrays, Asked, prompts
from benchmarks.machine import torch_device
from benchmarks.measure import memory_of_libraries, peak_memory
from benchmarks.presets import Preset
from benchmarks.torch_gpt import TorchGPT, generate, make_adamw, mean_loss, to_ours, to_theirs
from gpt_jax.config import ModelConfig, OptimizerConfig
from gpt_jax.interop.families.gpt2 import FAMILY


class HuggingFace(nn.Module):
    """transformers' GPT-2, called as TorchGPT is."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        if not (c.bias and FAMILY.can_express(c)) or c.dropout:
            raise ValueError("Hugging Face's GPT-2 is another architecture, or has dropout, which is not compared")
        config = GPT2Config(**FAMILY.to_settings(c), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        config._attn_implementation = "sdpa"
        self.config, self.gpt2 = c, GPT2LMHeadModel(config)
        self.gpt2.generation_config.eos_token_id = None  # Every answer is as long as was asked for.

    def named(self, of: Callable[[nn.Parameter], Any] = lambda p: p) -> dict[str, torch.Tensor]:
        return {name: of(p) for name, p in self.gpt2.named_parameters()}

    def forward(self, inputs_BT: torch.Tensor) -> torch.Tensor:
        return self.gpt2(inputs_BT, use_cache=False).logits


Model = TorchGPT | HuggingFace


@torch.no_grad()
def load(model: Model, arrays: Arrays) -> None:
    """Gives a model our parameters. Raises ValueError where it has others."""
    named, theirs = model.named(), to_theirs(arrays, model.config)
    if named.keys() != theirs.keys():
        raise ValueError(f"parameters differ: {sorted(named.keys() ^ theirs.keys())}")
    for name, parameter in named.items():
        parameter.copy_(theirs[name])


class Training(contestants.Training):
    """Trains a preset: in float32, or in bfloat16 by autocast."""

    def __init__(self, preset: Preset, compiled: bool = False, hugging_face: bool = False) -> None:
        """hugging_face: transformers' GPT2LMHeadModel in place of our PyTorch GPT."""
        self.preset, self.compiled = preset, compiled
        self.device, self.wait = torch_device()
        self.libraries = memory_of_libraries(self.device == "cpu")
        fastest = "bfloat16" if self.device == "cuda" else "float32"
        self.bfloat16 = preset.model.dtype.replace("auto", fastest) == "bfloat16"
        self.autocast = partial(torch.autocast, self.device, torch.bfloat16, enabled=self.bfloat16)
        self.loss = torch.compile(mean_loss) if compiled else mean_loss
        self.model = (HuggingFace if hugging_face else TorchGPT)(preset.model).to(self.device).train()
        self.optimizer, self.iteration = make_adamw(self.model, preset.optimizer), 0

    def start(self, parameters: Arrays) -> None:
        load(self.model, parameters)
        self.optimizer, self.iteration = make_adamw(self.model, self.preset.optimizer), 0

    def how(self) -> dict[str, Any]:
        return {"compiled": self.compiled, "autocast": self.bfloat16, "threads": torch.get_num_threads()}

    def put(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tokens).to(self.device, non_blocking=True).long()

    def backward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gradients of the loss on a batch; returns the loss, on its way."""
        with self.autocast():
            loss = self.loss(self.model, tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def gradients(self, parameters: Arrays, tokens: torch.Tensor) -> Arrays:
        load(self.model, parameters)
        self.backward(tokens)
        return to_ours(self.model.named(lambda p: p.grad), self.preset.model)

    def train(self, tokens: torch.Tensor) -> torch.Tensor:
        adamw = self.preset.optimizer
        if adamw.schedule != "constant":
            for group in self.optimizer.param_groups:
                group["lr"] = cosine(adamw, self.preset.schedule_steps, self.iteration)
        loss = self.backward(tokens)
        nn.utils.clip_grad_norm_(self.model.parameters(), adamw.clip_norm)
        self.optimizer.step()
        self.iteration += 1
        return loss

    @torch.no_grad()
    def mean_loss(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        """Eager: it is too seldom called for a program of its own to pay."""
        self.model.eval()
        total, count = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for tokens_BS, mask_BT in batches:
            tokens = self.put(tokens_BS)
            targets_BT = tokens[:, 1:].masked_fill(~torch.from_numpy(mask_BT).to(self.device), -1)
            with self.autocast():
                logits_NV = self.model(tokens[:, :-1]).flatten(0, 1)
                total += F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=-1, reduction="sum")
            count += int(mask_BT.sum())
        self.model.train()
        return total.item() / count

    def memory(self) -> dict[str, Any]:
        kept = [x for values in self.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
        kinds = {"libraries": self.libraries, "state": sum(x.nbytes for x in (*self.model.parameters(), *kept))}
        return {"peak_bytes": peak_bytes(self.device), "memory": kinds}


class Decoding(contestants.Decoding):
    """Answers prompts with our PyTorch GPT."""

    architecture: type[Model] = TorchGPT

    def __init__(self, model: ModelConfig, cached: bool = True, modes: Sequence[str] = tuple(MODES)) -> None:
        """model: the weights are held in its dtype."""
        self.config, self.cached, self.modes = model, cached, modes
        self.device, _ = torch_device()
        self.libraries = memory_of_libraries(self.device == "cpu")

    def ready(self, parameters: Arrays) -> None:
        made = self.architecture(self.config)
        load(made, parameters)
        self.model: Any = made.to(self.device, getattr(torch, self.config.dtype)).eval()

    def begin(self) -> None:
        super().begin()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def prompts(self, batch: int, prompt: int) -> torch.Tensor:
        """The prompts on the device, int64 (B, T)."""
        return torch.from_numpy(prompts(self.config.vocab_size, batch, prompt)).to(self.device).long()

    def answer(self, batch: int, prompt: int, new: int, top_k: int) -> np.ndarray:
        stream = generate(self.model, self.prompts(batch, prompt), new, top_k, self.cached)
        return torch.stack([tokens_B for tokens_B, _ in stream], dim=1).cpu().numpy()

    def greedy(self, batch: int, prompt: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        return chosen(
            logits_BV for _, logits_BV in generate(self.model, self.prompts(batch, prompt), new, 0, self.cached)
        )

    def memory(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """The state is the weights and the cache of so many tokens."""
        c, weights = self.config, [*self.model.parameters()]
        cache = 2 * c.n_layer * c.d_model * batch * (prompt + new) * weights[0].element_size() if self.cached else 0
        kinds = {"libraries": self.libraries, "state": sum(x.nbytes for x in weights) + cache}
        return {"peak_bytes": peak_bytes(self.device), "memory": kinds}


class HuggingFaceDecoding(Decoding):
    """The same with transformers' `generate`, its cache and its fused attention."""

    architecture = HuggingFace

    def generate(self, batch: int, prompt: int, new: int, **how: Any) -> Any:
        """What `generate` returns for the prompts."""
        x_BT = self.prompts(batch, prompt)
        how |= {"attention_mask": torch.ones_like(x_BT), "max_new_tokens": new, "pad_token_id": 0}
        with torch.inference_mode():
            return self.model.gpt2.generate(x_BT, **how)

    def answer(self, batch: int, prompt: int, new: int, top_k: int) -> np.ndarray:
        how = {"do_sample": True, "top_k": top_k} if top_k else {"do_sample": False}
        return self.generate(batch, prompt, new, **how)[:, prompt:].cpu().numpy()

    def greedy(self, batch: int, prompt: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        how = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return chosen(self.generate(batch, prompt, new, **how).logits)

    def serve(self, asked: Asked, slots: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        answers = [tokens for at in range(0, len(asked), slots) for tokens in self.answers(asked[at : at + slots])]
        return time.perf_counter() - begin, answers

    def answers(self, asked: Asked) -> list[list[int]]:
        """Those to one batch, which is padded on the left, and goes on until its longest answer is there."""
        T, N = (max(lengths) for lengths in zip(*((len(prompt), new) for prompt, new in asked), strict=True))
        x_BT = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt, _ in asked], device=self.device)
        mask_BT = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt, _ in asked], device=self.device)
        how = {"attention_mask": mask_BT, "max_new_tokens": N, "pad_token_id": 0, "do_sample": False}
        with torch.inference_mode():
            rows = self.model.gpt2.generate(x_BT, **how)[:, T:].tolist()
        return [tokens[:new] for tokens, (_, new) in zip(rows, asked, strict=True)]


def chosen(logits: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The most probable tokens (B, new), and their log-probabilities in nats, from the logits (B, V) of each."""
    best = [x_BV.float().log_softmax(dim=-1).max(dim=-1) for x_BV in logits]
    logprobs_BN, tokens_BN = (torch.stack(x, dim=1).cpu().numpy() for x in zip(*best, strict=True))
    return tokens_BN, logprobs_BN


def cosine(c: OptimizerConfig, steps: int, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0, as gpt_jax's schedule "cosine" has it: down to a tenth."""
    n = iteration + 1
    if n < c.warmup_steps:
        return c.learning_rate * n / c.warmup_steps
    done = (n - c.warmup_steps) / max(1, steps - c.warmup_steps)
    return c.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def peak_bytes(device: str) -> int:
    """Most memory that was in use so far: the GPU's, or the process's."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
