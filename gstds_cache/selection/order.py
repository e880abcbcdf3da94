"""The order in which an epoch goes through the rows: keyed by (seed, epoch), with but one each row exactly once.

- ``permutation``: any order of up to 65,536 rows is as likely as any other; of more rows it is computed, not stored
  (:mod:`gstds_cache.selection.permutation`).
- ``window:ROWS``: shards of the store in random order, so many of them at a time as hold ROWS rows, and these rows in
  random order. A store that is read in windows (:mod:`gstds_cache.store.access`) then reads every shard once an epoch.
- ``class-balanced``: the classes by turns, each as often, and of each its rows in random order: "class-aware sampling"
  (L. Shen et al., "Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks", ECCV 2016,
  section 4.2). An epoch has as many places as there are rows: rows of a rare class come several times in it, those of
  a frequent one in one of several epochs.

Memory is that of a window, or of 65,536 rows, for each of the last two epochs, and does not grow with the rows; for
``class-balanced`` it is 8 bytes a row for each, and as many for the classes.

The order is named by the user and part of a selection's identity; it never follows from how much memory there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int, Int64

from gstds_cache.config import BALANCED
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
        window: Rows of a window, at least 1; None for an order of all rows.
        balanced: Whether every class comes as often.
    """

    window: int | None = None
    balanced: bool = False

    @property
    def identity(self) -> str:
        """The same text for all spellings: ``permutation``, ``class-balanced`` or ``window:ROWS``."""
        if self.balanced:
            return BALANCED
        return "permutation" if self.window is None else f"window:{self.window}"


PERMUTATION = Order()


def parse_order(text: str) -> Order:
    """Parse ``permutation``, ``class-balanced``, ``window`` or ``window:ROWS``.

    Args:
        text: The order.

    Returns:
        The order.

    Raises:
        UsageError: It is none of these.
    """
    if text in {"permutation", BALANCED}:
        return Order(balanced=text == BALANCED)
    name, _, rows = text.partition(":")
    if name != "window" or (rows and not rows.isdecimal()) or rows == "0" or (":" in text and not rows):
        raise UsageError(f"`order`: got {text!r}, expected permutation, {BALANCED}, window or window:ROWS")
    return Order(int(rows) if rows else DEFAULT_WINDOW)


class ClassBalanced:
    """Epochs in which every class comes as often: the C classes by turns, in a random order of each epoch.

    A class's rows are shuffled, and each of the next epochs takes as many of them as it has places for the class, until
    all have come; then they are shuffled again. Where an epoch has more places than the class has rows, they come in
    the same order again: of a class's neighbouring places in an epoch no two have the same row, up to as many as it has
    rows. At last the rows of each batch are shuffled: ranks take slices of it, and may leave its last rows out.

    Attributes:
        classes: The labels of the classes, int64 [C].
        sizes: Rows of each, int64 [C].
        passes: Epochs until every row of each class has come, int64 [C].
    """

    def __init__(self, rows: EligibleRows, labels: Int[np.ndarray, " N"], seed: int, batch_size: int) -> None:
        """Sort the rows by class.

        Args:
            rows: Rows that take part.
            labels: Label of every row of the store, -1 where it has none.
            seed: Key of the order.
            batch_size: Rows of a batch; an epoch's last holds what is left, from half as many to one and a half.

        Raises:
            UsageError: A row has no label, or all have the same one.
        """
        every = rows.all()
        given = labels[every]
        without = int((given < 0).sum())
        self.classes, self.sizes = np.unique(given, return_counts=True)
        if without or len(self.classes) < 2:
            got = f"{without:,} of {len(given):,} rows have no label" if without else "all rows have the same label"
            raise UsageError(
                f"`order={BALANCED!r}`: {got}, expected classes to take turns",
                hint="leave `order` out, or embed images that have a class each",
            )
        self._members = np.split(every[np.argsort(given, kind="stable")], np.cumsum(self.sizes)[:-1])
        self._seed, self._rows, self._batch_size = seed, len(every), batch_size
        self._places = len(every) // len(self.classes)  # of a class in an epoch, or one more
        self.passes = -(-self.sizes // self._places)
        self.of_epoch = lru_cache(maxsize=2)(self._order)

    def most_in(self, places: int) -> int:
        """How often a class comes among so many neighbouring places, at most."""
        return -(-places // len(self.classes))

    def _order(self, epoch: int) -> Int64[np.ndarray, " N"]:
        order, rng = np.empty(self._rows, np.int64), rng_for(self._seed, "plan-classes", epoch)
        for place, number in enumerate(rng.permutation(len(self.classes)).tolist()):
            members = self._members[number]
            turn, part = divmod(epoch, int(self.passes[number]))
            places, first = order[place :: len(self.classes)], part * self._places
            shuffled = rng_for(self._seed, "plan-class", int(self.classes[number]), turn).permutation(members)
            places[:] = shuffled[np.arange(first, first + len(places)) % len(members)]
        last = self._batch_size * (batches_in(self._rows, self._batch_size) - 1)
        batches = order[:last].reshape(-1, self._batch_size)
        rng.permuted(batches, axis=1, out=batches)
        rng.shuffle(order[last:])
        return order


def batches_in(rows: int, batch_size: int) -> int:
    """Batches of an epoch; the last holds what is left, from 0.5 to 1.5 times ``batch_size``."""
    return max(1, (rows + batch_size // 2) // batch_size)


def shards_at_once(window: int, shard_rows: int) -> int:
    """Shards of a window: as many as hold no more than its rows, at least one."""
    return max(1, window // shard_rows)


def rows_in_order(
    rows: EligibleRows, order: Order, *, seed: int, shard_rows: int, balanced: ClassBalanced | None = None
) -> RowsAt:
    """The order of an epoch's rows.

    Args:
        rows: Rows that take part.
        order: Permutation, windows, or classes by turns.
        seed: Key of the order.
        shard_rows: Rows of a shard of the store.
        balanced: The classes, where they come by turns.

    Returns:
        A function from an epoch and two positions in its order to the rows from the one to the other.
    """
    if balanced is not None:
        return lambda epoch, start, stop: balanced.of_epoch(epoch)[start:stop]
    if order.window is None:
        return _permuted(rows, seed)
    return _in_windows(rows, seed, shards_at_once(min(order.window, rows.items), shard_rows), shard_rows)


def rows_at_places(
    rows: EligibleRows, seed: int, balanced: ClassBalanced | None = None
) -> Callable[[int, Int64[np.ndarray, " B"]], Int64[np.ndarray, " B"]]:
    """The rows at any places of an epoch's order, for many batches that do not lie one after the other.

    Args:
        rows: Rows that take part.
        seed: Key of the order.
        balanced: The classes, where they come by turns; else the order is a permutation.

    Returns:
        A function from an epoch and places, which it may overwrite, to the rows.
    """
    if balanced is not None:
        return lambda epoch, places: balanced.of_epoch(epoch)[places]
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
