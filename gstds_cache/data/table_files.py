"""Parquet and Arrow files as groups of rows: what is read at once, and kept for the next row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from gstds_cache.data.columns import Columns
from gstds_cache.data.names import AT_ONCE
from gstds_cache.errors import DatasetError, in_words

LARGE = 64 << 20
"""Bytes of images in a group of rows from which on it is unpacked to a temporary file instead of memory."""


@runtime_checkable
class TableFile(Protocol):
    """An open file of a table.

    Attributes:
        schema: Its schema.
        rows: Number of rows of each group.
    """

    schema: pa.Schema
    rows: Sequence[int]

    def group(self, number: int, columns: Columns) -> pa.ChunkedArray:
        """The column of images in a group of rows."""
        ...

    def pieces(self, number: int, columns: Columns) -> Iterator[pa.Array]:
        """The same a few rows at a time.

        Yields:
            Some rows.
        """
        ...

    def size(self, number: int, columns: Columns) -> int:
        """Bytes that :meth:`group` takes in memory; 0 where it is mapped."""
        ...

    def values(self, column: str) -> Iterator[Any]:
        """Every value of a column, as Python's own.

        Yields:
            A value.
        """
        ...

    def complete(self, column: str) -> bool:
        """Whether no row of a column of structs lacks its ``bytes``."""
        ...


class ParquetFile:
    """A Parquet file."""

    def __init__(self, path: str) -> None:
        """Open the file and read its footer."""
        import pyarrow.parquet as pq

        # Mapped, and nothing is read ahead: a part of a group can be read without the rest of it.
        self._file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.rows: Sequence[int] = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._leaves = {metadata.schema.column(leaf).path: leaf for leaf in range(metadata.num_columns)}

    def group(self, number: int, columns: Columns) -> pa.ChunkedArray:
        """The column in a group of rows."""
        return self._file.read_row_group(number, columns.read, use_threads=False).column(0)

    def pieces(self, number: int, columns: Columns) -> Iterator[pa.Array]:
        """The same, 64 rows at a time.

        Yields:
            Some rows.
        """
        for batch in self._file.iter_batches(64, row_groups=[number], columns=columns.read, use_threads=False):
            yield batch.column(0)

    def size(self, number: int, columns: Columns) -> int:
        """Bytes of the column's pages, unpacked."""
        group = self._file.metadata.row_group(number)
        return sum(group.column(self._leaves[name]).total_uncompressed_size for name in columns.read)

    def values(self, column: str) -> Iterator[Any]:
        """Every value of a column.

        Yields:
            A value.
        """
        for batch in self._file.iter_batches(AT_ONCE, columns=[column], use_threads=False):
            yield from batch.column(0).to_pylist()

    def complete(self, column: str) -> bool:
        """Whether the footer says that there are bytes in every row."""
        leaf = self._leaves[f"{column}.bytes"]
        metadata = self._file.metadata
        statistics = [metadata.row_group(number).column(leaf).statistics for number in range(metadata.num_row_groups)]
        return all(found is not None and found.has_null_count and found.null_count == 0 for found in statistics)


class ArrowFile:
    """An Arrow IPC file, or a stream of record batches as ``datasets`` saves them, mapped."""

    def __init__(self, path: str) -> None:
        """Open the file and read where its record batches lie.

        Raises:
            DatasetError: It is a compressed stream, of which no batch can be had without all before it.
        """
        self._path = path
        with pa.memory_map(path) as file:
            is_file = file.read(6) == b"ARROW1"
        self._batches: list[pa.RecordBatch] = []
        self._file = pa.ipc.open_file(pa.memory_map(path)) if is_file else None
        if self._file is not None:
            self.schema = self._file.schema
            # Of one narrow column, so that no images are unpacked to count them.
            narrow = [name for name in self.schema.names if pa.types.is_primitive(self.schema.field(name).type)]
            counting = self._reader([*narrow, *self.schema.names][:1])
            self.rows: Sequence[int] = [
                counting.get_batch(number).num_rows for number in range(counting.num_record_batches)
            ]
            return
        before = pa.total_allocated_bytes()
        with pa.ipc.open_stream(pa.memory_map(path)) as reader:
            self.schema = reader.schema
            for batch in reader:
                self._batches.append(batch)
                if pa.total_allocated_bytes() - before > max(LARGE, batch.nbytes // 2):
                    raise DatasetError(
                        f"{path}: got a compressed Arrow stream, expected one whose rows can be read one by one",
                        hint="write it as a Parquet file, or as an Arrow file: pyarrow.ipc.new_file",
                    )
        self.rows = [batch.num_rows for batch in self._batches]

    def _reader(self, columns: Sequence[str]) -> Any:
        fields = [self.schema.get_field_index(name) for name in columns]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        return pa.ipc.open_file(pa.memory_map(self._path), options=options)

    def _column(self, number: int, column: str) -> pa.Array:
        if self._file is None:
            return self._batches[number].column(column)
        return self._reader([column]).get_batch(number).column(0)

    def group(self, number: int, columns: Columns) -> pa.ChunkedArray:
        """The column in a record batch."""
        return pa.chunked_array([self._column(number, columns.image)])

    def pieces(self, number: int, columns: Columns) -> Iterator[pa.Array]:
        """The same at once: it is mapped.

        Yields:
            Some rows.
        """
        yield from self.group(number, columns).chunks

    def size(self, number: int, columns: Columns) -> int:  # noqa: ARG002
        """0: it is mapped, unless the file is compressed."""
        return 0

    def values(self, column: str) -> Iterator[Any]:
        """Every value of a column.

        Yields:
            A value.
        """
        for number in range(len(self.rows)):
            yield from self._column(number, column).to_pylist()

    def complete(self, column: str) -> bool:
        """Whether there are bytes in every row."""
        parts = (self._column(number, column) for number in range(len(self.rows)))
        return all(part.field("bytes").null_count == part.null_count == 0 for part in parts)


def open_table_file(uri: str, path: str) -> TableFile:
    """Open a file by what it begins with, whatever its name is.

    Args:
        uri: The data set, for errors.
        path: The file.

    Returns:
        The open file.

    Raises:
        DatasetError: It is neither, or is damaged.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            head = file.read(6)
        if head[:4] == b"PAR1":
            return ParquetFile(path)
        if head == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
            return ArrowFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            f"data set {uri!r}: {path} cannot be read: {in_words(error)}",
            hint="it may have been cut short while it was copied: copy it again and compare the sizes",
        ) from error
    got = f"the bytes {head!r}" if head else "an empty file"
    raise DatasetError(f"data set {uri!r}: {path} begins with {got}, expected a Parquet or Arrow IPC file")
