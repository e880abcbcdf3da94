"""Reading a selection, from a file, a pipe or a service alike; nothing short of the whole is taken for one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.errors import (
    FingerprintMismatchError,
    ProducerFailedError,
    StreamError,
    TruncatedStreamError,
    UsageError,
    command_line,
)
from gstds_cache.files.location import local_file
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.candidate_records import CandidateRows
from gstds_cache.stream.records import NO_RECORD, STATUS, Kind, Rows, next_hash, sha_words
from gstds_cache.stream.resume import ResumeToken
from gstds_cache.stream.schema import ByteStream, Header
from gstds_cache.stream.source import AGAIN, BatchSource, ByteSource


class SelectionStream:
    """Iterates over the batches of a selection, checking every record.

    The stream is whole only once iteration has ended without an error. Iterate once.

    Attributes:
        header: What the stream says of itself.
        next_seq: The batch that comes next.
        rows_in: Rows of the batches before it, before selection; None where the first were not read.
    """

    def __init__(self, source: ByteStream | BatchSource, *, resume: ResumeToken | None = None) -> None:
        """Read the header, and pass over what was consumed before.

        Args:
            source: A binary file or pipe, or another source of record batches.
            resume: Go on from here. A source that begins with the first record is read up to there, and has to have
                the token's running hash there.

        Raises:
            StreamError: This is no selection, or one of an unknown format.
            TruncatedStreamError: It ends inside the header.
            FingerprintMismatchError: The token is of another selection.
        """
        batches = source if isinstance(source, BatchSource) else ByteSource(source)
        self._source: BatchSource = batches
        try:
            self.header = Header.from_schema(batches.schema)
        except UnicodeDecodeError as error:  # from Arrow, for a damaged column name
            raise StreamError(f"the selection's header is damaged: {error}", hint=AGAIN) from error
        self._kept_before = [0, *accumulate(self.header.kept_per_epoch)]
        self.next_seq, self._kept, self._hash = 0, 0, NO_RECORD
        self.rows_in: int | None = 0
        self._rows = CandidateRows if self.header.candidates else Rows
        self._failed, self._selections = False, self._guarded()
        if resume is not None:
            self._resume(resume)

    def __repr__(self) -> str:
        header = self.header
        return f"SelectionStream({header.selection_digest[:16]}, batch {self.next_seq} of {header.total_batches})"

    def close(self) -> None:
        """Close the file, pipe or connection."""
        self._source.close()

    def __enter__(self) -> SelectionStream:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def running_sha256(self) -> str:
        """Hash over the records up to the last batch that was read, as 64 hexadecimal digits."""
        return self._hash.hex()

    def token(self) -> ResumeToken:
        """Where this stream stands: after the last batch that was read."""
        return ResumeToken(
            selection_digest=self.header.selection_digest,
            cache_fingerprint=self.header.cache_fingerprint,
            epoch=self.next_seq // self.header.batches_per_epoch,
            next_seq=self.next_seq,
            kept=self._kept,
            sha256=self.running_sha256,
        )

    def __iter__(self) -> Iterator[SelectedBatch]:
        """Iterate over the batches; a second iterator goes on where the first stands.

        Returns:
            The selections in order. Iteration raises TruncatedStreamError where the stream ends, or becomes unreadable,
            before its stream-end record; ProducerFailedError where the producer reported an error; StreamError where a
            record is damaged, out of sequence or out of range.

        Raises:
            StreamError: An iteration before ended with an error.
        """
        if self._failed:
            raise StreamError(
                f"this stream failed at batch {self.next_seq}, and cannot be read on", hint="open it again"
            )
        return self._selections

    def _resume(self, token: ResumeToken) -> None:
        header = self.header
        mine = (header.selection_digest, header.cache_fingerprint)
        if (token.selection_digest, token.cache_fingerprint) != mine:
            raise FingerprintMismatchError(
                f"the resume token is of selection {token.selection_digest[:12]} of cache "
                f"{token.cache_fingerprint[:12]}; this is {mine[0][:12]} of {mine[1][:12]}",
                hint="resume with the selection it was begun with",
            )
        if token.next_seq > header.total_batches:
            raise StreamError(f"the resume token is for batch {token.next_seq}, of {header.total_batches} there are")
        if self._source.first_seq == token.next_seq:
            self.next_seq, self._kept, self._hash = token.next_seq, token.kept, bytes.fromhex(token.sha256)
            self.rows_in = 0 if token.next_seq == 0 else None
        while self.next_seq < token.next_seq:
            next(self._selections)
        if (self.running_sha256, self._kept) != (token.sha256, token.kept):
            raise FingerprintMismatchError(
                f"the selection's first {token.next_seq} batches are not those that were consumed",
                hint="resume with the same selection, or start over",
            )

    def _guarded(self) -> Iterator[SelectedBatch]:
        try:
            yield from self._checked()
        except BaseException:
            self._failed = True
            raise

    def _checked(self) -> Iterator[SelectedBatch]:
        items, running, last = self.header.items, NO_RECORD, -1
        make, status_of, offers = object.__new__, STATUS.get, self.header.candidates
        while True:
            rows, reason = self._read()
            outside, damaged = rows.outside(items), rows.damaged
            for row, (seq, epoch, batch_id, kind, n_in, flags, value, residual, packed, kept, score) in enumerate(
                rows.columns
            ):
                if row == damaged:
                    raise StreamError(
                        f"selection record {seq} is damaged: its crc does not match its columns", hint=AGAIN
                    )
                if seq != self.next_seq:
                    raise StreamError(f"selection record out of sequence: got batch {seq}, expected {self.next_seq}")
                before = running if last == seq else self._hash
                if kind:
                    if self._mark(kind, seq, epoch, kept.tolist(), before, reason):
                        with suppress(EOFError):  # Arrow's end mark: a producer must not find its pipe broken
                            self._source.read()
                        return
                    running, last = next_hash(before, packed), seq
                    continue
                status = status_of(flags)
                if not len(kept) or status is None or (outside and row in outside):
                    raise StreamError(
                        f"selection record {seq} names no row, one outside 0..{items - 1}, or an unknown status"
                    )
                if offers and (problem := score.problem(kept)):
                    raise StreamError(f"selection record {seq} cannot be drawn from: {problem}", hint=AGAIN)
                self._hash = sha256(before + packed).digest()  # next_hash, without the price of a call
                self._kept += score.keep if offers else len(kept)
                self.next_seq = seq + 1
                if self.rows_in is not None:
                    self.rows_in += n_in
                selection = make(SelectedBatch)
                selection.__dict__.update(  # the __init__ of a frozen class takes twice as long
                    seq=seq,
                    epoch=epoch,
                    batch_id=batch_id,
                    n_in=n_in,
                    kept=kept,
                    score=None if offers else score,
                    status=status,
                    value=value,
                    residual=residual,
                    candidates=score if offers else None,
                )
                yield selection

    def _read(self) -> tuple[Rows, str]:
        try:
            batch, reason = self._source.read()
        except EOFError as error:
            if isinstance(error, StreamError):
                raise
            raise TruncatedStreamError(
                f"the selection is truncated: it ends at batch {self.next_seq} of {self.header.total_batches}, "
                f"without its stream-end record ({error})",
                hint=f"the producer was killed, or the file was cut or damaged; {AGAIN}",
            ) from error
        try:
            return self._rows(batch), reason
        except ValueError as error:
            raise StreamError(f"selection record after batch {self.next_seq} is damaged: {error}") from error

    def _mark(self, kind: int, seq: int, epoch: int, numbers: list[int], running: bytes, reason: str) -> bool:
        """Check a record that is no batch.

        Returns:
            Whether it is the last.

        Raises:
            ProducerFailedError: It says that the producer failed.
            StreamError: It does not match what came before it.
        """
        if kind == Kind.ERROR:
            raise ProducerFailedError(
                f"the producer of the selection failed at batch {seq}: {reason}",
                hint="see the messages of gstds-select",
            )
        if kind == Kind.EPOCH_END:
            known = min(max(epoch, 0), self.header.epochs - 1)
            held, promised = self._kept - self._kept_before[known], self.header.kept_per_epoch[known]
            if not numbers == [held] == [promised] or self.next_seq != (epoch + 1) * self.header.batches_per_epoch:
                raise StreamError(
                    f"epoch {epoch} ends with {numbers} rows kept, its records hold {held}, the header promises "
                    f"{promised}"
                )
            return False
        if kind != Kind.STREAM_END:
            raise StreamError(f"selection record after batch {self.next_seq} is of unknown kind {kind}")
        want = [self.header.total_batches, self.header.total_kept, *sha_words(running)]
        if numbers != want or self._kept != self.header.total_kept:
            raise StreamError(
                f"the selection's totals do not match its records: {self.next_seq} batches, {self._kept} rows kept, "
                f"the header promises {want[0]} and {want[1]}",
                hint=AGAIN,
            )
        return True


def is_service(text: str) -> bool:
    """Whether a selection is named by a service's address."""
    return text.startswith(("grpc://", "grpc+tls://"))


