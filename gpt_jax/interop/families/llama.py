"""Llama 2 and 3, SmolLM2, TinyLlama, Yi: rotary positions, RMS norms, SwiGLU, grouped queries, no biases."""

from gpt_jax.config import ModelConfig
from gpt_jax.interop.families.family import Family, Settings
from gpt_jax.interop.layout import Embedding, Qkv, Same, Transposed


def read_biases(settings: Settings) -> Settings:
    """The linear layers with biases; most models have none."""
    attention = ("qkv", "out") if settings.get("attention_bias") else ()
    return {"biases": attention + (("mlp",) if settings.get("mlp_bias") else ())}


def write_biases(config: ModelConfig) -> Settings:
    """The inverse of `read_biases`."""
    return {"attention_bias": config.has_bias("out"), "mlp_bias": config.has_bias("mlp")}


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    activation=("hidden_act", "silu"),
    settings={
        "vocab_size": ("vocab_size", 32000),
        "max_position_embeddings": ("context_length", 2048),
        "hidden_size": ("d_model", 4096),
        "num_hidden_layers": ("n_layer", 32),
        "num_attention_heads": ("n_head", 32),
        "num_key_value_heads": ("n_kv_head", None),
        "head_dim": ("d_head", None),
        "intermediate_size": ("d_ff", 11008),
        "rms_norm_eps": ("norm_eps", 1e-6),
        "tie_word_embeddings": ("tied_head", False),
    },
    shared={"positions": "rotary", "norm": "rms", "gated": True, "bias": False},
    tensors={
        "tokens_VD": Embedding("model.embed_tokens.weight"),
        "head_VD": Embedding("lm_head.weight"),
        "layers/norm_1/scale": Same("model.layers.{i}.input_layernorm.weight"),
        "layers/attention/qkv/kernel": Qkv(
            "model.layers.{i}.self_attn.q_proj.weight",
            "model.layers.{i}.self_attn.k_proj.weight",
            "model.layers.{i}.self_attn.v_proj.weight",
        ),
        "layers/attention/qkv/bias": Qkv(
            "model.layers.{i}.self_attn.q_proj.bias",
            "model.layers.{i}.self_attn.k_proj.bias",
            "model.layers.{i}.self_attn.v_proj.bias",
        ),
        "layers/attention/out/kernel": Transposed("model.layers.{i}.self_attn.o_proj.weight"),
        "layers/attention/out/bias": Same("model.layers.{i}.self_attn.o_proj.bias"),
        "layers/norm_2/scale": Same("model.layers.{i}.post_attention_layernorm.weight"),
        "layers/mlp/gate/kernel": Transposed("model.layers.{i}.mlp.gate_proj.weight"),
        "layers/mlp/gate/bias": Same("model.layers.{i}.mlp.gate_proj.bias"),
        "layers/mlp/up/kernel": Transposed("model.layers.{i}.mlp.up_proj.weight"),
        "layers/mlp/up/bias": Same("model.layers.{i}.mlp.up_proj.bias"),
        "layers/mlp/down/kernel": Transposed("model.layers.{i}.mlp.down_proj.weight"),
        "layers/mlp/down/bias": Same("model.layers.{i}.mlp.down_proj.bias"),
        "final_norm/scale": Same("model.norm.weight"),
    },
    prefix="model.",
    not_weights=(r".*\.rotary_emb\.inv_freq",),
    read_more=read_biases,
    write_more=write_biases,
)
