"""``parquet:PATH?image=COLUMN&label=COLUMN``: images in Parquet or Arrow IPC files, read by row."""

from __future__ import annotations

import glob
import os
import shlex
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt8

from gstds_cache.data.columns import Columns, find_columns
from gstds_cache.data.containers import Container, Signature
from gstds_cache.data.files import Files, FileSource, printable
from gstds_cache.data.hash_cache import signature_of
from gstds_cache.data.names import Names
from gstds_cache.data.source import ImageSource
from gstds_cache.data.table import Cell, TableSource, beside, cell_of, ids_of, labels_of
from gstds_cache.data.table_files import LARGE, TableFile, open_table_file
from gstds_cache.errors import DatasetError, IncompleteError, UsageError
from gstds_cache.files import mapped
from gstds_cache.files.atomic import DISK_FULL
from gstds_cache.files.location import expanded
from gstds_cache.runtime.resources import about_us

OPEN_FILES = 16
"""Files that a process has open at a time."""
KEPT = 2 * LARGE
"""Bytes of images that a process keeps of the groups of rows read last."""
GROUPS = 64
"""Groups of rows that it keeps at most, however small."""
SPOOLS = 2
"""Groups of more than ``LARGE`` bytes that a process keeps in temporary files."""


def open_parquet(uri: str, path: str, params: Mapping[str, str]) -> ImageSource:
    """Open a table of images: a file, the files of a folder, or of a pattern such as ``train-*.parquet``.

    Row i of the files, sorted by path, is item i. Only the footers, labels and ids are read here. A row's image is read
    with its group of rows, the last of which are kept: files with groups of some hundred rows (``row_group_size``) are
    read fastest in any order.

    Args:
        uri: The data set as the user named it.
        path: The file, folder or pattern.
        params: Columns: ``image`` (bytes of files, Hugging Face's {bytes, path}, or paths relative to the table's
            folder), ``label`` and ``id``. By default an image and a label column are found by name and type, and rows
            are numbered. Hugging Face's class names are used where the table has them.

    Returns:
        The source.

    Raises:
        UsageError: ``path`` is empty, or a column is not there.
        DatasetError: There are no such files, they are damaged or of different columns, or ids occur twice.
    """
    paths = _paths(uri, path)
    columns, table = None, _Index()
    for name in paths:
        signature, file = signature_of(name), open_table_file(uri, name)
        if columns is None:
            columns, first = find_columns(uri, file.schema, params), file.schema
        _require_same(uri, columns, first, name, file.schema)
        table.add(name, signature, file, columns)
    assert columns is not None
    if not table.rows:
        raise DatasetError(f"data set {uri!r}: got 0 rows in {len(paths)} files, expected one for each image")
    ids = _ids(uri, table, columns)
    labels, read = labels_of(uri, ids, columns.label, _values(uri, table, columns.label), columns.classes)
    kind, notes = uri.partition(":")[0], (*columns.notes, *read.notes)
    if columns.form == "path":
        files = Files.at(Names.of(_image_paths(uri, table, columns.image)))
        return FileSource(uri=uri, kind=kind, ids=ids, labels=labels, files=files, classes=read.classes, notes=notes)
    large = max(table.sizes)
    if large > LARGE:
        notes += (
            f"groups of rows with up to {large >> 20:,} MB of images: each is unpacked to a temporary file while it is "
            "read; a table written with row_group_size=500 needs none",
        )
    return TableSource(
        uri=uri,
        kind=kind,
        ids=ids,
        labels=labels,
        cells=TableCells(uri, columns, table.paths, table.signatures, *table.groups()),
        containers=table.containers(columns) if table.complete else (),
        classes=read.classes,
        notes=notes,
    )


