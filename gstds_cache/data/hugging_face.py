"""``hf:PATH_OR_NAME``: data sets of Hugging Face's ``datasets``: saved, in Parquet files, or by a name on the hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gstds_cache.data.columns import Columns, find_columns
from gstds_cache.data.containers import Container, Signature, if_same
from gstds_cache.data.files import Files, FileSource
from gstds_cache.data.hash_cache import signature_of
from gstds_cache.data.names import AT_ONCE, Names
from gstds_cache.data.source import ImageSource
from gstds_cache.data.table import Cell, TableSource, cell_of, ids_of, labels_of
from gstds_cache.errors import DatasetError, UsageError, in_words, unknown_name
from gstds_cache.files.location import expanded

HUB_SECONDS = 5
"""How long the hub may take to say whether it has a data set."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_hugging_face(uri: str, name: str, params: Mapping[str, str]) -> ImageSource:
    """Open a data set of Hugging Face.

    Row i is item i of ``datasets``' own object. Images are taken as the table has them, encoded, and are hashed and
    decoded here. Nothing is asked of the hub where ``name`` is a path, or where ``HF_HUB_OFFLINE`` or
    ``HF_DATASETS_OFFLINE`` is set.

    Args:
        uri: The data set as the user named it.
        name: A folder that ``save_to_disk`` wrote; a folder or file that ``load_dataset`` reads (Parquet, images); or
            a name on the hub.
        params: ``split`` (default: the only one, else ``train``), ``config`` of several on the hub; columns as in
            :func:`gstds_cache.data.parquet.open_parquet`.

    Returns:
        The source.

    Raises:
        UsageError: ``datasets`` is not installed, or a split or column is not there.
        DatasetError: There is no such data set, the hub does not answer, or it holds no images.
    """
    if not name:
        raise UsageError(f"data set {uri!r}: no name given", hint="name a folder, or a data set of the hub: hf:NAME")
    with _quiet(uri) as datasets:
        path = expanded(name, "data set")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.exists():
            loaded = _from_files(datasets, path, params.get("config"))
        else:
            loaded = _from_hub(datasets, uri, name, params)
    dataset, notes = _split(uri, loaded, params.get("split"))
    return _adapt(dataset, uri, "hf", params, notes, loaded_here=True)


def open_dataset_object(dataset: Any, uri: str) -> ImageSource:
    """Take a ``datasets.Dataset`` of a Python program; columns are found by their features and names.

    Args:
        dataset: The object.
        uri: How it is named in errors.

    Returns:
        The source.

    Raises:
        DatasetError: Its images or labels cannot be told from its other columns.
    """
    kind = (getattr(dataset, "format", None) or {}).get("type")
    notes = ("its transform is not applied: images are embedded as they are stored",) if kind == "custom" else ()
    return _adapt(dataset, uri, uri, {}, notes, loaded_here=False)


def is_dataset(value: Any) -> bool:
    """Whether this is a ``datasets.Dataset``; the library is not imported for it."""
    kinds = type(value).__mro__
    return any(kind.__module__ == "datasets.arrow_dataset" and kind.__name__ == "Dataset" for kind in kinds)


@contextmanager
def _quiet(uri: str) -> Iterator[Any]:
    """The library, without its progress bars.

    Yields:
        The module ``datasets``.

    Raises:
        UsageError: It is not installed.
    """  # noqa: DOC501
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"data set {uri!r}: the library datasets cannot be imported: {error}",
            hint="pip install 'gstds-cache[hf]'",
        ) from error
    shown = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # Loaders of all formats: whatever they raise is about what was named.
        raise DatasetError(
            f"data set {uri!r}: datasets cannot load it: {in_words(error)}",
            hint="try the same in Python: datasets.load_dataset(...), or load_from_disk for a folder that was saved",
        ) from error
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _from_files(datasets: Any, path: Path, config: str | None) -> Any:
    kinds = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
    kind = kinds.get(path.suffix.lower())
    if path.is_file() and kind is not None:
        return datasets.load_dataset(kind, data_files=str(path))
    return datasets.load_dataset(str(path), name=config)


