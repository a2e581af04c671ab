"""Log-probabilities of tokens that are not whole characters: exact bytes, names and offsets."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from fairkv_jax.checkpoint.open import open_checkpoint
from fairkv_jax.engine.output_processor import OutputProcessor
from fairkv_jax.engine.request import Logprob, Request, RequestOutput
from fairkv_jax.engine.scheduler_output import NewTokens, SampledTokens
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.serve.logprobs import (
    ShownTokens,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    prompt_offsets,
)
from fairkv_jax.tokenizer import Tokenizer
from tests.oracle.tiny import write_tiny_checkpoint

TEXT = "a 漢字 👩‍👩‍👧 naïve 😀!"


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> Tokenizer:
    return open_checkpoint(checkpoint).tokenizer()


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("gemma") / "tiny.gguf"
    return open_checkpoint(write_tiny_checkpoint(path, architecture="gemma")).tokenizer()


def outputs_of(tokenizer: Tokenizer, token_ids: list[int], **params: Any) -> list[RequestOutput]:
    """The outputs after every token, as the engine makes them."""
    processor = OutputProcessor(tokenizer)
    sampling = SamplingParams(max_tokens=len(token_ids), logprobs=0, **params)
    processor.add(Request("r", [5], sampling), max_tokens=len(token_ids), arrival_time=0.0)
    outputs = []
    for token_id in token_ids:
        one = np.array([[token_id]])
        empty = np.zeros((1, 1, 0))
        sampled = SampledTokens(one, np.zeros((1, 1)), np.ones((1, 1), int), empty, empty)
        outputs += processor.process([NewTokens("r", sampled, 0, range(1))], now=0.0)
    return outputs


def begin_of(text: str, token_bytes: list[bytes]) -> list[int]:
    """Where each token begins, from the bytes before it: the oracle."""
    starts = np.cumsum([0, *map(len, token_bytes)])[:-1]
    ends = np.cumsum([len(character.encode()) for character in text])
    return [int(np.searchsorted(ends, start, side="right")) for start in starts]


@pytest.mark.parametrize("name", ["tiny", "sentencepiece"])
def test_bytes_add_up_to_the_text_and_offsets_index_it(name: str, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    outputs = outputs_of(tokenizer, token_ids)
    text = outputs[-1].outputs[0].text
    assert text == TEXT
    names = TokenNames(tokenizer)
    data = [bytes(names.bytes(token_id)) for token_id in token_ids]
    assert b"".join(data) == TEXT.encode()
    wanted = begin_of(TEXT, data)
    assert len(set(wanted)) < len(token_ids), "some characters are split"
    shown = ShownTokens(names)
    for output in outputs:
        offsets = shown.offsets(output)
        assert offsets == wanted[: len(offsets)]
        assert all(offset < len(output.outputs[0].text) for offset in offsets)
    assert offsets == wanted


def test_offsets_stay_within_the_text_whatever_the_tokens_are(
    tiny: Tokenizer, sentencepiece: Tokenizer
):
    """Invalid UTF-8, special tokens, with and without those in the text, stop strings."""
    rng = random.Random(3)
    for tokenizer in (tiny, sentencepiece):
        for skip in (True, False):
            token_ids = rng.choices(range(tokenizer.vocab_size), k=60)
            options = {"skip_special_tokens": skip, "ignore_eos": True}
            outputs = outputs_of(tokenizer, token_ids, **options)
            text = outputs[-1].outputs[0].text
            shown = ShownTokens(TokenNames(tokenizer, skips_special_tokens=skip))
            for output in outputs:
                offsets = shown.offsets(output)
                assert offsets == sorted(offsets)
                assert not offsets or offsets[-1] <= len(output.outputs[0].text)
            assert len(offsets) == len(token_ids)
            stops = outputs_of(tokenizer, token_ids, stop=text[20:23], **options)
            offsets = ShownTokens(TokenNames(tokenizer)).offsets(stops[-1])
            assert len(offsets) == len(stops[-1].outputs[0].token_ids)
            assert max(offsets) <= len(stops[-1].outputs[0].text)


def test_special_tokens_that_are_skipped_have_no_bytes(tiny: Tokenizer):
    assert TokenNames(tiny).name(2) == "<|im_end|>"
    assert TokenNames(tiny).bytes(2) == []
    assert bytes(TokenNames(tiny, skips_special_tokens=False).bytes(2)) == b"<|im_end|>"
    assert TokenNames(tiny).name(10**6) == ""


@pytest.mark.parametrize(
    ("text", "adds"), [(TEXT, True), (TEXT, False), (" leading space", True), ("", True)]
)
def test_offsets_in_prompts(tiny: Tokenizer, sentencepiece: Tokenizer, text: str, adds: bool):
    for tokenizer in (tiny, sentencepiece):
        token_ids = tokenizer.encode(text, add_special_tokens=adds)
        plain = tokenizer.encode(text, add_special_tokens=False)
        added = len(token_ids) - len(plain)
        wanted = begin_of(text, [tokenizer.token_bytes(token_id) for token_id in plain])
        assert prompt_offsets(tokenizer, token_ids, text) == [0] * added + wanted
        decoded = tokenizer.decode(token_ids, skip_special_tokens=False)
        data = [tokenizer.token_bytes(token_id) for token_id in token_ids]
        assert prompt_offsets(tokenizer, token_ids, None) == begin_of(decoded, data)


def test_the_first_space_of_a_text_is_not_counted_where_the_decoder_strips_it():
    texts = ["<unk>", "▁Paris", "▁is", "<0xE6>", "<0xBC>", "<0xA2>"]
    vocabulary = {text: index for index, text in enumerate(texts)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = Tokenizer(backend, eos_token_ids=[])
    ids = [1, 2, 3, 4, 5, 2]
    assert tokenizer.decode(ids) == "Paris is漢 is"
    assert prompt_offsets(tokenizer, ids, None) == [0, 5, 8, 8, 8, 9]
    assert [tokenizer.token_text(i) for i in (1, 3)] == [" Paris", "\ufffd"]


def test_tokens_of_one_text_do_not_overwrite_each_other(tiny: Tokenizer):
    """The chosen token has its own name; of the others of one name, the most likely has it."""
    broken = [
        token_id for token_id in range(tiny.vocab_size) if len(tiny.token_bytes(token_id)) == 1
    ]
    broken = [token_id for token_id in broken if tiny.token_bytes(token_id)[0] >= 0x80][:19]
    twins = Twins(tiny, same={90, 91, 92})
    ranked = [91, *broken, 92, 90]
    entries = {
        token_id: Logprob(-float(rank), rank, "") for rank, token_id in enumerate(ranked, start=1)
    }
    lists = completion_logprobs([90], [entries], [0], 20, TokenNames(twins))
    (top,) = lists["top_logprobs"]
    assert len(top) == 21
    assert lists["tokens"] == ["same"]
    assert top["same"] == lists["token_logprobs"][0] == -22.0
    assert top["token_id:91"] == -1.0
    assert "token_id:92" not in top
    byte = tiny.token_bytes(broken[0])[0]
    assert top[f"bytes:\\x{byte:02x}"] == -2.0
    (entry,) = chat_logprobs([broken[0]], [entries], 20, TokenNames(twins))["content"]
    assert entry["token"] == f"\\x{byte:02x}"
    assert entry["bytes"] == [byte]
    assert len(entry["top_logprobs"]) == 20


class Twins(Tokenizer):
    """A tokenizer some of whose tokens have one text, as "A" and "<0x41>" have elsewhere."""

    def __init__(self, tokenizer: Tokenizer, same: set[int]):
        super().__init__(Backend.from_str(tokenizer.to_json()), eos_token_ids=[])
        self._same = same

    def token_bytes(self, token_id: int) -> bytes:
        return b"same" if token_id in self._same else super().token_bytes(token_id)
