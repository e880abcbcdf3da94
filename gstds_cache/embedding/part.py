"""``shard=I/N``: several processes, on one machine or many, embed into one store, each a part of its shards.

Parts are consecutive shards of the store, so that each process reads the files, tar shards or Parquet files of its own
rows. Nobody has to know of anybody: a shard that has a commit record is done, whoever did it, and the process after
whose last commit none is missing finishes the store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gstds_cache.errors import IncompleteError, UsageError
from gstds_cache.runtime.notify import Notify
from gstds_cache.runtime.progress import Counted
from gstds_cache.store.factory import open_transport
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.writer import StoreWriter


@dataclass(frozen=True)
class Part:
    """One of the parts that a store's shards are cut into.

    Attributes:
        number: Which, from 0.
        count: How many there are.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def shards(self, total: int) -> range:
        """The part's shards of ``total``; the sizes of two parts differ by one at most."""
        return range(self.number * total // self.count, (self.number + 1) * total // self.count)


def parse_part(text: str | None) -> Part | None:
    """Parse ``I/N``.

    Args:
        text: ``I/N`` with I from 0 to N - 1, or None where the whole store is meant.

    Returns:
        The part, or None.

    Raises:
        UsageError: It is something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text)
    if match is None:
        raise UsageError(
            f"`shard`: got {text!r}, expected I/N, with I from 0 to N - 1",
            hint="of three processes the first takes `shard=0/3`, the others `shard=1/3` and `shard=2/3`",
        )
    part = Part(int(match[1]), int(match[2]))
    if part.number >= part.count:
        last = "" if part.count == 0 else f": the last of {part.count} is `shard={part.count - 1}/{part.count}`"
        raise UsageError(
            f"`shard`: got {text!r}, expected I/N, with I from 0 to N - 1", hint=f"parts are counted from 0{last}"
        )
    return part


def finish_if_last(metadata: StoreMetadata, progress: Counted, notify: Notify) -> StoreMetadata:
    """Finish the store if every shard is committed, unless another process does.

    To be called when this process no longer holds the store's lock. In a directory one process alone finishes: the lock
    is taken exclusively, and whoever holds it still, sharing it, comes here later. In a bucket several may finish at
    once; each writes the same bytes.

    Args:
        metadata: What the store says of itself.
        progress: Called with shards checked and shards in all.
        notify: Called with a line for the user, where another process is at it.

    Returns:
        The metadata, read anew where this process finished the store.

    Raises:
        ChunkCorruptError: A committed object is not what its commit record says.
        IncompleteError: A bucket does not answer.
    """
    if len(metadata.committed()) < metadata.spec.shards or metadata.complete() is not None:
        return metadata
    transport = open_transport(metadata.location)
    try:
        with transport.lock():
            metadata = StoreMetadata(metadata.location, transport=transport)
            writer = StoreWriter(metadata)
            writer.recover()
            writer.finish(progress)
    except IncompleteError as error:
        if not transport.exclusive:
            raise
        notify(f"note: every shard is committed, and another process finishes the store: {error.message}")
    return metadata
