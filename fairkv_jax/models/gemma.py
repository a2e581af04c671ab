"""Gemma 1: norms scale by 1 + w, the MLP's gate is GELU, embeddings are scaled by sqrt(D).

GELU is the tanh approximation whatever config.json says under "hidden_act": the first files say
"gelu", and were trained and published with the approximation. GGUF files hold 1 + w.
"""

from fairkv_jax.models.family import Family

GEMMA = Family(
    name="gemma",
    hf_class="GemmaForCausalLM",
    defaults={
        "head_dim": 256,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    required={
        "hidden_act": ("gelu", "gelu_pytorch_tanh"),
        "hidden_activation": (None, "gelu_pytorch_tanh"),
        "attention_bias": (False,),
        "rope_type": ("default",),
    },
    model_options={"activation": "gelu_tanh", "norm_offset": 1.0, "scale_embeddings": True},
    gguf_architecture="gemma",
)
