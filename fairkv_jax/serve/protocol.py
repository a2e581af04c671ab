"""Request bodies, which are validated strictly; optional fields have OpenAI's defaults.

Unknown fields are ignored. Known but unsupported fields that would change the output are rejected.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fairkv_jax.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    SamplingParams,
    StructuredOutputsParams,
)

MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1000


class Body(BaseModel):
    """Values are not converted: the string "1" and NaN are not accepted as numbers."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class NotServed(ValueError):
    """A request sets a known field that is not supported."""

    def __init__(self, field: str, name: str | None = None):
        self.field = field
        super().__init__(f"{name or field} is not supported by this server: leave it out")


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's extension: every chunk reports the usage of its choice so far."""


class JsonSchema(Body):
    """A named JSON schema; the name is ignored."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's field that asks for JSON output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_is_announced(self) -> "ResponseFormat":
        if self.type == "json_schema" and (
            not self.json_schema or self.json_schema.schema_ is None
        ):
            raise ValueError("the type json_schema needs json_schema with a name and a schema")
        return self

    @property
    def constraint(self) -> dict[str, Any]:
        """Returns the arguments of `StructuredOutputsParams`; empty for text."""
        if self.type == "json_object":
            return {"json_object": True}
        return {"json": self.json_schema.schema_} if self.json_schema else {}


class StructuredOutputs(Body):
    """vLLM's field that constrains the output; exactly one member is set."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_served(self) -> "StructuredOutputs":
        for name in ("structural_tag", "whitespace_pattern"):
            if getattr(self, name) is not None:
                raise NotServed("structured_outputs", f"structured_outputs.{name}")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if getattr(self, name):
                raise NotServed("structured_outputs", f"structured_outputs.{name}")
        return self

    @property
    def constraint(self) -> dict[str, Any]:
        """Returns the arguments of `StructuredOutputsParams`."""
        names = ("regex", "choice", "grammar", "json_object")
        return {"json": self.json_} | {name: getattr(self, name) for name in names}


class GenerationBody(Body):
    """Fields that completions and chat completions share."""

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
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    kv_budget: int | None = Field(None, ge=1)
    """Kept tokens per head on average, at most the server's budget."""
    kv_ratio: float | None = Field(None, ge=0, lt=1)
    """Removed fraction of the prompt, instead of a budget; not less than the server removes."""
    kv_policy: str | None = None
    prefix_id: str | None = None
    """A cached prefix, whose tokens come before those of this request; see /v1/prefixes."""

    guided_whitespace_pattern: str | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "guided_whitespace_pattern": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
        "length_penalty": (1.0,),
    }
    """Unsupported fields, with the values that have no effect and are accepted."""

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
        """Limits stop strings, because every decode step searches for them."""
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or any(len(each) > MAX_STOP_CHARACTERS for each in stops):
            raise ValueError(
                f"at most {MAX_STOPS} stop strings of {MAX_STOP_CHARACTERS} characters are "
                "accepted: send fewer or shorter ones"
            )
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids_as_keys(cls, logit_bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in logit_bias or ():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError('its keys must be token ids, for example {"50256": -100}')
        if logit_bias and len(logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"at most {MAX_LOGIT_BIAS} tokens are accepted, got {len(logit_bias)}")
        return logit_bias

    @field_validator("prompt_logprobs")
    @classmethod
    def _few_prompt_logprobs(cls, count: int | None) -> int | None:
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise ValueError(f"it must be between 0 and {MAX_LOGPROBS}, got {count}")
        return count

    @model_validator(mode="after")
    def _no_stream_of_prompt_logprobs(self) -> "GenerationBody":
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("`prompt_logprobs` are not available when `stream=True`")
        return self

    @model_validator(mode="after")
    def _check_ranges(self) -> "GenerationBody":
        self.sampling_params()  # SamplingParams checks the ranges of its fields.
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self) -> SamplingParams:
        """Returns the engine's parameters; omitted fields have `SamplingParams`' defaults."""
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        if self.logit_bias is not None:
            given["logit_bias"] = {int(key): bias for key, bias in self.logit_bias.items()}
        return SamplingParams(
            max_tokens=self.output_limit,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            structured_outputs=self.structured_outputs_params(),
            **{name: value for name, value in given.items() if value is not None},
        )

    @property
    def constraining_fields(self) -> list[str]:
        """The names of the fields that are set and constrain the output."""
        formatted = self.response_format is not None and self.response_format.type != "text"
        named = ("structured_outputs", *_GUIDED_FIELDS)
        given = [name for name in named if getattr(self, name) is not None]
        return [*(["response_format"] if formatted else []), *given]

    def structured_outputs_params(self) -> StructuredOutputsParams | None:
        """Returns the constraint on the output, whichever field sets it."""
        fields = self.constraining_fields
        if not fields:
            return None
        if len(fields) > 1:
            raise ValueError(
                f"only one field may constrain the output, got {', '.join(fields)}: leave out "
                "the others"
            )
        value = getattr(self, fields[0])
        if fields[0] in _GUIDED_FIELDS:
            return StructuredOutputsParams(**{_GUIDED_FIELDS[fields[0]]: value})
        return StructuredOutputsParams(**value.constraint)

    @property
    def output_limit(self) -> int | None:
        """Maximum number of tokens to generate; None: as many as the context holds."""
        return self.max_tokens

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Like `num_logprobs`, for the prompt's tokens."""
        return self.prompt_logprobs

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Most likely tokens to report beside the sampled one; None: no log-probabilities."""


_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)

_GUIDED_FIELDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older field names and the `StructuredOutputsParams` fields they stand for."""


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0, le=2**31 - 1)
    logprobs: int | None = None
    echo: bool | None = None

    suffix: str | None = None
    best_of: int | None = None

    NEUTRAL = {**GenerationBody.NEUTRAL, "suffix": ("",), "best_of": (1,)}

    @model_validator(mode="after")
    def _something_to_answer(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, got 0: it may be 0 only with echo")
        return self

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, prompt: Any) -> Any:
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or a list of token ids, from any of the four accepted forms."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [item for item in self.prompt if isinstance(item, int)]
        return [token_ids] if token_ids else [i for i in self.prompt if not isinstance(i, int)]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation; only text content is supported."""

    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart] | None = None
    name: str | None = None

    def as_dict(self) -> dict[str, str]:
        """Returns the message as chat templates expect it, with parts joined by line breaks."""
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

    echo: bool | None = None
    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None

    NEUTRAL = {**GenerationBody.NEUTRAL, "echo": (False,), "tools": ([],), "functions": ([],)}

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
