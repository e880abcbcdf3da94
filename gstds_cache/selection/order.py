"""The order in which an epoch goes through the rows: keyed by (seed, epoch), each row exactly once.

- ``permutation``: any order is as likely as any other.
- ``window:ROWS``: units of the store in random order, so many of them at a time as hold ROWS rows, and these rows in
  random order. A store that is read in windows (:mod:`gstds_cache.store.access`) then reads every unit once an epoch.

The order is named by the user and part of a selection's identity; it never follows from how much memory there is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for

DEFAULT_WINDOW = 65536
Order = Callable[[int], Int64[np.ndarray, " n"]]  # from an epoch to rows


def parse_order(text: str) -> int | None:
    """Rows of a window; None for a permutation.

    Args:
        text: ``permutation``, ``window`` or ``window:ROWS``.

    Raises:
        UsageError: It is none of these.
    """
    if text == "permutation":
        return None
    name, _, rows = text.partition(":")
    if name != "window" or (rows and not rows.isdecimal()) or rows == "0" or (":" in text and not rows):
        raise UsageError(f"--order: got {text!r}, expected permutation, window or window:ROWS")
    return int(rows) if rows else DEFAULT_WINDOW


def units_at_once(window: int, unit_rows: int) -> int:
    """Units of a window: as many as hold no more than its rows, at least one."""
    return max(1, window // unit_rows)


def make_order(rows: Int64[np.ndarray, " n"], *, seed: int, window: int | None, unit_rows: int) -> Order:
    """The order of an epoch's rows.

    Args:
        rows: Rows that take part, ascending.
        seed: Key of the order.
        window: Rows of a window, or None for a permutation of all.
        unit_rows: Rows of a unit of the store.

    Returns:
        A function from an epoch to its rows in order.
    """
    if window is None:
        return lambda epoch: rows[rng_for(seed, "plan", epoch).permutation(len(rows))]
    units, starts = np.unique(rows // unit_rows, return_index=True)
    pieces = np.split(rows, starts[1:])
    at_once = units_at_once(window, unit_rows)

    def order(epoch: int) -> Int64[np.ndarray, " n"]:
        rng = rng_for(seed, "plan-windows", epoch)
        shuffled = rng.permutation(len(units))
        return np.concatenate(
            [
                rng.permutation(np.concatenate([pieces[unit] for unit in shuffled[first : first + at_once]]))
                for first in range(0, len(units), at_once)
            ]
        )

    return order
