"""Reading a selection, from a file or a pipe alike; nothing short of the whole is taken for one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from gstds_cache.errors import (
    FingerprintMismatchError,
    ProducerFailedError,
    StreamError,
    TruncatedStreamError,
    UsageError,
    command_line,
)
from gstds_cache.selection.selected import Selection
from gstds_cache.stream.schema import ByteStream, Header, Kind, Record, sha_words

AGAIN = "make it again: gstds-select STORE --out FILE"


class SelectionStream:
    """Iterates over the batches of a selection, checking every record.

    The stream is whole only once iteration has ended without an error. Iterate once.

    Attributes:
        header: What the stream says of itself.
        running_sha256: Hash over the records read so far.
        next_seq: The batch that comes next.
    """

    def __init__(self, source: ByteStream) -> None:
        """Read the header.

        Args:
            source: A binary file or pipe.

        Raises:
            StreamError: This is no selection, or one of an unknown format.
            TruncatedStreamError: It ends inside the header.
        """
        self._source = source
        try:
            self._reader = pa.ipc.open_stream(source)
        except (pa.ArrowException, OSError) as error:
            raise TruncatedStreamError(
                f"this is no selection, or one that ends inside its header ({_first_line(error)})", hint=AGAIN
            ) from error
        try:
            self.header = Header.from_schema(self._reader.schema)
        except UnicodeDecodeError as error:  # from Arrow, for a damaged column name
            raise StreamError(f"the selection's header is damaged: {error}", hint=AGAIN) from error
        self._sha = hashlib.sha256()
        self.next_seq = 0
        self._kept, self._kept_in_epoch = 0, 0

    def close(self) -> None:
        """Close the file or pipe."""
        self._source.close()

    def __enter__(self) -> SelectionStream:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def running_sha256(self) -> str:
        """Hash over the records read so far, as 64 hexadecimal digits."""
        return self._sha.hexdigest()

    def __iter__(self) -> Iterator[Selection]:
        """Yield batch after batch.

        Yields:
            The selections in order.

        Raises:
            TruncatedStreamError: The stream ended, or became unreadable, before its stream-end record.
            ProducerFailedError: The producer reported an error.
            StreamError: A record is damaged, out of sequence or out of range.
        """
        for record in self._records():
            if record.seq != self.next_seq:
                raise StreamError(f"selection record out of sequence: got batch {record.seq}, expected {self.next_seq}")
            if record.kind == Kind.STREAM_END:
                self._check_end(record)
                return
            if record.kind == Kind.EPOCH_END:
                self._check_epoch_end(record)
            self._sha.update(record.packed())
            if record.kind == Kind.EPOCH_END:
                self._kept, self._kept_in_epoch = self._kept + self._kept_in_epoch, 0
                continue
            if not record.kept.size or record.kept.min() < 0 or record.kept.max() >= self.header.items:
                raise StreamError(
                    f"selection record {record.seq} names no row, or one outside 0..{self.header.items - 1}"
                )
            self._kept_in_epoch += len(record.kept)
            self.next_seq += 1
            yield record.selection()

    def _records(self) -> Iterator[Record]:
        while True:
            try:
                batch, extra = self._reader.read_next_batch_with_custom_metadata()
                batch.validate(full=True)
            except (StopIteration, pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise TruncatedStreamError(
                    f"the selection is truncated: it ends at batch {self.next_seq} of {self.header.total_batches}, "
                    f"without its stream-end record ({_first_line(error) or 'end of file'})",
                    hint=f"the producer was killed or the file was cut; {AGAIN}",
                ) from error
            for row in range(batch.num_rows):
                try:
                    record = Record.from_batch(batch, row)
                except ValueError as error:
                    raise StreamError(f"selection record after batch {self.next_seq} is damaged: {error}") from error
                if record.kind == Kind.ERROR:
                    text = (extra or {}).get(b"error", b"no reason given").decode(errors="replace")
                    raise ProducerFailedError(
                        f"the producer of the selection failed at batch {record.seq}: {text}",
                        hint="see the messages of gstds-select",
                    )
                yield record

    def _check_epoch_end(self, record: Record) -> None:
        promised = self.header.kept_per_epoch[min(record.epoch, self.header.epochs - 1)]
        if not record.kept.tolist() == [self._kept_in_epoch] == [promised]:
            raise StreamError(
                f"epoch {record.epoch} ends with {record.kept.tolist()} rows kept, its records hold "
                f"{self._kept_in_epoch}, the header promises {promised}"
            )

    def _check_end(self, record: Record) -> None:
        want = [self.header.total_batches, self.header.total_kept, *sha_words(self._sha.digest())]
        if record.kept.tolist() != want or self._kept != self.header.total_kept:
            raise StreamError(
                f"the selection's totals do not match its records: {self.next_seq} batches, {self._kept} rows kept, "
                f"the header promises {want[0]} and {want[1]}",
                hint=AGAIN,
            )


def open_selection(path: Path) -> SelectionStream:
    """Open a selection file.

    Raises:
        UsageError: There is no such file.
        StreamError: It is no selection.
    """
    if not path.is_file():
        raise UsageError(f"no selection at {path}", hint="make one: gstds-select STORE --out FILE")
    file = path.open("rb")
    try:
        return SelectionStream(file)
    except BaseException:
        file.close()
        raise


def require_dataset(header: Header, *, items: int, items_root: str, uri: str) -> None:
    """Refuse a selection whose rows are of another data set.

    Raises:
        FingerprintMismatchError: If the number, order, bytes or labels of the items differ.
    """
    if (header.items, header.items_root) != (items, items_root):
        raise FingerprintMismatchError(
            f"the selection was made from another data set: it has {header.items} items (root "
            f"{header.items_root[:12]}), {uri} has {items} (root {items_root[:12]})",
            hint=f"embed and select this one: {command_line('gstds-embed', uri)}; gstds-select STORE",
        )


def require_store(header: Header, *, fingerprint: str, where: str | Path) -> None:
    """Refuse a selection made from another store.

    Raises:
        FingerprintMismatchError: If the fingerprints differ.
    """
    if header.cache_fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"the selection was made from cache {header.cache_fingerprint[:12]}, {where} is {fingerprint[:12]}",
            hint=f"select from this one: {command_line('gstds-select', where)}",
        )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
