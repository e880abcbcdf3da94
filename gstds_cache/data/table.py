"""Images in a column of a table, one a row: bytes of files, or paths of files."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from gstds_cache.data.containers import Container
from gstds_cache.data.decode import UndecodableError, decode_image
from gstds_cache.data.files import MAX_BYTES, Files, regular_file
from gstds_cache.data.hashed import require_large_before, require_same, require_unread_before
from gstds_cache.data.labels import NO_LABEL, LabelColumn
from gstds_cache.data.names import Names, duplicate
from gstds_cache.errors import DatasetError
from gstds_cache.files import mapped
from gstds_cache.runtime.resources import about_us

Cell = bytes | str | None
"""An image file's bytes, its path, or nothing."""


@runtime_checkable
class Cells(Protocol):
    """A column of images, read by row; can be pickled to the processes that decode."""

    def __len__(self) -> int: ...

    def cell(self, row: int) -> Cell:
        """What is in a row.

        Raises:
            OSError: It cannot be read.
        """
        ...

    def reopened(self) -> Cells:
        """The same column with open files of its own, for a process that was forked."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class TableSource:
    """Images in a column of a table. An item's payload is the image file's bytes; none, where the cell is empty."""

    uri: str
    kind: str
    ids: Sequence[str] = field(repr=False)
    labels: Int64[np.ndarray, " N"] = field(repr=False)
    cells: Cells = field(repr=False)
    containers: Sequence[Container] = field(default=(), repr=False)
    classes: Sequence[str] = ()
    mirror_safe: bool = True
    notes: Sequence[str] = ()
    hashed: UInt8[np.ndarray, "N 32"] | None = field(default=None, repr=False)

    @property
    def files(self) -> Files | None:
        """None: a file holds many items."""
        return None

    def __repr__(self) -> str:
        return f"TableSource({self.uri!r}, {len(self)} items)"

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        """The bytes of image file ``row``; none where the cell is empty.

        Raises:
            OSError: It cannot be read, or the cell is the path of a file of more than ``MAX_BYTES``.
            IntegrityError: It is another than the one that was hashed.
        """
        return self._data(row) or b""

    def image(self, row: int) -> Image.Image:
        """Image ``row`` in RGB.

        Raises:
            UndecodableError: It cannot be read, there is none, it has more than ``MAX_BYTES``, or is not an image.
            IncompleteError: It cannot be read, and could when it was hashed.
            IntegrityError: It is another than the one that was hashed.
            OSError: This process may open no more files.
        """
        try:
            data = self._data(row)
        except OSError as error:
            if about_us(error):
                raise
            if error.errno == errno.EFBIG:
                raise UndecodableError(str(error.strerror)) from None
            require_unread_before(self, row, error)
            raise UndecodableError(f"unreadable: {error.strerror or str(error) or type(error).__name__}") from None
        if data is None:
            raise UndecodableError("no image: the cell is empty")
        if len(data) > MAX_BYTES:
            raise UndecodableError(_too_large(len(data)))
        return decode_image(data)

    def _data(self, row: int) -> bytes | None:
        cell = self.cells.cell(row)
        data = self._file(row, cell) if isinstance(cell, str) else cell
        require_same(self, row, data or b"")
        return data

    def _file(self, row: int, path: str) -> bytes:
        with io.FileIO(path, opener=regular_file) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                require_large_before(self, row, size)
                raise OSError(errno.EFBIG, _too_large(size), path)
            return file.readall()

    def as_hashed(self, sha256: UInt8[np.ndarray, "N 32"] | None) -> TableSource:
        """The same items, compared with their hashes (:func:`gstds_cache.data.hashed.as_hashed`)."""
        return replace(self, hashed=sha256)

    def for_workers(self) -> Callable[[], TableSource]:
        """Called in a process that is forked from this one, what this returns gives a source with its own files."""
        return partial(_with_own, self)


def _with_own(source: TableSource) -> TableSource:
    return replace(source, cells=source.cells.reopened())


def _too_large(size: int) -> str:
    return f"too large a file: {size} bytes, at most {MAX_BYTES} are decoded"


def cell_of(value: Any) -> Cell:
    """What a scalar of a table holds: bytes, or a path; of a struct its bytes, else its path."""
    held = value.as_py()
    if isinstance(held, dict):
        held = held["path"] if held["bytes"] is None else held["bytes"]
    return None if held is None else held if isinstance(held, str) else bytes(held)


def beside(path: str, cell: str) -> str:
    """Where a path in a table leads: paths are relative to the table's folder."""
    return os.path.normpath(os.path.join(os.path.dirname(path), cell))  # noqa: PTH118, PTH120


def ids_of(uri: str, column: str, values: Iterable[Any]) -> Names:
    """Ids from a column, as text.

    Raises:
        DatasetError: One is empty, is no text or number, or occurs twice; names the rows.
    """
    ids = Names.of((_id(uri, column, row, value) for row, value in enumerate(values)), "strict")
    twice = duplicate(ids)
    if twice is not None:
        rows = [row for row, name in enumerate(ids) if name == twice]
        raise DatasetError(
            f"data set {uri!r}: got the id {twice!r} in rows {rows[0]} and {rows[1]} of column {column!r}, expected a "
            "different one for each",
            hint="name another column, or none: rows are numbered then",
        )
    return ids


def _id(uri: str, column: str, row: int, value: Any) -> str:
    if not isinstance(value, str | int) or value == "":
        raise DatasetError(
            f"data set {uri!r}: got {value!r} in row {row} of the column of ids {column!r}, expected text or a number",
            hint="name another column, or none: rows are numbered then",
        )
    return str(value)


def labels_of(
    uri: str, ids: Names, column: str | None, values: Iterable[Any], classes: Sequence[str]
) -> tuple[Int64[np.ndarray, " N"], LabelColumn]:
    """Labels from a column (:class:`gstds_cache.data.labels.LabelColumn`).

    Args:
        uri: The data set.
        ids: Its ids.
        column: The column of labels; None if there is none.
        values: What is in it.
        classes: The table's own class names.

    Returns:
        [N] labels, and the classes and notes that go with them.

    Raises:
        DatasetError: A value is no label.
    """
    read = LabelColumn(len(ids), uri, lambda row: f"column {column!r}, item {ids[row]!r} (row {row})", classes)
    if column is not None:
        return read.read(values), read
    labels = mapped.zeros((len(ids),), np.int64)
    labels[:] = NO_LABEL
    return labels, read
