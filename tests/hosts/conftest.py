"""Network namespaces for the tests of several hosts."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.hosts.groups import Network, namespaces


@pytest.fixture
def network() -> Iterator[Network]:
    """Two network namespaces, or a skipped test where they are not permitted."""
    with ExitStack() as stack:
        try:
            network = stack.enter_context(namespaces())
        except PermissionError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield network