def _from_hub(datasets: Any, uri: str, name: str, params: Mapping[str, str]) -> Any:
    """Load a data set by its name on the hub, or what an earlier load has left of it on this machine.

    Raises:
        DatasetError: It cannot be such a name, the hub has no such data set, or does not answer.
    """
    if not _HUB_NAME.fullmatch(name):
        raise DatasetError(
            f"data set {uri!r}: nothing there, and {name!r} is no name on the hub, expected a folder, a file, or NAME "
            "or USER/NAME",
            hint="check the path",
        )
    offline = datasets.config.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set" if offline else _why_not(name)
    datasets.config.HF_HUB_OFFLINE = bool(why)
    try:
        return datasets.load_dataset(name, name=params.get("config"), split=params.get("split"))
    except Exception as error:
        if why:
            raise DatasetError(
                f"data set {uri!r}: no file or folder of that name, nothing of it was loaded on this machine before, "
                f"and the hub is not to be had: {why}",
                hint="check the path; or load it once where there is a network, save it with save_to_disk and name "
                "that folder",
            ) from error
        raise
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _why_not(name: str) -> str:
    """Why the hub cannot be asked; empty where it answers. One question with a time limit, where loading would retry.

    Raises:
        DatasetError: It answers that there is no such data set.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except GatedRepoError as error:
        raise DatasetError(
            f"data set {name!r} is gated on the hub: {in_words(error)}",
            hint="accept its terms, then log in: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise DatasetError(
            f"data set {name!r}: no file or folder of that name, and the hub has no such data set that may be read",
            hint="check the path or the name; a private one takes a login: hf auth login",
        ) from error
    except Exception as error:  # Of whichever client the library uses today.
        return in_words(error)
    return ""


def _split(uri: str, loaded: Any, split: str | None) -> tuple[Any, tuple[str, ...]]:
    """One split of what was loaded, and notes.

    Raises:
        DatasetError: Several may be meant.
    """  # noqa: DOC501
    if is_dataset(loaded):
        of = str(getattr(loaded, "split", None) or "")
        if split and of and split != of and not of.startswith(f"{split}["):
            raise unknown_name(f"split of data set {uri!r}:", split, [of])
        return loaded, ()
    names = list(loaded)
    if split is None:
        split = names[0] if len(names) == 1 else "train"
        if split not in names:
            raise DatasetError(
                f"data set {uri!r}: got no split of {', '.join(names)}, expected one", hint=f"e.g. ?split={names[0]}"
            )
        others = [name for name in names if name != split]
        notes = (f"split {split}; there are also {', '.join(others)}: name one by split=",) if others else ()
        return loaded[split], notes
    if split not in names:
        raise unknown_name(f"split of data set {uri!r}:", split, names)
    return loaded[split], ()


def _adapt(
    dataset: Any, uri: str, kind: str, params: Mapping[str, str], notes: Sequence[str], *, loaded_here: bool
) -> ImageSource:
    # Of an object that a program loaded, nobody knows whether its files are still those that it mapped.
    paths = tuple(sorted({str(file["filename"]) for file in dataset.cache_files})) if loaded_here else ()
    opened = _signature(paths)
    schema = dataset.features.arrow_schema
    _require_images(uri, dataset, params)
    columns = find_columns(uri, schema, _with_features(dataset, params))
    if not len(dataset):
        raise DatasetError(f"data set {uri!r}: got 0 items, expected at least 1")
    cells = HuggingFaceCells(dataset, columns)
    ids = Names.numbered(len(dataset)) if columns.id is None else ids_of(uri, columns.id, _values(dataset, columns.id))
    labels, read = labels_of(
        uri, ids, columns.label, () if columns.label is None else _values(dataset, columns.label), columns.classes
    )
    notes = (*notes, *columns.notes, *read.notes)
    if _only_paths(dataset, columns):
        files = Files.at(Names.of(_path_in(cells, row) for row in range(len(dataset))))
        return FileSource(uri=uri, kind=kind, ids=ids, labels=labels, files=files, classes=read.classes, notes=notes)
    return TableSource(
        uri=uri,
        kind=kind,
        ids=ids,
        labels=labels,
        cells=cells,
        containers=_containers(dataset, columns, paths, opened),
        classes=read.classes,
        notes=notes,
    )


def _only_paths(dataset: Any, columns: Columns) -> bool:
    """Whether all images are files beside the table, as of a folder of images that ``datasets`` loaded."""
    chunks = dataset.data.column(columns.image).chunks
    return columns.form == "path" or (
        columns.form == "struct" and all(chunk.field("bytes").null_count == len(chunk) for chunk in chunks)
    )


def _with_features(dataset: Any, params: Mapping[str, str]) -> dict[str, str]:
    """``params`` with the columns that their features tell: the only Image, the only ClassLabel."""
    found = dict(params)
    for what, feature in (("image", "Image"), ("label", "ClassLabel")):
        names = [name for name, kind in dataset.features.items() if type(kind).__name__ == feature]
        if what not in found and len(names) == 1:
            found[what] = names[0]
    return found


def _require_images(uri: str, dataset: Any, params: Mapping[str, str]) -> None:
    """Refuse a choice between several columns of images.

    Raises:
        DatasetError: So it is.
    """
    names = [name for name, kind in dataset.features.items() if type(kind).__name__ == "Image"]
    if len(names) > 1 and not params.get("image") and "image" not in names:
        raise DatasetError(
            f"data set {uri!r}: got {len(names)} columns of images, {', '.join(names)}, expected one, or one named "
            "image",
            hint=f"keep one: dataset.select_columns([{names[0]!r}, ...]); in a name: image={names[0]}",
        )


class HuggingFaceCells:
    """A column of a ``datasets.Dataset``, read from its Arrow table, which is mapped where the data set is on disk."""

    def __init__(self, dataset: Any, columns: Columns) -> None:
        """Take the column's chunks, and where each begins; rows may be picked from them by the data set's indices."""
        self._told = dataset, columns
        self._length = len(dataset)
        column = dataset.data.column(columns.image)
        self._chunks = column.chunks
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        self._rows = _indices(dataset)

    def __len__(self) -> int:
        return self._length

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._told

    def reopened(self) -> HuggingFaceCells:
        """The same: nothing has a position."""
        return self

    def cell(self, row: int) -> Cell:
        """What is in a row."""
        if self._rows is not None:
            row = _at(self._rows, row)
        chunk = int(np.searchsorted(self._starts, row, "right")) - 1
        return cell_of(self._chunks[chunk][row - int(self._starts[chunk])])


def _path_in(cells: HuggingFaceCells, row: int) -> str:
    cell = cells.cell(row)
    return os.path.abspath(cell if isinstance(cell, str) else "")  # noqa: PTH100


def _indices(dataset: Any) -> pa.ChunkedArray | None:
    """Rows of the table that are the data set's, as ``select`` and ``shuffle`` leave them; None: all, in order."""
    indices = getattr(dataset, "_indices", None)
    return None if indices is None else indices.column(0)


