"""The hash of every item of a data set: kept from before, or made here, in threads, or by an executor."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from gstds_cache.data.ahead import expect_rows
from gstds_cache.data.blocks import BLOCK, in_blocks
from gstds_cache.data.containers import Container
from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache, old_enough, signatures_of
from gstds_cache.data.hashing import SPREAD_FROM, UNREADABLE, hash_by, hash_item
from gstds_cache.data.names import Names
from gstds_cache.data.objects import Objects
from gstds_cache.data.source import ImageSource
from gstds_cache.data.subset import Subset, taken
from gstds_cache.files import mapped
from gstds_cache.runtime.executor import Executor
from gstds_cache.runtime.progress import Counted

HASH_THREADS = 4


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
    in_blocks(lambda block: _hash_rows(source, files, digests, block), len(source), progress, threads, digests)
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
            in_blocks(work, len(rows), told, threads, digests)
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
            in_blocks(work, len(source), progress, threads, *touched)
    finally:
        if changed.any():
            hash_cache.record(files, signatures, digests, changed)
    return digests


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
    units = (np.arange(first, min(first + BLOCK, rows.stop)) for first in range(rows.start, rows.stop, BLOCK))
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
        for first in range(0, len(files), BLOCK):
            rows, seen, now = _changed(files, signatures, range(first, min(first + BLOCK, len(files))))
            looked = min(first + BLOCK, len(files))
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
