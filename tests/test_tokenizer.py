"""Encoding against published ids and a slow BPE, chats, and text that comes token by token."""

import os
import random
import time

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from fairkv_jax.bounded_worker import WorkerPool, memory_in_use
from fairkv_jax.chat_template import LIMITS
from fairkv_jax.checkpoint import fetch_demo, open_checkpoint
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from fairkv_jax.tokenizer import Tokenizer
from tests.oracle import bpe
from tests.oracle.tiny import write_tiny_checkpoint

TEXTS = [
    "the cat and the hat will win",
    "I'm 2024 years, don't you'll 're 12.5%",
    "  two spaces  and\ttabs\n\n\nnewlines   ",
    "漢字かな交じり文、한국어 текст ½ ² Ⅷ",
    "😀 👩‍👩‍👧‍👦 naïve café \u0301 \u200b\u00a0x",
    "",
    " ",
    "\n",
]
MESSAGES = [{"role": "user", "content": "Describe a rabbit in 2 short sentences"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    return open_checkpoint(path).tokenizer()


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return open_checkpoint(fetch_demo()).tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_undoes_encoding(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "ids"),
    [  # of Hugging Face's own tokenizer of the model, as programs that test against it list them
        ("Hello, 世界!", [19556, 28, 216, 7906, 240, 178, 239, 230, 17]),
        ("Tab\there\nNewline\n\nDouble", [30064, 197, 1531, 198, 5529, 1311, 198, 198, 33743]),
        ("'s 't 're 've", [506, 637, 100, 637, 257, 637, 307]),
        ("The quick brown fox", [504, 2365, 6354, 16438]),
        ("<|im_end|>\n<|endoftext|>", [2, 198, 0]),
    ],
)
def test_published_ids(demo, text, ids):
    assert demo.encode(text) == ids
    assert demo.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
def test_published_ids_of_a_chat(demo):
    # What llama.cpp (through Ollama) reports for this chat; the digit 2 stands alone.
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = demo.apply_chat_template(MESSAGES)
    assert prompt == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{MESSAGES[0]['content']}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = demo.encode(prompt, add_special_tokens=False)
    assert ids[:4] == [1, 9690, 198, 2683]
    assert ids[19:] == [
        *(2, 198, 1, 4093, 198, 37964, 253, 16024, 281, 216, 34, 1890, 8545),
        *(2, 198, 1, 520, 9531, 198),
    ]
    assert demo.eos_token_ids == {0, 2}
    assert demo.vocab_size == 49152


@pytest.mark.slow
def test_ids_agree_with_a_slow_bpe(demo):
    metadata = GGUFFile(fetch_demo()).metadata
    vocabulary = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = metadata["tokenizer.ggml.merges"]
    rng = random.Random(0)
    alphabet = "ab thé'sdlrevm  \n\t09½Ⅷ漢字😀.,!?()\u00a0\u200b"
    texts = TEXTS + ["".join(rng.choices(alphabet, k=30)) for _ in range(200)]
    for text in texts:
        assert demo.encode(text) == bpe.encode(text, vocabulary, merges), repr(text)


def test_special_tokens_in_the_text_become_ids(tiny):
    assert tiny.encode("<|im_start|>") == [1]
    assert tiny.decode([1, *tiny.encode("hat"), 2], skip_special_tokens=True) == "hat"
    assert tiny.decode([1, *tiny.encode("hat"), 2], skip_special_tokens=False) == (
        "<|im_start|>hat<|im_end|>"
    )
    assert tiny.token_text(2) == "<|im_end|>"
    assert tiny.eos_token_ids == {0, 2}


def test_half_a_surrogate_pair_is_refused(tiny):
    with pytest.raises(ValueError, match=r"'\\ud83d'\) at position 2"):
        tiny.encode("ab\ud83d")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_add_up_to_the_text(tiny, text, skip):
    ids = [1, *tiny.encode(text), 2]
    stream = tiny.detokenizer(skip_special_tokens=skip)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == tiny.decode(ids, skip_special_tokens=skip)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_split_over_tokens_comes_whole(tiny):
    ids = tiny.encode("😀")
    assert len(ids) == 4  # one a byte
    stream = tiny.detokenizer()
    assert [stream.push(i) for i in ids] == ["", "", "", "😀"]
    assert stream.flush() == ""


def test_an_incomplete_character_comes_with_the_flush(tiny):
    stream = tiny.detokenizer()
    pieces = [stream.push(i) for i in tiny.encode("a漢")[:-1]]
    assert pieces == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_pieces_of_random_ids_add_up(tiny):
    rng = random.Random(0)
    for _ in range(300):
        ids = rng.choices(range(tiny.vocab_size), k=30)
        for skip in (True, False):
            stream = tiny.detokenizer(skip_special_tokens=skip)
            text = "".join(map(stream.push, ids)) + stream.flush()
            assert text == tiny.decode(ids, skip_special_tokens=skip), ids


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A vocabulary as Llama 2's: words begin with ▁, which the decoder strips from the first."""
    texts = ["<unk>", "<s>", "▁Paris", "▁is", ".", "▁", "<0xE6>", "<0xBC>", "<0xA2>"]
    vocabulary = {text: index for index, text in enumerate(texts)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(["<s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend, eos_token_ids=[])


@pytest.mark.parametrize(
    ("context", "first"),
    [
        ([], "Paris"),
        ([1], "Paris"),  # a special token has no text: the word begins the text
        ([3], " Paris"),
        ([5], " Paris"),
        ([6, 7], "Paris"),  # within a character, which the output cannot complete
    ],
)
def test_the_first_space_stays_after_a_prompt(sentencepiece, context, first):
    stream = sentencepiece.detokenizer(context=context)
    pieces = [stream.push(token_id) for token_id in (2, 3, 6, 7, 8, 4)]
    assert pieces == [first, " is", "", "", "漢", "."]


def test_template_options(tiny):
    assert tiny.apply_chat_template(MESSAGES, add_generation_prompt=False).endswith("<|im_end|>\n")
    assert tiny.apply_chat_template(MESSAGES).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        (["hello"], r"messages\[0\] must be"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] must be a string, got None"),
        ([{"role": 7, "content": ""}], r"messages\[0\]\['role'\] must be a string, got 7"),
    ],
)
def test_malformed_messages(tiny, messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny.apply_chat_template(messages)


def with_template(template: str | None) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    return Tokenizer(
        Backend(BPE()),
        eos_token_ids=[],
        chat_template=template,
        template_tokens={"bos_token": "<s>"},
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ mood }}", "<s>hifine"),
        # Blocks on lines of their own leave no line behind.
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hi"}'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{% for m in [1, 2] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% if tools is none %}none{% endif %}", "none"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_the_dialect_of_templates(template, expected):
    messages = [{"role": "user", "content": "hi"}]
    assert with_template(template).apply_chat_template(messages, mood="fine") == expected


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{% if %}", "does not compile"),
        ("{{ raise_exception('roles must alternate') }}", "rejects the messages: roles must alt"),
        ("{{ messages.append(1) }}", "rejects the messages"),
        ("{{ ''.__class__.__mro__ }}", "rejects the messages"),
        ("{{ 1 / 0 }}", "rejects the messages"),
    ],
)
def test_templates_that_fail(template, complaint):
    with pytest.raises(ValueError, match=complaint):
        with_template(template).apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        ("{{ 'x'.ljust(2000000000) }}", "takes more than 256 MiB"),
        ("{{ 'x'.ljust(20000000) }}", "writes more than 16 MiB"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 5 seconds",
        ),
    ],
)
def test_templates_have_limits_of_time_memory_and_output(template, limit):
    """The process itself takes no part in it, and ordinary conversations follow."""
    tokenizer = with_template("{% if mood %}" + template + "{% endif %}fine")
    began, memory = time.monotonic(), memory_in_use()[1]
    with pytest.raises(ValueError, match=limit):
        tokenizer.apply_chat_template(MESSAGES, mood="bad")
    assert time.monotonic() - began < 30
    assert memory_in_use()[1] - memory < 100 << 20
    assert tokenizer.apply_chat_template(MESSAGES, mood="") == "fine"


def test_templates_see_no_secrets_of_the_server(monkeypatch):
    monkeypatch.setenv("FAIRKV_API_KEY", "secret")
    pool = WorkerPool("tests.test_tokenizer:environment_reader", None, LIMITS)
    assert "FAIRKV_API_KEY" not in pool.call(None)
    pool.close()


def environment_reader(setup):
    return lambda value: sorted(os.environ)
