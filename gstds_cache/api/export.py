"""Tables for other tools: the embeddings of a store, and how a selection sees each sample."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gstds_cache.config import DEVICE
from gstds_cache.errors import UsageError
from gstds_cache.files.location import LocationLike, file_to_write
from gstds_cache.report.recompute import RecomputeSettings, selector_of, store_of, watch_again
from gstds_cache.report.scores import SampleScores, check_target, write_scores
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.store.export import export_rows
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        file: Where it is.
        rows: Rows in it.
        dim: Length of an embedding.
        dtype: How an embedding is stored.
        undecodable: How many of the rows have no embedding, as their image could not be decoded.
        bytes: Size of the file.
    """

    file: Path
    rows: int
    dim: int
    dtype: str
    undecodable: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"file": str(self.file)}


@dataclass(frozen=True)
class ScoresReport:
    """What :func:`export_scores` wrote.

    Attributes:
        file: The table.
        rows: Samples in it.
        epochs: Epochs of the selection.
        never_kept: Samples that were in a batch and never stayed.
        unseen: Samples that were never in a batch, as they have no embedding.
        bytes: Size of the file.
    """

    file: Path
    rows: int
    epochs: int
    never_kept: int
    unseen: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"file": str(self.file)}


def export_store(store: LocationLike | EmbeddingStore, file: str | Path, *, replace: bool = False) -> ExportReport:
    """Write the embeddings of a whole store for other tools, row i at place i.

    Args:
        store: The store, or its location.
        file: ``.npy``, ``.parquet`` or ``.arrow``; :func:`gstds_cache.store.export.export_rows` says what is in each.
        replace: Whether ``file`` may exist.

    Returns:
        What was written.

    Raises:
        UsageError: The ending is another, or ``file`` exists, is a folder or in one that does not exist.
        ChunkCorruptError: A shard is damaged.
        IncompleteError: The store is not complete.
    """
    path = file_to_write(file, "`file`")
    opened = store if isinstance(store, EmbeddingStore) else EmbeddingStore(store)
    size = export_rows(opened, path, replace=replace)
    return ExportReport(path, len(opened), opened.spec.dim, opened.spec.dtype, len(opened.without_embedding), size)


def export_scores(
    store: LocationLike | EmbeddingStore,
    selection: str | os.PathLike[str],
    file: str | Path,
    *,
    device: str = DEVICE,
    guidance: str | None = None,
    schedule: str | None = None,
    replace: bool = False,
    progress: Progress | bool | None = True,
) -> ScoresReport:
    """Compute a selection again and write how it sees each sample: one row a sample.

    The columns are those of :func:`gstds_cache.report.scores.write_scores`.

    Args:
        store: The store the selection was made from, or its location.
        selection: The selection.
        file: ``.parquet`` or ``.arrow``.
        device: Where the selection is computed again.
        guidance: The selection's guidance, where it was a file or had parameters; None finds it out.
        schedule: The selection's schedule, where it was ``file:PATH``: a selection names no paths.
        replace: Whether ``file`` may exist.
        progress: As for :func:`gstds_cache.embed`; counts batches.

    Returns:
        What was written.

    Raises:
        UsageError: ``file`` cannot be written, or this version does not know the selection's settings, or the selection
            is of candidates.
        StreamError: The selection is damaged.
        FingerprintMismatchError: The store is not the selection's, or gives other rows here.
    """
    path = file_to_write(file, "`file`")
    check_target(path, replace=replace)
    settings = RecomputeSettings(device=device, guidance=guidance, schedule=schedule)
    with open_selection(selection) as stream, showing(progress, "batches") as show:
        header = stream.header
        opened = store if isinstance(store, EmbeddingStore) else store_of(header, store)
        scores = SampleScores(len(opened))
        if header.candidates:
            raise UsageError(
                "the selection offers candidates: which rows are trained on is decided while training, by their losses",
                hint="give a selection of kept rows",
            )
        for batch in watch_again(selector_of(opened, header, settings), stream):
            scores.add(batch)
            show("score", batch.selection.seq + 1, header.total_batches, {})
    size = write_scores(scores, opened, header, path)
    unseen = int((scores.seen == 0).sum())
    never = int((scores.kept == 0).sum()) - unseen
    return ScoresReport(path, len(opened), header.epochs, never, unseen, size)