def _at(rows: pa.ChunkedArray, row: int) -> int:
    return int(rows[row].as_py())


def _values(dataset: Any, name: str) -> Iterator[Any]:
    column, rows = dataset.data.column(name), _indices(dataset)
    for start in range(0, len(dataset), AT_ONCE):
        if rows is None:
            yield from column.slice(start, AT_ONCE).to_pylist()
        else:
            yield from column.take(rows.slice(start, AT_ONCE)).to_pylist()


def _containers(dataset: Any, columns: Columns, paths: tuple[str, ...], opened: Signature) -> tuple[Container, ...]:
    """The data set's files as one container; none where it has none, or names files of images elsewhere."""
    chunks = dataset.data.column(columns.image).chunks
    held = columns.form == "bytes" or (
        columns.form == "struct" and all(chunk.null_count == chunk.field("bytes").null_count == 0 for chunk in chunks)
    )
    if not paths or not held:
        return ()
    rows = _indices(dataset)
    picked = hashlib.sha256()
    if rows is not None:
        for start in range(0, len(rows), AT_ONCE):
            picked.update(np.asarray(rows.slice(start, AT_ONCE).combine_chunks(), np.int64).tobytes())
    name = "\n".join([*paths, f"\0hf {columns.image} {picked.hexdigest()}"])
    return (Container(name, range(len(dataset)), partial(if_same, opened, partial(_signature, paths))),)


def _signature(paths: tuple[str, ...]) -> Signature:
    """One for several files: all sizes, the latest times, and a hash of all there is."""
    parts = [signature_of(path) for path in paths]
    if not parts or any(part[0] < 0 for part in parts):
        return -1, -1, -1, -1
    digest = hashlib.sha256(repr(parts).encode()).digest()
    sizes, changed, made, _ = zip(*parts, strict=True)
    return sum(sizes), max(changed), max(made), int.from_bytes(digest[:7], "big")
