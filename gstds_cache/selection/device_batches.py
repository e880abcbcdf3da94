"""From what a device computed of a stack to its selected batches: in passes over the stack, not batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt16

from gstds_cache.graph.compiled import compiled
from gstds_cache.selection.device_results import SolvedStack
from gstds_cache.selection.plan import BatchPlan
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.selection.spectra import Spectrum
from gstds_cache.spectral.status import Status

STATUS = [Status(number) for number in range(64)]  # making a flag takes as long as the rest of a batch
PIECE = 8  # batches whose rules one thread runs

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
    planned, short = stack.planned, np.zeros(len(stack.planned), np.bool_)
    classes = int(labels.max(initial=-1)) + 1
    short_into(labels, planned.indices, stack.positions, planned.keep, floor, classes, short)
    return np.flatnonzero(short)


@compiled()
def short_into(
    labels: Int[np.ndarray, " N"],
    indices: Int64[np.ndarray, "G B"],
    positions: UInt16[np.ndarray, "G M"],
    keep: Int64[np.ndarray, " G"],
    floor: int,
    classes: int,
    short: Bool[np.ndarray, " G"],
) -> None:
    """Say of each batch whether a class keeps less than a floor of its rows, and less than it has.

    Args:
        labels: Label of each row of the store, below ``classes``; -1 where there is none.
        indices: Rows of the batches, ``[G, B]``.
        positions: Which of them stay, from the start, ``[G, M]``.
        keep: How many, ``[G]``.
        floor: Rows that are to stay of each class.
        classes: Classes.
        short: Where the answers go, ``[G]``.
    """
    missing = np.zeros(classes, np.int64)
    for g in range(len(indices)):
        for i in range(indices.shape[1]):
            label = labels[indices[g, i]]
            if label >= 0:
                missing[label] = min(missing[label] + 1, floor)
        for m in range(keep[g]):
            label = labels[indices[g, positions[g, m]]]
            if label >= 0:
                missing[label] -= 1
        for i in range(indices.shape[1]):
            label = labels[indices[g, i]]
            if label >= 0:
                short[g] |= missing[label] > 0
                missing[label] = 0


@compiled()
def count_labels_into(
    labels: Int[np.ndarray, " N"], rows: Int64[np.ndarray, " R"], counts: Int64[np.ndarray, " C1"]
) -> None:
    """Count rows by their label: label c in place c + 1, those without one in place 0.

    Args:
        labels: Label of each row of the store, from -1 on.
        rows: Rows of the store.
        counts: Where they are added up, ``[C + 1]``.
    """
    for i in range(len(rows)):
        counts[labels[rows[i]] + 1] += 1


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