class _Index:
    """The groups of rows of all files."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.signatures: list[Signature] = []
        self.starts: list[int] = []  # of each file: its first row
        self.rows, self.complete = 0, True
        self.sizes: list[int] = [0]
        self._groups: list[tuple[int, int, int]] = []

    def add(self, path: str, signature: Signature, file: TableFile, columns: Columns) -> None:
        self.starts.append(self.rows)
        for number, rows in enumerate(file.rows):
            if rows:
                self._groups.append((len(self.paths), number, self.rows))
                self.sizes.append(file.size(number, columns))
            self.rows += rows
        self.paths.append(path)
        self.signatures.append(signature)
        if columns.form == "struct":
            self.complete = self.complete and file.complete(columns.image)

    def groups(self) -> tuple[Int64[np.ndarray, " G"], Int64[np.ndarray, " G"], Int64[np.ndarray, " G1"]]:
        """Of each group: its file, its number in the file, and its first row; the last is the number of all rows."""
        table = np.array(self._groups, np.int64).reshape(-1, 3)
        return table[:, 0].copy(), table[:, 1].copy(), np.append(table[:, 2], self.rows)

    def containers(self, columns: Columns) -> tuple[Container, ...]:
        ends = [*self.starts[1:], self.rows]
        return tuple(
            Container.of_file(Path(path), range(start, end), f"{columns.form} {columns.image}", opened)
            for path, start, end, opened in zip(self.paths, self.starts, ends, self.signatures, strict=True)
        )


@dataclass(frozen=True)
class _Spool:
    """The images of a large group of rows in a temporary file."""

    data: memoryview
    ends: Int64[np.ndarray, " n"]
    kinds: UInt8[np.ndarray, " n"]  # 0 nothing, 1 bytes, 2 a path

    def cell(self, place: int) -> Cell:
        start = int(self.ends[place - 1]) if place else 0
        data = bytes(self.data[start : int(self.ends[place])])
        kind = self.kinds[place]
        return data if kind == 1 else data.decode() if kind == 2 else None


class TableCells:
    """The column of images in Parquet or Arrow files, read by group of rows; threads may share it."""

    def __init__(
        self,
        uri: str,
        columns: Columns,
        paths: Sequence[str],
        signatures: Sequence[Signature],
        files: Int64[np.ndarray, " G"],
        numbers: Int64[np.ndarray, " G"],
        starts: Int64[np.ndarray, " G1"],
    ) -> None:
        """Take what the files' footers say.

        Args:
            uri: The data set, for errors.
            columns: What is read.
            paths: The files.
            signatures: Of each, before its footer was read.
            files: [G] the file of each group of rows.
            numbers: [G] its number in the file.
            starts: [G + 1] its first row; the last is the number of all rows.
        """
        self._told = uri, columns, paths, signatures, files, numbers, starts
        self._uri, self._columns, self._paths, self._signatures = uri, columns, paths, signatures
        self._files, self._numbers, self._starts = files, numbers, starts
        self._lock = threading.Lock()
        self._open: OrderedDict[int, TableFile] = OrderedDict()
        self._arrays: OrderedDict[int, pa.Array] = OrderedDict()
        self._spools: OrderedDict[int, _Spool] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._told

    def reopened(self) -> TableCells:
        """The same column with files of its own."""
        return TableCells(*self._told)

    def cell(self, row: int) -> Cell:
        """What is in a row.

        Raises:
            OSError: The group of rows is damaged.
            DatasetError: The file is another than it was.
            IncompleteError: There is no room for a temporary file.
        """
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        place = row - int(self._starts[group])
        with self._lock:
            held = self._held(group)
        cell = held.cell(place) if isinstance(held, _Spool) else cell_of(held[place])
        return beside(self._paths[int(self._files[group])], cell) if isinstance(cell, str) else cell

    def _held(self, group: int) -> pa.Array | _Spool:
        """The images of a group of rows, read if they are not there yet.

        Raises:
            OSError: It is damaged.
        """  # noqa: DOC501
        kept: OrderedDict[int, Any] = self._spools if group in self._spools else self._arrays
        if group in kept:
            kept.move_to_end(group)
            return kept[group]
        file, number = self._file(int(self._files[group])), int(self._numbers[group])
        try:
            size = file.size(number, self._columns)
            if size > LARGE:
                spool = self._spools[group] = _spooled(self._uri, file, number, self._columns)
                while len(self._spools) > SPOOLS:
                    self._spools.popitem(last=False)
                return spool
            column = file.group(number, self._columns).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            if about_us(error) or isinstance(error, pa.ArrowMemoryError):
                raise
            # Without the text: it may hold addresses, and would be another reason in every run.
            raise OSError(f"a group of rows in {Path(self._paths[int(self._files[group])]).name} is damaged") from error
        array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        self._arrays[group] = array
        while len(self._arrays) > 1 and (len(self._arrays) > GROUPS or sum(map(_bytes, self._arrays.values())) > KEPT):
            self._arrays.popitem(last=False)
        return array

    def _file(self, number: int) -> TableFile:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self._paths[number]
        if signature_of(path)[:2] != self._signatures[number][:2]:
            raise DatasetError(
                f"data set {self._uri!r}: {path} changed since it was opened, expected the same file",
                hint="run the same command again, when nothing writes to it any more",
            )
        self._open[number] = open_table_file(self._uri, path)
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[number]


def _spooled(uri: str, file: TableFile, number: int, columns: Columns) -> _Spool:
    """Unpack a large group of rows to a temporary file, a few rows at a time.

    Raises:
        IncompleteError: There is no room for it.
        OSError: It cannot be read.
    """
    rows = file.rows[number]
    ends, kinds = mapped.zeros((rows,), np.int64), mapped.zeros((rows,), np.uint8)

    def write(spool: IO[bytes]) -> None:
        place = 0
        for array in file.pieces(number, columns):
            for value in array:
                cell = cell_of(value)
                data = cell.encode() if isinstance(cell, str) else cell
                spool.write(data or b"")
                ends[place], kinds[place] = spool.tell(), 0 if data is None else 2 if isinstance(cell, str) else 1
                place += 1

    try:
        data = mapped.written(write)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise IncompleteError(
            f"data set {uri!r}: no room for a temporary file with a group of {rows:,} rows in {mapped.folder()}",
            hint="set TMPDIR to a folder with room, or write the table with row_group_size=500; then run the same "
            "command again",
        ) from error
    mapped.release(data)
    return _Spool(data, ends, kinds)


def _bytes(array: pa.Array) -> int:
    return int(array.nbytes)


def _paths(uri: str, path: str) -> list[str]:
    """The files that are meant, sorted.

    Raises:
        UsageError: ``path`` is empty.
        DatasetError: There are none.
    """
    if not path:
        raise UsageError(
            f"data set {uri!r}: no path given", hint="name a file, a folder of files or a pattern: parquet:PATH"
        )
    place = str(expanded(path.removeprefix("file://"), "data set"))
    if os.path.isdir(place):  # noqa: PTH112
        found: list[str] = []
        for pattern in ("*.parquet", "*.arrow", "*.feather"):
            found = found or glob.glob(f"{glob.escape(place)}/**/{pattern}", recursive=True)  # noqa: PTH207 - skips dots
    elif os.path.lexists(place):
        found = [place]
    else:
        found = glob.glob(place, recursive=True)  # noqa: PTH207
    if not found:
        what = "a folder without a Parquet or Arrow file" if os.path.isdir(place) else "nothing there"  # noqa: PTH112
        raise DatasetError(
            f"data set {uri!r}: got {what}, expected a file, a folder of files or a pattern such as train-*.parquet",
            hint=f"look for it: ls {shlex.quote(printable(os.path.dirname(place) or '.'))}",  # noqa: PTH120
        )
    found.sort(key=lambda name: (name.count("/"), os.fsencode(name)), reverse=True)
    once = {os.path.realpath(name): name for name in found}  # a link to a folder above leads to each file many times
    return sorted(once.values(), key=os.fsencode)


def _require_same(uri: str, columns: Columns, first: pa.Schema, path: str, schema: pa.Schema) -> None:
    for name in filter(None, (columns.image, columns.label, columns.id)):
        got = schema.field(name).type if name in schema.names else "no such column"
        if got != first.field(name).type:
            raise DatasetError(
                f"data set {uri!r}: got {got} for the column {name!r} of {path}, expected {first.field(name).type} as "
                "in the first file",
                hint="name files of one table",
            )


def _values(uri: str, table: _Index, column: str | None) -> Iterator[Any]:
    for path in table.paths if column is not None else ():
        yield from open_table_file(uri, path).values(str(column))


def _image_paths(uri: str, table: _Index, column: str) -> Iterator[str]:
    for path in table.paths:
        for cell in open_table_file(uri, path).values(column):
            yield os.path.abspath(beside(path, cell or ""))  # noqa: PTH100


def _ids(uri: str, table: _Index, columns: Columns) -> Names:
    if columns.id is not None:
        return ids_of(uri, columns.id, _values(uri, table, columns.id))
    if len(table.paths) == 1:
        return Names.numbered(table.rows)
    common = os.path.commonpath(table.paths)

    def numbered() -> Iterator[str]:
        for name, start, end in zip(table.paths, table.starts, [*table.starts[1:], table.rows], strict=True):
            stem = printable(os.path.splitext(os.path.relpath(name, common))[0])  # noqa: PTH122
            yield from (f"{stem}/{row:07d}" for row in range(end - start))

    return Names.of(numbered())
