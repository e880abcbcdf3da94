"""Reading tar shards: their indices once, then bytes by their place."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gstds_cache.data.containers import Signature
from gstds_cache.data.files import printable
from gstds_cache.data.members import LabelMember, is_image
from gstds_cache.data.shard_cache import ShardCache
from gstds_cache.data.shards import Shard, changed, gone, signature_now
from gstds_cache.data.tar_index import TarError, TarIndex, TarScan, read_at
from gstds_cache.errors import DatasetError
from gstds_cache.files.bucket import Bucket, ChangedError
from gstds_cache.runtime.resources import about_us

OPEN_FILES = 64
"""Shards that are open at a time."""

_INDEX = "index"

Seen = tuple[Signature, int, Callable[[], Signature]]
"""A shard's signature, the time it was seen, in nanoseconds, and what gives that of now."""


@dataclass(frozen=True)
class Opened:
    """A shard's members and labels.

    Attributes:
        shard: The shard.
        index: Its members.
        labels: A JSON list with a label of each sample.
        digests: SHA-256 of the members that are images, by member, where the shard was read whole.
    """

    shard: Shard
    index: TarIndex
    labels: bytes
    digests: dict[int, bytes]


def index_shard(shard: Shard, *, bucket: Bucket | None, label: LabelMember, cache: ShardCache, uri: str) -> Opened:
    """Index a shard, or find the index that is kept.

    Args:
        shard: The shard.
        bucket: Where it is; None for a file.
        label: Where its labels are.
        cache: Keeps indices and labels.
        uri: The data set, for errors.

    Returns:
        Its members and labels.

    Raises:
        DatasetError: It is damaged or was cut off, cannot be read, or its labels are none.
        IntegrityError: It changed meanwhile.
        StoreUnavailableError: The bucket does not answer.
    """
    where = f"data set {uri!r}, shard {printable(shard.where)}"
    kept = kept_index(shard, label, cache)
    if kept is not None:
        return kept
    index = _recalled(shard, cache)
    seen: Seen = (shard.signature, time.time_ns(), partial(signature_now, shard))
    digests: dict[int, bytes] = {}
    try:
        if index is None or bucket is not None:
            scan = _scan(shard, bucket, label)
            index, digests = scan.index, scan.digests
            contents: Callable[[int], bytes] = scan.contents.__getitem__
        else:
            reading = LocalShards((shard,))
            contents = partial(_member, reading, index)
    except TarError as error:
        raise DatasetError(
            f"{where}: {error}",
            hint="download or write it again. An archive that is whole but for its end mark gets one by: "
            "truncate -s +1024 SHARD"
            if "without the mark" in str(error)
            else "download or write it again",
        ) from None
    members = label.members(index)
    samples = np.flatnonzero(members >= 0)
    found = ((int(sample), int(members[sample]), contents(int(members[sample]))) for sample in samples)
    opened = Opened(shard, index, json.dumps(label.values(index, found, where)).encode(), digests)
    keep_index(opened, label, cache, seen)
    return opened


def kept_index(shard: Shard, label: LabelMember, cache: ShardCache) -> Opened | None:
    """The index of a shard and its labels, where both are kept.

    Args:
        shard: The shard.
        label: Where its labels are.
        cache: Keeps them.

    Returns:
        Both; None where one is missing.
    """
    index, labels = _recalled(shard, cache), cache.recall(shard.where, label.what, shard.signature)
    if index is None or (labels is None and label.extensions):
        return None
    return Opened(shard, index, labels or _none(index), {})


def keep_index(opened: Opened, label: LabelMember, cache: ShardCache, seen: Seen) -> None:
    """Keep the index of a shard and its labels.

    Args:
        opened: Both.
        label: Where the labels are.
        cache: Keeps them.
        seen: As :meth:`gstds_cache.data.shard_cache.ShardCache.record` wants it.
    """
    cache.record(opened.shard.where, _INDEX, opened.index.to_bytes(), seen)
    cache.record(opened.shard.where, label.what, opened.labels, seen)


def _recalled(shard: Shard, cache: ShardCache) -> TarIndex | None:
    kept = cache.recall(shard.where, _INDEX, shard.signature)
    try:
        return None if kept is None else TarIndex.from_bytes(kept)
    except (ValueError, KeyError, TypeError):
        return None


def _none(index: TarIndex) -> bytes:
    return json.dumps([None] * len(index)).encode()


def _member(reading: LocalShards, index: TarIndex, member: int) -> bytes:
    return reading.read(0, int(index.offset[member]), int(index.size[member]))


def _scan(shard: Shard, bucket: Bucket | None, label: LabelMember) -> TarScan:
    if bucket is None:
        opened = _open(shard)
        _require_same(shard, os.fstat(opened.number))
        return TarScan(read_at(opened.number), shard.size, wanted=label.reads).run()
    try:
        read = _Stream(bucket.pieces(shard.name, shard.etag))
        return TarScan(read, shard.size, wanted=label.reads, hashed=is_image).run()
    except ChangedError as error:
        raise changed(shard) from error
    except FileNotFoundError as error:
        raise gone(shard) from error


class _Stream:
    """Reads an object that comes piece after piece; what lies before what was asked for last is forgotten."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._buffer, self._begins = bytearray(), 0

    def __call__(self, offset: int, size: int) -> bytes:
        while self._begins + len(self._buffer) < offset + size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._buffer += piece
            self._forget(offset)
        self._forget(offset)
        return bytes(self._buffer[:size])

    def _forget(self, offset: int) -> None:
        passed = min(max(offset - self._begins, 0), len(self._buffer))
        del self._buffer[:passed]
        self._begins += passed


class LocalShards:
    """Bytes of shards that are files, by their place. Several threads may read at once; a fork may share it."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._begin()

    def _begin(self) -> None:
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_shards": self._shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def read(self, place: int, offset: int, size: int) -> bytes:
        """Some bytes of a shard.

        Args:
            place: Which shard.
            offset: The first of them.
            size: How many.

        Returns:
            The bytes.

        Raises:
            IntegrityError: The shard is gone, or another than when it was indexed.
            OSError: It cannot be read, or this process may open no more files.
        """  # noqa: DOC501
        shard, file = self._shards[place], self._file(place)
        _require_same(shard, os.fstat(file.number))
        data = os.pread(file.number, size, offset)
        while len(data) < size:  # a system call gives 2 GiB at most, and some file systems less than was asked for
            more = os.pread(file.number, size - len(data), offset + len(data))
            if not more:
                raise changed(shard)
            data += more
        return data

    def _file(self, place: int) -> _File:
        with self._lock:
            file = self._open.get(place)
            if file is not None:
                self._open.move_to_end(place)
                return file
        file = _open(self._shards[place])
        with self._lock:
            self._open[place] = file
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)  # closed when the last thread that reads it is done
        return file


class _File:
    """A file that is open until nobody holds this any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _open(shard: Shard) -> _File:
    try:
        return _File(shard.name)
    except OSError as error:
        if about_us(error):
            raise
        if error.errno == errno.ENOENT:
            raise gone(shard) from error
        raise DatasetError(
            f"tar shard {printable(shard.where)}: cannot be opened: {error.strerror}, expected a readable file",
            hint="look at its permissions: ls -l",
        ) from error


def _require_same(shard: Shard, status: os.stat_result) -> None:
    """Compare a shard with what it was when it was indexed: size and time of the last change of its content.

    Raises:
        IntegrityError: It is another.
    """  # noqa: DOC501
    if (status.st_size, status.st_mtime_ns) != shard.signature[:2]:
        raise changed(shard)
