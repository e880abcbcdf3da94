"""The order in which an epoch goes through the rows: keyed by (seed, epoch), each row exactly once.

- ``permutation``: any order of up to 65,536 rows is as likely as any other; of more rows it is computed, not stored
  (:mod:`gstds_cache.selection.permutation`).
- ``window:ROWS``: shards of the store in random order, so many of them at a time as hold ROWS rows, and these rows in
  random order. A store that is read in windows (:mod:`gstds_cache.store.access`) then reads every shard once an epoch.

Memory is that of a window, or of 65,536 rows, for each of the last two epochs: it does not grow with the rows.

The order is named by the user and part of a selection's identity; it never follows from how much memory there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.permutation import Permutation
from gstds_cache.selection.rows import EligibleRows

DEFAULT_WINDOW = 65536
# From an epoch, a first position and one past the last to the rows at these positions.
RowsAt = Callable[[int, int, int], Int64[np.ndarray, " B"]]


@dataclass(frozen=True)
class Order:
    """The order of an epoch, parsed.

    Attributes:
        window: Rows of a window, at least 1; None for a permutation of all rows.
    """

    window: int | None = None

    @property
    def identity(self) -> str:
        """The same text for all spellings: ``permutation`` or ``window:ROWS``."""
        return "permutation" if self.window is None else f"window:{self.window}"


PERMUTATION = Order()


def parse_order(text: str) -> Order:
    """Parse ``permutation``, ``window`` or ``window:ROWS``.

    Args:
        text: The order.

    Returns:
        The order.

    Raises:
        UsageError: It is none of these.
    """
    if text == "permutation":
        return Order()
    name, _, rows = text.partition(":")
    if name != "window" or (rows and not rows.isdecimal()) or rows == "0" or (":" in text and not rows):
        raise UsageError(f"`order`: got {text!r}, expected permutation, window or window:ROWS")
    return Order(int(rows) if rows else DEFAULT_WINDOW)


def shards_at_once(window: int, shard_rows: int) -> int:
    """Shards of a window: as many as hold no more than its rows, at least one."""
    return max(1, window // shard_rows)


def rows_in_order(rows: EligibleRows, order: Order, *, seed: int, shard_rows: int) -> RowsAt:
    """The order of an epoch's rows.

    Args:
        rows: Rows that take part.
        order: Permutation or windows.
        seed: Key of the order.
        shard_rows: Rows of a shard of the store.

    Returns:
        A function from an epoch and two positions in its order to the rows from the one to the other.
    """
    if order.window is None:
        return _permuted(rows, seed)
    return _in_windows(rows, seed, shards_at_once(min(order.window, rows.items), shard_rows), shard_rows)


def rows_at_places(rows: EligibleRows, seed: int) -> Callable[[int, Int64[np.ndarray, " B"]], Int64[np.ndarray, " B"]]:
    """The rows at any places of an epoch's permutation, for many batches that do not lie one after the other.

    Args:
        rows: Rows that take part.
        seed: Key of the order.

    Returns:
        A function from an epoch and places, which it may overwrite, to the rows.
    """
    of_epoch = _permutations(rows, seed)
    return lambda epoch, places: rows.at(of_epoch(epoch).of(places))


def _permuted(rows: EligibleRows, seed: int) -> RowsAt:
    of_epoch = _permutations(rows, seed)
    return lambda epoch, start, stop: rows.at(of_epoch(epoch).at(start, stop))


def _permutations(rows: EligibleRows, seed: int) -> Callable[[int], Permutation]:
    @lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> Permutation:
        return Permutation(len(rows), rng_for(seed, "plan", epoch))

    return of_epoch


def _in_windows(rows: EligibleRows, seed: int, at_once: int, shard_rows: int) -> RowsAt:
    bounds = rows.below(np.minimum(np.arange(-(-rows.items // shard_rows) + 1) * shard_rows, rows.items))
    shards = np.flatnonzero(np.diff(bounds))  # those with a row that takes part

    @lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " W1"]]:
        """The shards in order, and where each window begins and the last one ends."""
        shuffled = shards[rng_for(seed, "plan-windows", epoch).permutation(len(shards))]
        counts = bounds[shuffled + 1] - bounds[shuffled]
        return shuffled, np.append(0, np.cumsum(np.add.reduceat(counts, np.arange(0, len(shards), at_once))))

    @lru_cache(maxsize=2)
    def of_window(epoch: int, window: int) -> Int64[np.ndarray, " w"]:
        here = of_epoch(epoch)[0][window * at_once : (window + 1) * at_once].tolist()
        numbers = np.concatenate([np.arange(bounds[shard], bounds[shard + 1]) for shard in here])
        return rows.at(rng_for(seed, "plan-window", epoch, window).permutation(numbers))

    def rows_at(epoch: int, start: int, stop: int) -> Int64[np.ndarray, " B"]:
        begins = of_epoch(epoch)[1]
        first, last = np.searchsorted(begins, (start, stop - 1), side="right") - 1
        parts = [of_window(epoch, window) for window in range(first, last + 1)]
        return np.concatenate(parts)[start - begins[first] : stop - begins[first]]

    return rows_at
