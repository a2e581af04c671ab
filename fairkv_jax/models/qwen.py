"""Qwen 2 and 2.5, with biases of queries, keys and values, and Qwen 3, with norms of heads."""

from fairkv_jax.models.family import Family

QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    defaults={
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    required={"hidden_act": ("silu",), "rope_type": ("default",)},
    model_options={"qkv_bias": True},
    gguf_architecture="qwen2",
)

# The dense models only.
QWEN3 = Family(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    defaults={
        "head_dim": 128,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    required={"hidden_act": ("silu",), "attention_bias": (False,), "rope_type": ("default",)},
    model_options={"qk_norm": True},
    gguf_architecture="qwen3",
)
