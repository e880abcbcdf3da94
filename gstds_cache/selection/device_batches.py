"""From what a device computed of a stack to its selected batches: in passes over the stack, not batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int, Int64

from gstds_cache.selection.device_path import SolvedStack
from gstds_cache.selection.plan import BatchPlan
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.selection.spectra import Spectrum
from gstds_cache.spectral.status import Status

STATUS = [Status(number) for number in range(64)]  # making a flag takes as long as the rest of a batch
PIECE = 8  # batches whose rules one thread runs
COUNTED_AT_ONCE = 1 << 22  # numbers of a table of graphs and classes

R = TypeVar("R")
Choose = Callable[[BatchPlan, Spectrum], SelectedBatch]
HoldFloor = Callable[[BatchPlan, np.ndarray], np.ndarray]


def selections_of(
    stack: SolvedStack, choose: Choose, *, labels: Int[np.ndarray, " N"], floor: int, hold: HoldFloor
) -> list[SelectedBatch]:
    """The selected batches of a stack.

    Args:
        stack: The stack.
        choose: Selects from a batch by its spectrum, where the device did not.
        labels: Label of each row of the store, -1 where there is none; for ``floor``.
        floor: Rows of each class that are to stay of a batch; 0 for no floor.
        hold: From a batch and the positions that its rule keeps to those that hold the floor.

    Returns:
        One of each batch, in order.
    """
    planned, spectra = stack.planned, stack.spectra
    if stack.positions is None or stack.score is None:
        return [choose(batch, spectra[n]) for n, batch in enumerate(planned)]
    kept = np.take_along_axis(planned.indices, stack.positions.astype(np.int64), axis=1)
    numbers = (planned.seq, planned.epoch, planned.batch_id, planned.keep, stack.status)
    columns = [*(part.tolist() for part in numbers), stack.value.tolist(), stack.residual.tolist()]
    rows_in = planned.indices.shape[1]
    made = [
        SelectedBatch(seq, epoch, batch_id, rows_in, rows[:keep], score[:keep], STATUS[status], value, residual)
        for seq, epoch, batch_id, keep, status, value, residual, rows, score in zip(
            *columns, kept, stack.score, strict=True
        )
    ]
    again = set(spectra)
    if floor:
        again |= set(_short(stack, labels, floor).tolist())
    if again:
        batches = list(planned)
        for n in sorted(again):
            made[n] = choose(batches[n], spectra[n]) if n in spectra else _held(stack, n, batches[n], made[n], hold)
    return made


def _held(stack: SolvedStack, n: int, batch: BatchPlan, selection: SelectedBatch, hold: HoldFloor) -> SelectedBatch:
    """A batch with rows exchanged, so that its classes keep the floor."""
    assert stack.positions is not None
    assert stack.vector is not None
    positions = hold(batch, stack.positions[n, : batch.keep].astype(np.int64))
    return SelectedBatch(
        seq=selection.seq,
        epoch=selection.epoch,
        batch_id=selection.batch_id,
        n_in=selection.n_in,
        kept=batch.indices[positions],
        score=stack.vector[n, positions].astype(np.float32),
        status=selection.status,
        value=selection.value,
        residual=selection.residual,
    )


def _short(stack: SolvedStack, labels: Int[np.ndarray, " N"], floor: int) -> Int64[np.ndarray, " U"]:
    """Batches of which a class keeps less than the floor, and less than it has."""
    assert stack.positions is not None
    planned, classes = stack.planned, int(labels.max(initial=-1)) + 2
    stays: Bool[np.ndarray, "G M"] = np.arange(stack.positions.shape[1]) < planned.keep[:, None]
    short = []
    for first in range(0, len(planned), max(1, COUNTED_AT_ONCE // classes)):
        some = slice(first, first + max(1, COUNTED_AT_ONCE // classes))
        of_rows = labels[planned.indices[some]].astype(np.int64) + 1
        graphs = len(of_rows)
        of_rows += classes * np.arange(graphs)[:, None]
        kept = np.take_along_axis(of_rows, stack.positions[some].astype(np.int64), axis=1)[stays[some]]
        present, have = (
            np.bincount(x.ravel(), minlength=graphs * classes).reshape(graphs, classes)[:, 1:] for x in (of_rows, kept)
        )
        short.append(np.flatnonzero((have < np.minimum(present, floor)).any(axis=1)) + first)
    return np.concatenate(short)


def pieces_of(stacks: Iterable[SolvedStack]) -> Iterator[list[tuple[BatchPlan, Spectrum]]]:
    """Batches and their spectra, a few at a time, for threads that share the rules' work.

    Yields:
        Up to :data:`PIECE` of one stack.
    """
    for stack in stacks:
        pairs = [(batch, stack.spectra[n]) for n, batch in enumerate(stack.planned)]
        for first in range(0, len(pairs), PIECE):
            yield pairs[first : first + PIECE]


def map_pairs(choose: Callable[[BatchPlan, Spectrum], R], pairs: list[tuple[BatchPlan, Spectrum]]) -> list[R]:
    """What ``choose`` makes of each pair."""
    return [choose(*pair) for pair in pairs]
