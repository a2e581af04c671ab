"""Wrong options and prompts: a sentence that names value and limit, and nothing left behind."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.plan import HeadScores, Profile, make_plan
from tests.engine.drive import check_idle, greedy, random_prompt, request


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(model=tiny_checkpoint, max_model_len=64, max_num_seqs=2, progress=False)


@pytest.fixture
def engine(llm: LLM) -> Iterator[LLMEngine]:
    yield llm.engine
    check_idle(llm.engine)


BAD_PROMPTS = [
    ([], "the prompt is empty: give at least one token"),
    ("", "the prompt is empty"),
    (random_prompt(64), "the prompt has 64 tokens, but max_model_len 64 must hold it and .*to 63"),
    (random_prompt(2000), "the prompt has 2000 tokens, .*shorten it to 63 or raise max_model_len"),
    ([5, 384], r"token id 384 is not in the vocabulary \[0, 384\)"),
    ([-1], r"token id -1 is not in the vocabulary"),
    ([5, "x"], "a prompt must be a text or a list of token ids, got"),
    ([5.0], "a prompt must be a text or a list of token ids, got"),
    ([True], "a prompt must be a text or a list of token ids, got"),
    ([None], "a prompt must be a text or a list of token ids, got"),
    ("\ud83d", "an unpaired surrogate"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_prompts(llm: LLM, engine: LLMEngine, prompt: Any, message: str):
    """The good prompt beside it is not run either."""
    with pytest.raises(ValueError, match=message):
        llm.generate([random_prompt(5), prompt], greedy(3))


@pytest.mark.parametrize("prompts", [None, 5, 5.5, {"prompt": "x"}])
def test_prompts_of_a_wrong_type(llm: LLM, engine: LLMEngine, prompts: Any):
    with pytest.raises(ValueError, match="a prompt must be a text or a list of token ids, got"):
        llm.generate(prompts, greedy(3))


@pytest.mark.parametrize("params", [[greedy(1)], [greedy(1)] * 3, []])
def test_as_many_params_as_prompts(llm: LLM, engine: LLMEngine, params: list[SamplingParams]):
    with pytest.raises(ValueError, match=f"got {len(params)} for 2 prompts"):
        llm.generate(["a", "b"], params)


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", [{"top_k": 3}]])
def test_params_of_a_wrong_type(llm: LLM, engine: LLMEngine, params: Any):
    with pytest.raises(ValueError, match="SamplingParams"):
        llm.generate(["a"], params)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [([], "empty"), ([384], "384"), (random_prompt(64), "64"), ([1.5], "1.5"), ("text", "text")],
)
def test_prefill_logits(llm: LLM, engine: LLMEngine, token_ids: Any, message: str):
    with pytest.raises(ValueError, match=message):
        llm.prefill_logits(token_ids)


@pytest.mark.parametrize(
    "messages",
    [[], "hello", [{"role": "user"}], [[]], None, [5], [{"role": "user", "content": [5]}]],
)
def test_chats(llm: LLM, engine: LLMEngine, messages: Any):
    with pytest.raises(ValueError, match=r"."):
        llm.chat(messages, greedy(3))


def test_the_engine_takes_nothing_that_it_refuses(engine: LLMEngine):
    with pytest.raises(ValueError, match="empty"):
        engine.add_request(request("a", [], greedy(3)))
    assert not engine.has_unfinished_requests()


def test_an_interrupted_run_leaves_nothing_behind(
    llm: LLM, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
):
    """As by Ctrl-C between two steps."""
    steps = iter([engine.step] * 3)

    def step():
        try:
            return next(steps)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([random_prompt(9)] * 5, greedy(20))


SCORES = HeadScores("m", "test", ((0.1, 0.2, 0.3),) * 2)
WRONG_SCORES = HeadScores("m", "test", ((0.1, 0.2),))
BAD_OPTIONS = [
    ({"kv_policy": "h2o", "kv_budget": 64}, "unknown kv_policy 'h2o': use one of full, "),
    ({"kv_policy": "ada_snapkv", "kv_budget": 16}, "kv_budget 16 is smaller than the window 32"),
    ({"kv_policy": "snapkv"}, "needs either kv_budget or kv_ratio"),
    ({"kv_budget": 64}, "kv_policy 'full' takes neither"),
    ({"kv_policy": 5, "kv_budget": 64}, "kv_policy 5"),
    ({"kv_policy": "keydiff", "kv_ratio": 0.5, "kv_scorer": "h2o"}, "kv_scorer must be one of "),
    ({"kv_scorer": "keydiff"}, "kv_scorer 'keydiff' has no effect where every token is kept"),
    ({"kv_policy": "snapkv", "kv_budget": 64, "kv_allocator": "full"}, "'full' takes neither"),
    (
        {"kv_policy": "expected_attention", "kv_ratio": 0.5, "kv_epsilon": -1},
        "kv_epsilon .*, got -1",
    ),
    (
        {"kv_policy": "snapkv", "kv_budget": 64, "kv_head_scores": "s.json"},
        "'s.json' is not a file",
    ),
    (
        {"kv_policy": "snapkv", "kv_budget": 64, "kv_head_scores": SCORES},
        "kv_head_scores goes with",
    ),
    ({"kv_policy": "duo_attention", "kv_ratio": 0.5}, "needs head scores, and .* has none: learn"),
    (
        {"kv_policy": "duo_attention", "kv_ratio": 0.5, "kv_head_scores": WRONG_SCORES},
        "scores of m are for 1 layers x 2 KV heads, but .* has 2 x 3",
    ),
    (
        {"kv_policy": "duo_attention", "kv_ratio": 0.8, "kv_head_scores": SCORES},
        "kv_ratio 0.8 leaves 12 of 64 tokens per head, which is less than the 8 sinks .*0.375",
    ),
    (
        {"kv_policy": "duo_attention", "kv_budget": 39, "kv_head_scores": SCORES},
        "kv_budget 39 is less than the 8 sinks and 32 recent .*: raise it to at least 40",
    ),
    ({"head_plan": "unfair"}, "head_plan 'unfair' is neither one of static, best_effort, "),
    ({"head_plan": 5}, "head_plan 5|head_plan '5'"),
    ({"tensor_parallel_size": 9}, "tensor_parallel_size 9 needs 9 devices, but 8 cpu device"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size|num_devices"),
    ({"tensor_parallel_size": "2"}, "tensor_parallel_size|num_devices"),
    ({"max_model_len": 4096}, "max_model_len 4096 is beyond the model's context 2048"),
    ({"max_model_len": 0}, r"max_model_len must be an integer of at least \d, got 0"),
    ({"max_model_len": "64"}, r"max_model_len must be an integer of at least \d, got '64'"),
    ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
    ({"max_extra_replicas": -1}, "max_extra_replicas must be an integer of at least 0, got -1"),
    ({"page_size": 10}, "page_size must be a multiple of 8, got 10"),
    ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    ({"dtype": None}, "dtype must be one of .* got None"),
    ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must lie in \(0, 1\], got 1.5"),
    ({"kv_cache_memory_bytes": 1000}, "cannot hold one request of max_model_len 64.*: raise"),
    ({"kv_cache_memory_bytes": -1}, "must be an integer of at least 1, got -1"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda o: str(o)[:60])
def test_options(tiny_checkpoint: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LLM(**{"model": tiny_checkpoint, "max_model_len": 64, "progress": False} | options)


def test_an_option_that_does_not_exist(tiny_checkpoint: Path):
    with pytest.raises(TypeError, match="kv_bugdet"):
        LLM(model=tiny_checkpoint, kv_bugdet=64)


def test_a_plan_for_other_devices_or_another_model(tiny_checkpoint: Path, tmp_path: Path):
    plan = make_plan(Profile.uniform(2, 3, 10), 2)
    other = make_plan(Profile.uniform(30, 3, 10), 2)
    options = {"model": tiny_checkpoint, "max_model_len": 64, "progress": False}
    with pytest.raises(ValueError, match=r"devices\) = \(2, 3, 2\), but .*size 3 has \(2, 3, 3\)"):
        LLM(head_plan=plan, tensor_parallel_size=3, **options)
    with pytest.raises(ValueError, match=r"= \(30, 3, 2\), but .* has \(2, 3, 2\)"):
        LLM(head_plan=other, tensor_parallel_size=2, **options)
    file = tmp_path / "plan.json"
    for content in ("", "{", "[]", "{}", plan.to_json().replace('"head"', '"tail"')):
        file.write_text(content)
        with pytest.raises(ValueError, match="plan"):
            LLM(head_plan=file, tensor_parallel_size=2, **options)
    record = json.loads(plan.to_json())
    record["layers"][0][0]["share"] = 0.25
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="shares of its replicas must sum to"):
        LLM(head_plan=str(file), tensor_parallel_size=2, **options)


def test_a_plan_from_a_file(tiny_checkpoint: Path, tmp_path: Path):
    plan = make_plan(Profile.uniform(2, 3, 10), 2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    options = {"model": tiny_checkpoint, "max_model_len": 64, "progress": False}
    llm = LLM(head_plan=tmp_path / "plan.json", tensor_parallel_size=2, **options)
    assert llm.engine.plan.layers == plan.layers


def test_checkpoints_that_are_none(tiny_checkpoint: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*nowhere\.gguf"):
        LLM(model=tmp_path / "nowhere.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold a model\.json, a config\.json or one \.gguf"):
        LLM(model=tmp_path / "empty")
    text = tmp_path / "text.gguf"
    text.write_text("This is no model.")
    with pytest.raises(ValueError, match=r"text\.gguf"):
        LLM(model=text)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.999])
def test_a_truncated_checkpoint(tiny_checkpoint: Path, tmp_path: Path, kept: float):
    """Cut in its head, its metadata, its weights: refused before anything is loaded."""
    file = tmp_path / "cut.gguf"
    content = tiny_checkpoint.read_bytes()
    file.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        LLM(model=file, progress=False)


def test_another_architecture(tiny_checkpoint: Path, tmp_path: Path):
    file = shutil.copy(tiny_checkpoint, tmp_path / "other.gguf")
    field = GGUFReader(file).fields["general.architecture"]
    content = bytearray(Path(file).read_bytes())
    value = struct.pack("<Q", 5) + b"llama"
    at = content.index(value, field.offset)
    content[at : at + len(value)] = struct.pack("<Q", 5) + b"mamba"
    Path(file).write_bytes(content)
    with pytest.raises(ValueError, match="mamba"):
        LLM(model=file, progress=False)


def test_a_request_that_leaves_less_than_every_head_keeps(tiny_checkpoint: Path):
    """Only where the request asks for it: short prompts keep more than the engine's ratio."""
    llm = LLM(
        tiny_checkpoint,
        kv_policy="duo_attention",
        kv_ratio=0.3,
        kv_head_scores=SCORES,
        max_model_len=256,
        max_num_seqs=1,
        progress=False,
    )
    (output,) = llm.generate([random_prompt(50)], greedy(1))
    assert output.kv_lengths is not None
    assert output.kv_lengths.min() == 40
    with pytest.raises(ValueError, match=r"kv_ratio 0\.7 leaves .*: lower it to at most 0\.6"):
        llm.generate([random_prompt(100)], greedy(1), kv_ratio=0.7)
    with pytest.raises(ValueError, match="kv_budget 20 is less than the 8 sinks and 32 recent"):
        llm.generate([random_prompt(100)], greedy(1), kv_budget=20)
