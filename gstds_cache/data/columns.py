"""Ids and labels beside vectors that another tool made: a value for each row, in a file or a sequence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from gstds_cache.data.labels import LabelColumn
from gstds_cache.data.names import AT_ONCE, Names, duplicate
from gstds_cache.data.vectors import column_parts, schema_of
from gstds_cache.errors import DatasetError, UsageError, unknown_name
from gstds_cache.files.given import reading, require_file
from gstds_cache.files.location import local_file
from gstds_cache.uris import split_query

ENDINGS = (".txt", ".npy", ".parquet", ".arrow")
EXPECTED = (
    "a file that ends in .txt (a value a line), .npy, or .parquet or .arrow with ?column=NAME; or a sequence of values"
)
_WHOLE = re.compile(r"-?\d{1,18}")


class Column:
    """A value for each row, which can be gone through more than once.

    Attributes:
        name: What errors call it.
    """

    def __init__(self, name: str, values: Callable[[], Iterable[Any]], length: int) -> None:
        self.name, self._values, self._length = name, values, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values())


def open_column(given: Any, argument: str, rows: int) -> Column:
    """Open ids or labels that a user gave.

    Args:
        given: A path, or a sequence, array or tensor of values.
        argument: The argument, in backticks.
        rows: How many there should be.

    Returns:
        The values.

    Raises:
        UsageError: They are no such thing, the file does not read, or there are fewer or more than rows.
    """
    if isinstance(given, (str, Path)):
        column = _open_file(str(given), argument)
    elif isinstance(given, Column):
        column = given
    elif hasattr(given, "__len__") and hasattr(given, "__getitem__") and not isinstance(given, (bytes, dict)):
        array = given.detach().cpu().numpy() if hasattr(given, "detach") else given
        flat = isinstance(array, np.ndarray) and array.ndim == 1
        column = Column(argument, (lambda: _of_array(array)) if flat else (lambda: iter(array)), len(array))
    else:
        raise UsageError(f"{argument}: got {type(given).__name__}, expected {EXPECTED}")
    if len(column) != rows:
        few = "fewer" if len(column) < rows else "more"
        raise UsageError(
            f"{column.name}: got {len(column):,} values, {few} than the {rows:,} vectors; expected one for each row",
            hint="they belong together by position: value i is of row i",
        )
    return column


def open_list(given: Any, argument: str) -> Column:
    """Open ids that a user gave, however many.

    Args:
        given: As for :func:`open_column`.
        argument: The argument, in backticks.

    Returns:
        The values.
    """
    if isinstance(given, (str, Path)):
        return _open_file(str(given), argument)
    return open_column(given, argument, len(given) if hasattr(given, "__len__") else 0)


def read_ids(column: Column, *, repeated: bool = False) -> Names:
    """The ids of a column, as text; whole numbers become their digits.

    Args:
        column: The values.
        repeated: Whether one may occur more than once.

    Returns:
        The ids.

    Raises:
        UsageError: One is empty, no text, or occurs twice.
    """

    def texts() -> Iterator[str]:
        for row, value in enumerate(column):
            text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
            if not text:
                raise UsageError(f"{column.name}: row {row}: got {value!r:.80}, expected text or a whole number")
            yield text

    try:
        names = Names.of(texts(), "strict")
    except UnicodeEncodeError as error:
        raise UsageError(f"{column.name}: an id is no UTF-8: {error.object!r:.80}") from error
    if not repeated and (twice := duplicate(names)) is not None:
        rows = list(islice((row for row, name in enumerate(names) if name == twice), 2))
        raise UsageError(
            f"{column.name}: id {twice!r} occurs more than once, first in rows {rows[0]} and {rows[1]}; expected each "
            "id once",
            hint="make them unique, e.g. by the folder an item lies in; or leave the ids out, and rows are numbered",
        )
    return names


def read_labels(column: Column) -> tuple[Int64[np.ndarray, " N"], tuple[str, ...], tuple[str, ...]]:
    """The labels of a column: whole numbers, or text that makes classes (:class:`gstds_cache.data.labels.LabelColumn`).

    Returns:
        [N] class indices, -1 where there is none; class names; and what the user should be told.

    Raises:
        UsageError: One is no label.
    """
    labels = LabelColumn(len(column), column.name.strip("`"), lambda row: f"row {row}")
    try:
        values = labels.read(column)
    except DatasetError as error:
        raise UsageError(error.message.replace("data set ", "labels ", 1), hint=error.hint) from error
    return values, labels.classes, labels.notes


def _open_file(given: str, argument: str) -> Column:
    base, parameters = split_query(argument, given)
    path = local_file(base, argument)
    if path.suffix not in ENDINGS:
        raise UsageError(f"{argument}: got {base!r}, expected {EXPECTED}")
    for name in parameters:
        if name != "column" or path.suffix not in {".parquet", ".arrow"}:
            raise UsageError(
                f"{argument}: got the parameter {name!r}, expected none, or column for .parquet and .arrow"
            )
    require_file(path, argument)
    if path.suffix == ".txt":
        with reading(path, "text in UTF-8"):
            count, whole = _look_through(path)
        return Column(argument, lambda: _lines(path, numbers=whole), count)
    if path.suffix == ".npy":
        with reading(path, "one array (.npy) of numbers or text"):
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 1:
            raise UsageError(f"{argument}: got an array of shape {list(array.shape)}, expected [N], a value a row")
        return Column(argument, lambda: _of_array(array), len(array))
    with reading(path, "a Parquet or Arrow file"):
        schema, count = schema_of(path)
    column = parameters.get("column") or (schema.names[0] if len(schema.names) == 1 else "")
    if not column:
        raise UsageError(
            f"{argument}: {path} has the columns {', '.join(schema.names)}", hint=f"say which: {base}?column=NAME"
        )
    if column not in schema.names:
        raise unknown_name(f"column of {path}", column, schema.names)
    return Column(argument, lambda: (v for part in column_parts(path, column) for v in part.to_pylist()), count)


def _look_through(path: Path) -> tuple[int, bool]:
    """How many lines a text has, and whether all of them are whole numbers or empty."""
    count, whole = 0, True
    for count, line in enumerate(_lines(path), 1):  # noqa: B007 - the last one counts
        whole = whole and (not line or _WHOLE.fullmatch(line) is not None)
    return count, whole


def _lines(path: Path, *, numbers: bool = False) -> Iterator[Any]:
    """The lines of a text, without their ends; empty ones are None where the others are numbers.

    Yields:
        Text, or whole numbers.
    """
    with path.open(encoding="utf-8", newline=None) as file:
        for line in file:
            text = line.rstrip("\n")
            yield (int(text) if text else None) if numbers else text


def _of_array(array: np.ndarray) -> Iterator[Any]:
    for start in range(0, len(array), AT_ONCE):
        yield from array[start : start + AT_ONCE].tolist()
