"""``gstds_cache.import_embeddings``: a store of embeddings that another tool made."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from gstds_cache.config import MOST_ROWS, as_type
from gstds_cache.data.align import rows_by_id
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.label_counts import label_notes
from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.data.names import Names
from gstds_cache.data.row_values import Column, open_column, read_ids, read_labels
from gstds_cache.data.sources import open_source
from gstds_cache.data.vectors import StoredAs, Vectors, open_vectors
from gstds_cache.embedding.imported import VectorImport, import_vectors
from gstds_cache.errors import UsageError
from gstds_cache.files import mapped
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.runtime.notify import Notify, log
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.store.embed_report import EmbedReport
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import IMPORTED


def import_embeddings(
    vectors: Any,
    cache: LocationLike,
    *,
    ids: Any = None,
    labels: Any = None,
    dataset: Any = None,
    key: str | None = None,
    model: str | None = None,
    dtype: StoredAs | None = None,
    shard_rows: int | None = None,
    progress: Progress | bool | None = True,
    notify: Notify | None = None,
) -> EmbeddingStore:
    """Make a complete store of embeddings that another tool made, and return it.

    Row i is vector i. Rows are kept as they are where they have length 1, and are divided by their lengths where not.
    A vector that is zeros alone, or holds NaN or Inf, is quarantined as a broken image is: its row stays in its place,
    without an embedding. The same call again finds the store and writes nothing; after an interrupt it goes on.

    With ``dataset`` the store is of that data set's items, and a selection from it trains on it. Vector i is then of
    item i; with ``ids`` as well, items are found by their ids, in whatever order the vectors are.

    Args:
        vectors: [N, D] float16, bfloat16, float32 or float64: a NumPy array, a torch tensor, or the path of a file that
            ends in .npy, .safetensors, .parquet or .arrow (a column of lists). float64 and bfloat16 are stored as
            float32.
        cache: The store: a directory, or ``s3://BUCKET/PREFIX``.
        ids: A name for each row, each once: a sequence, or a file: .txt (a line each), .npy, or .parquet or .arrow with
            ``?column=NAME``. None takes the column ``id`` of a table, else row numbers.
        labels: A label for each row, in the same ways: whole numbers, or text, which makes classes. None takes the
            column ``label`` of a table.
        dataset: The images that the vectors are of: a data set's URI, or an object, as for :func:`gstds_cache.embed`.
            Its labels are taken.
        key: Which tensor of a .safetensors file, or column of a table; needed where there are several.
        model: What made the vectors, in your words; part of the store's identity.
        dtype: How they are stored: ``float16`` or ``float32``. None keeps what they are.
        shard_rows: Rows per shard; None takes about 16 MB.
        progress: As for :func:`gstds_cache.embed`; counts shards.
        notify: Called with each line for the user. None logs them as warnings.

    Returns:
        The store. Its ``report`` says what this call did.

    Raises:
        UsageError: The vectors, ids or labels cannot be meant, or do not belong together.
        DatasetError: The data set cannot be read, or the vectors changed while they were imported.
        FingerprintMismatchError: The store at ``cache`` holds something else.
        ChunkCorruptError: It is damaged.
        IncompleteError: The disk is too small, or another process writes the store; the same call goes on.
    """
    key, model = as_type("key", key, str | None), as_type("model", model, str | None)
    dtype = None if dtype is None else as_type("dtype", dtype, StoredAs)
    shard_rows = as_type("shard_rows", shard_rows, int | None)
    if shard_rows is not None and not 1 <= shard_rows <= MOST_ROWS:
        raise UsageError(f"`shard_rows`: got {shard_rows}, expected 1 to {MOST_ROWS}, or None")
    if model is not None and (not model or not model.isprintable()):
        raise UsageError(f"`model`: got {model!r:.80}, expected a name that can be printed")
    where, notify = Location.parse(cache, "`cache`").absolute(), notify or log
    if dataset is not None and labels is not None:
        raise UsageError(
            "`labels` and `dataset` both say what the labels are",
            hint="leave out `labels`: those of the data set are a part of its identity",
        )
    opened = open_vectors(vectors, key)
    with showing(progress, "shards", hash="items") as show:
        manifest, order, notes = _items(opened, ids, labels, dataset, show)
        job = VectorImport(opened, order, manifest, dtype or opened.stored_as, model or "", shard_rows, notes)
        if opened.dtype not in {"float16", "float32"}:
            notes.append(f"the vectors are {opened.dtype} and are stored as {job.dtype}, which selections compute in")
        attributes = {
            "kind": manifest.kind,
            "classes": list(manifest.classes),
            "provenance": _provenance(opened, key, ids, labels, dataset, dtype, model),
        }
        store, before, seconds = import_vectors(job, where, attributes=attributes, progress=show)
    store.report = _report(store, before, seconds, notes)
    for note in notes:
        notify(f"note: {note}")
    return store


def _items(
    vectors: Vectors, ids: Any, labels: Any, dataset: Any, show: Progress
) -> tuple[DatasetManifest, Int64[np.ndarray, " N"] | None, list[str]]:
    """The items that the vectors are of, which vector is of each (None: in order), and what the user should know."""
    rows = len(vectors)
    notes: list[str] = []
    if dataset is not None:
        hash_cache = HashCache(hashes_folder())
        source = open_source(dataset, hash_cache=hash_cache, progress=lambda done, of: show("hash", done, of, {}))
        names = None if ids is None else read_ids(open_column(ids, "`ids`", rows))
        order = _order_of(source.ids, names, rows, source.uri, notes)
        manifest = build_manifest(source, hash_cache=hash_cache, progress=lambda done, of: show("hash", done, of, {}))
        notes += [*source.notes, *label_notes(source.labels, len(source.classes))]
        return manifest, order, notes
    given = {"id": ids, "label": labels}
    for name in vectors.columns:
        if given[name] is None:
            given[name] = Column(f"{vectors.name}, column {name}", partial(vectors.column, name), rows)
    id_column, label_column = given["id"], given["label"]
    names = Names.numbered(rows) if id_column is None else read_ids(open_column(id_column, "`ids`", rows))
    values = mapped.zeros((rows,), np.int64)
    values[:] = -1
    classes: tuple[str, ...] = ()
    if label_column is not None:
        values, classes, said = read_labels(open_column(label_column, "`labels`", rows))
        shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
        notes += [f"{note}: {shown}" for note in said]
        notes += label_notes(values, len(classes))
    # What an item's bytes hash to is not known; the vectors are a part of the fingerprint themselves.
    hashes = mapped.zeros((rows, 32), np.uint8)
    return DatasetManifest(IMPORTED, names, hashes, values, classes), None, notes


def _order_of(items: Any, names: Names | None, rows: int, uri: str, notes: list[str]) -> Int64[np.ndarray, " N"] | None:
    """Which vector is of each item of a data set; None where vector i is of item i.

    Raises:
        UsageError: An item has no vector.
    """
    if names is None:
        if len(items) != rows:
            raise UsageError(
                f"`dataset`: {uri} has {len(items):,} items and there are {rows:,} vectors, expected one for each",
                hint="give `ids` as well: each item's vector is then found by its id",
            )
        return None
    order = rows_by_id(items, names)
    missing = np.flatnonzero(order < 0)
    if missing.size:
        raise UsageError(
            f"`ids`: {missing.size:,} of the {len(items):,} items of {uri} have no vector, first "
            f"{items[int(missing[0])]!r} "
            f"(row {missing[0]}); the first of `ids` is {names[0]!r}",
            hint="ids have to be the data set's own: gstds_cache.open_source(DATASET).ids lists them",
        )
    if len(order) < rows:
        notes.append(f"{rows - len(order):,} of {rows:,} vectors are of no item of {uri} and were left out")
    if len(order) == rows and bool((order == np.arange(rows)).all()):
        return None
    notes.append(f"vectors were put into the order of {uri}, by their ids")
    return order


def _provenance(
    vectors: Vectors, key: str | None, ids: Any, labels: Any, dataset: Any, dtype: str | None, model: str | None
) -> dict[str, Any]:
    """How the store was made; no identity."""
    command = ["gstds-cache", "import", str(vectors.path or "VECTORS")]
    options = {"key": key, "ids": ids, "labels": labels, "dataset": dataset, "dtype": dtype, "model": model}
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", str(value) if isinstance(value, (str, Path)) else name.upper()]
    named = {"dataset": dataset} if isinstance(dataset, str) else {}
    return {
        **named,
        "vectors": str(vectors.path) if vectors.path else "an array of a Python program",
        "command": command,
        **{name: version(name) for name in ("torch", "zarr", "numpy")},
    }


def _report(store: EmbeddingStore, before: int, seconds: dict[str, float], notes: list[str]) -> EmbedReport:
    return EmbedReport(
        location=str(store.location),
        fingerprint=store.fingerprint,
        model=str(store.spec.encoder["model"]),
        items=store.spec.items,
        ok=store.spec.items - len(store.quarantined),
        quarantined=tuple(store.quarantined),
        embedded=0,
        reused=0,
        committed_before=before,
        shards=store.spec.shards,
        batch_size=1,
        workers=0,
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        shares={},
        notes=tuple(notes),
    )