def open_selection(where: str | os.PathLike[str], *, resume: ResumeToken | None = None) -> SelectionStream:
    """Open a selection.

    Args:
        where: A file, what :func:`gstds_cache.select` returned, ``-`` for stdin, or ``grpc://HOST:PORT``
            (``grpc+tls://``, and ``/DIGEST`` for one of several).
        resume: Go on from here: where another stream's :meth:`SelectionStream.token` was taken.

    Returns:
        The stream.

    Raises:
        UsageError: There is no such file, or it is a store; or ``where`` is no name at all.
        StreamError: It is no selection.
        FingerprintMismatchError: ``resume`` is of another selection.
    """
    text = selection_name(where)
    if is_service(text):
        from gstds_cache.stream.flight_client import FlightSource  # Flight takes 0.1 s to import

        source = FlightSource(text, start=resume)
        return _opened(source, resume)
    if text == "-":
        return SelectionStream(sys.stdin.buffer, resume=resume)
    path = local_file(text, "`selection`")
    if path.is_dir() and _is_store(path):
        raise UsageError(
            f"{path} is a store, and no selection",
            hint=f"select from it: {command_line('gstds-select', path)}, or gstds_cache.select({text!r})",
        )
    if not path.is_file():
        raise UsageError(f"no selection at {path}", hint="make one: gstds-select STORE")
    return _opened(path.open("rb"), resume)


