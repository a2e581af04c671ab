"""Qwen 3, dense: a head width of its own, and norms of query and key heads in place of biases."""

from fairkv_jax.checkpoint.families.family import Family

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
    qk_norm=True,
    gguf_architecture="qwen3",
)
