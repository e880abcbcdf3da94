"""A finished selection, and what making it took."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.reader import open_selection

if TYPE_CHECKING:
    from gstds_cache.training.sampler import SelectedBatchSampler


@dataclass(frozen=True, kw_only=True)
class SelectionSummary:
    """What one call selected, and what it took.

    Attributes:
        out: File of the selection; ``-`` for a stream.
        selection_digest: Identity of the selection, SHA-256 as 64 hexadecimal digits.
        cache_fingerprint: Fingerprint of the store.
        dataset_uri: Where the data set was when the store was made; None where that is not recorded.
        cache_hit: Whether nothing was computed, as the selection was made before.
        epochs: Epochs of the selection.
        total_batches: Batches of the selection; a step of training each.
        total_rows: Rows of all of them before selection.
        total_kept: Rows that stay of these, or are to be drawn of them while training.
        batches: Batches computed by this call; fewer than all where an interrupted call had left some.
        rows: Rows of these before selection.
        kept: Rows that stay of these, or are to be drawn.
        samples_per_second: ``rows`` over the seconds of selecting.
        classes: By class, rows ``seen`` by this call and rows ``kept``.
        status: Batches of this call by the status of their Fiedler vector.
        graphs_found: Batches of this call whose graph came from an earlier epoch.
        rule: Rule; ``draw NAME`` where a trainer draws.
        guidance: Digest of the guidance; ``none`` without.
        guidance_note: Where guidance came from; empty where this call looked at none.
        knn_backend: kNN backend.
        shares: Shares of the work by phase.
        seconds: Wall-clock seconds: ``open``, ``select``, ``write`` (on a stream: waiting for its reader), ``total``.
    """

    out: str
    selection_digest: str
    cache_fingerprint: str
    dataset_uri: str | None
    cache_hit: bool
    epochs: int
    total_batches: int
    total_rows: int
    total_kept: int
    batches: int
    rows: int
    kept: int
    samples_per_second: float
    classes: dict[str, dict[str, int]]
    status: dict[str, int]
    graphs_found: int
    rule: str
    guidance: str
    guidance_note: str
    knn_backend: str
    shares: dict[str, float]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


@dataclass(frozen=True)
class Selection:
    """A finished selection. Iterating yields its batches, each record checked; its path is what ``os.fspath`` gives.

    ::

        selection = gstds_cache.select(store, keep=0.25, epochs=20)
        loader = DataLoader(dataset, batch_sampler=selection.sampler())

    Attributes:
        path: Its file, absolute; :func:`~gstds_cache.open_selection` reads it.
        summary: What the call that gave it did. Selections of the same file are equal, whichever call gave them.
    """

    path: Path
    summary: SelectionSummary = field(compare=False)

    def __repr__(self) -> str:
        steps = f"epochs={self.epochs}, total_steps={self.total_steps}"
        return f"Selection({str(self.path)!r}, {self.summary.rule!r}, {steps})"

    def __fspath__(self) -> str:
        """Its file: whatever takes a selection's path takes this as well."""
        return os.fspath(self.path)

    @property
    def digest(self) -> str:
        """Identity of the selection, SHA-256 as 64 hexadecimal digits."""
        return self.summary.selection_digest

    @property
    def epochs(self) -> int:
        """Epochs."""
        return self.summary.epochs

    @property
    def total_steps(self) -> int:
        """Batches of all epochs: steps of training, for a learning-rate schedule."""
        return self.summary.total_batches

    def __iter__(self) -> Iterator[SelectedBatch]:
        """Iterate over the batches, from the first.

        Yields:
            The batches in order.

        Raises:
            StreamError: The file is damaged or truncated.
        """
        with open_selection(self.path) as stream:
            yield from stream

    def sampler(self, **arguments: Any) -> SelectedBatchSampler:
        """A batch sampler over the selection, for a DataLoader.

        Args:
            arguments: As :class:`~gstds_cache.SelectedBatchSampler` takes them after the selection.
        """
        from gstds_cache.training.sampler import SelectedBatchSampler

        return SelectedBatchSampler(self.path, **arguments)
