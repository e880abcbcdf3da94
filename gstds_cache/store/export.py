"""A store's rows as one file for other tools: ``.npy``, Parquet or Arrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Float

from gstds_cache.errors import UsageError
from gstds_cache.files.atomic import atomic_write
from gstds_cache.store import layout
from gstds_cache.store.factory import open_transport
from gstds_cache.store.metadata import Problem, corrupt
from gstds_cache.store.mirror import write_rows
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.transport import map_object

FORMATS = (".npy", ".parquet", ".arrow")


def export_rows(store: EmbeddingStore, file: Path, *, replace: bool = False) -> int:
    """Write all rows of a whole store, row i at place i, one shard in memory at a time.

    ``.npy`` holds [N, D] in the store's dtype, and zeros where an item could not be decoded. ``.parquet`` and
    ``.arrow`` (an Arrow IPC file) hold columns ``id``, ``sha256``, ``label``, ``valid`` and ``embedding``, a fixed-size
    list of D that is null where an item could not be decoded; a shard is a row group, or a record batch.

    Args:
        store: A whole store.
        file: Where to write; its ending says in which format.
        replace: Whether ``file`` may exist.

    Returns:
        Bytes of the file.

    Raises:
        UsageError: The ending is none of ``FORMATS``, or ``file`` exists.
        ChunkCorruptError: A shard is damaged.
    """
    if file.suffix not in FORMATS:
        raise UsageError(f"export to {file}: got the ending {file.suffix!r}, expected one of {', '.join(FORMATS)}")
    if file.exists() and not replace:
        raise UsageError(f"export to {file}: the file exists", hint="give another name, or pass `replace=True`")
    shards = (store.shard(shard) for shard in range(store.spec.shards))
    if file.suffix == ".npy":
        write_rows(file, store.spec, shards)
    else:
        _write_table(store, file, shards)
    return file.stat().st_size


def _write_table(store: EmbeddingStore, file: Path, shards: Iterator[Float[np.ndarray, "R D"]]) -> None:
    try:
        items = pa.ipc.open_file(pa.BufferReader(_items_of(store))).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = Problem(layout.ITEMS, f"{layout.ITEMS} does not decode ({error})")
        raise corrupt(store.location, [problem]) from error
    row = pa.list_(pa.from_numpy_dtype(np.dtype(store.spec.dtype)), store.spec.dim)
    fields = [*items.schema.remove_metadata(), pa.field("valid", pa.uint8()), pa.field("embedding", row)]
    schema = pa.schema(fields, metadata={"gstds.fingerprint": store.fingerprint})
    with atomic_write(file, durable=True) as out, _table_writer(file.suffix, out, schema) as writer:
        for shard, rows in enumerate(shards):
            span = store.spec.rows_of(shard)
            valid = store.valid[span.start : span.stop]
            values = pa.array(np.ascontiguousarray(rows).reshape(-1))
            embedding = pa.FixedSizeListArray.from_arrays(values, type=row, mask=pa.array(valid != layout.OK))
            part = items.slice(span.start, len(span)).combine_chunks()
            columns = [*(column.chunk(0) for column in part.columns), pa.array(valid), embedding]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _items_of(store: EmbeddingStore) -> memoryview:
    """The list of items as it is stored; of a store that rows were appended to, the whole list."""
    if store.grown:
        return store.manifest().to_arrow()
    return map_object(open_transport(store.location), layout.ITEMS)


def _table_writer(
    suffix: str, file: IO[bytes], schema: pa.Schema
) -> pa.ipc.RecordBatchFileWriter | pa.parquet.ParquetWriter:
    if suffix == ".arrow":
        return pa.ipc.new_file(file, schema)
    # Unit vectors do not compress; dictionaries of floats only cost time.
    return pa.parquet.ParquetWriter(file, schema, compression="none", use_dictionary=["label", "valid"])
