"""Writing a selection: to a file that appears only when it is whole, or to a pipe as it is made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from gstds_cache.errors import StreamError, UsageError
from gstds_cache.locking import exclusive
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.selected import Selection
from gstds_cache.stream.reader import SelectionStream, open_selection
from gstds_cache.stream.schema import ByteStream, Header, Kind, Record, sha_words


def header_of(selector: BatchSelector) -> Header:
    """The header of a selector's run."""
    plan = selector.plan
    of_epochs = (
        range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch) for epoch in range(plan.epochs)
    )
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
        kept_per_epoch=[sum(map(plan.keep, seqs)) for seqs in of_epochs],
        settings=selector.identity["select"],
    )


class SelectionWriter:
    """Writes data records and puts the epoch-end, stream-end and error records where they belong.

    Used as a context manager: leaving the block after the last batch writes the stream end; leaving it by an exception
    writes an error record, so that a reader never takes half a selection for a whole one.
    """

    def __init__(self, sink: ByteStream, header: Header) -> None:
        self.header = header
        self._sink = sink
        self._writer = pa.ipc.new_stream(sink, header.to_schema())
        self._sha = hashlib.sha256()
        self._next, self._kept, self._kept_in_epoch = 0, 0, 0

    def write(self, selection: Selection) -> None:
        """Write one batch.

        Raises:
            StreamError: The batch is not the next one.
        """
        if selection.seq != self._next:
            raise StreamError(f"batch {selection.seq} written, expected batch {self._next}")
        self._put(Record.data(selection))
        self._next += 1
        self._kept_in_epoch += len(selection.kept)
        if self._next % self.header.batches_per_epoch == 0:
            self._put(Record.mark(Kind.EPOCH_END, self._next, selection.epoch, [self._kept_in_epoch]))
            self._kept, self._kept_in_epoch = self._kept + self._kept_in_epoch, 0

    def __enter__(self) -> SelectionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, BrokenPipeError):
            return
        if kind is not None:
            mark = Record.mark(Kind.ERROR, self._next, -1, [])
            stopped = issubclass(kind, (KeyboardInterrupt, GeneratorExit))
            text = b"interrupted" if stopped else f"{kind.__name__}: {error}".encode()[:4096]
            self._writer.write_batch(mark.to_batch(), custom_metadata={"error": text})
            self._sink.flush()
            return
        if self._next != self.header.total_batches:
            raise StreamError(f"{self._next} batches written, the header promises {self.header.total_batches}")
        words = [self._next, self._kept, *sha_words(self._sha.digest())]
        self._put(Record.mark(Kind.STREAM_END, self._next, self.header.epochs - 1, words))
        self._writer.close()
        self._sink.flush()

    def _put(self, record: Record) -> None:
        self._writer.write_batch(record.to_batch())
        self._sink.flush()
        self._sha.update(record.packed())


def is_finished(selector: BatchSelector, path: Path, *, replace: bool = False) -> bool:
    """Whether ``path`` holds this very selection, whole.

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
        raise UsageError(f"--out {path}: a directory is in the way, expected a file or nothing")
    if not path.exists():
        return False
    try:
        with open_selection(path) as stream:
            if stream.header == header_of(selector):
                for _ in stream:
                    pass
                return True
            found = f"selection {stream.header.selection_digest[:12]}, this run makes {selector.digest[:12]}"
    except StreamError as error:
        found = f"no whole selection ({error.message})"
    if replace:
        return False
    raise UsageError(f"--out {path}: the file holds {found}", hint="give another --out, or --force to replace it")


def write_file(selector: BatchSelector, path: Path) -> Iterator[Selection]:
    """Write a selection to ``path``, continuing what an interrupted run left.

    Batches go to ``.NAME.partial`` beside ``path``, which is renamed once it is whole and on the disk. Batches that a
    killed or interrupted run of the same selection left there are taken over, not computed again.

    Args:
        selector: The run.
        path: Where the selection goes.

    Yields:
        The batches that were computed now, as they are written.

    Raises:
        IncompleteError: Another process is writing the same file.
    """
    header = header_of(selector)
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(f".{path.name}.lock"), of=path):
        yield from _continue(selector, header, partial)
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _continue(selector: BatchSelector, header: Header, partial: Path) -> Iterator[Selection]:
    """Write ``partial`` to its end, keeping the batches that are in it.

    Yields:
        The batches that were computed now.
    """
    done = list(_left_over(partial, header))
    rewritten = partial.with_suffix(".tmp")
    with rewritten.open("wb", buffering=0) as file:
        try:
            with SelectionWriter(file, header) as writer:
                for selection in done:
                    writer.write(selection)
                rewritten.replace(partial)
                for selection in selector.run(start=len(done)):
                    writer.write(selection)
                    yield selection
        finally:
            os.fsync(file.fileno())


def write_pipe(selector: BatchSelector, sink: ByteStream) -> Iterator[Selection]:
    """Write a selection to a pipe, batch by batch. A reader that goes away raises BrokenPipeError.

    Args:
        selector: The run.
        sink: Where it goes.

    Yields:
        The batches as they are written.
    """
    with SelectionWriter(sink, header_of(selector)) as writer:
        for selection in selector.run():
            writer.write(selection)
            yield selection


def _left_over(partial: Path, header: Header) -> Iterable[Selection]:
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
