"""PyTorch's contestants in decoding: our PyTorch GPT, with or without a cache, and Hugging Face's GPT-2."""

from typing import Any

import torch

from benchmarks.decode import prompts
from benchmarks.machine import torch_device
from benchmarks.theirs import HuggingFace, read_arrays
from benchmarks.torch_gpt import Arrays, TorchGPT, generate, load
from benchmarks.worker import forget_peak, peak_memory, resident_memory, seconds_of
from gpt_jax.config import config_from_dict


class Decoding:
    """Answers prompts with our PyTorch GPT."""

    def __init__(self, model: dict[str, Any], parameters: str, cached: bool = True) -> None:
        """model: a ModelConfig's fields, in whose dtype the weights are held; parameters: the file with ours."""
        self.config, self.cached = config_from_dict({"model": model}, "a benchmark").model, cached
        self.device, _ = torch_device()
        self.libraries = resident_memory()
        made = self.make_model(read_arrays(parameters))
        self.model = made.to(self.device, getattr(torch, self.config.dtype)).eval()

    def make_model(self, arrays: Arrays) -> Any:
        """The model with these parameters, float32 on the CPU."""
        model = TorchGPT(self.config)
        load(model, arrays)
        return model

    def ready(self) -> None:
        """What was needed to load the weights and is not needed any more is given back."""
        forget_peak()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def prompts(self, batch: int, prompt: int) -> torch.Tensor:
        """The prompts on the device, int64 (B, T)."""
        return torch.from_numpy(prompts(self.config.vocab_size, batch, prompt)).to(self.device).long()

    def answer(self, batch: int, prompt: int, new: int, top_k: int) -> torch.Tensor:
        """New tokens, int64 (B, new), on the host."""
        stream = generate(self.model, self.prompts(batch, prompt), new, top_k, self.cached)
        return torch.stack([tokens_B for tokens_B, _ in stream], dim=1).cpu()

    def logits(self, batch: int, prompt: int, new: int) -> list[torch.Tensor]:
        """The logits (B, V) of each token of a greedy answer."""
        stream = generate(self.model, self.prompts(batch, prompt), new, 0, self.cached)
        return [logits_BV for _, logits_BV in stream]

    def greedy(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """The most probable tokens and their log-probabilities, as lists."""
        tokens_BN = self.answer(batch, prompt, new, 0)
        logprobs = [
            logits_BV.float().log_softmax(dim=-1).cpu().gather(1, tokens_BN[:, i, None])
            for i, logits_BV in enumerate(self.logits(batch, prompt, new))
        ]
        return {"tokens": tokens_BN.tolist(), "logprobs": torch.cat(logprobs, dim=1).tolist()}

    def seconds(self, batch: int, prompt: int, new: int, top_k: int) -> float:
        """Seconds of an answer, from the prompts to the tokens on the host."""
        return seconds_of(lambda: self.answer(batch, prompt, new, top_k))

    def peak_bytes(self) -> int:
        """Most memory that was in use so far."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_memory()

    def memory(self, batch: int, prompt: int, new: int) -> dict[str, int]:
        """Bytes, by kind: the process with its libraries, before there was any array; weights and the cache of so many
        tokens."""
        c = self.config
        weights = [*self.model.parameters()]
        cache = 2 * c.n_layer * c.d_model * batch * (prompt + new) * weights[0].element_size() if self.cached else 0
        return {"libraries": self.libraries, "state": sum(x.nbytes for x in weights) + cache}


class HuggingFaceDecoding(Decoding):
    """The same with transformers' `generate`, its cache and its fused attention."""

    def make_model(self, arrays: Arrays) -> Any:
        model = HuggingFace(self.config, arrays).gpt2
        model.generation_config.eos_token_id = None  # Every answer is as long as was asked for.
        return model

    def generate(self, batch: int, prompt: int, new: int, **how: Any) -> Any:
        """What `generate` returns for the prompts."""
        tokens_BT = self.prompts(batch, prompt)
        mask_BT = torch.ones_like(tokens_BT)
        with torch.inference_mode():
            return self.model.generate(tokens_BT, attention_mask=mask_BT, max_new_tokens=new, pad_token_id=0, **how)

    def answer(self, batch: int, prompt: int, new: int, top_k: int) -> torch.Tensor:
        how = {"do_sample": True, "top_k": top_k} if top_k else {"do_sample": False}
        return self.generate(batch, prompt, new, **how)[:, prompt:].cpu()

    def logits(self, batch: int, prompt: int, new: int) -> list[torch.Tensor]:
        how = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return list(self.generate(batch, prompt, new, **how).logits)
