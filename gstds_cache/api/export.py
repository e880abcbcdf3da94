"""Tables for other tools: the embeddings of a store, and how a selection sees each sample."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gstds_cache.config import DEVICE
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.sources import open_source
from gstds_cache.errors import UsageError
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import LocationLike, file_to_write, local_file
from gstds_cache.report.fiftyone import IMAGES, METADATA, SAMPLES, candidate_columns, joined_columns, write_dataset
from gstds_cache.report.recompute import RecomputeSettings, selector_of, store_of, watch_again
from gstds_cache.report.scores import SampleScores, check_target, write_scores
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.store.export import export_rows
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import SelectionStream, open_selection, require_store


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
        unseen: Samples that were never in a batch, as they have no embedding or are hidden.
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
    with open_selection(selection) as stream:
        header = stream.header
        opened = store if isinstance(store, EmbeddingStore) else store_of(header, store)
        if header.candidates:
            raise UsageError(
                "the selection offers candidates: which rows are trained on is decided while training, by their losses",
                hint="give a selection of kept rows",
            )
        scores = _scores(
            opened, stream, RecomputeSettings(device=device, guidance=guidance, schedule=schedule), progress
        )
    size = write_scores(scores, opened, header, path)
    unseen = int((scores.seen == 0).sum())
    never = int((scores.kept == 0).sum()) - unseen
    return ScoresReport(path, len(opened), header.epochs, never, unseen, size)


@dataclass(frozen=True)
class FiftyOneReport:
    """What :func:`export_fiftyone` wrote.

    Attributes:
        folder: The folder.
        samples: Samples in it.
        left_out: Items without a sample: they are neither files nor images.
        fields: Fields beside path, label, row and id.
    """

    folder: Path
    samples: int
    left_out: int
    fields: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"folder": str(self.folder), "fields": list(self.fields)}


def export_fiftyone(
    store: LocationLike | EmbeddingStore,
    folder: str | Path,
    *,
    selection: str | os.PathLike[str] | None = None,
    join: Sequence[str | Path] = (),
    dataset: Any = None,
    device: str = DEVICE,
    guidance: str | None = None,
    schedule: str | None = None,
    replace: bool = False,
    progress: Progress | bool | None = True,
) -> FiftyOneReport:
    """Write a folder that FiftyOne imports, each item a sample; FiftyOne itself is not needed.

    In FiftyOne: ``fiftyone.Dataset.from_dir(folder, dataset_type=fiftyone.types.FiftyOneDataset)``. Files are named
    where they are, not copied; items that are no files are written to ``data/`` as PNG.

    Args:
        store: The store, or its location.
        folder: The folder; it is made.
        selection: A selection of the store, whose view of each sample becomes fields: those of :func:`export_scores`;
            of candidates ``offered``, ``stratum``, ``reference_loss`` and ``prior``. None for none.
        join: Tables (``.parquet``, ``.arrow``) with a column ``id``, whose other columns become fields.
        dataset: Where the data set is now; None is where it was when the store was made.
        device: As for :func:`export_scores`, as are the next two.
        guidance: The selection's guidance.
        schedule: The selection's schedule.
        replace: Whether an earlier export may be in ``folder``.
        progress: As for :func:`gstds_cache.embed`; counts batches.

    Returns:
        What was written.

    Raises:
        UsageError: ``folder`` holds something else, the data set is not known, or a table cannot be joined.
        DatasetError: The data set cannot be read.
        StreamError: The selection is damaged.
        FingerprintMismatchError: The data set or the selection is not the store's.
    """
    path = _folder_to_write(folder, replace)
    opened = store if isinstance(store, EmbeddingStore) else EmbeddingStore(store)
    if dataset is None and opened.dataset_uri is None:
        raise UsageError("the store does not say where its images are", hint="pass `dataset=DATASET`")
    source = open_source(opened.dataset_uri if dataset is None else dataset, hash_cache=HashCache(hashes_folder()))
    columns: dict[str, pa.Array] = {}
    info = {"gstds.fingerprint": opened.fingerprint}
    for table in join:
        columns |= joined_columns(local_file(table, "`join`"), opened.manifest().ids)
    if selection is not None:
        settings = RecomputeSettings(device=device, guidance=guidance, schedule=schedule)
        with open_selection(selection) as stream:
            require_store(stream.header, fingerprint=opened.fingerprint, where=str(opened.location))
            info["gstds.selection_digest"] = stream.header.selection_digest
            if stream.header.candidates:
                columns |= candidate_columns(stream, len(opened))
            else:
                columns |= _scores(opened, stream, settings, progress).columns
    path.mkdir(parents=True, exist_ok=True)
    for name in (SAMPLES, METADATA):
        (path / name).unlink(missing_ok=True)
    samples, left = write_dataset(path, opened, source, columns, info=info)
    return FiftyOneReport(path, samples, left, tuple(columns))


def _folder_to_write(folder: str | Path, replace: bool) -> Path:
    """The folder, refused where it holds something else.

    Raises:
        UsageError: It does, or is a file, or holds an export that is not to be replaced.
    """
    path = local_file(folder, "`folder`")
    if path.is_file():
        raise UsageError(f"`folder`: {path} is a file, expected a folder or nothing")
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if strange := names - {METADATA, SAMPLES, IMAGES}:
        raise UsageError(f"`folder`: {path} holds something else ({min(strange)!r})", hint="give the path of a new one")
    if names and not replace:
        raise UsageError(f"`folder`: {path} holds an export", hint="give another name, or `replace=True`")
    return path


def _scores(
    store: EmbeddingStore, stream: SelectionStream, settings: RecomputeSettings, progress: Progress | bool | None
) -> SampleScores:
    scores, header = SampleScores(len(store)), stream.header
    with showing(progress, "batches") as show:
        for batch in watch_again(selector_of(store, header, settings), stream):
            scores.add(batch)
            show("score", batch.selection.seq + 1, header.total_batches, {})
    return scores
