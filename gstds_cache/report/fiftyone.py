"""A store as a folder that FiftyOne imports: ``metadata.json`` and ``samples.json``, written without FiftyOne.

``fiftyone.types.FiftyOneDataset`` reads two layouts. This is the one without a version, which names each field's class;
the other is a dump of FiftyOne's database, and changes with it. FiftyOne's importer checks for it by the missing
``version`` (``FiftyOneDatasetImporter._is_legacy_format_data``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.files.atomic import atomic_write
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import SelectionStream

METADATA, SAMPLES, IMAGES = "metadata.json", "samples.json", "data"
OWN = ("filepath", "tags", "metadata", "id", "item_id", "row", "ground_truth")
"""Fields that a table joined to the samples cannot bring."""

_CLASS = "fiftyone.core.fields."
_SCHEMA = {
    "filepath": f"{_CLASS}StringField",
    "tags": f"{_CLASS}ListField({_CLASS}StringField)",
    "metadata": f"{_CLASS}EmbeddedDocumentField(fiftyone.core.metadata.ImageMetadata)",
    "item_id": f"{_CLASS}StringField",
    "row": f"{_CLASS}IntField",
    "ground_truth": f"{_CLASS}EmbeddedDocumentField(fiftyone.core.labels.Classification)",
}


def write_dataset(
    folder: Path, store: EmbeddingStore, source: ImageSource, columns: Mapping[str, pa.Array], *, info: dict[str, str]
) -> tuple[int, int]:
    """Write the folder; ``samples.json`` last, without which FiftyOne imports nothing.

    An item that is a file stays where it is; others are written to ``data/`` as PNG.

    Args:
        folder: The folder; it exists.
        store: The store.
        source: The data set it was made from.
        columns: Further fields by name, one value a row of the store; null where there is none.
        info: What FiftyOne shows as the data set's info.

    Returns:
        Samples written; items left out, as they are neither files nor images.

    Raises:
        FingerprintMismatchError: The data set has other items than the store.
    """
    manifest = store.manifest()
    if len(source) != len(store) or any(a != b for a, b in zip(source.ids, manifest.ids, strict=True)):
        raise FingerprintMismatchError(
            f"{source.uri} has other items than the store: {len(source):,} here, {len(store):,} there",
            hint="pass `dataset=DATASET`, the one that was embedded",
        )
    schema = _SCHEMA | {name: _field_of(column.type) for name, column in columns.items()}
    metadata = {"name": folder.name, "media_type": "image", "sample_fields": schema, "info": info}
    with atomic_write(folder / METADATA, durable=False) as file:
        file.write(json.dumps(metadata, indent=2).encode())
    written = left = 0
    with atomic_write(folder / SAMPLES, durable=False) as file:
        file.write(b'{"samples": [')
        for sample in _samples(folder, store, source, columns):
            if sample is None:
                left += 1
                continue
            file.write((",\n" if written else "\n").encode() + json.dumps(sample).encode())
            written += 1
        file.write(b"\n]}\n")
    return written, left


def _samples(
    folder: Path, store: EmbeddingStore, source: ImageSource, columns: Mapping[str, pa.Array]
) -> Iterator[dict[str, Any] | None]:
    manifest, classes, files = store.manifest(), source.classes, source.files
    for row, (item, label) in enumerate(zip(manifest.ids, manifest.labels.tolist(), strict=True)):
        path = files.path(row) if files is not None else _written(folder, source, row)
        if path is None:
            yield None
            continue
        name = classes[label] if label < len(classes) else str(label)
        yield {
            "_media_type": "image",
            "filepath": path,
            "tags": [] if store.valid[row] == layout.OK else ["undecodable"],
            "metadata": None,
            "item_id": item,
            "row": row,
            "ground_truth": {"_cls": "Classification", "tags": [], "label": name} if label >= 0 else None,
            **{field: _plain(column[row].as_py()) for field, column in columns.items()},
        }


def _written(folder: Path, source: ImageSource, row: int) -> str | None:
    """The item as a PNG; its path in the folder, or None where it is no image."""
    relative = f"{IMAGES}/{row // 10_000:04d}/{row:08d}.png"
    try:
        image = source.image(row)
    except UndecodableError:
        return None
    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / relative)
    return relative


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _field_of(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return f"{_CLASS}BooleanField"
    if pa.types.is_integer(kind):
        return f"{_CLASS}IntField"
    return f"{_CLASS}FloatField" if pa.types.is_floating(kind) else f"{_CLASS}StringField"


def candidate_columns(stream: SelectionStream, items: int) -> dict[str, pa.Array]:
    """How a selection of candidates sees each sample, over all its batches.

    Args:
        stream: The selection, not read yet.
        items: Items of the data set (N).

    Returns:
        ``offered``, how often it was in a batch; ``stratum``, that of its first batch, int16; ``reference_loss`` and
        ``prior``, their means; null where it never was in one.
    """
    offered, stratum = np.zeros(items, np.int64), np.full(items, -1, np.int16)
    reference, prior = np.zeros(items), np.zeros(items)
    for batch in stream:
        rows, seen = batch.kept, batch.candidates
        if seen is None:
            continue
        first = offered[rows] == 0
        offered[rows] += 1
        stratum[rows[first]] = seen.stratum[first]
        reference[rows] += seen.reference
        prior[rows] += seen.prior
    never, times = offered == 0, np.maximum(offered, 1)
    return {
        "offered": pa.array(offered),
        "stratum": pa.array(stratum, mask=never),
        "reference_loss": pa.array(reference / times, mask=never),
        "prior": pa.array(prior / times, mask=never),
    }


def joined_columns(file: Path, ids: Sequence[str]) -> dict[str, pa.Array]:
    """Columns of a table by any tool, brought to the store's rows by their ids.

    Args:
        file: ``.parquet``, or ``.arrow`` (an Arrow IPC file), with a column ``id``; an item need not be in it.
        ids: Those of the store.

    Returns:
        Its other columns of numbers, booleans and texts, but for those every sample has anyway; null where an item is
        not in the table.

    Raises:
        UsageError: It cannot be read, has no ``id``, or an id that repeats or that the store lacks.
    """
    try:
        table = pq.read_table(file) if file.suffix == ".parquet" else pa.ipc.open_file(str(file)).read_all()
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"`join` {file}: got no table that can be read ({error})") from error
    if "id" not in table.column_names:
        names = ", ".join(table.column_names[:12])
        raise UsageError(f"`join` {file}: got no column `id` (but {names})", hint="rename the one that holds the ids")
    wanted = pa.array(ids, pa.utf8())
    theirs = table["id"].combine_chunks().cast(pa.utf8())
    if len(theirs.unique()) != len(theirs):
        raise UsageError(f"`join` {file}: got an `id` more than once, expected one row an item")
    if (strange := pc.index_in(theirs, wanted)).null_count:
        name = theirs[strange.is_null().to_numpy(zero_copy_only=False).argmax()].as_py()
        raise UsageError(
            f"`join` {file}: got the id {name!r}, which the store does not have",
            hint=f"ids are those of `gstds-cache export`: {', '.join(map(repr, ids[:2]))}, ...",
        )
    place = pc.index_in(wanted, theirs)
    return {
        name: table[name].combine_chunks().take(place)
        for name in table.column_names
        if name not in OWN and _joinable(table.schema.field(name).type)
    }


def _joinable(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_large_string,
    )
    return any(test(kind) for test in tests)
