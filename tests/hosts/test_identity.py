"""Two processes give the tokens, kept lengths and kept positions of one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.logged import logged_engine
from tests.hosts.groups import ENGINE, LOOPBACK, Network, scenario_group
from tests.hosts.scenarios import SCENARIOS

MANY = ("mixed", "aborted", "choices")
CASES = {
    "ada_snapkv": (MANY, {}),
    "int8, compressed while decoding": (
        ("long_outputs",),
        {
            "kv_cache_dtype": "int8",
            "kv_decode_budget": 192,
            "kv_decode_interval": 16,
            "max_model_len": 384,
            "kv_cache_memory_bytes": 1 << 22,
        },
    ),
    "kvzip, with prefixes": (
        ("short", "prefixes"),
        {
            "kv_policy": "kvzip",
            "enable_prefix_caching": True,
            "prefix_min_tokens": 16,
            "kv_cache_memory_bytes": 1 << 22,
        },
    ),
}


def on_one_host(checkpoint: Path, folder: Path, scenarios: tuple[str, ...], **options: Any) -> Any:
    engine = logged_engine(checkpoint, folder / "alone.jsonl", **ENGINE | options)
    return {name: json.loads(json.dumps(SCENARIOS[name](engine))) for name in scenarios}


def check(
    checkpoint: Path,
    folder: Path,
    scenarios: tuple[str, ...],
    network: Network = LOOPBACK,
    follower_module: str = "fairkv_jax.serve",
    **options: Any,
) -> None:
    with scenario_group(
        checkpoint,
        folder,
        scenarios,
        network=network,
        follower_module=follower_module,
        **options,
    ) as group:
        expected = on_one_host(checkpoint, folder, scenarios, **options)
        for name in scenarios:
            assert group.wait_for(name) == expected[name], name
        assert (group.leader.status(), group.follower.status()) == (0, 0), group.logs


def test_greedy_and_seeded_requests(tiny_checkpoint: Path, tmp_path: Path):
    check(tiny_checkpoint, tmp_path, ("short",))


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_request(tiny_checkpoint: Path, tmp_path: Path, name: str):
    scenarios, options = CASES[name]
    check(tiny_checkpoint, tmp_path, scenarios, **options)


@pytest.mark.long
def test_in_network_namespaces(tiny_checkpoint: Path, tmp_path: Path, network: Network):
    check(tiny_checkpoint, tmp_path, MANY, network)
