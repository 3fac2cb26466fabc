"""PyTorch's contestants in training: our PyTorch GPT, eager or compiled, and Hugging Face's GPT-2."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.machine import torch_device
from benchmarks.presets import OPTIMIZER, from_spec, random_tokens
from benchmarks.torch_gpt import Arrays, TorchGPT, load, make_adamw, mean_loss, to_ours, to_theirs
from benchmarks.worker import peak_memory, resident_memory, seconds_of
from gpt_jax.config import ModelConfig


class Training:
    """Trains a preset: in float32, or in bfloat16 by autocast."""

    def __init__(self, preset: dict[str, Any], parameters: str, compiled: bool = False) -> None:
        """preset: a Preset's spec; parameters: the file with ours, to start from."""
        self.preset, self.parameters, self.compiled = from_spec(preset), parameters, compiled
        self.device, self.synchronize = torch_device()
        self.libraries = resident_memory()
        self.bfloat16 = self.preset.model.dtype == "bfloat16"
        self.loss = torch.compile(mean_loss) if compiled else mean_loss
        self.model = self.make_model(read_arrays(parameters)).to(self.device).train()
        self.optimizer = make_adamw(self.model, OPTIMIZER)

    def make_model(self, arrays: Arrays) -> nn.Module:
        """The model with these parameters, on the CPU."""
        model = TorchGPT(self.preset.model)
        load(model, arrays)
        return model

    def gradients(self) -> Arrays:
        """The gradients that the parameters have now, by the paths of ours."""
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return to_ours(named, self.preset.model)

    def start(self) -> None:
        """Starts anew, with the initial parameters; what is compiled stays."""
        self.model.load_state_dict(self.make_model(read_arrays(self.parameters)).state_dict())
        self.optimizer = make_adamw(self.model, OPTIMIZER)

    def how(self) -> dict[str, Any]:
        """The options that matter."""
        return {"compiled": self.compiled, "autocast": self.bfloat16, "threads": torch.get_num_threads()}

    def backward(self, batch: int) -> torch.Tensor:
        """Gradients of the loss on a batch; returns the loss, on its way."""
        tokens = torch.from_numpy(random_tokens(self.preset, batch)).to(self.device, non_blocking=True).long()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss(self.model, tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def step(self, batch: int) -> torch.Tensor:
        """An optimizer step on a batch; returns the loss, on its way."""
        loss = self.backward(batch)
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_norm)
        self.optimizer.step()
        return loss

    def write_gradients(self, path: str, batch: int) -> None:
        """Writes the gradients of the initial parameters on a batch, by the paths of ours."""
        self.backward(batch)
        with Path(path).open("wb") as file:
            np.savez(file, **self.gradients())  # type: ignore[arg-type]

    def losses(self, batch: int, count: int) -> list[float]:
        """The losses of so many steps on one and the same batch, which is learned by heart."""
        return [self.step(batch).item() for _ in range(count)]

    def seconds(self, first: int, count: int) -> float:
        """Seconds a step of so many, all of them done."""

        def steps() -> None:
            for batch in range(first, first + count):
                self.step(batch)
            self.synchronize()

        return seconds_of(steps) / count

    def peak_bytes(self) -> int:
        """Most memory that was in use so far."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_memory()

    def memory(self) -> dict[str, int]:
        """Bytes, by kind: the process with its libraries, before there was any array; and the state, parameters and
        optimizer's. To be called after a step."""
        return {"libraries": self.libraries, "state": bytes_of_state(self.model, self.optimizer)}


def bytes_of_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters, and of what the optimizer keeps."""
    kept = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in (*model.parameters(), *kept))


class HuggingFaceTraining(Training):
    """The same with transformers' GPT2LMHeadModel, eager."""

    def make_model(self, arrays: Arrays) -> nn.Module:
        return HuggingFace(self.preset.model, arrays)

    def gradients(self) -> Arrays:
        assert isinstance(self.model, HuggingFace)
        gradients = {name: p.grad for name, p in self.model.gpt2.named_parameters() if p.grad is not None}
        return to_ours(self.model.rename(gradients, to_ours=True), self.preset.model)


class HuggingFace(nn.Module):
    """transformers' GPT-2 with our parameters, called as TorchGPT is."""

    def __init__(self, c: ModelConfig, arrays: Arrays) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        if not (c.bias and c.tied_head) or c.dropout:
            raise ValueError("Hugging Face's GPT-2 has biases and a tied head; dropout is not compared")
        sizes = {"n_embd": c.d_model, "n_layer": c.n_layer, "n_head": c.n_head, "n_positions": c.context_length}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(vocab_size=c.vocab_size, layer_norm_epsilon=c.norm_eps, **sizes, **off)
        config._attn_implementation = "sdpa"
        self.n_layer = c.n_layer
        self.gpt2 = GPT2LMHeadModel(config)
        theirs = self.rename(to_theirs(arrays, c), to_ours=False)
        with torch.no_grad():
            for name, parameter in self.gpt2.named_parameters():
                parameter.copy_(theirs[name])

    def rename(self, tensors: dict[str, torch.Tensor], to_ours: bool) -> dict[str, torch.Tensor]:
        """Tensors by the names of TorchGPT, from or to GPT2LMHeadModel's, which holds its weights (D, F)."""
        names = {"tokens": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f"}
        parts = {"norm_1": "ln_1", "norm_2": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj"}
        parts |= {"up": "mlp.c_fc", "down": "mlp.c_proj"}
        for i in range(self.n_layer):
            names |= {f"blocks.{i}.{ours}": f"transformer.h.{i}.{theirs}" for ours, theirs in parts.items()}
        renamed = {}
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                source, target = (f"{theirs}.{kind}", f"{ours}.{kind}")[:: 1 if to_ours else -1]
                if source in tensors:
                    transposed = kind == "weight" and "norm" not in ours and ours.startswith("blocks")
                    renamed[target] = tensors[source].T if transposed else tensors[source]
        return renamed

    def forward(self, inputs_BT: torch.Tensor) -> torch.Tensor:
        return self.gpt2(inputs_BT, use_cache=False).logits


def read_arrays(path: str) -> Arrays:
    """The arrays of an .npz file."""
    with np.load(path) as file:
        return dict(file)
