# /// script
# requires-python = ">=3.11"
# dependencies = ["lm-eval[api]>=0.4.13"]
# ///
"""Evaluates the model behind the address that is given with lm-eval, on tasks of its own."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import lm_eval

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Berlin"], "answer": 0},
    {"question": "Two and two make", "choices": ["nine", "four"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["cold", "table"], "answer": 0},
]

url = sys.argv[1]
with TemporaryDirectory() as folder:
    file = Path(folder, "questions.jsonl")
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
    }
    choose = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    write = {
        "task": "write",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "demo",
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "remote",
            "batch_size": 2,
            "max_retries": 1,
        },
        tasks=[{**common, **choose}, {**common, **write}],
        log_samples=True,
        bootstrap_iters=0,
    )
assert found is not None
print(
    json.dumps(
        {
            "accuracy": found["results"]["choose"]["acc,none"],
            "written": [sample["resps"][0][0] for sample in found["samples"]["write"]],
        }
    )
)
