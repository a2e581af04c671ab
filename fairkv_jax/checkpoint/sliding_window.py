"""How long a sequence may be for a model whose attention slides over a window."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def within_window(path: Path, context: int, window: int) -> int:
    """The model's context in tokens, no more than the window: within it attention is full."""
    if window >= context:
        return context
    logger.warning(
        "%s: attention slides over a window of %d tokens, which therefore bounds the context of "
        "%d tokens: beyond it the cache would have to forget",
        path,
        window,
        context,
    )
    return window