def selection_name(where: object) -> str:
    """The path or address in what a caller gave for a selection.

    Raises:
        UsageError: It is none, as a store or None.
    """
    text = os.fspath(where) if isinstance(where, str | os.PathLike) else where
    if not isinstance(text, str):
        got = "None" if text is None else type(text).__name__
        raise UsageError(
            f"`selection`: got {got}, expected a selection's file or address, or an open stream",
            hint="give what gstds_cache.select(store) returns, or the path of its file",
        )
    return text


def _is_store(folder: Path) -> bool:
    from gstds_cache.store.layout import GROUP  # Zarr takes long to import

    return (folder / GROUP).is_file()


def _opened(source: ByteStream | BatchSource, resume: ResumeToken | None) -> SelectionStream:
    try:
        return SelectionStream(source, resume=resume)
    except BaseException:
        source.close()
        raise


def require_dataset(header: Header, *, items: int, items_root: str, uri: str, why: str = "") -> None:
    """Refuse a selection whose rows are of another data set.

    Args:
        header: The selection's.
        items: Items of the data set.
        items_root: Root of its manifest.
        uri: The data set, as the user named it.
        why: What may be behind items that are as many, and differ (``why_items_differ``).

    Raises:
        FingerprintMismatchError: If the number, order, bytes or labels of the items differ.
    """
    if (header.items, header.items_root) != (items, items_root):
        raise FingerprintMismatchError(
            f"the selection was made from another data set: it has {header.items} items (root "
            f"{header.items_root[:12]}), {uri} has {items} (root {items_root[:12]})"
            + (f"; {why}" if why and header.items == items else ""),
            hint=f"embed and select this one: {command_line('gstds-embed', uri)}; gstds-select STORE",
        )


def require_manifest(header: Header, manifest: DatasetManifest, *, uri: str, why: str = "") -> None:
    """Refuse a selection whose rows are of other items.

    A selection from imported vectors, whose images were not known, is of any items that have the same ids in the same
    order, and the same labels where there were any.

    Args:
        header: The selection's.
        manifest: The items of the data set.
        uri: The data set, as the user named it.
        why: As for :func:`require_dataset`.
    """
    same = (header.items, header.items_root) == (len(manifest), manifest.root)
    if not same and header.items == len(manifest) and header.items_root in manifest.roots_without_hashes():
        return
    require_dataset(header, items=len(manifest), items_root=manifest.root, uri=uri, why=why)


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
