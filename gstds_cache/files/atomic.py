"""A file that is either absent, the old one or the new one whole, however many processes write it at once."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

STALE = 3600.0  # seconds in which whoever writes a file writes something

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.tmp", re.DOTALL)
_LENGTH = 50  # characters of the name: a file name may have 255 bytes in all


@contextmanager
def replacing(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """Write ``path`` under a temporary name beside it; at the end of the block it takes the place of ``path``.

    The name is one of this process and this call, so that two that write ``path`` at once write two files, and the last
    one that is whole stays. A block left by an exception leaves ``path`` as it was. What killed processes left is
    deleted.

    Args:
        path: The file.
        alone: Whether a lock keeps all others out: then no temporary file of ``path`` but this one is in use.

    Yields:
        The temporary name, for a file to be written. Flushing it to the disk is up to the block.
    """
    discard_leftovers(path, alone=alone)
    # The process number tells people whose it is. It is not enough: threads share one, and containers a folder.
    temporary = path.with_name(f".{path.name[:_LENGTH]}.{os.getpid()}-{uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replaced_name(temporary: str) -> str | None:
    """The first characters of the name that a temporary file of this name was to get, or None if it is no such file."""
    match = _TEMPORARY.fullmatch(temporary)
    return match["name"] if match else None


def discard_leftovers(path: Path, *, alone: bool = False) -> None:
    """Delete temporary files of ``path`` that a killed process left.

    Args:
        path: The file.
        alone: Whether a lock keeps all others out. Else one that was written to within the hour may be another's.
    """
    now = time.time()
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if replaced_name(entry.name) == path.name[:_LENGTH]:
                with suppress(OSError):
                    if alone or now - entry.stat().st_mtime > STALE:
                        os.unlink(entry.path)  # noqa: PTH108
