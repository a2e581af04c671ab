"""Repairs JAX's cache of compiled programs.

JAX warns of an entry that it cannot read and compiles the program, but never overwrites an entry,
so that it would warn at every start. Where the size of the cache is limited, it writes nothing any
more if an entry has no time of its last use, as when a process was killed between writing the two.
"""

import logging
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")


def replace_damaged_entries(folder: str) -> None:
    """Removes entries of a program when JAX says that it cannot read one; it then writes it again.

    JAX names the program, not the entry, so those of the program's other shapes are removed too,
    and written again as well when they are next compiled.
    """
    show: Any = warnings.showwarning

    def handle(message: Warning | str, *details: Any, **more: Any) -> None:
        found = _UNREADABLE.match(str(message))
        if found is None:
            show(message, *details, **more)
            return
        log.warning("a damaged entry of the compilation cache is replaced: %s", found[1])
        for entry in Path(folder).glob(f"{found[1]}-*-cache"):
            entry.unlink(missing_ok=True)

    warnings.filterwarnings("always", message=_UNREADABLE.pattern)
    warnings.showwarning = handle


def complete_entries(folder: str) -> None:
    """Adds the time of the last use to entries that have none, if JAX keeps these times."""
    if os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE", "-1") == "-1":
        return
    for entry in Path(folder).glob("*-cache"):
        used = entry.with_name(f"{entry.name.removesuffix('-cache')}-atime")
        if not used.exists():
            used.write_bytes(time.time_ns().to_bytes(8, "little"))
