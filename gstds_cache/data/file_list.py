"""``list:FILE.csv``: images named by a list of paths, with or without labels."""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gstds_cache.data.files import Files, FileSource, has_image_extension, printable
from gstds_cache.data.labels import LabelColumn
from gstds_cache.data.names import Names, duplicate
from gstds_cache.errors import DatasetError, UsageError, unknown_name
from gstds_cache.files.given import reading, require_file
from gstds_cache.files.location import local_file

PATH_NAMES = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "img",
    "img_path",
)
"""How a header names the column of paths, in any case."""
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "cls")
TRIED = 64
"""Files, spread over the list, of which one at least has to be there."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WHOLE = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class _Columns:
    """Where a row has its path and label, and how many fields it has."""

    path: int
    label: int | None
    count: int
    header: bool


def open_file_list(uri: str, path: str, params: Mapping[str, str]) -> FileSource:
    """Open a list of images: a row for each, with its path and, where there is a second column, its label.

    Row i of the list is item i; a header is no row, and blank lines are passed over. Paths are relative to the list's
    folder. Labels are whole numbers where all of them are, else text, of which the sorted values are the classes; an
    empty label, or none, is an item without a label. A file that is missing is an item that cannot be read.

    Args:
        uri: The data set as the user named it.
        path: The list: comma-separated, or tab-separated where it ends in ``.tsv``; UTF-8.
        params: ``path`` and ``label``, names of columns in the header; ``label=`` for no labels.

    Returns:
        The source; ids are the paths, normalised.

    Raises:
        UsageError: ``path`` is empty, or a column is not in the header.
        DatasetError: There is no such list, a row cannot be meant, a path occurs twice, or none of the files is there.
    """
    if not path:
        raise UsageError(f"data set {uri!r}: no file given", hint="name the list: list:FILE.csv, with path,label rows")
    file = local_file(path, "list of files")
    require_file(file, "list of files", DatasetError, "name a file with a row path,label for each image")
    columns = _columns(uri, file, params)
    ids = Names.of(printable(os.path.normpath(row[columns.path])) for _, row in _rows(uri, file, columns))
    if not ids:
        raise DatasetError(f"data set {uri!r}: got no row in {file}, expected one for each image: path,label")
    twice = duplicate(ids)
    if twice is not None:
        lines = [
            line for line, row in _rows(uri, file, columns) if printable(os.path.normpath(row[columns.path])) == twice
        ]
        raise DatasetError(
            f"data set {uri!r}: got the path {twice!r} in lines {lines[0]} and {lines[1]}, expected each image once",
            hint="take one of the lines out: an item has one row and one label",
        )
    folder = os.path.abspath(file.parent)  # noqa: PTH100 - Path's would resolve nothing more
    files = Files.at(
        Names.of(os.path.normpath(os.path.join(folder, row[columns.path])) for _, row in _rows(uri, file, columns))  # noqa: PTH118
    )
    _require_one(uri, files, folder)
    column = LabelColumn(len(ids), uri, lambda row: f"item {ids[row]!r} (row {row})")
    labels = column.read(_labels(uri, file, columns))
    return FileSource(
        uri=uri, kind="list", ids=ids, labels=labels, files=files, classes=column.classes, notes=column.notes
    )


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Read the list.

    Yields:
        Line number and fields of every row that is not blank.

    Raises:
        DatasetError: It is no text in columns.
    """
    with (
        reading(file, "a list of comma-separated rows path,label", DatasetError),
        file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text,
    ):
        rows = csv.reader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", skipinitialspace=True)
        for row in rows:
            if any(row):
                yield rows.line_num, row


