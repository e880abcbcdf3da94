"""The ordered manifest: which items, in which order, with which bytes and labels. Its root is a data set's identity."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import IO

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, UInt8

from gstds_cache.data.ahead import expect_rows
from gstds_cache.data.containers import Container
from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache, old_enough, signatures_of
from gstds_cache.data.hashing import SPREAD_FROM, UNREADABLE, hash_by, hash_item
from gstds_cache.data.names import AT_ONCE, Names
from gstds_cache.data.objects import Objects
from gstds_cache.data.source import ImageSource
from gstds_cache.data.subset import Subset, taken
from gstds_cache.errors import IntegrityError
from gstds_cache.files import mapped
from gstds_cache.files.digest import merkle_root
from gstds_cache.runtime.executor import Executor
from gstds_cache.runtime.progress import Counted

HASH_THREADS = 4
CLEARLY = 0.8
"""Share of the time of one thread that several have to do with, to be taken."""
_BLOCK = 100
_WAVE = 200  # blocks that are handed to threads at once, at most
_TRIAL, _TRIAL_SECONDS = 16, 0.1  # blocks that are done alone, for so long at most, and as many in threads
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

    def roots_without_hashes(self) -> tuple[str, str]:
        """The roots that these items have where what their bytes hash to is not known: with their labels, and without.

        Vectors that were imported without their data set are of items that are known so.
        """
        unknown, none = mapped.zeros(self.sha256.shape, np.uint8), mapped.zeros(self.labels.shape, np.int64)
        none[:] = -1
        with_labels, without = (replace(self, sha256=unknown, labels=labels) for labels in (self.labels, none))
        return with_labels.root, without.root

    def _leaves(self) -> Iterator[bytes]:
        names = Names.of(self.ids, "strict")
        for start in range(0, len(self), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            digests, labels = self.sha256[part].tobytes(), self.labels[part].astype(">i8").tobytes()
            for row, name in enumerate(names.encoded(part.start, part.stop)):
                yield (
                    len(name).to_bytes(8, "big")
                    + name
                    + digests[32 * row : 32 * row + 32]
                    + labels[8 * row : 8 * row + 8]
                )
            mapped.release(self.sha256, self.labels, names.file)

    def to_arrow(self) -> memoryview:
        """Serialise to an Arrow IPC file: columns ``id``, ``sha256``, ``label``; kind and classes in the metadata.

        Returns:
            The file's bytes, mapped; the same for the same manifest and pyarrow version.
        """
        schema = _SCHEMA.with_metadata(
            {"kind": self.kind, "classes": json.dumps(list(self.classes), ensure_ascii=False)}
        )

        names = Names.of(self.ids, "strict")

        def write(file: IO[bytes]) -> None:
            with pa.ipc.new_file(file, schema) as writer:
                for start in range(0, max(len(self), 1), _RECORDS):
                    part = slice(start, start + _RECORDS)
                    arrays = list(names.arrays(part.start, part.stop))
                    digests = np.ascontiguousarray(self.sha256[part])
                    columns = [
                        pa.concat_arrays(arrays or [pa.array([], pa.binary())]).cast(pa.utf8()),
                        pa.FixedSizeBinaryArray.from_buffers(
                            pa.binary(32), len(digests), [None, pa.py_buffer(digests)]
                        ),
                        pa.array(self.labels[part]),
                    ]
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                    mapped.release(self.sha256, self.labels, names.file)

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
            metadata, batches = table.schema.metadata, [batch for batch in table.to_batches(AT_ONCE) if len(batch)]
            sha256, labels, done = mapped.zeros((len(table), 32), np.uint8), mapped.zeros((len(table),), np.int64), 0
            for batch in batches:
                part, digests = slice(done, done + len(batch)), batch["sha256"]
                # Without an object for each row: of a hundred million rows they took minutes.
                whole = np.frombuffer(digests.buffers()[1], np.uint8).reshape(-1, 32)
                sha256[part] = whole[digests.offset : digests.offset + len(digests)]
                labels[part] = batch["label"].to_numpy()
                done += len(batch)
                mapped.release(sha256, labels, memoryview(data))
            return cls(
                kind=metadata[b"kind"].decode(),
                ids=Names.of_arrays(batch["id"].cast(pa.binary()) for batch in batches),
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
    progress: Counted | None = None,
    threads: int = HASH_THREADS,
    executor: Executor | None = None,
) -> DatasetManifest:
    """Read and hash every item of a source.

    Args:
        source: The data set.
        hash_cache: Digests of files kept from before: a file that has not changed since is not opened.
        progress: Called with (items done, items in all) about every 100 items and at the end.
        threads: Threads that read and hash; hashing and file reads leave Python's lock.
        executor: Where items are read and hashed instead; None for this process.

    Returns:
        The manifest, in the source's order, with ``UNREADABLE`` for items whose bytes could not be read.
    """
    return DatasetManifest(
        kind=source.kind,
        ids=Names.of(source.ids, "strict"),
        sha256=hash_items(source, hash_cache=hash_cache, progress=progress, threads=threads, executor=executor),
        labels=source.labels,
        classes=tuple(source.classes),
    )


def hash_items(
    source: ImageSource,
    *,
    hash_cache: HashCache | None = None,
    progress: Counted | None = None,
    threads: int = HASH_THREADS,
    read: bool = True,
    executor: Executor | None = None,
) -> UInt8[np.ndarray, "N 32"]:
    """SHA-256 of every item's payload, in order, ``UNREADABLE`` where reading raises OSError.

    Args:
        source: The data set.
        hash_cache: Digests of files kept from before; those found now are added, also if this is interrupted. A data
            set, or the whole of one, that was hashed with this very object is not looked at again: its files' times
            are read once a command.
        progress: Called with (items done, items in all) about every 100 items and at the end.
        threads: Threads that read and hash.
        read: Whether files are read; else those that ``hash_cache`` does not know are ``UNREADABLE``. What is neither
            in files nor in containers is read all the same.
        executor: Where items are read and hashed instead; None for this process.

    Returns:
        [N, 32] digests, read-only: of one data set and object of ``hash_cache`` they are one array.
    """
    whole = source.base if isinstance(source, Subset) else source
    digests = None if hash_cache is None else hash_cache.hashed(whole)
    if digests is not None:
        if progress is not None:
            progress(len(source), len(source))
        return taken(digests, source.rows) if isinstance(source, Subset) else digests
    containers: Sequence[Container] = getattr(source, "containers", ())
    files: Files | None = getattr(source, "objects", source.files)
    if len(source) < SPREAD_FROM:
        executor = None
    cached = hash_cache is not None and (files is not None or len(containers) > 0)
    if hash_cache is None or not cached:
        digests = _hash_all(source, progress, threads, executor)
    elif files is not None:
        digests = _hash_new(source, files, hash_cache, progress, threads, read=read, executor=executor)
    else:
        digests = _hash_contained(source, containers, hash_cache, progress, threads, read=read, executor=executor)
    digests.flags.writeable = False
    if hash_cache is not None and (read or not cached):
        hash_cache.keep(source, digests)
    return digests


def _hash_all(
    source: ImageSource, progress: Counted | None, threads: int, executor: Executor | None
) -> UInt8[np.ndarray, "N 32"]:
    files, digests = source.files, mapped.zeros((len(source), 32), np.uint8)
    if executor is not None:
        _hash_elsewhere(executor, source, digests, range(len(source)), progress)
        return digests
    _in_blocks(lambda block: _hash_rows(source, files, digests, block), len(source), progress, threads, digests)
    return digests


def _hash_contained(
    source: ImageSource,
    containers: Sequence[Container],
    hash_cache: HashCache,
    progress: Counted | None,
    threads: int,
    *,
    read: bool,
    executor: Executor | None,
) -> UInt8[np.ndarray, "N 32"]:
    """Hash the items of the containers that are not known or have changed; a container is kept when it is done."""
    digests, total = mapped.zeros((len(source), 32), np.uint8), len(source)
    for container in containers:
        rows, now = container.rows, time.time_ns()
        part = digests[rows.start : rows.stop]
        seen = container.signature()
        if hash_cache.recall_contained(container.name, seen, part):
            if progress is not None:
                progress(rows.stop, total)
            continue
        if not read:
            part[:] = np.frombuffer(UNREADABLE, np.uint8)
            continue

        def work(block: range, rows: range = rows) -> None:
            _hash_rows(source, None, digests, rows[block.start : block.stop])

        told = progress and _shifted(progress, rows.start, total)
        if executor is not None:
            _hash_elsewhere(executor, source, digests, rows, told)
        else:
            _in_blocks(work, len(rows), told, threads, digests)
        readable = (part != np.frombuffer(UNREADABLE, np.uint8)).any(axis=1).all()
        if readable and container.signature() == seen and old_enough(np.array([seen], np.int64), now).all():
            hash_cache.record_contained(container.name, seen, part)
    return digests


def _shifted(progress: Counted, start: int, total: int) -> Counted:
    """``progress`` of a part of the rows as progress of all of them."""
    return lambda done, _part: progress(start + done, total)


def _hash_new(
    source: ImageSource,
    files: Files,
    hash_cache: HashCache,
    progress: Counted | None,
    threads: int,
    *,
    read: bool,
    executor: Executor | None,
) -> UInt8[np.ndarray, "N 32"]:
    """Hash the files that are not known or have changed; where ``read`` is False, leave them ``UNREADABLE``."""
    signatures, digests = hash_cache.recall(files)
    changed = mapped.zeros((len(files),), np.bool_)
    touched: list[np.ndarray | memoryview] = [signatures, digests, changed]
    if isinstance(files.names, Names):
        touched.append(files.names.file)

    def work(block: range) -> None:
        rows, seen, now = _changed(files, signatures, block)
        if not read:
            digests[rows] = np.frombuffer(UNREADABLE, np.uint8)
        elif rows.size:
            changed[rows] = _hash_changed(source, files, signatures, digests, rows, seen, now)

    try:
        if executor is not None and read:
            _hash_changed_elsewhere(executor, source, files, signatures, digests, changed, progress)
        else:
            _in_blocks(work, len(source), progress, threads, *touched)
    finally:
        if changed.any():
            hash_cache.record(files, signatures, digests, changed)
    return digests


def _in_blocks(
    work: Callable[[range], None],
    rows: int,
    progress: Counted | None,
    threads: int,
    *touched: np.ndarray | memoryview,
) -> None:
    """Do ``work`` for blocks of rows; when this returns or raises, no thread of it runs any more.

    In threads only where that is found to be quicker: a small file that is in memory takes a microsecond or ten, and
    threads that hand Python's lock to each other for it take ten times as long.
    """

    def do(block: range) -> range:
        work(block)
        return block

    def follow(done: Iterable[range]) -> float:
        """Take what is done; seconds a block."""
        count, begun = 0, time.perf_counter()
        for block in done:
            count += 1
            if progress is not None:
                progress(block.stop, rows)
        mapped.release(*touched)
        return (time.perf_counter() - begun) / max(count, 1)

    blocks = (range(first, min(first + _BLOCK, rows)) for first in range(0, rows, _BLOCK))
    pool, try_both = ThreadPoolExecutor(max(1, threads)), True
    try:
        while try_both:
            alone = follow(_for_a_while(map(do, islice(blocks, _TRIAL))))
            together = follow(pool.map(do, islice(blocks, _TRIAL))) if threads > 1 else math.inf
            several, usual, count, try_both = together < CLEARLY * alone, min(alone, together), _TRIAL, False
            while not try_both and (wave := list(islice(blocks, count))):  # What waits for a thread takes memory.
                # Of other files, as where those that were known have ended, it is found out again.
                try_both = follow(pool.map(do, wave) if several else map(do, wave)) > 2 * usual
                count = min(2 * count, _WAVE)
    finally:
        pool.shutdown(cancel_futures=True)


def _for_a_while(done: Iterable[range]) -> Iterator[range]:
    """Stop after a while.

    Yields:
        What is done within a tenth of a second, and one more.
    """
    until = time.perf_counter() + _TRIAL_SECONDS
    for block in done:
        yield block
        if time.perf_counter() > until:
            return


def _hash_rows(
    source: ImageSource, files: Files | None, digests: UInt8[np.ndarray, "N 32"], rows: Iterable[int]
) -> None:
    some = list(rows)
    expect_rows(source, some)
    for row in some:
        digests[row] = np.frombuffer(hash_item(source, files, row), np.uint8)


def _hash_elsewhere(
    executor: Executor,
    source: ImageSource,
    digests: UInt8[np.ndarray, "N 32"],
    rows: range,
    progress: Counted | None,
) -> None:
    """Have rows hashed by an executor."""
    units = (np.arange(first, min(first + _BLOCK, rows.stop)) for first in range(rows.start, rows.stop, _BLOCK))
    done = 0
    for part, hashed, _machine in hash_by(executor, source, source.files, units):
        digests[part] = hashed
        done += len(part)
        if progress is not None:
            progress(done, len(rows))


def _hash_changed_elsewhere(
    executor: Executor,
    source: ImageSource,
    files: Files,
    signatures: Int64[np.ndarray, "N 4"],
    digests: UInt8[np.ndarray, "N 32"],
    changed: Bool[np.ndarray, " N"],
    progress: Counted | None,
) -> None:
    """:func:`_hash_changed` of all blocks, where an executor has files read; this process looks at their times."""
    waiting: dict[int, tuple[Int64[np.ndarray, "n 4"], Int64[np.ndarray, "n 4"], int]] = {}
    looked = 0

    def units() -> Iterator[Int64[np.ndarray, " n"]]:
        nonlocal looked
        for first in range(0, len(files), _BLOCK):
            rows, seen, now = _changed(files, signatures, range(first, min(first + _BLOCK, len(files))))
            looked = min(first + _BLOCK, len(files))
            if rows.size:
                waiting[int(rows[0])] = seen, signatures[rows], now
                signatures[rows] = -1
                yield rows

    for rows, hashed, _machine in hash_by(executor, source, files, units()):
        digests[rows] = hashed
        seen, before, now = waiting.pop(int(rows[0]))
        changed[rows] = _sign(files, signatures, digests, rows, seen, before, now)
        if progress is not None:
            progress(looked, len(files))


def _changed(
    files: Files, signatures: Int64[np.ndarray, "N 4"], block: range
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, "n 4"], int]:
    """Rows of ``block`` whose files have another signature than in ``signatures``; what they have now; and when."""
    now = time.time_ns()
    seen = _signatures(files, block)
    rows = np.flatnonzero((seen != signatures[block.start : block.stop]).any(axis=1) | (seen[:, 0] < 0))
    return rows + block.start, seen[rows], now


def _signatures(files: Files, rows: range | Int64[np.ndarray, " n"]) -> Int64[np.ndarray, "n 4"]:
    """What the files have now; objects of a bucket, what they had when it was listed: no other version is read."""
    if isinstance(files, Objects):
        return files.signatures[rows.start : rows.stop] if isinstance(rows, range) else files.signatures[rows]
    return signatures_of(files.paths(rows) if isinstance(rows, range) else map(files.path, rows.tolist()))


def _hash_changed(
    source: ImageSource,
    files: Files,
    signatures: Int64[np.ndarray, "N 4"],
    digests: UInt8[np.ndarray, "N 32"],
    rows: Int64[np.ndarray, " n"],
    seen: Int64[np.ndarray, "n 4"],
    now: int,
) -> Bool[np.ndarray, " n"]:
    """Hash the files ``rows``, whose signatures were ``seen`` at the time ``now``; both arrays are brought up to date.

    A file's signature is taken before and after it is read, so that a digest is never filed under the signature of
    other content. One that is not to be relied on becomes -1.

    Returns:
        [n] whether the signature is another than before.
    """
    before = signatures[rows]
    signatures[rows] = -1
    _hash_rows(source, files, digests, rows.tolist())
    return _sign(files, signatures, digests, rows, seen, before, now)


def _sign(
    files: Files,
    signatures: Int64[np.ndarray, "N 4"],
    digests: UInt8[np.ndarray, "N 32"],
    rows: Int64[np.ndarray, " n"],
    seen: Int64[np.ndarray, "n 4"],
    before: Int64[np.ndarray, "n 4"],
    now: int,
) -> Bool[np.ndarray, " n"]:
    """Give files that were hashed their signatures; returns for which it is another than ``before``."""
    after = _signatures(files, rows)
    readable = (digests[rows] != np.frombuffer(UNREADABLE, np.uint8)).any(axis=1)
    reliable = readable & (seen == after).all(axis=1) & old_enough(seen, now)
    signatures[rows[reliable]] = seen[reliable]
    return np.asarray((signatures[rows] != before).any(axis=1))
