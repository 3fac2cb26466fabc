"""PyTorch's contestants: our PyTorch GPT, eager or compiled, with or without a cache, and Hugging Face's GPT-2."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (as everybody calls it)

from benchmarks import contestants
from benchmarks.contestants import Arrays, prompts, read_arrays
from benchmarks.machine import torch_device
from benchmarks.measure import forget_peak, peak_memory, resident_memory
from benchmarks.presets import from_spec
from benchmarks.torch_gpt import TorchGPT, generate, make_adamw, mean_loss, to_ours, to_theirs
from gpt_jax.config import ModelConfig, OptimizerConfig, config_from_dict


class HuggingFace(nn.Module):
    """transformers' GPT-2, called as TorchGPT is."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        if not (c.bias and c.tied_head) or c.dropout:
            raise ValueError("Hugging Face's GPT-2 has biases and a tied head; dropout is not compared")
        sizes = {"n_embd": c.d_model, "n_layer": c.n_layer, "n_head": c.n_head, "n_positions": c.context_length}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(vocab_size=c.vocab_size, layer_norm_epsilon=c.norm_eps, **sizes, **off)
        config._attn_implementation = "sdpa"
        self.config, self.gpt2 = c, GPT2LMHeadModel(config)
        self.gpt2.generation_config.eos_token_id = None  # Every answer is as long as was asked for.

    def named(self, of: Callable[[nn.Parameter], Any] = lambda p: p) -> dict[str, torch.Tensor]:
        """As TorchGPT's: a matrix that is (D, F) here is a view (F, D)."""
        tensors = {name.removeprefix("transformer."): of(p) for name, p in self.gpt2.named_parameters()}
        return {name: x.T if ".c_" in name and x.ndim == 2 else x for name, x in tensors.items()}

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

    def __init__(
        self, preset: dict[str, Any], parameters: str, compiled: bool = False, hugging_face: bool = False
    ) -> None:
        """preset: a Preset's spec; parameters: the file with gpt_jax's, to start from; hugging_face: transformers'
        GPT2LMHeadModel in place of our PyTorch GPT."""
        self.preset, self.parameters, self.compiled = from_spec(preset), parameters, compiled
        self.device, self.synchronize = torch_device()
        self.libraries = resident_memory()
        fastest = "bfloat16" if self.device == "cuda" else "float32"
        dtype = self.preset.model.dtype
        self.bfloat16 = (fastest if dtype == "auto" else dtype) == "bfloat16"
        self.loss = torch.compile(mean_loss) if compiled else mean_loss
        self.model = (HuggingFace if hugging_face else TorchGPT)(self.preset.model).to(self.device).train()
        self.start()

    def start(self) -> None:
        load(self.model, read_arrays(self.parameters))
        self.optimizer, self.iteration = make_adamw(self.model, self.preset.optimizer), 0

    def how(self) -> dict[str, Any]:
        return {"compiled": self.compiled, "autocast": self.bfloat16, "threads": torch.get_num_threads()}

    def put(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tokens).to(self.device, non_blocking=True).long()

    def autocast(self) -> torch.autocast:
        """In which the forward pass runs."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)

    def backward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gradients of the loss on a batch; returns the loss, on its way."""
        with self.autocast():
            loss = self.loss(self.model, tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def gradients(self, tokens: torch.Tensor) -> Arrays:
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

    def wait(self) -> None:
        self.synchronize()

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

    def peak_bytes(self) -> int:
        return peak_bytes(self.device)

    def state_and_temporaries(self, **_: int) -> dict[str, int]:
        kept = [x for values in self.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
        return {"state": sum(x.nbytes for x in (*self.model.parameters(), *kept))}


class Decoding(contestants.Decoding):
    """Answers prompts with our PyTorch GPT."""

    architecture: type[Model] = TorchGPT

    def __init__(self, model: dict[str, Any], parameters: str, cached: bool = True) -> None:
        """model: a ModelConfig's fields, in whose dtype the weights are held; parameters: the file with gpt_jax's."""
        self.config, self.cached = config_from_dict({"model": model}, "a benchmark").model, cached
        self.device, _ = torch_device()
        self.libraries = resident_memory()
        made = self.architecture(self.config)
        load(made, read_arrays(parameters))
        self.model: Any = made.to(self.device, getattr(torch, self.config.dtype)).eval()

    def ready(self) -> None:
        """What was needed to load the weights and is not needed any more is given back."""
        forget_peak()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def prompts(self, batch: int, prompt: int) -> torch.Tensor:
        """The prompts on the device, int64 (B, T)."""
        return torch.from_numpy(prompts(self.config.vocab_size, batch, prompt)).to(self.device).long()

    def tokens(self, batch: int, prompt: int, new: int, top_k: int) -> torch.Tensor:
        """New tokens, int64 (B, new), on the device."""
        stream = generate(self.model, self.prompts(batch, prompt), new, top_k, self.cached)
        return torch.stack([tokens_B for tokens_B, _ in stream], dim=1)

    def logits(self, batch: int, prompt: int, new: int) -> Iterable[torch.Tensor]:
        """The logits (B, V) of each token of a greedy answer."""
        return (logits_BV for _, logits_BV in generate(self.model, self.prompts(batch, prompt), new, 0, self.cached))

    def answer(self, batch: int, prompt: int, new: int, top_k: int) -> np.ndarray:
        return self.tokens(batch, prompt, new, top_k).cpu().numpy()

    def logprobs(self, batch: int, prompt: int, new: int) -> np.ndarray:
        """Of the most probable tokens, which a greedy answer has."""
        best = [x_BV.float().log_softmax(dim=-1).amax(dim=-1).cpu() for x_BV in self.logits(batch, prompt, new)]
        return torch.stack(best, dim=1).numpy()

    def peak_bytes(self) -> int:
        return peak_bytes(self.device)

    def state_and_temporaries(self, **case: int) -> dict[str, int]:
        """The state is the weights and the cache of so many tokens."""
        c, weights = self.config, [*self.model.parameters()]
        n_tokens = case["batch"] * (case["prompt"] + case["new"])
        cache = 2 * c.n_layer * c.d_model * n_tokens * weights[0].element_size() if self.cached else 0
        return {"state": sum(x.nbytes for x in weights) + cache}


class HuggingFaceDecoding(Decoding):
    """The same with transformers' `generate`, its cache and its fused attention."""

    architecture = HuggingFace

    def generate(self, batch: int, prompt: int, new: int, **how: Any) -> Any:
        """What `generate` returns for the prompts."""
        x_BT = self.prompts(batch, prompt)
        how |= {"attention_mask": torch.ones_like(x_BT), "max_new_tokens": new, "pad_token_id": 0}
        with torch.inference_mode():
            return self.model.gpt2.generate(x_BT, **how)

    def tokens(self, batch: int, prompt: int, new: int, top_k: int) -> torch.Tensor:
        how = {"do_sample": True, "top_k": top_k} if top_k else {"do_sample": False}
        return self.generate(batch, prompt, new, **how)[:, prompt:]

    def logits(self, batch: int, prompt: int, new: int) -> Iterable[torch.Tensor]:
        how = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return self.generate(batch, prompt, new, **how).logits


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
