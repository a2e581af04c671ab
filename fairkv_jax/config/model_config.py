"""The shape of a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer with rotary positions and grouped-query attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen 2)."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head before RoPE (Qwen 3)."""
    rope_divisors: tuple[float, ...] | None = None
    """Divisors of the H/2 rotary frequencies (Llama 3.1); None: the frequencies are unchanged."""
    activation: str = "silu"
    """The activation of the MLP's gate: "silu", or "gelu_tanh" (Gemma)."""
    norm_offset: float = 0.0
    """Added to the weights of norms before they scale (1 in Gemma)."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size (Gemma)."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(
                f"{len(self.rope_divisors)} divisors of rotary frequencies do not fit the "
                f"{self.head_dim // 2} frequencies of head_dim {self.head_dim}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.num_heads // self.num_kv_heads
