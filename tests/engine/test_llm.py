"""The Python API: forms of prompts, chats, and the order of outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.llm_engine import LLMEngine
from tests.engine.drive import greedy, random_prompt

BOS = 1
PROMPT = random_prompt(30, seed=4)
OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "kv_policy": "ada_snapkv",
    "kv_budget": 24,
    "kv_window": 8,
    "max_model_len": 128,
    "progress": False,
}


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(model=tiny_checkpoint, **OPTIONS)


def test_prompts_as_text_as_ids_and_mixed(llm: LLM, engine: LLMEngine):
    text = "the wall and the inn"
    ids = llm.get_tokenizer().encode(text)
    params = greedy(6)
    one, two = llm.generate([text, ids], params)
    assert one.outputs[0].text == two.outputs[0].text
    assert one.prompt_token_ids == two.prompt_token_ids == ids
    assert (one.prompt, two.prompt) == (text, None)
    assert llm.generate(text, params)[0].outputs[0].text == one.outputs[0].text
    as_array: Any = np.array(ids)
    assert llm.generate(as_array, params)[0].outputs[0].text == one.outputs[0].text
    assert llm.generate([], params) == []


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM, engine: LLMEngine):
    prompts = [random_prompt(5 + i, seed=i) for i in range(8)]
    params = [greedy(8 - i) for i in range(8)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(8, 0, -1))


def test_chat(llm: LLM, engine: LLMEngine):
    messages = [{"role": "user", "content": "and then?"}]
    rendered = "<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
    (one,) = llm.chat(messages, greedy(5))
    assert one.prompt == rendered
    assert one.prompt_token_ids == llm.get_tokenizer().encode(rendered)
    assert one.outputs[0].text == llm.generate(rendered, greedy(5))[0].outputs[0].text
    several = llm.chat([messages, messages], greedy(5))
    assert [output.outputs[0].text for output in several] == [one.outputs[0].text] * 2


def test_a_chat_gets_no_second_bos(tiny_checkpoint: Path, tmp_path: Path):
    """A model that wants one in front of texts: in chats the template has written it."""
    content = bytearray(tiny_checkpoint.read_bytes())
    key = b"tokenizer.ggml.add_bos_token"
    content[content.index(key) + len(key) + 4] = True  # behind the value's type
    (tmp_path / "bos.gguf").write_bytes(content)
    llm = LLM(model=tmp_path / "bos.gguf", **OPTIONS)
    (text,) = llm.generate("and then?", greedy(1))
    assert text.prompt_token_ids[:2] == [BOS, *llm.get_tokenizer().encode("and", False)[:1]]
    (chat,) = llm.chat([{"role": "user", "content": "and then?"}], greedy(1))
    assert chat.prompt_token_ids[0] == BOS
    assert chat.prompt_token_ids[1] != BOS


def test_special_tokens_show_only_where_asked_for(llm: LLM, engine: LLMEngine):
    hot = {"temperature": 8.0, "max_tokens": 90, "ignore_eos": True, "seed": 3}
    tokenizer = llm.get_tokenizer()
    for skip in (True, False):
        params = SamplingParams(skip_special_tokens=skip, **hot)
        output = llm.generate(PROMPT, params)[0].outputs[0]
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=skip)
