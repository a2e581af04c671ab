"""Mistral 7B and Mistral Small: a head width of its own, and attention to a sliding window.

GGUF files of this family say "llama". Within the window sliding attention is full attention, so
the window bounds the context.
"""

from fairkv_jax.checkpoint.families.family import Family

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
