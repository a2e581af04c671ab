"""Qwen 2 and 2.5: biases of queries, keys and values."""

from fairkv_jax.checkpoint.families.family import Family

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
    qkv_bias=True,
    gguf_architecture="qwen2",
)
