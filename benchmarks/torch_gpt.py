"""The same GPT in PyTorch, eager: what the training step is compared with."""

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (as everybody calls it)

from gpt_jax.config import ModelConfig, OptimizerConfig


class Block(nn.Module):
    """Pre-layer-norm attention and feed-forward layers, as in gpt_jax.model.gpt.Block."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.n_head = c.n_head
        self.norm_1 = nn.LayerNorm(c.d_model, bias=c.bias)
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model, bias=c.bias)
        self.out = nn.Linear(c.d_model, c.d_model, bias=c.bias)
        self.norm_2 = nn.LayerNorm(c.d_model, bias=c.bias)
        self.up = nn.Linear(c.d_model, c.ff_dim, bias=c.bias)
        self.down = nn.Linear(c.ff_dim, c.d_model, bias=c.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (x.view(B, T, self.n_head, -1).transpose(1, 2) for x in self.qkv(self.norm_1(x_BTD)).split(D, dim=-1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attention.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD)), approximate="tanh"))


class TorchGPT(nn.Module):
    """GPT-2 with a tied head."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.positions = nn.Embedding(c.context_length, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.final_norm = nn.LayerNorm(c.d_model, bias=c.bias)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds_to_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * c.n_layer) if adds_to_residual else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats of int64 tokens (B, T + 1)."""
        inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
        x_BTD = self.tokens(inputs_BT) + self.positions.weight[: inputs_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.final_norm(x_BTD) @ self.tokens.weight.T
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def make_adamw(model: TorchGPT, c: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW, with decay on matrices and embeddings."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)


def train_step(
    model: TorchGPT, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, c: OptimizerConfig
) -> torch.Tensor:
    """One optimizer step; returns the loss."""
    loss = model(tokens)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
    optimizer.step()
    return loss
