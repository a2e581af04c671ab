"""Llama 2 and 3, SmolLM2, and the many models published in their form."""

from fairkv_jax.checkpoint.families.family import Family

LLAMA = Family(
    name="llama",
    hf_class="LlamaForCausalLM",
    defaults={"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    required={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_type": ("default", "llama3"),
    },
    gguf_architecture="llama",
    gguf_interleaves=True,
)
