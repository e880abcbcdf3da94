"""What is left to embed of each shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from gstds_cache.store.commit_record import Quarantined
from gstds_cache.store.spec import CacheSpec

Known = Callable[[range], tuple[Bool[np.ndarray, " R"], Float[np.ndarray, "K D"]]]
"""For a range of rows, which of them [R] are known already, and those rows' embeddings [K, D] in order."""


@dataclass
class ShardWork:
    """One shard on its way: the rows it will be, and what is left to embed of it.

    Attributes:
        shard: The shard.
        span: Its rows.
        block: [R, D] the rows, known ones filled in.
        batches: Rows of each forward pass; no row that is known, and none of another shard.
        quarantined: Items found so far that do not decode, or for which the model gives no features.
    """

    shard: int
    span: range
    block: Float[np.ndarray, "R D"]
    batches: list[Sequence[int]]
    quarantined: list[Quarantined] = field(default_factory=list)


class Plan:
    """Shards' work, prepared by whoever needs it first: the loader, which looks for rows to decode, or the main loop.

    Both are the same thread.
    """

    def __init__(self, spec: CacheSpec, known: Known | None) -> None:
        self._spec, self._known = spec, known
        self._work: dict[int, ShardWork] = {}
        self._nothing_to_do: set[int] = set()

    def look_ahead(self, shard: int) -> list[Sequence[int]]:
        """Rows of each of the shard's forward passes."""
        return [] if shard in self._nothing_to_do else self.take(shard).batches

    def take(self, shard: int) -> ShardWork:
        """The shard's work."""
        work = self._work.get(shard) or self._prepare(shard)
        if work.batches:
            self._work[shard] = work
        else:
            # Not kept: in a data set that is known whole, the loader would fill memory with every shard's rows.
            self._nothing_to_do.add(shard)
        return work

    def forget(self, shard: int) -> None:
        """Drop the work of a shard whose batches have all been loaded."""
        self._work.pop(shard, None)

    def _prepare(self, shard: int) -> ShardWork:
        span, size = self._spec.rows_of(shard), self._spec.batch_size
        block = np.zeros((len(span), self._spec.dim), self._spec.dtype)
        rows: Sequence[int] = span
        if self._known is not None:
            known, values = self._known(span)
            block[known] = values
            rows = (np.flatnonzero(~known) + span.start).tolist()
        return ShardWork(shard, span, block, [rows[start : start + size] for start in range(0, len(rows), size)])
