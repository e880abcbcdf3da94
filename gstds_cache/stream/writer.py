"""A selection on disk: written as it is made, taken up again after a kill, replaced by its final form when whole.

While it is made, a selection lies in ``.NAME.partial``, in record batches of what was ready. When it is whole it is
read once more, checked, and written in full groups under its name: so a finished file has the same bytes however often
the making was interrupted, and is read at full speed. Batches that come so fast that they fill a group within
:data:`HELD` seconds are held back until they do: of a run of such batches from the first to the last the file is whole
as it is, and only gets its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from gstds_cache.errors import StreamError, UsageError
from gstds_cache.files.atomic import atomic_write, discard_leftovers, flush_directory, writing
from gstds_cache.files.lock import exclusive
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.reader import SelectionStream, open_selection
from gstds_cache.stream.record_writer import SelectionWriter, computed, grouped, is_full
from gstds_cache.stream.schema import CANDIDATES_FORMAT, FORMAT, Header

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector

HELD = 3.0
"""Seconds for which batches that fill no group wait for the next ones; a kill costs them, and what is under way."""


def partial_of(path: Path) -> Path:
    """Where the selection that will be at ``path`` lies while it is made."""
    return path.with_name(f".{path.name}.partial")


def header_of(selector: BatchSelector) -> Header:
    """The header of a selector's run."""
    plan = selector.plan
    return Header(
        cache_fingerprint=selector.store.fingerprint,
        selection_digest=selector.digest,
        items=len(selector.store),
        items_root=selector.store.spec.items_root,
        seed=selector.config.seed,
        epochs=selector.config.epochs,
        batches_per_epoch=plan.batches_per_epoch,
        total_batches=plan.total_batches,
        total_kept=plan.total_kept,
        kept_per_epoch=plan.kept_per_epoch,
        settings=selector.identity["select"],
        format=FORMAT if selector.draw is None else CANDIDATES_FORMAT,
    )


def is_finished(selector: BatchSelector, path: Path, *, replace: bool = False) -> bool:
    """Whether ``path`` holds this very selection, whole; every byte of it is checked.

    Args:
        selector: The run.
        path: Where its file would be.
        replace: Whether a file that holds something else may be replaced.

    Returns:
        True where nothing needs to be computed; False where there is no file, or one that may be replaced.

    Raises:
        UsageError: The file holds something else, and ``replace`` is not set.
    """
    if path.is_dir():
        raise UsageError(f"`out={str(path)!r}`: a directory is in the way, expected a file or nothing")
    if not path.exists():
        return False
    try:
        with open_selection(path) as stream:
            if stream.header == header_of(selector):
                for _ in stream:
                    pass
                return True
            held = f"selection {stream.header.selection_digest[:12]}, this run makes {selector.digest[:12]}"
    except StreamError as error:
        held = f"no whole selection ({error.message})"
    if replace:
        return False
    raise UsageError(
        f"`out={str(path)!r}`: the file holds {held}", hint="give another `out`, or `force=True` to replace it"
    )


def stored_header(path: Path) -> Header | None:
    """The header of the finished selection at ``path``, or None; its records are checked by whoever reads them."""
    try:
        with open_selection(path) as stream:
            return stream.header
    except (UsageError, StreamError, OSError):
        return None


class Storing:
    """A selection that is being stored.

    Attributes:
        header: What the selection says of itself.
        taken_over: Batches that an interrupted run had left.
        size: Bytes of the partial file that hold whole record batches.
        in_groups: Whether all was written in the groups of a finished file.
    """

    def __init__(self, file: BinaryIO, partial: Path, header: Header) -> None:
        """Begin the file, or go on with what is at ``partial``."""
        self.header, self._file, self._partial = header, file, partial
        with writing(partial):
            self._writer, self._ended = SelectionWriter(file, header), False
            for group in grouped(_left_over(partial, header)):
                self._writer.write(*group)
        self.taken_over = self._writer.next_seq
        self.size = file.tell()
        self.in_groups, self._last_full = self.taken_over == 0, True

    def write(self, *selections: SelectedBatch) -> None:
        """Write batches."""
        with writing(self._partial):
            self._writer.write(*selections)
        self.size = self._file.tell()
        rows = [len(selection.kept) for selection in selections]
        self.in_groups &= self._last_full and not is_full(len(rows) - 1, sum(rows[:-1]))
        self._last_full = is_full(len(rows), sum(rows))

    def end(self) -> None:
        """Write the stream end, once."""
        if not self._ended:
            with writing(self._partial):
                self._writer.end()
            self._ended, self.size = True, self._file.tell()


@contextmanager
def storing(header: Header, path: Path) -> Iterator[Storing]:
    """Store a selection at ``path``; at the end of the block it is there, whole and on the disk.

    A block left by an exception leaves ``.NAME.partial``, from which the next one for the same selection goes on.

    Args:
        header: The header of the selection.
        path: Where it goes.

    Yields:
        What takes the batches from ``taken_over`` on.

    Raises:
        IncompleteError: Another process is writing the same file.
        StreamError: Not all batches were written.
        OSError: The disk takes no more.
    """
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(f".{path.name}.lock"), of=path):
        begun = partial.with_suffix(".tmp")  # one name for all processes: the lock lets one at a time write it
        # Named once more: closing the file tries to write what is left, and its error takes the place of the first.
        with writing(partial), begun.open("wb") as file:
            try:
                stored = Storing(file, partial, header)
            except OSError:
                begun.unlink(missing_ok=True)
                raise
            begun.replace(partial)
            try:
                yield stored
                stored.end()
            finally:
                with writing(partial):
                    os.fsync(file.fileno())
        if stored.in_groups:
            discard_leftovers(path, alone=True)
            partial.replace(path)
            flush_directory(path.parent)
        else:
            _finish(partial, path)


def write_file(selector: BatchSelector, path: Path) -> Generator[SelectedBatch, None, None]:
    """Write a selection to ``path``, continuing what an interrupted run left.

    A run that is killed loses the batches of its last :data:`HELD` seconds, and those that threads have under way; one
    that is interrupted, these alone.

    Args:
        selector: The run.
        path: Where the selection goes.

    Yields:
        The batches that were computed now, as they are written.

    Raises:
        IncompleteError: Another process is writing the same file.
    """
    with storing(header_of(selector), path) as stored:
        for ready in computed(selector, stored.taken_over, hold=HELD):
            stored.write(*ready)
            yield from ready


def copy_file(source: Path, path: Path) -> None:
    """Copy a finished selection; ``path`` appears when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as original, atomic_write(path, durable=True) as file:
        shutil.copyfileobj(original, file)


def _finish(partial: Path, path: Path) -> None:
    """Write ``partial`` once more, checked and in full groups, and give it its name.

    Raises:
        OSError: The disk takes no more.
    """
    # The lock keeps other writers out. Where the disk is full, the partial file still has all of it.
    with (
        atomic_write(path, durable=True, leftovers="all") as file,
        open_selection(partial) as stream,
        SelectionWriter(file, stream.header) as writer,
    ):
        for group in grouped(stream):
            writer.write(*group)
    partial.unlink()


def _left_over(partial: Path, header: Header) -> Iterator[SelectedBatch]:
    if not partial.exists():
        return
    with partial.open("rb") as file:
        try:
            stream = SelectionStream(file)
            if stream.header != header:
                return
            yield from stream
        except StreamError:
            return
