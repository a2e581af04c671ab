"""Contexts with facts: where the answers are, what a seed decides, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.profile.examples import Example, make_examples
from fairkv_jax.profile.facts import Fact, plant, read_words
from fairkv_jax.profile.learn_config import LearnConfig
from fairkv_jax.tokenizer import Tokenizer
from tests.oracle.tiny import write_tiny_checkpoint

CONFIG = LearnConfig(num_contexts=3, context_tokens=480)


def make(tokenizer: Tokenizer, config: LearnConfig = CONFIG, longest: int = 2048) -> list[Example]:
    return make_examples(
        tokenizer, config, model="tiny", max_position_embeddings=longest, progress=False
    )


@pytest.fixture(scope="module", params=["llama", "gemma", "demo"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Bytes with few merges; SentencePiece, which puts a start token first; and a real one."""
    if request.param == "demo":
        return open_checkpoint(request.getfixturevalue("demo_checkpoint")).tokenizer()
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_checkpoint(path, architecture=request.param)
    return open_checkpoint(path).tokenizer()


def test_plant_tells_where_the_answers_are():
    facts = (Fact("The cat is", "What is it?", "red"), Fact("The dog ate", "What?", "rice"))
    passage = plant(["one", "two", "three", "four"], facts, [0.8, 0.3])
    assert passage.text == "one The dog ate rice. two three The cat is red. four"
    for fact, at in zip(facts, passage.answers_at, strict=True):
        assert passage.text[at : at + len(fact.answer)] == fact.answer


def test_tokens_of_facts_and_of_answers_are_those_of_the_same_words(tokenizer: Tokenizer):
    for example in make(tokenizer):
        length, size = int(example.length), example.tails.shape[1]
        context, tails = np.asarray(example.context), np.asarray(example.tails)
        predicts = np.asarray(example.predicts).reshape(len(tails), -1)
        used = np.asarray(example.weights).reshape(predicts.shape) > 0
        targets = np.asarray(example.targets).reshape(predicts.shape)
        assert 0.9 * CONFIG.context_tokens < length <= CONFIG.context_tokens
        assert len(context) % 256 == 0
        assert example.weights.sum() == pytest.approx(1)
        for row, tail in enumerate(tails):
            in_context = context[np.asarray(example.is_fact)[row]].tolist()
            asked = targets[row, used[row]]
            at = predicts[row, used[row]] - row * size
            np.testing.assert_array_equal(tail[at + 1], asked)
            answer = tokenizer.decode(in_context).strip()
            assert answer == tokenizer.decode(asked.tolist()).strip()
            assert answer
            # The question ends as the fact begins.
            beginning = tokenizer.decode(tail[: at[0] + 1].tolist()).split()[-3:]
            before = context[: np.flatnonzero(np.asarray(example.is_fact)[row])[0]]
            assert tokenizer.decode(before.tolist()).split()[-3:] == beginning
            assert not np.asarray(example.is_fact)[row, : CONFIG.sinks].any()
            assert not np.asarray(example.is_fact)[row, length - CONFIG.recent :].any()


def test_a_seed_decides(demo_checkpoint: Path):
    tokenizer = open_checkpoint(demo_checkpoint).tokenizer()
    first, again, other = (
        make(tokenizer, LearnConfig(num_contexts=2, seed=seed)) for seed in (1, 1, 2)
    )
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.context, two.context)
        np.testing.assert_array_equal(one.tails, two.tails)
    assert (np.asarray(first[0].context) != np.asarray(other[0].context)).any()
    assert (np.asarray(first[0].context) != np.asarray(first[1].context)).any()


def test_a_haystack_of_the_user_surrounds_the_facts(demo_checkpoint: Path, tmp_path: Path):
    haystack = tmp_path / "haystack.txt"
    haystack.write_text("zebra\n\nzither ")
    tokenizer = open_checkpoint(demo_checkpoint).tokenizer()
    (example,) = make(tokenizer, LearnConfig(num_contexts=1, haystack=str(haystack)))
    text = tokenizer.decode(np.asarray(example.context)[: int(example.length)].tolist())
    assert text.count("zebra") > 50
    haystack.write_text("\n")
    with pytest.raises(ValueError, match="contains no words: give a longer text"):
        read_words(haystack)


def test_contexts_that_do_not_suit_the_model_are_refused(tiny_checkpoint: Path):
    tokenizer = open_checkpoint(tiny_checkpoint).tokenizer()
    with pytest.raises(ValueError, match=r"longer than the context of tiny, 500 tokens: lower"):
        make(tokenizer, longest=500)
    with pytest.raises(ValueError, match="with the tokenizer of tiny, more than context_tokens 96"):
        make(tokenizer, LearnConfig(context_tokens=96))


def test_a_tokenizer_without_an_answer_is_refused():
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    backend = Backend(WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="tokenizer of tiny, which has 2 tokens, cannot represent"):
        make(Tokenizer(backend, eos_token_ids=()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "other"}, "method must be one of attention, gates, got 'other'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num_contexts": 0}, "num_contexts must be at least 1"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"l1": float("nan")}, "l1 must be a finite number"),
        ({"recent": 300}, "recent 300 are more than half of context_tokens 512"),
    ],
)
def test_bad_options_are_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LearnConfig(**change)
