"""Llama 2 and 3, SmolLM2, the many models published in their form, and Mistral."""

from fairkv_jax.models.family import Family

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

# Mistral 7B and Mistral Small. Their attention may slide over a window; within the window it is
# full attention, so the window bounds the context. GGUF files of this family say "llama".
MISTRAL = Family(
    name="mistral",
    hf_class="MistralForCausalLM",
    defaults={
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
    required={"hidden_act": ("silu",), "rope_type": ("default",)},
)
