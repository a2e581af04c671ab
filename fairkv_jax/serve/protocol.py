"""Bodies of completions and chat completions; optional fields have OpenAI's defaults."""

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, WithJsonSchema, field_validator, model_validator

from fairkv_jax.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    SamplingParams,
    StructuredOutputsParams,
)
from fairkv_jax.serve import unsupported
from fairkv_jax.serve.access import WELL_FORMED_ID
from fairkv_jax.serve.body import Body, Integers, OptionalInteger
from fairkv_jax.serve.logprobs import TokenNames
from fairkv_jax.serve.messages import Message, TemplateOptions
from fairkv_jax.serve.output_format import ResponseFormat, StructuredOutputs, schema_for_output
from fairkv_jax.serve.tool_calls.tools import ToolOptions
from fairkv_jax.tokenizer import Tokenizer

MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1000

_SOME_TEXT = {"type": "string", "minLength": 1}
_SOME_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_A_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}

Prompt = Annotated[
    str | list[str] | Integers | list[Integers],
    WithJsonSchema(
        {
            "anyOf": [
                _SOME_TEXT,
                {"type": "array", "items": _SOME_TEXT, "minItems": 1},
                _SOME_TOKENS,
                {"type": "array", "items": _SOME_TOKENS, "minItems": 1},
            ]
        }
    ),
]
Stop = Annotated[
    str | list[str] | None,
    WithJsonSchema(
        {
            "anyOf": [
                _A_STOP,
                {"type": "array", "items": _A_STOP, "maxItems": MAX_STOPS},
                {"type": "null"},
            ]
        }
    ),
]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's extension: every chunk reports the usage of its choice so far."""


class GenerationBody(Body):
    """Fields that completions and chat completions share."""

    REFUSED = unsupported.GENERATION

    model: str | None = None
    request_id: str | None = Field(None, pattern=f"^{WELL_FORMED_ID}$")
    """The id of the request, which `id` of the response ends with. The header X-Request-Id goes
    first."""
    n: OptionalInteger = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: OptionalInteger = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: OptionalInteger = None
    min_p: float | None = None
    seed: OptionalInteger = None
    stop: Stop = None
    """Texts that end the output. Every step searches for all of them."""
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: OptionalInteger = None
    prompt_logprobs: OptionalInteger = None
    return_token_ids: bool | None = None
    """Whether the response has `prompt_token_ids` and `token_ids`."""
    return_tokens_as_token_ids: bool | None = None
    """Whether log-probabilities name tokens "token_id:5" instead of by their texts."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    kv_budget: OptionalInteger = Field(None, ge=1)
    """Kept tokens per head on average, at most the server's budget."""
    kv_ratio: float | None = Field(None, ge=0, lt=1)
    """Removed fraction of the prompt, instead of a budget; not less than the server removes."""
    kv_policy: str | None = None
    prefix_id: str | None = None
    """A cached prefix, whose tokens come before those of this request; see /v1/prefixes."""
    cache_salt: str | None = Field(None, min_length=1)
    """vLLM's field: only requests with the same salt share what is cached without being named."""

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
        if fields[0] == "guided_json":
            return StructuredOutputsParams(json=schema_for_output(value))
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


def token_names(body: GenerationBody, tokenizer: Tokenizer) -> TokenNames:
    """Returns how the response to a request names tokens."""
    return TokenNames(
        tokenizer,
        as_ids=bool(body.return_tokens_as_token_ids),
        skips_special_tokens=body.skip_special_tokens is not False,
    )


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

    REFUSED = unsupported.COMPLETION

    prompt: Prompt
    """A text, token ids, or a list of either. Every prompt has `n` choices; together they may be
    as many as the server runs and queues, see --max-num-seqs and --max-num-queued-reqs."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds special tokens, such as BOS, to texts. Default: yes, unless they
    continue a prefix."""
    max_tokens: OptionalInteger = Field(16, ge=0, le=2**31 - 1)
    logprobs: OptionalInteger = None
    echo: bool | None = None

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
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds special tokens to texts."""
        return (
            self.prefix_id is None if self.add_special_tokens is None else self.add_special_tokens
        )

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


class ChatBody(GenerationBody, TemplateOptions, ToolOptions):
    """POST /v1/chat/completions."""

    REFUSED = unsupported.CHAT

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: OptionalInteger = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: OptionalInteger = Field(None, ge=0, le=MAX_LOGPROBS)
    include_reasoning: bool | None = None
    """Whether the message has the reasoning that --reasoning-parser finds. Default: yes."""

    _reasoning: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set logprobs to true")
        return self

    @property
    def constraining_fields(self) -> list[str]:
        """The names of the fields that constrain the output.

        Where a tool must be called, `response_format` is for the answer that follows later.
        """
        fields = super().constraining_fields
        if self.calls_schema is None:
            return fields
        return ["tool_choice", *(name for name in fields if name != "response_format")]

    def structured_outputs_params(self) -> StructuredOutputsParams | None:
        if self.calls_schema is not None and self.constraining_fields == ["tool_choice"]:
            params = StructuredOutputsParams(json=self.calls_schema)
        else:
            params = super().structured_outputs_params()
        return params and replace(params, reasoning=self._reasoning)

    def after_reasoning(self, reasoning: str | None) -> "ChatBody":
        """Returns the request, whose constraint lets the model reason first.

        Args:
            reasoning: see `StructuredOutputsParams.reasoning`.
        """
        body = self.model_copy()
        body._reasoning = reasoning
        return body

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
