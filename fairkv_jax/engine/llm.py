"""The Python API, shaped as vLLM's users know it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from fairkv_jax.engine.build import build_engine
from fairkv_jax.engine.request import Request, RequestOutput
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.tokenizer import Tokenizer

Prompt = str | list[int]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model for offline use: prompts in, finished outputs back.

    Takes the options of `build_engine`, for example

        llm = LLM(tensor_parallel_size=2, kv_policy="ada_snapkv", kv_budget=256)
        llm.generate(["The capital of France is"], SamplingParams(temperature=0))

    Raises:
        ValueError: an option is out of its limits, or the checkpoint cannot be read.
    """

    def __init__(self, **options: Any):
        self.engine = build_engine(**options)
        self._progress = options.get("progress", True)
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_kept_positions: bool = False,
    ) -> list[RequestOutput]:
        """Continues every prompt, a text or a list of token ids; outputs in the prompts' order.

        Raises:
            ValueError: a prompt or an option is invalid; then none has been run.
        """
        batch = _as_batch(prompts)
        params = sampling_params or SamplingParams()
        each = [params] * len(batch) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(batch):
            raise ValueError(f"{len(each)} sampling_params for {len(batch)} prompts")
        requests = [
            self._request(prompt, params, return_kept_positions)
            for prompt, params in zip(batch, each, strict=True)
        ]
        for request in requests:
            self.engine.validate(request)
        return self._run(requests)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_kept_positions: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation, or a list of them, in the model's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        template = self.engine.tokenizer.apply_chat_template
        prompts = [template(conversation) for conversation in conversations]  # pyright: ignore[reportArgumentType]
        return self.generate(prompts, sampling_params, return_kept_positions=return_kept_positions)

    def prefill_logits(self, token_ids: list[int]) -> Float[np.ndarray, "V"]:
        """Float32 logits of the token that follows a prompt; for comparisons with other code."""
        self.engine.validate(Request("prefill_logits", token_ids))
        return np.asarray(self.engine.engine.prefill(token_ids).logits)

    def get_tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def _request(self, prompt: Prompt, params: SamplingParams, positions: bool) -> Request:
        self._num_requests += 1
        request_id = str(self._num_requests)
        if isinstance(prompt, str):
            token_ids = self.engine.tokenizer.encode(prompt)
            return Request(request_id, token_ids, params, prompt, positions)
        return Request(request_id, list(prompt), params, None, positions)

    def _run(self, requests: list[Request]) -> list[RequestOutput]:
        """Runs requests to their ends; where that is interrupted, none stays behind."""
        self.engine.warm_up([len(r.prompt_token_ids) for r in requests], len(requests))
        finished: dict[str, RequestOutput] = {}
        for request in requests:
            self.engine.add_request(request)
        try:
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
    """A list of prompts, of one where it is a text or a list of token ids.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
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
