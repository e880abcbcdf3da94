"""``gstds_cache.select_once``: a core set for a whole training run."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jaxtyping import Int, Int64

from gstds_cache.api.select_batches import open_store
from gstds_cache.api.selection import Selection, SelectionSummary
from gstds_cache.config import MEMORY_BUDGET, OnceConfig, OnceSettings, as_type, require_settings
from gstds_cache.costs.records import Cost, keep_record, selection_costs
from gstds_cache.errors import UsageError
from gstds_cache.files.atomic import atomic_write
from gstds_cache.files.derived import SELECTIONS, derived_paths, first_writable
from gstds_cache.files.location import file_to_write, local_file
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.runtime.threads import limited_threads
from gstds_cache.selection.core_set import choose_core_set
from gstds_cache.selection.difficulty import PIECE
from gstds_cache.selection.floors import class_name
from gstds_cache.selection.unit_rows import UnitRows
from gstds_cache.store.access import Kind
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.core_set import core_set_batches, core_set_header
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.record_writer import grouped
from gstds_cache.stream.schema import Header
from gstds_cache.stream.writer import stored_header, storing

ENDINGS = (".txt", ".csv")


def select_once(
    store: EmbeddingStore | str | Path,
    rows: int,
    *,
    out: str | Path | None = None,
    ids: str | Path | None = None,
    force: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    access: Kind = "auto",
    mirror: str | Path | None = None,
    progress: Progress | bool | None = True,
    **settings: Unpack[OnceSettings],
) -> Selection:
    """Choose a core set once, over the whole data set, and write it as a selection of the same rows in every epoch.

    A core set that was chosen before from the same store and settings is found, and nothing is computed.

    Args:
        store: A store, or its location.
        rows: Rows to choose.
        out: File of the selection; by default one named by the selection's digest in ``STORE.selections/``, or in
            ``$GSTDS_CACHE`` where nothing can be written beside the store.
        ids: File of the chosen items: ``.txt``, an id a line, or ``.csv`` with columns ``id``, ``row``, ``label`` and
            ``class``; None is ``out`` with the ending ``.csv``.
        force: Replace files that hold something else.
        memory_budget: As for :func:`gstds_cache.select`.
        access: As for :func:`gstds_cache.select`.
        mirror: As for :func:`gstds_cache.select`.
        progress: As for :func:`gstds_cache.select`; counts rows.
        settings: As the fields of :class:`~gstds_cache.OnceConfig`.

    Returns:
        The selection.

    Raises:
        UsageError: A setting cannot be meant, there are fewer rows, or a file holds something else.
        IncompleteError: The store is not complete, or another process is writing the same file.
        SolverError: A row's embedding holds NaN or Inf.
    """
    begun = time.perf_counter()
    require_settings(select_once, OnceConfig, settings)
    config, count = OnceConfig(**settings), int(as_type("once", rows, int))
    device = resolve_device(config.device)
    opened = open_store(store, memory_budget, access, mirror)
    if count < 1:
        raise UsageError(f"`once`: got {count:,}, expected 1 or more")
    unit_rows = UnitRows.of(opened)
    header = core_set_header(opened, count, config)
    path = _default_path(opened, header) if out is None else local_file(out, "`out`")
    listed = path.with_suffix(".csv") if ids is None else file_to_write(ids, "`ids`")
    if listed.suffix not in ENDINGS:
        raise UsageError(f"`ids` {listed}: got the ending {listed.suffix!r}, expected one of {', '.join(ENDINGS)}")
    found = stored_header(path) == header
    _refuse_files(path, listed, opened, found=found, named=(out is not None, ids is not None), force=force)
    with limited_threads(config.threads), showing(progress, "rows") as show:
        if found:
            chosen = _rows_of(path)
        else:
            chosen = choose_core_set(
                unit_rows, count, config, device, lambda done, all_: show("choose", done, all_, {})
            )
            with storing(header, path) as stored:
                batches = core_set_batches(chosen, len(unit_rows), header, stored.taken_over)
                for group in grouped(batches):
                    stored.write(*group)
    with atomic_write(listed, durable=True) as lines:
        _write_ids(lines, listed, opened, chosen)
    seconds = time.perf_counter() - begun
    if not found:
        where = str(opened.location.path or opened.location)
        keep_record(
            [selection_costs(path)],
            Cost(header.selection_digest, len(unit_rows), 0, seconds, None, str(device), where),
            anew=True,
        )
    return Selection(path.absolute(), _summary(opened, header, path, chosen, len(unit_rows), found, seconds))


def _refuse_files(
    path: Path, listed: Path, store: EmbeddingStore, *, found: bool, named: tuple[bool, bool], force: bool
) -> None:
    """Refuse to replace what is not ours; ``named`` says whether the user named the selection, and the list.

    Raises:
        UsageError: A file holds something else, or both are one.
    """
    if not found and path.exists() and not force and named[0]:
        raise UsageError(f"`out` {path}: the file holds something else", hint="give another name, or `force=True`")
    if listed.resolve() == path.resolve():
        raise UsageError(
            f"`out` {path}: the list of ids has the same name",
            hint="give `out` another ending, such as .arrow, or `ids`",
        )
    # A default file is named by the selection's digest, and nobody's but ours.
    taken = listed.exists() and not force and any(named)
    if taken and not (found and _is_list_of(listed, store, _rows_of(path))):
        raise UsageError(
            f"`ids` {listed}: the file exists and holds something else", hint="give another name, or `force=True`"
        )


def _default_path(store: EmbeddingStore, header: Header) -> Path:
    """Where a core set goes for which no ``out`` was given.

    Raises:
        UsageError: Nothing can be written in any of the default folders.
    """
    name = f"{header.selection_digest[:16]}.arrow"
    folders = derived_paths(store.location, SELECTIONS)
    for folder in folders:
        if stored_header(folder / name) == header:
            return folder / name
    writable = first_writable(folders)
    if writable.path is None:
        raise UsageError(
            f"there is no default folder for the selection: {writable.note}",
            hint="give `out`, or set GSTDS_CACHE to a folder that can be written",
        )
    return writable.path / name


def _rows_of(path: Path) -> Int64[np.ndarray, " n"]:
    """The rows of a core set that is stored; every record is checked."""
    with open_selection(path) as stream:
        return np.sort(np.concatenate([batch.kept for batch in stream if batch.epoch == 0]))


def _write_ids(out: Any, file: Path, store: EmbeddingStore, rows: Int64[np.ndarray, " n"]) -> None:
    """Write the ids of some rows to ``out``, in the store's order, as the ending of ``file`` says.

    Raises:
        UsageError: An id holds a line break, and the file is ``.txt``.
    """
    names, labels, classes = store.manifest().ids, store.labels, store.classes
    text = io.TextIOWrapper(out, "utf-8", errors="surrogateescape", newline="")
    writer = csv.writer(text, lineterminator="\n")
    if file.suffix == ".csv":
        writer.writerow(["id", "row", "label", "class"])
    for row in rows.tolist():
        name, label = names[row], int(labels[row])
        if file.suffix == ".csv":
            named = classes[label] if 0 <= label < len(classes) else ""
            writer.writerow([name, row, label if label >= 0 else "", named])
            continue
        if len(name.splitlines()) != 1:
            raise UsageError(f"`ids` {file}: the id {name!r} is not one line", hint="write a list that ends in .csv")
        text.write(f"{name}\n")
    text.flush()
    text.detach()  # the file is closed by whoever opened it


def _is_list_of(file: Path, store: EmbeddingStore, rows: Int64[np.ndarray, " n"]) -> bool:
    """Whether a file is the list of these rows."""
    wanted = io.BytesIO()
    _write_ids(wanted, file, store, rows)
    return file.is_file() and file.stat().st_size == wanted.tell() and file.read_bytes() == wanted.getbuffer()


def _summary(
    store: EmbeddingStore,
    header: Header,
    path: Path,
    rows: Int64[np.ndarray, " n"],
    of: int,
    found: bool,
    seconds: float,
) -> SelectionSummary:
    kept, counts = np.unique(np.asarray(store.labels)[rows], return_counts=True)
    seen = _seen(store, kept) if len(kept) <= MOST_CLASSES else np.zeros(len(kept), np.int64)
    return SelectionSummary(
        out=str(path),
        selection_digest=header.selection_digest,
        cache_fingerprint=store.fingerprint,
        dataset_uri=store.dataset_uri,
        cache_hit=found,
        epochs=header.epochs,
        total_batches=header.total_batches,
        total_rows=of * header.epochs,
        total_kept=header.total_kept,
        batches=0 if found else header.total_batches,
        rows=0 if found else of * header.epochs,
        kept=0 if found else header.total_kept,
        samples_per_second=0.0 if found else round(of / max(seconds, 1e-9), 1),
        classes={
            class_name(label, store.classes): {"seen": of_class, "kept": count}
            for label, of_class, count in zip(kept.tolist(), seen.tolist(), counts.tolist(), strict=True)
            if label >= 0 and len(kept) <= MOST_CLASSES
        },
        status={},
        graphs_found=0,
        rule=header.settings["rule"],
        guidance="none",
        guidance_note="",
        knn_backend="none",
        shares={},
        seconds={"total": round(seconds, 3)},
    )


def _seen(store: EmbeddingStore, names: Int[np.ndarray, " C"]) -> Int64[np.ndarray, " C"]:
    """Rows of each class that could be chosen; ``names`` are labels, ascending."""
    rows, counts = UnitRows.of(store).rows, np.zeros(len(names), np.int64)
    for first in range(0, len(rows), PIECE):
        labels = store.labels[rows.at(np.arange(first, min(first + PIECE, len(rows))))]
        place = np.minimum(np.searchsorted(names, labels), len(names) - 1)
        counts += np.bincount(place[names[place] == labels], minlength=len(names))
    return counts


MOST_CLASSES = 10_000
"""Classes up to which they are counted one by one."""
