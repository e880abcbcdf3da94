"""Lines for the user: what a public call's ``notify`` is called with, and what is done with them by default."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

Notify = Callable[[str], None]
"""Called with one line: a warning, an estimate, a note. Arguments stand in backticks, as in errors."""


def log(line: str) -> None:
    """Log ``line`` as a warning of the logger ``gstds_cache``."""
    logging.getLogger("gstds_cache").warning("%s", line)


@cache
def log_once(line: str) -> None:
    """:func:`log` what concerns the whole process, such as a device that cannot be used, the first time it is seen."""
    log(line)
