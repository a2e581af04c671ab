"""What clients of OpenAI and vLLM may send and this server does not support.

Whatever would change an answer is refused by name, with the reason that stands here; fields that
cannot change an answer are accepted without effect. docs/server.md is written from these tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """A field that is refused."""

    reason: str
    neutral: tuple[Any, ...] = ()
    """Values, besides null, that have no effect and are accepted."""

    def accepts(self, value: Any) -> bool:
        """Returns whether a value has no effect; true and false are not numbers."""
        return value is None or any(
            value == other and isinstance(value, bool) == isinstance(other, bool)
            for other in self.neutral
        )

    @property
    def way_out(self) -> str:
        return "leave it out"


_TEXT_ONLY = "it generates text only"
_NO_MEDIA = "it reads text only"
_ONE_ENGINE = "prompts are read and answered by one engine"
_SAMPLING_STEP = "sampling has no such step"

GENERATION: Mapping[str, Refused] = {
    "allowed_token_ids": Refused("use logit_bias or structured_outputs"),
    "bad_words": Refused("use logit_bias", ([],)),
    "best_of": Refused("use n and logprobs", (1,)),
    "early_stopping": Refused("there is no beam search", (False,)),
    "ec_transfer_params": Refused(_ONE_ENGINE),
    "guided_decoding_backend": Refused("it always uses llguidance", ("auto", "guidance")),
    "guided_whitespace_pattern": Refused("use structured_outputs.disable_any_whitespace"),
    "kv_transfer_params": Refused(_ONE_ENGINE),
    "length_penalty": Refused("there is no beam search", (1,)),
    "logits_processors": Refused("requests cannot bring code", ([],)),
    "logprob_token_ids": Refused("use logprobs, for the most likely tokens"),
    "priority": Refused("clients take turns; there are no priorities", (0,)),
    "repetition_detection": Refused("use stop, or repetition_penalty"),
    "return_mm_kwargs": Refused(_NO_MEDIA, (True, False)),
    "return_token_offsets": Refused("use logprobs, whose text_offset tells them", (False,)),
    "routed_experts_prompt_start": Refused("routed experts are not reported", (0,)),
    "service_tier": Refused("there is one service tier", ("auto", "default")),
    "spaces_between_special_tokens": Refused(
        "tokens are joined without additional spaces", (True,)
    ),
    "store": Refused("answers are not stored", (False,)),
    "stream_interval": Refused("every step's tokens are sent as they come", (1,)),
    "thinking_token_budget": Refused("use max_tokens", (-1,)),
    "truncate_prompt_tokens": Refused("send a shorter prompt, or a kv_budget"),
    "truncation_side": Refused("prompts are not truncated"),
    "use_beam_search": Refused("there is no beam search", (False,)),
    "vllm_xargs": Refused("there are no extensions that read it", ({},)),
    "watermarking": Refused(_SAMPLING_STEP, (False,)),
}
"""Fields of completions and of chat completions."""

COMPLETION: Mapping[str, Refused] = GENERATION | {
    "prompt_embeds": Refused("send the prompt as text or token ids"),
    "suffix": Refused("it continues prompts and fills no gaps", ("",)),
}

TEMPLATE: Mapping[str, Refused] = {
    "chat_template": Refused("requests cannot bring templates, which are code"),
    "media_io_kwargs": Refused(_NO_MEDIA, ({},)),
    "mm_processor_kwargs": Refused(_NO_MEDIA, ({},)),
}
"""Fields of everything that is rendered with the chat template."""

CHAT: Mapping[str, Refused] = (
    GENERATION
    | TEMPLATE
    | {
        "audio": Refused(_TEXT_ONLY),
        "echo": Refused("use continue_final_message, and prepend the message", (False,)),
        "function_call": Refused("use tool_choice", ("none",)),
        "functions": Refused("use tools", ([],)),
        "modalities": Refused(_TEXT_ONLY, (["text"],)),
        "moderation": Refused("answers are not moderated"),
        "return_prompt_text": Refused("use /tokenize and /detokenize", (False,)),
        "verbosity": Refused("ask for it in the prompt", ("medium",)),
        "web_search_options": Refused("it has no web search"),
    }
)

MESSAGE: Mapping[str, Refused] = {
    "audio": Refused(_NO_MEDIA),
    "function_call": Refused("use tool_calls"),
    "refusal": Refused("use content"),
    "task": Refused("no supported model reads it"),
    "tools": Refused("use the request's tools", ([],)),
}

STRUCTURED_OUTPUTS: Mapping[str, Refused] = {
    "structural_tag": Refused("use grammar"),
    "whitespace_pattern": Refused("use disable_any_whitespace"),
}

PATHS: Mapping[str, str] = {
    "/classify": "it generates text, and has no classifier",
    "/inference/v1/generate": "prompts and outputs are text or token ids of completions",
    "/pooling": "it generates text, and has no embeddings",
    "/rerank": "it generates text, and has no scores",
    "/score": "it generates text, and has no scores",
    "/v1/assistants": "conversations are not stored",
    "/v1/audio": _TEXT_ONLY,
    "/v1/batches": "requests are answered at once",
    "/v1/conversations": "conversations are not stored",
    "/v1/embeddings": "it generates text, and has no embeddings",
    "/v1/files": "files are not stored",
    "/v1/fine_tuning": "models are not trained",
    "/v1/images": _TEXT_ONLY,
    "/v1/messages": "Anthropic's API is not served",
    "/v1/moderations": "it generates text, and moderates none",
    "/v1/realtime": _TEXT_ONLY,
    "/v1/rerank": "it generates text, and has no scores",
    "/v1/responses": "conversations are not stored",
    "/v1/score": "it generates text, and has no scores",
    "/v1/threads": "conversations are not stored",
    "/v1/uploads": "files are not stored",
    "/v1/vector_stores": "files are not stored",
    "/v1/videos": _TEXT_ONLY,
    "/v2/rerank": "it generates text, and has no scores",
}
"""Paths of OpenAI's and vLLM's other APIs. They are refused with a 400 that says why."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "include_obfuscation": "pads chunks against observers, which does not change the answer",
    "metadata": "labels for stored answers, which do not change the answer",
    "prediction": "a hint that makes other servers faster, which does not change the answer",
    "prompt_cache_key": "a hint for routing, which does not change the answer",
    "prompt_cache_options": "a hint for caching, which does not change the answer",
    "prompt_cache_retention": "a hint for caching, which does not change the answer",
    "safety_identifier": "names the user, which does not change the answer",
    "session_id": "names the conversation, which does not change the answer",
    "user": "names the user, which does not change the answer",
}
"""Fields of completions and chat completions that are accepted and cannot change the answer."""
