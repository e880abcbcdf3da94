"""Re-packing: what a selection keeps, cut into batches of one constant size.

A filter ratio makes every batch of a selection smaller. Re-packed, it becomes *fewer full batches* instead: the device
stays as busy as it was, and shapes are constant, which compilers and CUDA graphs ask for. Rows keep their order. A
stored selection stays one record per graph; re-packing is the consumer's, and a generator that reads no further ahead
than one batch needs.

The rows left at the end of an epoch, fewer than a batch, are subject to ``remainder``:

- ``carry`` puts them at the head of the next epoch's first batch. Only the last ``total_kept % size`` rows of the run
  are left out. A batch across an epoch's border can hold a row twice, once of each epoch.
- ``drop`` leaves them out: each epoch stands alone, and no batch holds a row twice, unless classes come by turns: there
  a row of a rare class may come again in the selection's next batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
from jaxtyping import Int64

from gstds_cache.errors import UsageError
from gstds_cache.selection.selected_batch import SelectedBatch

Remainder = Literal["carry", "drop"]
REMAINDERS: tuple[Remainder, ...] = ("carry", "drop")
REMAINDER: Remainder = "carry"
"""What is done unless another policy is asked for."""


@dataclass(frozen=True)
class PackedBatch:
    """A batch of constant size.

    Attributes:
        seq: Position in the whole run, from 0, counted in batches of constant size.
        epoch: Epoch of its last row.
        batch_id: Position in that epoch, from 0.
        kept: Rows, int64 [size], in the selection's order.
    """

    seq: int
    epoch: int
    batch_id: int
    kept: Int64[np.ndarray, " size"]


def repack(batches: Iterable[SelectedBatch], size: int, remainder: Remainder = REMAINDER) -> Iterator[PackedBatch]:
    """Cut the kept rows of a selection into batches of ``size``.

    A batch is yielded as soon as it is full, before anything else is read; after the last one the selection is read to
    its end, so that a truncated one is never used up.

    Args:
        batches: The selection's batches, in order, from an epoch's beginning.
        size: Rows of each batch.
        remainder: ``carry`` or ``drop`` what is left at an epoch's end.

    Yields:
        Batches of exactly ``size`` rows.

    Raises:
        UsageError: The size or the policy cannot be meant.
    """
    require_repack(size, remainder)
    left = np.empty(0, np.int64)
    seq, epoch, batch_id = 0, -1, 0
    for batch in batches:
        if batch.epoch != epoch:
            epoch, batch_id = batch.epoch, 0
            if remainder == "drop":
                left = left[:0]
        left = np.concatenate([left, batch.kept])
        while len(left) >= size:
            full, left = left[:size], left[size:]
            yield PackedBatch(seq, epoch, batch_id, full)
            seq, batch_id = seq + 1, batch_id + 1


def packed_per_epoch(kept_per_epoch: Sequence[int], size: int, remainder: Remainder = REMAINDER) -> list[int]:
    """Batches that :func:`repack` makes in each epoch, known before any of them.

    Args:
        kept_per_epoch: Rows kept in each epoch, as a selection's header tells.
        size: Rows of each batch.
        remainder: As for :func:`repack`.

    Returns:
        Batches by epoch.

    Raises:
        UsageError: The size or the policy cannot be meant, or not one batch would be full.
    """
    require_repack(size, remainder)
    if remainder == "drop":
        counts = [kept // size for kept in kept_per_epoch]
    else:
        counts = [
            after - before for before, after in pairwise(t // size for t in accumulate(kept_per_epoch, initial=0))
        ]
    if not any(counts):
        raise UsageError(
            f"re-packing into batches of {size}: the selection keeps {list(kept_per_epoch)[:8]} rows by epoch, not one "
            "batch would be full",
            hint=f"re-pack into at most {max(kept_per_epoch, default=0)} rows",
        )
    return counts


def require_repack(size: int, remainder: str) -> None:
    """Refuse a batch size below 1 and an unknown policy.

    Raises:
        UsageError: It is one.
    """
    if size < 1:
        raise UsageError(f"re-packing: got a batch size of {size}, expected at least 1")
    if remainder not in REMAINDERS:
        raise UsageError(f"remainder: got {remainder!r}, expected one of {', '.join(REMAINDERS)}")
