"""The model card of an export: architecture, training and results, from the files of the run."""

import json
from pathlib import Path
from typing import Any

from gpt_jax.config import Config, ModelConfig


def model_card(name: str, config: Config, records: list[dict[str, Any]], exported: ModelConfig) -> str:
    """A README.md for the hub: a header for the hub, then text. Figures that the run does not have are left out.

    records: the run's metrics up to the exported checkpoint. exported: the configuration of the exported model.
    """
    m, d, o, t = config.model, config.data, config.optimizer, config.train
    last = records[-1] if records else {}
    evaluated = [record for record in records if "val_loss" in record]
    source = ", ".join(Path(name).name for name in d.source or (d.dir,))  # Without the folders of this machine.
    method = "trained from random weights"
    if config.init_from:
        targets = ", ".join(m.lora.targets)
        adapters = f"LoRA adapters of rank {m.lora.rank} (alpha {m.lora.alpha:g}, on {targets}), merged"
        method = f"fine-tuned from {model_name(config.init_from)}, {adapters if m.lora.rank else 'all parameters'}"
    rows = {
        "parameters": f"{exported.n_params:,}",
        "architecture": f"{m.n_layer} layers, {m.n_head} heads ({m.kv_heads} for keys and values), width {m.d_model}, "
        f"context {exported.context_length}, vocabulary {m.vocab_size:,}",
        "data": source,
        "steps": f"{last['step']:,} of {t.steps:,}" if last else None,
        "tokens": f"{last['tokens']:,}" if "tokens" in last else None,
        "batch": f"{d.batch_size} sequences of {m.context_length} tokens",
        "optimizer": f"AdamW, learning rate {o.learning_rate:g} ({o.schedule}, {o.warmup_of(t.steps)} steps of "
        f"warmup), betas {o.beta1:g} and {o.beta2:g}, "
        f"weight decay {o.weight_decay:g}, gradients clipped at {o.clip_norm:g}",
        "dropout": f"{m.dropout:g}",
        "seed": str(t.seed),
        "training loss": f"{last['loss']:.4f} nats a token" if "loss" in last else None,
    }
    if evaluated:
        final = evaluated[-1]
        bits = final.get("val_bits_per_byte")
        per_byte = f", {bits:.4f} bits a byte" if bits is not None else ""
        rows["validation loss"] = f"{final['val_loss']:.4f} nats a token{per_byte}, after step {final['step']:,}"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt_jax
---

# {name}

A GPT, {method} with gpt_jax.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```
"""


def model_name(init_from: str) -> str:
    """The name of the model in `init_from`, without the folders above it: of RUN/checkpoints/STEP, that of the run."""
    path = Path(init_from)
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name
