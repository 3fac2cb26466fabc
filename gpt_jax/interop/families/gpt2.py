"""GPT-2, and the Chinese models of its architecture: learned positions, layer norms, GELU, biases everywhere."""

from gpt_jax.interop.families.family import Family
from gpt_jax.interop.layout import Embedding, FusedQkv, Positions, Same

FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    activation=("activation_function", "gelu_new"),
    settings={
        "vocab_size": ("vocab_size", 50257),
        "n_positions": ("context_length", 1024),
        "n_embd": ("d_model", 768),
        "n_layer": ("n_layer", 12),
        "n_head": ("n_head", 12),
        "n_inner": ("d_ff", None),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "tie_word_embeddings": ("tied_head", True),
    },
    shared={"positions": "learned", "norm": "layer", "bias": True},
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    tensors={
        "tokens_VD": Embedding("transformer.wte.weight"),
        "positions_TD": Positions("transformer.wpe.weight"),
        "head_VD": Embedding("lm_head.weight"),
        "layers/norm_1/scale": Same("transformer.h.{i}.ln_1.weight"),
        "layers/norm_1/bias": Same("transformer.h.{i}.ln_1.bias"),
        "layers/attention/qkv/kernel": FusedQkv("transformer.h.{i}.attn.c_attn.weight"),
        "layers/attention/qkv/bias": FusedQkv("transformer.h.{i}.attn.c_attn.bias"),
        "layers/attention/out/kernel": Same("transformer.h.{i}.attn.c_proj.weight"),
        "layers/attention/out/bias": Same("transformer.h.{i}.attn.c_proj.bias"),
        "layers/norm_2/scale": Same("transformer.h.{i}.ln_2.weight"),
        "layers/norm_2/bias": Same("transformer.h.{i}.ln_2.bias"),
        "layers/mlp/up/kernel": Same("transformer.h.{i}.mlp.c_fc.weight"),
        "layers/mlp/up/bias": Same("transformer.h.{i}.mlp.c_fc.bias"),
        "layers/mlp/down/kernel": Same("transformer.h.{i}.mlp.c_proj.weight"),
        "layers/mlp/down/bias": Same("transformer.h.{i}.mlp.c_proj.bias"),
        "final_norm/scale": Same("transformer.ln_f.weight"),
        "final_norm/bias": Same("transformer.ln_f.bias"),
    },
    prefix="transformer.",
    not_weights=(r".*\.attn\.bias", r".*\.attn\.masked_bias"),
)
