"""Qwen3: Qwen2 with norms of the query and key heads in place of biases."""

from dataclasses import replace

from gpt_jax.interop.families import llama, qwen2
from gpt_jax.interop.layout import Same

FAMILY = replace(
    qwen2.FAMILY,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    settings={**qwen2.FAMILY.settings, "head_dim": ("d_head", 128)},
    shared={**llama.FAMILY.shared, "qk_norm": True},
    read_more=lambda theirs: qwen2.read_window(theirs) | llama.read_biases(theirs),
    write_more=lambda config: qwen2.write_window(config) | llama.write_biases(config),
    tensors={
        **llama.FAMILY.tensors,
        "layers/attention/q_norm/scale": Same("model.layers.{i}.self_attn.q_norm.weight"),
        "layers/attention/k_norm/scale": Same("model.layers.{i}.self_attn.k_norm.weight"),
    },
)
