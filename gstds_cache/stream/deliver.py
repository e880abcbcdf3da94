"""A selection to where it is wanted: from beside its store where it is finished already, else as it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gstds_cache.files.derived import SELECTIONS, WritablePath, derived_paths, first_writable
from gstds_cache.runtime.notify import Notify
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.pipe import replay, write_pipe
from gstds_cache.stream.schema import ByteStream
from gstds_cache.stream.writer import copy_file, header_of, is_finished, stored_header, write_file

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector


def kept_paths(selector: BatchSelector) -> list[Path]:
    """Where this selection may be kept, by its digest: in ``STORE.selections/``, or in the cache."""
    return [folder / f"{selector.digest[:16]}.arrow" for folder in selection_folders(selector)]


def selection_folders(selector: BatchSelector) -> list[Path]:
    """The folders in which selections of the selector's store may be kept, in the order to look."""
    return derived_paths(selector.store.location, SELECTIONS)


def path_to_keep(selector: BatchSelector) -> WritablePath:
    """Where this selection is kept, or is to be kept: its folder is made, and takes files."""
    paths = kept_paths(selector)
    stored = _stored_in(selector, paths)
    if stored is not None:
        return WritablePath(stored)
    folder = first_writable([path.parent for path in paths])
    return WritablePath(None if folder.path is None else folder.path / paths[0].name, folder.note)


def _stored_in(selector: BatchSelector, paths: list[Path]) -> Path | None:
    return next((path for path in paths if stored_header(path) == header_of(selector)), None)


def deliver_kept(selector: BatchSelector, out: Path | ByteStream, *, replace: bool, notify: Notify) -> bool:
    """Deliver a selection that is finished already, computing nothing.

    Args:
        selector: The run that would make it.
        out: A file, or a pipe.
        replace: Whether a file that holds something else may be replaced.
        notify: Told where it was found.

    Returns:
        Whether it was finished; where not, nothing was written.

    Raises:
        UsageError: The file holds something else, and ``replace`` is off.
        BrokenPipeError: The reader of the pipe went away.
    """
    paths = kept_paths(selector)
    kept = _stored_in(selector, paths)
    if not isinstance(out, Path):
        if kept is not None:
            notify(f"this selection is in {kept} already, nothing is computed")
            replay(kept, out)
        return kept is not None
    # A file that we named, by the digest of what belongs into it, holds nothing else that anyone could want.
    if is_finished(selector, out, replace=replace or out in paths):
        notify(f"this selection is in {out} already, nothing was computed")
        return True
    if kept is not None and out != kept and is_finished(selector, kept, replace=True):
        copy_file(kept, out)
        notify(f"this selection was in {kept} already, and was copied")
        return True
    return False


def deliver_computed(selector: BatchSelector, out: Path | ByteStream, *, notify: Notify) -> Iterator[SelectedBatch]:
    """Compute a selection into a file or a pipe, and keep it for other runs; an interrupted run's batches stay.

    Args:
        selector: The run.
        out: A file, or a pipe.
        notify: Told why it is not kept, where it cannot be; it is delivered all the same.

    Yields:
        The batches that were computed now.

    Raises:
        IncompleteError: Another process is writing the same file.
        BrokenPipeError: The reader of the pipe went away.
    """
    if isinstance(out, Path) and out in kept_paths(selector):
        yield from write_file(selector, out)
        return
    writable = path_to_keep(selector)
    if writable.path is None:
        notify(f"not kept for other runs: {writable.note}")
    if not isinstance(out, Path):
        yield from write_pipe(selector, out, keep=writable.path, notify=notify)
        return
    yield from write_file(selector, out)
    if writable.path is not None:
        try:
            copy_file(out, writable.path)
        except OSError as error:
            notify(f"not kept for other runs: {error}")
