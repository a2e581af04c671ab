"""The Python API for offline inference, with vLLM's names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from fairkv_jax.checkpoint.fetch import DEMO_MODEL
from fairkv_jax.config import ENGINE_CLASSES, ENGINE_OPTIONS
from fairkv_jax.engine.build import build_engine
from fairkv_jax.engine.conversation import ChatPrompt, chat_prompt, flat_message
from fairkv_jax.engine.request import (
    Boundary,
    CachedPrefix,
    Request,
    RequestOutput,
    ValidatedRequest,
)
from fairkv_jax.options import document_options, with_new_names
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.tokenizer import Tokenizer

Prompt = str | list[int]
Messages = Sequence[Mapping[str, Any]]


@document_options(*ENGINE_CLASSES)
class LLM:
    """A model for offline inference, which generates outputs for lists of prompts.

    >>> from fairkv_jax import LLM, SamplingParams
    >>> llm = LLM("SmolLM2-135M-Instruct", kv_policy="streaming_llm", kv_budget=64,
    ...           enable_prefix_caching=True)

    `progress` shows progress bars. The other options are keyword arguments:

    {options}

    Raises:
        TypeError: an option is unknown.
        ValueError: an option is out of range, or the checkpoint cannot be read.
    """

    def __init__(self, model: str | Path = DEMO_MODEL, *, progress: bool = True, **options: Any):
        options = with_new_names(options, ENGINE_OPTIONS, stacklevel=2)
        self.engine = build_engine(model, progress=progress, **options)
        self._progress = progress
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prefix_id: str | None = None,
        kv_policy: str | None = None,
        kv_budget: int | None = None,
        kv_ratio: float | None = None,
        return_kept_positions: bool = False,
    ) -> list[RequestOutput]:
        """Generates a continuation of every prompt, which is a text or a list of token ids.

        With `prefix_id`, see `cache_prefix`, the prompts are what follows that prefix. The `kv_`
        options replace the engine's, and may not keep more. Returns the outputs in the order of
        the prompts.

        >>> params = SamplingParams(max_tokens=4, ignore_eos=True)
        >>> (output,) = llm.generate(["one two three " * 30], params)
        >>> len(output.outputs[0].token_ids)
        4
        >>> float(output.kv_lengths.mean())  # kept tokens per layer and KV head
        64.0

        Raises:
            ValueError: a prompt or a parameter is invalid. All prompts are checked before any is
                run.
        """
        batch = [self._encoded(prompt, prefix_id) for prompt in _as_batch(prompts)]
        return self._run(
            self._requests(
                batch,
                sampling_params,
                return_kept_positions=return_kept_positions,
                prefix_id=prefix_id,
                kv_policy=kv_policy,
                kv_budget=kv_budget,
                kv_ratio=kv_ratio,
            )
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prefix_id: str | None = None,
        kv_policy: str | None = None,
        kv_budget: int | None = None,
        kv_ratio: float | None = None,
        return_kept_positions: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, using the model's chat template.

        With `prefix_id`, see `cache_prefix`, the messages are those that follow the prefix's. The
        `kv_` options are those of `generate`. If the engine caches prefixes, the conversation so
        far is cached for the next turn, and messages or parts of them may have a mark
        `"cache_control": {"type": "ephemeral"}`, behind which another request may go on.

        >>> (answer,) = llm.chat([{"role": "user", "content": "Hello!"}], params)
        >>> answer.finished
        True
        """
        if not isinstance(messages, Sequence) or not messages:
            raise ValueError(f"messages must be a list of messages, got {messages!r}")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        record = None if prefix_id is None else self.engine.prefixes.get(prefix_id)
        caches = self.engine.engine_config.enable_prefix_caching
        prompts: list[ChatPrompt] = [
            chat_prompt(self.engine.tokenizer, each, record, divides=caches)  # pyright: ignore[reportArgumentType]
            for each in conversations
        ]
        return self._run(
            self._requests(
                [(prompt.text, prompt.token_ids) for prompt in prompts],
                sampling_params,
                boundaries=[prompt.boundaries for prompt in prompts],
                may_continue=True,
                return_kept_positions=return_kept_positions,
                prefix_id=prefix_id,
                kv_policy=kv_policy,
                kv_budget=kv_budget,
                kv_ratio=kv_ratio,
            )
        )

    def cache_prefix(
        self,
        prompt: Prompt | Messages,
        *,
        kv_policy: str | None = None,
        kv_budget: int | None = None,
        kv_ratio: float | None = None,
        require_query_agnostic: bool = True,
    ) -> CachedPrefix:
        """Reads and compresses the beginning of prompts once, for any number of requests.

        >>> document = llm.cache_prefix("one two three " * 30)
        >>> (answer,) = llm.generate(["Question: what follows?"], params, prefix_id=document.id)
        >>> answer.num_cached_tokens == document.num_tokens
        True

        It remains in the KV cache until its pages are needed, and is then computed again when a
        request needs it. An equal prefix is computed once.

        Args:
            prompt: A text, token ids, or messages of a conversation.
            kv_policy: Replaces the engine's; so do the following.
            require_query_agnostic: Refuse policies that choose by the end of the prefix, unless it
                is kept whole: they drop what questions may ask for. False is for comparisons.

        Raises:
            ValueError: the prefix is invalid, or the engine does not cache prefixes.
        """
        messages: Any = None
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
            messages = tuple(flat_message(message) for message in prompt)  # pyright: ignore[reportArgumentType]
            rendered = chat_prompt(self.engine.tokenizer, messages, add_generation_prompt=False)
            text, token_ids = rendered.text, rendered.token_ids
        else:
            prompts = _as_batch(prompt)  # pyright: ignore[reportArgumentType]
            if len(prompts) != 1:
                raise ValueError(
                    f"cache_prefix takes one text, list of token ids or conversation, got "
                    f"{len(prompts)}: call it once for each"
                )
            text, token_ids = self._encoded(prompts[0], None)
        self._num_requests += 1
        request = Request(
            str(self._num_requests),
            token_ids,
            prompt=text,
            kv_policy=kv_policy,
            kv_budget=kv_budget,
            kv_ratio=kv_ratio,
            caches_prefix=True,
            messages=messages,
            require_query_agnostic=require_query_agnostic,
        )
        (output,) = self._run([self.engine.validate(request)])
        assert output.cached_prefix is not None
        return output.cached_prefix

    def prefixes(self) -> list[CachedPrefix]:
        """Returns the prefixes that `cache_prefix` has cached, the oldest first.

        >>> [each.id == document.id for each in llm.prefixes()]
        [True]
        """
        return [self.engine.cached_prefix(record.id) for record in self.engine.prefixes.of_owner()]

    def delete_prefix(self, prefix_id: str) -> None:
        """Forgets a prefix and frees its pages.

        >>> llm.delete_prefix(document.id)
        >>> llm.prefixes()
        []

        Raises:
            ValueError: there is none with this id.
        """
        self.engine.delete_prefix(prefix_id)

    def prefill_logits(self, token_ids: list[int]) -> Float[np.ndarray, "V"]:
        """Returns the float32 logits of the token after a prompt, to compare with other code.

        >>> logits = llm.prefill_logits(llm.get_tokenizer().encode("one two three"))
        >>> logits.ndim, logits.dtype.name
        (1, 'float32')
        """
        (prompt,) = _as_batch([token_ids])
        if isinstance(prompt, str):
            raise ValueError(f"prefill_logits takes token ids, got the text {prompt!r}")
        prompt = list(prompt)
        self.engine.validate(Request("prefill_logits", prompt))
        return np.asarray(self.engine.runner.prefill(prompt).logits)

    def get_tokenizer(self) -> Tokenizer:
        """Returns the model's tokenizer.

        >>> tokenizer = llm.get_tokenizer()
        >>> tokenizer.decode(tokenizer.encode("one two three"))
        'one two three'
        """
        return self.engine.tokenizer

    def _encoded(self, prompt: Prompt, prefix_id: str | None) -> tuple[str | None, list[int]]:
        """Returns a prompt's text, if it has one, and its token ids."""
        if not isinstance(prompt, str):
            return None, list(prompt)
        encode = self.engine.tokenizer.encode
        return prompt, encode(prompt, add_special_tokens=prefix_id is None)

    def _requests(
        self,
        batch: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        boundaries: Sequence[tuple[Boundary, ...]] | None = None,
        **options: Any,
    ) -> list[ValidatedRequest]:
        """Makes and validates a request for every (text, token ids) pair.

        `boundaries` are those of each prompt; `options` are further fields of `Request`.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(batch)
        if not isinstance(params, Sequence) or not all(
            isinstance(each, SamplingParams) for each in params
        ):
            raise ValueError(f"sampling_params must be SamplingParams or a list, got {params!r}")
        if len(params) != len(batch):
            raise ValueError(
                f"sampling_params must have one entry per prompt, got {len(params)} for "
                f"{len(batch)} prompts"
            )
        requests = []
        boundaries = [()] * len(batch) if boundaries is None else boundaries
        for (text, token_ids), each, ends in zip(batch, params, boundaries, strict=True):
            self._num_requests += 1
            name = str(self._num_requests)
            request = Request(name, token_ids, each, text, boundaries=ends, **options)
            requests.append(self.engine.validate(request))
        return requests

    def _run(self, requests: list[ValidatedRequest]) -> list[RequestOutput]:
        """Runs requests until they finish; an interruption aborts the unfinished ones."""
        segments = [segment for each in requests for segment in self.engine.segments(each)]
        self.engine.warm_up(
            [each.stop - each.start for each in segments if each.start == 0],
            len(requests),
            suffix_lengths=[each.stop - each.start for each in segments if each.start > 0],
            prompt_logprobs=any(
                each.request.sampling_params.prompt_logprobs is not None for each in requests
            ),
        )
        finished: dict[str, RequestOutput] = {}
        try:
            for request in requests:
                self.engine.add_request(request)
            with tqdm(total=len(requests), desc="requests", disable=not self._progress) as bar:
                while self.engine.has_unfinished_requests():
                    for output in self.engine.step():
                        if output.finished:
                            finished[output.request_id] = output
                            bar.update()
        finally:
            for request in requests:
                if request.request_id not in finished:
                    self.engine.abort_request(request.request_id)
        return [finished[request.request_id] for request in requests]


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Returns a list of prompts; a single prompt becomes a list of one.

    Raises:
        ValueError: a prompt is neither a text nor a list of token ids.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray):
        raise ValueError(f"a prompt must be a text or a list of token ids, got {prompts!r}")
    batch = list(prompts)
    if batch and all(_is_token_id(item) for item in batch):
        return [batch]  # pyright: ignore[reportReturnType]
    for prompt in batch:
        is_ids = isinstance(prompt, Sequence | np.ndarray) and all(map(_is_token_id, prompt))
        if not isinstance(prompt, str) and not is_ids:
            raise ValueError(f"a prompt must be a text or a list of token ids, got {prompt!r}")
    return batch  # pyright: ignore[reportReturnType]


def _is_token_id(item: object) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)
