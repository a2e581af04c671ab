"""Runs the questions of a sweep on an engine in this process: its real pages and devices."""

from collections.abc import Sequence
from typing import Any

from fairkv_jax.engine.llm import LLM
from fairkv_jax.evaluate.documents import Document, Question
from fairkv_jax.evaluate.likelihood import Likelihood, LikelihoodMeter
from fairkv_jax.evaluate.results import FULL
from fairkv_jax.evaluate.runners import Answer
from fairkv_jax.sampling_params import SamplingParams


class EngineRunner:
    """An engine with one compression method, which requests run at several ratios.

    Raises:
        ValueError: see `LLM`.
    """

    def __init__(self, method: str, ratios: Sequence[float], **options: Any):
        """The engine keeps what the smallest ratio keeps, which no request may exceed."""
        ratio = None if method == FULL else min(ratios)
        self._llm = LLM(
            progress=False, kv_policy=method, kv_ratio=ratio, enable_prefix_caching=True, **options
        )
        self._tokenizer = self._llm.get_tokenizer()

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, with the special tokens of a prompt."""
        return self._tokenizer.encode(text)

    def answer_in_view(
        self, documents: Sequence[Document], ratio: float | None, max_tokens: int
    ) -> list[list[Answer]]:
        """Answers all questions; the prompts have the same tokens as in `answer_after`."""
        prompts = [
            self._tokenizer.encode(document.text) + self._suffix(question)
            for document in documents
            for question in document.questions
        ]
        outputs = self._llm.generate(prompts, _params(max_tokens), kv_ratio=ratio)
        answers = []
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.kv_lengths is not None
            kept = float(output.kv_lengths.mean()) / len(prompt)
            answers.append(Answer(output.outputs[0].text, kept))
        remaining = iter(answers)
        return [[next(remaining) for _ in document.questions] for document in documents]

    def answer_after(
        self, document: Document, ratio: float | None, max_tokens: int
    ) -> list[Answer]:
        """Compresses a document with any method, also one that looks at the document's end."""
        prefix = self._llm.cache_prefix(
            self._tokenizer.encode(document.text), kv_ratio=ratio, require_query_agnostic=False
        )
        kept = float(prefix.kept_tokens.mean()) / prefix.num_tokens
        try:
            questions = [self._suffix(question) for question in document.questions]
            outputs = self._llm.generate(questions, _params(max_tokens), prefix_id=prefix.id)
        finally:
            self._llm.delete_prefix(prefix.id)
        return [Answer(output.outputs[0].text, kept) for output in outputs]

    def likelihoods(self, passage: list[int], ratios: Sequence[float | None]) -> list[Likelihood]:
        """Measures the likelihood of a passage's end at several ratios, None for the full cache.

        Raises:
            ValueError: the passage is longer than the model's context.
        """
        meter = LikelihoodMeter(self._llm.engine.runner, passage)
        try:
            return [meter.measure(ratio) for ratio in ratios]
        finally:
            # The meter has emptied the cache behind the scheduler's back.
            self._llm.engine.scheduler.reset(self._llm.engine.output_processor.token_ids)

    def _suffix(self, question: Question) -> list[int]:
        return self._tokenizer.encode(question.text, add_special_tokens=False)


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)
