"""Writing a selection to a pipe as it is made, and keeping it: the next time it comes from the disk at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from gstds_cache.errors import IncompleteError
from gstds_cache.files.atomic import DISK_FULL
from gstds_cache.runtime.notify import Notify
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.record_writer import SelectionWriter, computed
from gstds_cache.stream.records import GROUP_RECORDS
from gstds_cache.stream.schema import ByteStream, Header
from gstds_cache.stream.writer import Storing, header_of, partial_of, storing

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector

COPY = 1 << 20
AHEAD = GROUP_RECORDS  # batches a producer may be ahead of its reader, beyond what the pipe holds


class GroupingWriter:
    """Hands batches to a thread that writes all that are ready, in one record batch.

    A reader that waits gets each batch as soon as it is there; one that is slow gets groups. A full queue makes
    :meth:`write` wait, so memory is bounded.
    """

    def __init__(self, writer: SelectionWriter, *, ahead: int = AHEAD) -> None:
        self._writer, self._ahead = writer, ahead
        self._ready: deque[SelectedBatch] = deque()
        self._changed = threading.Condition()
        self._closed, self._error = False, None  # type: bool, BaseException | None
        self._thread = threading.Thread(target=self._run, name="stream-writer", daemon=True)

    def write(self, *selections: SelectedBatch) -> None:
        """Queue batches.

        Raises:
            BrokenPipeError: The reader went away; or whatever else ended the writing.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._ahead or self._error is not None)
            if self._error is not None:
                raise self._error
            self._ready.extend(selections)
            self._changed.notify_all()

    def __enter__(self) -> GroupingWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is queued, and the end: of the stream, or of the producer.

        Raises:
            BrokenPipeError: The reader went away; or whatever else ended the writing.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is None:
            self._writer.__exit__(kind, error, traceback)
        elif kind is None:
            raise self._error

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._ready or self._closed)
                    group = list(self._ready)
                    self._ready.clear()
                    self._changed.notify_all()
                if not group:
                    return
                self._writer.write(*group)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


def write_pipe(
    selector: BatchSelector,
    sink: ByteStream,
    *,
    keep: Path | None = None,
    notify: Notify = lambda _text: None,
) -> Generator[SelectedBatch, None, None]:
    """Write a selection to a pipe as it is made. A reader that goes away raises BrokenPipeError.

    Args:
        selector: The run.
        sink: Where it goes.
        keep: Where to store the selection as well; what an interrupted run left there is not computed again. Where that
            is impossible (another process is at it, a read-only disk, one that fills up on the way), the pipe is served
            all the same.
        notify: Told why nothing is stored.

    Yields:
        The batches that were computed now.
    """
    header = header_of(selector)
    with ExitStack() as stack:
        kept = stack.enter_context(_Keeping(header, keep, notify))
        pipe = stack.enter_context(GroupingWriter(SelectionWriter(sink, header)))
        before = kept.taken_over
        if keep is not None and before:
            for selection in _first(keep, before):
                pipe.write(selection)
        for ready in computed(selector, before):
            pipe.write(*ready)
            kept.write(*ready)
            yield from ready


class _Keeping:
    """Stores the batches that go to a pipe, for as long as that can be done.

    Attributes:
        taken_over: Batches that an interrupted run had stored.
    """

    def __init__(self, header: Header, path: Path | None, notify: Notify) -> None:
        self.taken_over = 0
        self._header, self._path, self._notify = header, path, notify
        self._block: AbstractContextManager[Storing] | None = None
        self._stored: Storing | None = None

    def __enter__(self) -> _Keeping:
        if self._path is not None:
            block = storing(self._header, self._path)
            try:
                self._stored = block.__enter__()
            except (IncompleteError, OSError) as error:
                self._notify(f"this selection is not kept for the next time: {error}")
            else:
                self._block, self.taken_over = block, self._stored.taken_over
        return self

    def write(self, *selections: SelectedBatch) -> None:
        """Store batches; where that fails nothing more is stored."""
        if self._stored is None or self._block is None:
            return
        try:
            self._stored.write(*selections)
        except OSError as error:
            block, self._block = self._block, None
            with suppress(OSError):  # of what was not written yet
                block.__exit__(type(error), error, error.__traceback__)
            self._give_up(error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._block is not None:
            try:
                self._block.__exit__(kind, error, traceback)
            except OSError as failed:  # one that ended the block comes back as False
                self._give_up(failed)

    def _give_up(self, error: OSError) -> None:
        self._notify(f"this selection is not kept for the next time: {error}")
        if self._path is not None and error.errno in DISK_FULL:
            with suppress(OSError):  # the trainer beside us may need the room, for its checkpoint
                partial_of(self._path).unlink(missing_ok=True)


def replay(path: Path, sink: ByteStream) -> None:
    """Copy a finished selection to a pipe. Its reader checks every record.

    Raises:
        BrokenPipeError: The reader went away.
    """
    with path.open("rb") as file:
        while data := file.read(COPY):
            sink.write(data)
    sink.flush()


def _first(keep: Path, count: int) -> Iterator[SelectedBatch]:
    with open_selection(partial_of(keep)) as stream:
        while stream.next_seq < count:
            yield next(iter(stream))
