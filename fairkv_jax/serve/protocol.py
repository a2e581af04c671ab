"""The bodies that clients send, checked strictly; what they may leave out has OpenAI's defaults.

Unknown fields are ignored, as clients send many. Known ones that would change the answer, and that
are not served, are refused: an answer that silently disregards them would be wrong.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fairkv_jax.sampling_params import MAX_LOGPROBS, SamplingParams

MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1000


class Body(BaseModel):
    """Types are taken at their word: "1" is no number and NaN none either."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class NotServed(ValueError):
    """A field that is known, and not served, asks for something."""

    def __init__(self, field: str):
        self.field = field
        super().__init__(f"{field} is not supported by this server: leave it out")


class StreamOptions(Body):
    include_usage: bool | None = None


class GenerationBody(Body):
    """What both generating endpoints take."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0.0,),
        "presence_penalty": (0.0,),
        "repetition_penalty": (1.0,),
        "logit_bias": ({},),
        "min_tokens": (0,),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "truncate_prompt_tokens": (),
        "prompt_logprobs": (),
        "use_beam_search": (False,),
        "length_penalty": (1.0,),
    }
    """Fields that are not served, with the values that ask for nothing."""

    @model_validator(mode="after")
    def _refuse_what_is_not_served(self) -> "GenerationBody":
        for name, neutral in self.NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise NotServed(name)
        return self

    @field_validator("stop")
    @classmethod
    def _few_short_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        """They are searched for at every token of everybody's step."""
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or any(len(each) > MAX_STOP_CHARACTERS for each in stops):
            raise ValueError(
                f"at most {MAX_STOPS} stop strings of {MAX_STOP_CHARACTERS} characters are "
                "taken: send fewer or shorter ones"
            )
        return stop

    @model_validator(mode="after")
    def _check_ranges(self) -> "GenerationBody":
        self.sampling_params()  # its limits are the engine's own
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self) -> SamplingParams:
        """As the engine takes them; what was not given has `SamplingParams`' defaults."""
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        return SamplingParams(
            max_tokens=self.output_limit,
            logprobs=self.num_logprobs,
            **{name: value for name, value in given.items() if value is not None},
        )

    @property
    def output_limit(self) -> int | None:
        """Most tokens to generate; None: as many as the context holds."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report beside the chosen one; None: no log-probabilities at all."""


_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, le=2**31 - 1)
    logprobs: int | None = None

    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    NEUTRAL = {**GenerationBody.NEUTRAL, "echo": (False,), "suffix": ("",), "best_of": (1,)}

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, prompt: Any) -> Any:
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, as text or as token ids, whichever of the four forms they came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [item for item in self.prompt if isinstance(item, int)]
        return [token_ids] if token_ids else [i for i in self.prompt if not isinstance(i, int)]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation; of the content, only text is served."""

    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart] | None = None
    name: str | None = None

    def as_dict(self) -> dict[str, str]:
        """As chat templates take it: parts are joined by line breaks."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None

    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None

    NEUTRAL = {**GenerationBody.NEUTRAL, "tools": ([],), "functions": ([],)}

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set logprobs to true")
        return self

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(Body):
    """POST /tokenize: either a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
