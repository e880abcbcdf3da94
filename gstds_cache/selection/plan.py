"""Which rows make up which batch, and how many of them stay: all of it known before anything is computed.

The order of an epoch is keyed by (seed, epoch), so any batch of any epoch can be computed without the ones before it.
With P *batch assignments* there are P orders, and epoch e takes order e mod P, cut into the same batches (*groups*) as
before, in another sequence: what was computed for a group once holds in later epochs. Memory does not grow with the
rows or the epochs, but for 8 bytes a batch of an epoch and 8 bytes an epoch, and where classes come by turns 24 a row.

The last batch of an epoch is between half and one and a half times as large as the others: a remainder of a few rows
has no graph worth the name, and a training step on its one kept row undid the others (measured on digits: the loss
diverged).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Int, Int64

from gstds_cache.config import BALANCED, SMALLEST_BATCH
from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.order import (
    PERMUTATION,
    ClassBalanced,
    Order,
    batches_in,
    rows_at_places,
    rows_in_order,
)
from gstds_cache.selection.rows import EligibleRows
from gstds_cache.selection.schedule import PIECE, Schedule


def batch_of_few(rows: int, knn: int) -> int:
    """Rows of a batch where there are too few for the usual one: a quarter, or as many as neighbours need."""
    return max(SMALLEST_BATCH, rows // 4, min(rows, 2 * (knn + 1)))


def _batch_of_classes(fits: int) -> str:
    """What to do where batches of no more than ``fits`` rows have every class as often, and no row twice."""
    if fits < SMALLEST_BATCH:
        return "no batch is small enough: leave `order` out, or hide the rows of classes that have so few"
    knn = f", and `knn={fits - 1}` or less" if fits <= 10 else ""
    return f"use `batch_size={fits}` or less{knn}: the last batch of an epoch may be half as large again"


@dataclass(frozen=True)
class BatchPlan:
    """One batch before selection.

    Attributes:
        seq: Position in the whole run, from 0.
        epoch: Epoch, from 0.
        batch_id: Position in the epoch, from 0.
        indices: Rows of the store, int64 [B].
        keep: How many of them stay (M).
        assignment: Which of the plan's batch assignments this is of; the epoch, where every epoch has its own.
        group: Which batch of that assignment: the same (assignment, group) holds the same rows.
    """

    seq: int
    epoch: int
    batch_id: int
    indices: Int64[np.ndarray, " B"]
    keep: int
    assignment: int = 0
    group: int = 0


@dataclass(frozen=True, eq=False)
class PlannedStack:
    """Consecutive batches of one size before selection, as arrays: planning them one by one takes longer than a GPU.

    Attributes:
        seq: Position of each in the whole run, consecutive, int64 [G].
        epoch: Epoch, int64 [G].
        batch_id: Position in the epoch, int64 [G].
        indices: Rows of the store, int64 [G, B].
        keep: How many of them stay, int64 [G].
        assignment: As :attr:`BatchPlan.assignment`, int64 [G].
        group: As :attr:`BatchPlan.group`, int64 [G].
    """

    seq: Int64[np.ndarray, " G"]
    epoch: Int64[np.ndarray, " G"]
    batch_id: Int64[np.ndarray, " G"]
    indices: Int64[np.ndarray, "G B"]
    keep: Int64[np.ndarray, " G"]
    assignment: Int64[np.ndarray, " G"]
    group: Int64[np.ndarray, " G"]

    def __len__(self) -> int:
        return len(self.seq)

    def __iter__(self) -> Iterator[BatchPlan]:
        numbers = (self.seq, self.epoch, self.batch_id, self.keep, self.assignment, self.group)
        for (seq, epoch, batch_id, keep, assignment, group), indices in zip(
            zip(*(part.tolist() for part in numbers), strict=True), self.indices, strict=True
        ):
            yield BatchPlan(seq, epoch, batch_id, indices, keep, assignment, group)

    def parts(self, most: int) -> list[PlannedStack]:
        """The same batches in stacks of up to ``most``, in order."""
        pieces = [slice(first, first + most) for first in range(0, len(self), most)]
        return [PlannedStack(*(getattr(self, f.name)[piece] for f in fields(self))) for piece in pieces]


class SelectionPlan:
    """The batches of a run.

    Attributes:
        rows: Rows that take part.
        batches_per_epoch: Batches in an epoch; the last holds what is left, from 0.5 to 1.5 times ``batch_size``.
        total_batches: Batches in the run.
        order: Order of an epoch.
        batch_assignments: Fixed assignments of rows to batches; 0 where every epoch has a new one.
        total_rows: Rows that go in over the whole run: what training on everything would spend.
        kept_per_epoch: Rows kept in each epoch.
        total_kept: Rows kept in the run: the gradient samples a trainer will spend.
    """

    def __init__(
        self,
        rows: EligibleRows,
        *,
        batch_size: int,
        epochs: int,
        schedule: Schedule,
        seed: int,
        order: Order = PERMUTATION,
        shard_rows: int = 1,
        batch_assignments: int = 0,
        labels: Int[np.ndarray, " N"] | None = None,
    ) -> None:
        """Plan the run.

        Args:
            rows: Rows that take part; those without an embedding are left out.
            batch_size: Rows a batch holds before selection (B).
            epochs: Passes over ``rows``.
            schedule: Filter ratio over the run.
            seed: Key of the permutations.
            order: Order of an epoch.
            shard_rows: Rows of a shard of the store; matters with windows.
            batch_assignments: Fixed assignments of rows to batches, through which epochs cycle; 0 draws a new one in
                every epoch.
            labels: Of every row of the store, where classes come by turns.

        Raises:
            UsageError: There are fewer rows than one batch holds, the schedule does not fit the run, or classes that
                are to come by turns have too few rows, or too many.
        """
        if len(rows) < SMALLEST_BATCH:
            raise UsageError(
                f"too few images: {len(rows)} rows have an embedding, a batch has at least {SMALLEST_BATCH}",
                hint="there is nothing to select from so few: embed more images, or train on all of them",
            )
        if batch_size > len(rows):
            fits = batch_of_few(len(rows), 1)
            raise UsageError(
                f"`batch_size`: got {batch_size}, but only {len(rows)} rows have an embedding",
                hint=f"use `batch_size={fits}` or so" + (f", and `knn={fits - 1}` or less" if fits <= 10 else ""),
            )
        self.rows, self.batch_size, self.epochs, self.schedule, self.seed = rows, batch_size, epochs, schedule, seed
        self.order, self.batch_assignments = order, batch_assignments
        self.batches_per_epoch = batches_in(len(rows), batch_size)
        self.total_batches = self.batches_per_epoch * epochs
        sizes = np.full(self.batches_per_epoch, batch_size, np.int64)
        sizes[-1] = len(rows) - batch_size * (self.batches_per_epoch - 1)
        run_schedule = schedule.over(sizes, epochs)
        self.kept_per_epoch: list[int] = run_schedule.kept_per_epoch.tolist()
        self.total_rows, self.total_kept = len(rows) * epochs, sum(self.kept_per_epoch)
        self._piece = lru_cache(maxsize=2)(lambda n: run_schedule.piece(n * PIECE, (n + 1) * PIECE))
        self._groups = lru_cache(maxsize=2)(self._shuffle_groups)
        balanced = None
        if order.balanced:
            assert labels is not None
            balanced = ClassBalanced(rows, labels, seed, batch_size)
            self._check_classes(balanced, int(sizes.max()))
        self._rows_at = rows_in_order(rows, order, seed=seed, shard_rows=shard_rows, balanced=balanced)
        self._rows_at_places = rows_at_places(rows, seed, balanced)

    def _check_classes(self, balanced: ClassBalanced, largest: int) -> None:
        """Refuse batches in which a row would come twice, and assignments in which some never come.

        Raises:
            UsageError: There are such.
        """
        fewest, wanted = int(balanced.sizes.min()), balanced.most_in(largest)
        if fewest < wanted:
            raise UsageError(
                f"`order={BALANCED!r}`: a class has {fewest} rows, a batch of {largest} takes {wanted} of each",
                hint=_batch_of_classes(fewest * len(balanced.classes) * 2 // 3),
            )
        passes = int(balanced.passes.max())
        if 0 < self.batch_assignments < min(passes, self.epochs):
            raise UsageError(
                f"`batch_assignments`: got {self.batch_assignments}, and it takes {passes} epochs until all rows of "
                "the largest class have come: some never would",
                hint=f"use `batch_assignments={passes}`, or leave it out",
            )

    def batch(self, seq: int) -> BatchPlan:
        """Batch ``seq`` of the run, by itself."""
        epoch, batch_id = divmod(seq, self.batches_per_epoch)
        assignment, group = self.place(seq)
        start = group * self.batch_size
        indices = self._rows_at(assignment, start, start + self.rows_in(group))
        return BatchPlan(seq, epoch, batch_id, indices, self.keep(seq), assignment, group)

    def stack(self, first: int, stop: int) -> PlannedStack:
        """The batches ``first`` to ``stop``, which are of one size: the same as :meth:`batch` gives one by one."""
        seq = np.arange(first, stop)
        epoch, batch_id = np.divmod(seq, self.batches_per_epoch)
        size = self.rows_in(int(batch_id[0]))
        group, parts = batch_id.copy(), []
        for number in range(int(epoch[0]), int(epoch[-1]) + 1):
            here = slice(*np.searchsorted(epoch, (number, number + 1)).tolist())
            assignment = self._assignment(number)
            if self._in_its_own_order(number):
                start = int(batch_id[here][0]) * self.batch_size
                parts.append(self._rows_at(assignment, start, start + size * len(batch_id[here])))
            else:
                group[here] = self._groups(number)[batch_id[here]]
                places = group[here, None] * self.batch_size + np.arange(size)
                parts.append(self._rows_at_places(assignment, places.ravel()))
        indices = (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(len(seq), size)
        keep = np.concatenate([self._piece(n)[1] for n in range(first // PIECE, (stop - 1) // PIECE + 1)])
        begun = first // PIECE * PIECE
        assignments = epoch % self.batch_assignments if self.batch_assignments else epoch
        return PlannedStack(seq, epoch, batch_id, indices, keep[first - begun : stop - begun], assignments, group)

    def stacks(self, start: int, most: int, end: int | None = None) -> Iterator[PlannedStack]:
        """The batches from ``start`` to ``end``, up to ``most`` in a stack; an epoch's last alone, where it differs.

        Yields:
            Stacks, in order.
        """
        end = self.total_batches if end is None else end
        odd = self.rows_in(self.batches_per_epoch - 1) != self.batch_size
        first = start
        while first < end:
            stop = min(first + most, end)
            if odd:
                last = first - first % self.batches_per_epoch + self.batches_per_epoch - 1
                stop = min(stop, last if first < last else first + 1)
            yield self.stack(first, stop)
            first = stop

    def groups(self, epoch: int) -> Int64[np.ndarray, " T"]:
        """The groups of an epoch's batches, in the order in which they come."""
        return np.arange(self.batches_per_epoch) if self._in_its_own_order(epoch) else self._groups(epoch)

    def keep(self, seq: int) -> int:
        """Rows that stay of batch ``seq``."""
        return int(self._piece(seq // PIECE)[1][seq % PIECE])

    @cached_property
    def most_kept(self) -> int:
        """The most rows that stay of any batch."""
        return max(int(self._piece(n)[1].max()) for n in range(-(-self.total_batches // PIECE)))

    def ratio(self, seq: int) -> float:
        """The schedule's filter ratio at batch ``seq``."""
        return float(self._piece(seq // PIECE)[0][seq % PIECE])

    def came_before(self, start: int) -> int:
        """The ``seq`` from which on all batches are of rows that came together before, in a run from batch ``start``.

        At most ``total_batches``, as where every epoch has an assignment of its own.
        """
        if not self.batch_assignments:
            return self.total_batches
        whole = -(-start // self.batches_per_epoch)  # first epoch that the run begins with
        return min(self.total_batches, (whole + self.batch_assignments) * self.batches_per_epoch)

    def place(self, seq: int) -> tuple[int, int]:
        """Assignment and group of batch ``seq``: batches of the same are of the same rows, in the same order."""
        epoch, batch_id = divmod(seq, self.batches_per_epoch)
        return self._assignment(epoch), self._group(epoch, batch_id)

    def repeat(self, epoch: int) -> int:
        """How many epochs before this one had the same batches."""
        return epoch // self.batch_assignments if self.batch_assignments else 0

    def rows_in(self, group: int) -> int:
        """Rows of a group before selection."""
        last = group == self.batches_per_epoch - 1
        return len(self.rows) - group * self.batch_size if last else self.batch_size

    def _group(self, epoch: int, batch_id: int) -> int:
        """The group that comes at ``batch_id`` of an epoch.

        An assignment is gone through in its own order first, as it is with windows, which keep reading shard by shard
        that way; the group of another size stays last.
        """
        return batch_id if self._in_its_own_order(epoch) else int(self._groups(epoch)[batch_id])

    def _in_its_own_order(self, epoch: int) -> bool:
        return epoch < self.batch_assignments or not self.batch_assignments or self.order.window is not None

    def _assignment(self, epoch: int) -> int:
        return epoch % self.batch_assignments if self.batch_assignments else epoch

    def _shuffle_groups(self, epoch: int) -> Int64[np.ndarray, " T"]:
        last = self.batches_per_epoch - 1
        return np.append(rng_for(self.seed, "groups", epoch).permutation(last), last)
