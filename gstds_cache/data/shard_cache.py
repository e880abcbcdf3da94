"""Indices of tar shards and their labels, kept from run to run, so that a shard that has not changed is not opened.

Beside the hashes of files (:mod:`gstds_cache.data.hash_cache`), and trusted as those are: by the signature of a shard
that was at least two seconds old when it was read. There is a file for each thing that is kept of a shard; one
that is missing, damaged or cannot be written makes a run slower and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gstds_cache.data.containers import Signature
from gstds_cache.data.hash_cache import old_enough
from gstds_cache.files.atomic import atomic_write

FOLDER = "shards"

_FORMAT = 1
_HEAD = struct.Struct("<II4q")
"""Format, CRC-32 of what follows, and the shard's signature."""


class ShardCache:
    """What is kept of tar shards in a folder.

    Attributes:
        notes: What the user should be told: why nothing could be written.
    """

    def __init__(self, folder: Path | None) -> None:
        """Use a folder, which need not exist; None keeps nothing."""
        self.notes: tuple[str, ...] = ()
        self._folder = None if folder is None else folder / FOLDER

    def recall(self, where: str, what: str, signature: Signature) -> bytes | None:
        """What is kept of a shard, or None.

        Args:
            where: The shard.
            what: What is kept.
            signature: What it has now.

        Returns:
            The bytes that were given to :meth:`record` for this signature.
        """
        if self._folder is None or signature[0] < 0:
            return None
        try:
            data = self._path(where, what).read_bytes()
        except OSError:
            return None
        if len(data) < _HEAD.size:
            return None
        form, crc32, *seen = _HEAD.unpack_from(data)
        body = data[_HEAD.size :]
        return body if form == _FORMAT and tuple(seen) == signature and zlib.crc32(body) == crc32 else None

    def record(self, where: str, what: str, data: bytes, seen: tuple[Signature, int, Callable[[], Signature]]) -> None:
        """Keep something of a shard.

        Args:
            where: The shard.
            what: What is kept.
            data: Its bytes.
            seen: The signature before the shard was read, the time then in nanoseconds, and what gives that of now:
                nothing is kept of a shard that changed meanwhile, or so shortly before that a change might not show.
        """
        signature, at, now = seen
        if self._folder is None or now() != signature or not old_enough(np.array([signature], np.int64), at).all():
            return
        path = self._path(where, what)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, durable=False) as file:
                file.write(_HEAD.pack(_FORMAT, zlib.crc32(data), *signature))
                file.write(data)
        except OSError as error:
            note = f"the next run indexes tar shards again: cannot write {self._folder}: {error.strerror or error}"
            self.notes = (*self.notes, note) if note not in self.notes else self.notes

    def _path(self, where: str, what: str) -> Path:
        assert self._folder is not None
        return self._folder / hashlib.sha256(os.fsencode(f"{where}\0{what}")).hexdigest()[:40]
