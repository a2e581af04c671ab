"""Network namespaces for the tests of several hosts."""

from collections.abc import Iterator

import pytest

from tests.hosts.groups import Network, namespaces


@pytest.fixture
def network() -> Iterator[Network]:
    """Two network namespaces, or a skipped test where they are not permitted."""
    made = namespaces()
    try:
        network = made.__enter__()
    except PermissionError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    try:
        yield network
    finally:
        made.__exit__(None, None, None)
