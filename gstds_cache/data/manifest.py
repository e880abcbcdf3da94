"""The ordered manifest: which items, in which order, with which bytes and labels. Its root is a data set's identity."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import IO

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt8

from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache, settled, signatures_of
from gstds_cache.data.names import AT_ONCE, Names, cut, held
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import IntegrityError
from gstds_cache.files import mapped
from gstds_cache.files.digest import merkle_root
from gstds_cache.runtime.resources import about_us

UNREADABLE = bytes(32)
"""The SHA-256 recorded for an item whose bytes could not be read."""

_BLOCK = 100
_WAVE = 200 * _BLOCK
_RECORDS = 1 << 16
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.utf8(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class DatasetManifest:
    """What was in a data set, in order. Compare two by their ``root``.

    Attributes:
        kind: The source's kind, e.g. ``imagefolder``; provenance, and no part of the root.
        ids: Name of every item.
        sha256: [N, 32] SHA-256 of every item's bytes, or ``UNREADABLE``.
        labels: [N] class index of every item, -1 where there is none.
        classes: Class names by label; provenance, and no part of the root.
    """

    kind: str
    ids: Sequence[str]
    sha256: UInt8[np.ndarray, "N 32"]
    labels: Int64[np.ndarray, " N"]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows = len(self.ids)
        if self.sha256.shape != (rows, 32) or self.labels.shape != (rows,):
            raise ValueError(
                f"manifest of {rows} ids: got sha256 {self.sha256.shape} and labels {self.labels.shape}, "
                f"expected {(rows, 32)} and {(rows,)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def root(self) -> str:
        """Merkle root over the items in order, as 64 hexadecimal digits.

        A leaf is the id's length in UTF-8 bytes (8 bytes, big-endian), the id, the item's SHA-256 (32 bytes) and the
        label (8 bytes, big-endian, signed). Order, names, content and labels all change it; kind and paths do not.
        """
        return merkle_root(self._leaves())

    def _leaves(self) -> Iterator[bytes]:
        for start in range(0, len(self), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            digests, labels = self.sha256[part].tobytes(), self.labels[part].astype(">i8").tobytes()
            text, ends = cut(self.ids, part.start, part.stop)
            for row, (begin, end) in enumerate(pairwise(ends.tolist())):
                yield (
                    (end - begin).to_bytes(8, "big")
                    + text[begin:end]
                    + digests[32 * row : 32 * row + 32]
                    + labels[8 * row : 8 * row + 8]
                )
            mapped.release(self.sha256, self.labels)

    def to_arrow(self) -> memoryview:
        """Serialise to an Arrow IPC file: columns ``id``, ``sha256``, ``label``; kind and classes in the metadata.

        Returns:
            The file's bytes, mapped; the same for the same manifest and pyarrow version.
        """
        schema = _SCHEMA.with_metadata(
            {"kind": self.kind, "classes": json.dumps(list(self.classes), ensure_ascii=False)}
        )

        def write(file: IO[bytes]) -> None:
            with pa.ipc.new_file(file, schema) as writer:
                for start in range(0, max(len(self), 1), _RECORDS):
                    part, (text, ends) = slice(start, start + _RECORDS), cut(self.ids, start, start + _RECORDS)
                    names, rows = [pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(text)], len(ends) - 1
                    digests = pa.py_buffer(np.ascontiguousarray(self.sha256[part]))
                    columns = [
                        pa.StringArray.from_buffers(rows, *names),
                        pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, digests]),
                        pa.array(self.labels[part]),
                    ]
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                    mapped.release(self.sha256, self.labels)

        return mapped.written(write)

    @classmethod
    def from_arrow(cls, data: bytes | memoryview) -> DatasetManifest:
        """Read what :meth:`to_arrow` wrote.

        Args:
            data: The bytes of an Arrow IPC file.

        Returns:
            The manifest.

        Raises:
            IntegrityError: ``data`` is damaged, or is another kind of Arrow file.
        """
        try:
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            table.validate(full=True)
            table = table.cast(_SCHEMA.with_metadata(table.schema.metadata))
            metadata, batches = table.schema.metadata, table.to_batches(AT_ONCE)
            sha256, labels, done = mapped.zeros((len(table), 32), np.uint8), mapped.zeros((len(table),), np.int64), 0
            for batch in batches:
                part = slice(done, done + len(batch))
                sha256[part] = np.frombuffer(b"".join(batch["sha256"].to_pylist()), np.uint8).reshape(-1, 32)
                labels[part] = batch["label"].to_numpy()
                done += len(batch)
            return cls(
                kind=metadata[b"kind"].decode(),
                ids=Names.of(name for batch in batches for name in batch["id"].to_pylist()),
                sha256=sha256,
                labels=labels,
                classes=tuple(json.loads(metadata[b"classes"])),
            )
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"the manifest of items is damaged: {error}, expected an Arrow file as written",
                hint="restore items.arrow from a copy, or embed the data set into a new store",
            ) from error


def build_manifest(
    source: ImageSource,
    *,
    hash_cache: HashCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 4,
) -> DatasetManifest:
    """Read and hash every item of a source.

    Args:
        source: The data set.
        hash_cache: Digests of files remembered from before: a file that has not changed since is not opened.
        progress: Called with (items done, items in all) about every 100 items and at the end.
        threads: Threads that read and hash; hashing and file reads leave Python's lock.

    Returns:
        The manifest, in the source's order, with ``UNREADABLE`` for items whose bytes could not be read.
    """
    return DatasetManifest(
        kind=source.kind,
        ids=held(source.ids),
        sha256=hash_items(source, hash_cache=hash_cache, progress=progress, threads=threads),
        labels=source.labels,
        classes=tuple(source.classes),
    )


def hash_items(
    source: ImageSource,
    *,
    hash_cache: HashCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 4,
) -> UInt8[np.ndarray, "N 32"]:
    """SHA-256 of every item's payload, in order, ``UNREADABLE`` where reading raises OSError.

    Args:
        source: The data set.
        hash_cache: Digests of files remembered from before; those found now are added, also if this is interrupted.
        progress: Called with (items done, items in all) about every 100 items and at the end.
        threads: Threads that read and hash.

    Returns:
        [N, 32] digests, writable.
    """
    files = source.files
    if hash_cache is None or files is None:
        digests = mapped.zeros((len(source), 32), np.uint8)
        _in_blocks(lambda block: _hash_rows(source, files, digests, block), len(source), progress, threads, digests)
        return digests
    signatures, digests = hash_cache.recall(files)
    touched = [signatures, digests, *(files.names.parts() if isinstance(files.names, Names) else [])]
    changes: list[range] = []

    def work(block: range) -> None:
        if _hash_changed(source, files, signatures, digests, block):
            changes[:] = [block]

    try:
        _in_blocks(work, len(source), progress, threads, *touched)
    finally:
        if changes:
            hash_cache.record(files, signatures, digests)
    return digests


def _in_blocks(
    work: Callable[[range], None],
    rows: int,
    progress: Callable[[int, int], None] | None,
    threads: int,
    *touched: np.ndarray,
) -> None:
    """Do ``work`` for blocks of rows in threads; when this returns or raises, none of them runs any more."""

    def work_from(start: int) -> int:
        stop = min(start + _BLOCK, rows)
        work(range(start, stop))
        return stop

    pool = ThreadPoolExecutor(max(1, threads))
    try:
        for first in range(0, rows, _WAVE):  # What waits for a thread takes memory.
            for stop in pool.map(work_from, range(first, min(first + _WAVE, rows), _BLOCK)):
                if progress is not None:
                    progress(stop, rows)
            mapped.release(*touched)
    finally:
        pool.shutdown(cancel_futures=True)


def _hash_rows(
    source: ImageSource, files: Files | None, digests: UInt8[np.ndarray, "N 32"], rows: Iterable[int]
) -> None:
    for row in rows:
        digests[row] = np.frombuffer(_hash_item(source, files, row), np.uint8)


def _hash_changed(
    source: ImageSource,
    files: Files,
    signatures: Int64[np.ndarray, "N 4"],
    digests: UInt8[np.ndarray, "N 32"],
    block: range,
) -> bool:
    """Hash the files of ``block`` whose signature is not the one in ``signatures``; both arrays are brought up to date.

    A file's signature is taken before and after it is read, so that a digest is never filed under the signature of
    other content. One that is not to be relied on becomes -1.

    Returns:
        Whether a signature is another now.
    """
    now = time.time_ns()
    seen = signatures_of(files.paths(block))
    rows = np.flatnonzero((seen != signatures[block.start : block.stop]).any(axis=1) | (seen[:, 0] < 0)) + block.start
    if not rows.size:
        return False
    seen, before = seen[rows - block.start], signatures[rows]
    signatures[rows] = -1
    _hash_rows(source, files, digests, rows.tolist())
    after = signatures_of(map(files.path, rows.tolist()))
    readable = (digests[rows] != np.frombuffer(UNREADABLE, np.uint8)).any(axis=1)
    reliable = readable & (seen == after).all(axis=1) & settled(seen, now)
    signatures[rows[reliable]] = seen[reliable]
    return not np.array_equal(signatures[rows], before)


def _hash_item(source: ImageSource, files: Files | None, row: int) -> bytes:
    try:
        # A file can be larger than memory.
        return files.sha256(row) if files is not None else hashlib.sha256(source.payload(row)).digest()
    except OSError as error:
        if about_us(error):
            raise
        return UNREADABLE
