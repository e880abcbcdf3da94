"""Writing the records of a selection, in record batches of as many rows as are ready."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING

import pyarrow as pa

from gstds_cache.errors import StreamError
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.candidate_records import encode_candidates
from gstds_cache.stream.records import (
    GROUP_RECORDS,
    GROUP_ROWS,
    NO_RECORD,
    Kind,
    Record,
    encode,
    next_hash,
    sha_words,
)
from gstds_cache.stream.schema import ByteStream, Header

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector


class SelectionWriter:
    """Writes data records and puts the epoch-end, stream-end and error records where they belong.

    Used as a context manager: leaving the block after the last batch writes the stream end; leaving it by an exception
    writes an error record, so that a reader never takes half a selection for a whole one.

    Attributes:
        header: What the stream says of itself.
        next_seq: The batch to be written next.
    """

    def __init__(self, sink: ByteStream, header: Header) -> None:
        self.header, self.next_seq = header, 0
        self._sink, self._encode = sink, encode_candidates if header.candidates else encode
        self._writer = pa.ipc.new_stream(sink, header.to_schema())
        sink.flush()
        self._hash = NO_RECORD
        self._kept, self._kept_in_epoch = 0, 0

    def write(self, *selections: SelectedBatch) -> None:
        """Write batches, in one Arrow record batch; a reader sees them at once.

        Raises:
            StreamError: A batch is not the next one.
        """
        records = []
        for selection in selections:
            if selection.seq != self.next_seq:
                raise StreamError(f"batch {selection.seq} written, expected batch {self.next_seq}")
            if (selection.candidates is not None) != self.header.candidates:
                raise StreamError(f"batch {selection.seq}: candidates and kept rows do not go into one selection")
            records.append(Record.data(selection))
            self.next_seq += 1
            self._kept_in_epoch += selection.count
            if self.next_seq % self.header.batches_per_epoch == 0:
                records.append(Record.mark(Kind.EPOCH_END, self.next_seq, selection.epoch, [self._kept_in_epoch]))
                self._kept, self._kept_in_epoch = self._kept + self._kept_in_epoch, 0
        if records:
            self._put(records)

    def __enter__(self) -> SelectionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.end()
        elif not issubclass(kind, BrokenPipeError):
            stopped = issubclass(kind, (KeyboardInterrupt, GeneratorExit))
            self.fail("interrupted" if stopped else f"{kind.__name__}: {error}")

    def end(self) -> None:
        """Write the stream-end record.

        Raises:
            StreamError: Not all batches were written.
        """
        if self.next_seq != self.header.total_batches:
            raise StreamError(f"{self.next_seq} batches written, the header promises {self.header.total_batches}")
        words = [self.next_seq, self._kept, *sha_words(self._hash)]
        batch, _ = self._encode([Record.mark(Kind.STREAM_END, self.next_seq, self.header.epochs - 1, words)])
        self._writer.write_batch(batch)
        self._writer.close()
        self._sink.flush()

    def fail(self, reason: str) -> None:
        """Write an error record."""
        mark = Record.mark(Kind.ERROR, self.next_seq, -1, [])
        self._writer.write_batch(self._encode([mark])[0], custom_metadata={"error": reason.encode()[:4096]})
        self._sink.flush()

    def _put(self, records: Sequence[Record]) -> None:
        batch, packed = self._encode(records)
        self._writer.write_batch(batch)
        self._sink.flush()
        for body in packed:
            self._hash = next_hash(self._hash, body)


def grouped(selections: Iterable[SelectedBatch]) -> Iterator[list[SelectedBatch]]:
    """Yields batches in the groups in which a finished file holds them."""
    group: list[SelectedBatch] = []
    rows = 0
    for selection in selections:
        group.append(selection)
        rows += len(selection.kept)
        if is_full(len(group), rows):
            yield group
            group, rows = [], 0
    if group:
        yield group


def computed(selector: BatchSelector, start: int, *, hold: float = 0.0) -> Iterator[list[SelectedBatch]]:
    """Select from batch ``start`` on, and hand over together what is ready together.

    A record batch of one batch takes 100 us, a batch's share of a full one 7.

    Args:
        selector: The run.
        start: First ``seq``.
        hold: Seconds for which batches wait for those that fill their group, where nobody waits for them: a file that
            is written in full groups is not written once more at the end. With 0 those that are ready do not wait.

    Yields:
        Batches in order, in lists that are no longer than the groups of a finished file.
    """
    group: list[SelectedBatch] = []
    rows, begun = 0, 0.0
    with closing(selector.run(start=start)) as batches:  # type: ignore[type-var]
        try:
            for selection in batches:
                if not group:
                    begun = time.monotonic()
                group.append(selection)
                rows += len(selection.kept)
                enough = time.monotonic() - begun >= hold if hold else not selector.pending
                if enough or is_full(len(group), rows):
                    ready, group, rows = group, [], 0
                    yield ready
        except BaseException:
            if group:  # what was selected before something failed is not lost; nothing is held where this is closed
                yield group
            raise
        if group:
            yield group


def is_full(records: int, rows: int) -> bool:
    """Whether a group of a finished file is closed at so many records that keep so many rows."""
    return records >= GROUP_RECORDS or rows >= GROUP_ROWS
