"""A tiny checkpoint and a server around a scripted engine, for all tests of the server."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.oracle.tiny import write_tiny_checkpoint
from tests.serve.live import Server, running
from tests.serve.scripted import ScriptedEngine


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.gguf")


@pytest.fixture(scope="module")
def scripted(checkpoint: Path) -> ScriptedEngine:
    return ScriptedEngine(checkpoint)


@pytest.fixture(scope="module")
def server(scripted: ScriptedEngine) -> Iterator[Server]:
    with running(lambda: scripted) as server:
        yield server


@pytest.fixture
def client(server: Server) -> httpx.Client:
    return server.client