def _columns(uri: str, file: Path, params: Mapping[str, str]) -> _Columns:
    """Which columns are meant, by the query, the header, or their number.

    Raises:
        UsageError: A column is not in the header.
        DatasetError: There is no header, and what the columns are cannot be told.
    """  # noqa: DOC501
    line, first = next(_lines(file), (0, [""]))
    names = [name.strip().lower() for name in first]
    if params:
        for name in params.values():
            if name and name not in first:
                raise unknown_name(f"column of {file}:", name, first)
    known = next((names.index(name) for name in PATH_NAMES if name in names), None)
    given = params.get("path")
    if given or known is not None or params.get("label"):
        path = first.index(given) if given else known
        if path is None:
            raise DatasetError(
                f"data set {uri!r}: got the columns {', '.join(first)}, expected one of paths, named path",
                hint="say which it is: ?path=COLUMN",
            )
        return _Columns(path, _label_column(first, names, path, params), len(first), header=True)
    if len(first) > 2:
        raise DatasetError(
            f"data set {uri!r}: got {len(first)} columns and no header in {file}, expected path,label",
            hint="put a header with their names before the first row: path,label,... ; a path with a comma in it is "
            "put in quotes",
        )
    there = os.path.lexists(os.path.join(file.parent, first[0]))  # noqa: PTH118
    if first[0] and not has_image_extension(first[0]) and not there:
        raise DatasetError(
            f"data set {uri!r}, line {line} of {file}: got {first[0]!r}, expected the path of an image, or a header "
            "path,label",
            hint=f"if it is the name of the column, say so: ?path={first[0]}",
        )
    return _Columns(0, 1 if len(first) == 2 and "label" not in params else None, len(first), header=False)


def _label_column(first: list[str], names: list[str], path: int, params: Mapping[str, str]) -> int | None:
    given = params.get("label")
    if given is not None:
        return first.index(given) if given else None
    known = next((names.index(name) for name in LABEL_NAMES if name in names), None)
    return 1 - path if known is None and len(first) == 2 else known


def _rows(uri: str, file: Path, columns: _Columns) -> Iterator[tuple[int, list[str]]]:
    """The rows of images.

    Yields:
        Line number and fields; fields at the end that a line lacks are empty.

    Raises:
        DatasetError: A row has too many fields, no path, or a URL.
    """
    for number, (line, row) in enumerate(_lines(file)):
        if columns.header and number == 0:
            continue
        where = f"data set {uri!r}, line {line} of {printable(str(file))}"
        if len(row) > columns.count:
            raise DatasetError(
                f"{where}: got {len(row)} columns, expected {columns.count} as in the first line",
                hint="a path with a comma in it is put in quotes; a first row without a label ends with a comma",
            )
        row += [""] * (columns.count - len(row))  # noqa: PLW2901 - in its place
        path = row[columns.path]
        if not path or "\0" in path:
            raise DatasetError(f"{where}: got no path, expected one", hint="take the line out, or name its image")
        if _URL.match(path):
            raise DatasetError(
                f"{where}: got {path!r}, expected a path on this machine", hint="download the images first"
            )
        yield line, row


def _require_one(uri: str, files: Files, folder: str) -> None:
    """Refuse a list of which no file is there: its paths are relative to something else.

    Raises:
        DatasetError: So it is.
    """
    tried = [files.path(row) for row in range(0, len(files), -(-len(files) // TRIED))]
    if not any(map(os.path.lexists, tried)):
        what = "all" if len(tried) == len(files) else f"the {len(tried):,} that were looked for"
        raise DatasetError(
            f"data set {uri!r}: got {len(files):,} paths of which {what} are not there, expected paths relative to "
            f"{printable(folder)}; the first is {printable(tried[0])}",
            hint=f"look for it: ls {shlex.quote(printable(os.path.dirname(tried[0])))}",  # noqa: PTH120
        )


def _labels(uri: str, file: Path, columns: _Columns) -> Iterable[int | float | str | None]:
    """The label of every row: whole numbers where all are, numbers where all are (so that fractions are refused)."""
    place = columns.label
    if place is None:
        return (None for _ in _rows(uri, file, columns))

    def texts() -> Iterator[str]:
        return (row[place].strip() for _, row in _rows(uri, file, columns))

    whole = all(not text or _WHOLE.fullmatch(text) for text in texts())
    if whole:
        return (int(text) if text else None for text in texts())
    numbers = all(not text or _is_number(text) for text in texts())
    return (None if not text else float(text) if numbers else text for text in texts())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
