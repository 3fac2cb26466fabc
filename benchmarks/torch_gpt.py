"""The same GPT in PyTorch, as a good PyTorch engineer writes it today: what ours is compared with."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (as everybody calls it)

from benchmarks.contestants import Arrays
from gpt_jax.config import ModelConfig, OptimizerConfig
from gpt_jax.interop.families.gpt2 import FAMILY

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each (B, H, S, K), with room for S tokens."""


class Block(nn.Module):
    """Pre-layer-norm attention and feed-forward layers, as in gpt_jax.model.gpt.Block."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.n_head = c.n_head
        D, hidden = c.d_model, c.ff_dim
        self.ln_1 = nn.LayerNorm(D, c.norm_eps, bias=c.bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D, c.bias), "c_proj": nn.Linear(D, D, c.bias)})
        self.ln_2 = nn.LayerNorm(D, c.norm_eps, bias=c.bias)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, hidden, c.bias), "c_proj": nn.Linear(hidden, D, c.bias)})

    def forward(self, x_BTD: torch.Tensor, cache: LayerCache | None = None, start: int = 0) -> torch.Tensor:
        """x_BTD after this layer. With a cache, its tokens stand at positions `start` and on, and are written there."""
        B, T, D = x_BTD.shape
        qkv_BTX = self.attn["c_attn"](self.ln_1(x_BTD))
        q, k, v = (x.view(B, T, self.n_head, -1).transpose(1, 2) for x in qkv_BTX.split(D, dim=-1))
        if cache is not None:
            for buffer_BHSK, new_BHTK in zip(cache, (k, v), strict=True):
                buffer_BHSK[:, :, start : start + T] = new_BHTK
            k, v = (buffer_BHSK[:, :, : start + T] for buffer_BHSK in cache)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
        x_BTD = x_BTD + self.attn["c_proj"](y_BHTK.transpose(1, 2).reshape(B, T, D))
        y_BTF = F.gelu(self.mlp["c_fc"](self.ln_2(x_BTD)), approximate="tanh")
        return x_BTD + self.mlp["c_proj"](y_BTF)


class TorchGPT(nn.Module):
    """GPT-2: learned positions, layer norm, GELU, with or without biases, its head tied or not; without dropout."""

    def __init__(self, c: ModelConfig) -> None:
        """Raises ValueError for what GPT-2 does not have."""
        super().__init__()
        if c.positions != "learned" or c.norm != "layer" or c.gated or c.kv_heads != c.n_head or c.window or c.dropout:
            raise ValueError("this PyTorch model is GPT-2's architecture only, without dropout")
        self.config = c
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(c.vocab_size, c.d_model),
                "wpe": nn.Embedding(c.context_length, c.d_model),
                "h": nn.ModuleList(Block(c) for _ in range(c.n_layer)),
                "ln_f": nn.LayerNorm(c.d_model, c.norm_eps, bias=c.bias),
            }
        )
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tied_head:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, inputs_BT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of int64 tokens (B, T)."""
        return self.lm_head(self.hidden(inputs_BT))

    def hidden(self, inputs_BT: torch.Tensor, caches: list[LayerCache] | None = None, start: int = 0) -> torch.Tensor:
        """Hidden states (B, T, D) after the final norm.

        With caches, one a layer, the tokens stand at positions `start` and on: a whole prompt from 0 on, or one token.
        """
        parts = self.transformer
        x_BTD = parts.wte(inputs_BT) + parts.wpe.weight[start : start + inputs_BT.shape[1]]
        for i, block in enumerate(parts.h):
            x_BTD = block(x_BTD, caches[i] if caches else None, start)
        return parts.ln_f(x_BTD)

    def named(self, of: Callable[[nn.Parameter], Any] = lambda p: p) -> dict[str, torch.Tensor]:
        """The parameters, or what `of` makes of them, by GPT-2's names, with views (D, F) of the matrices (F, D) that
        are (D, F) there; a tied head is there once, as the embedding."""
        tensors = {name: of(p) for name, p in self.named_parameters()}
        return {name: x.T if ".c_" in name and x.ndim == 2 else x for name, x in tensors.items()}

    def empty_caches(self, batch: int, length: int) -> list[LayerCache]:
        """A cache a layer, for `batch` sequences of up to `length` tokens, in the weights' dtype and where they are."""
        shape = (batch, self.config.n_head, length, self.config.head_dim)
        new = self.lm_head.weight.new_empty
        return [(new(shape), new(shape)) for _ in self.transformer.h]


@torch.inference_mode()
def generate(
    model: TorchGPT, prompts_BT: torch.Tensor, new: int, top_k: int, cached: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The next token of each sequence, int64 (B,), and the logits (B, V) that it was chosen by, `new` times.

    prompts_BT: int64. top_k: draw from so many, or 0 for the most probable. cached: keep keys and values, or read the
    whole sequence for every token. Nothing waits for the device.
    """
    B, T = prompts_BT.shape
    caches = model.empty_caches(B, T + new) if cached else None
    inputs_BT, start = prompts_BT, 0
    for _ in range(new):
        logits_BV = model.lm_head(model.hidden(inputs_BT, caches, start)[:, -1])
        if top_k:
            logits_BK, tokens_BK = logits_BV.topk(top_k)
            next_B1 = tokens_BK.gather(1, torch.multinomial(logits_BK.float().softmax(dim=-1), 1))
        else:
            next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        yield next_B1[:, 0], logits_BV
        if cached:
            start, inputs_BT = start + inputs_BT.shape[1], next_B1
        else:
            inputs_BT = torch.cat([inputs_BT, next_B1], dim=1)


def mean_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of int64 tokens (B, T + 1)."""
    logits_BTV = model(tokens[:, :-1])
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten())


def make_adamw(model: nn.Module, c: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW, with decay on matrices and embeddings."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)


def names_of(path: str, c: ModelConfig) -> list[str]:
    """GPT-2's names for an array of ours: one a layer, or one."""
    (name,) = FAMILY.tensors[path].names
    return [name.format(i=i) for i in range(c.n_layer)] if path.startswith("layers/") else [name]


def to_theirs(arrays: Arrays, c: ModelConfig) -> dict[str, torch.Tensor]:
    """Our arrays by GPT-2's names, laid out as gpt_jax exports them."""
    theirs = {}
    for path, array in arrays.items():
        names = names_of(path, c)
        for name, part in zip(names, array if "layers/" in path else [array], strict=True):
            (x,) = FAMILY.tensors[path].write(part, c)
            theirs[name] = torch.tensor(np.ascontiguousarray(x))
    return theirs


def to_ours(tensors: dict[str, torch.Tensor], c: ModelConfig) -> Arrays:
    """The other direction; float32."""
    theirs = {name: x.detach().float().cpu().numpy() for name, x in tensors.items()}
    ours = {}
    for path, layout in FAMILY.tensors.items():
        parts = []
        for x in (theirs[name] for name in names_of(path, c) if name in theirs):

            def read(_: str, out: np.ndarray | None = None, x: np.ndarray = x) -> np.ndarray:
                if out is not None:
                    out[...] = x
                return x

            parts.append(np.empty(x.shape, np.float32))
            layout.fill(parts[-1], read, c)
        if parts:
            ours[path] = np.stack(parts) if "layers/" in path else parts[0]
    return ours
