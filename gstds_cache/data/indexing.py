"""Indexing tar shards: in threads of this process, or in other processes and on other machines."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from uuid import uuid4

from gstds_cache.data.files import printable
from gstds_cache.data.hashing import REACHABLE
from gstds_cache.data.members import LabelMember
from gstds_cache.data.shard_cache import ShardCache
from gstds_cache.data.shard_reading import Opened, index_shard, keep_index, kept_index
from gstds_cache.data.shards import Shard, Shards, signature_now
from gstds_cache.errors import DatasetError, IntegrityError
from gstds_cache.runtime.executor import Executor, PickledTask

AT_ONCE = 4
"""Shards that are indexed at a time."""
SPREAD_FROM = 8
"""Shards without an index from which on other processes are asked: below, starting to is what takes time."""


@dataclass(frozen=True)
class IndexAnywhere(PickledTask):
    """Indexes tar shards.

    Attributes:
        uri: The data set, for errors.
        shards: Its shards.
        label: Where their labels are.
        key: What tells this one from others.
    """

    uri: str
    shards: Shards
    label: LabelMember
    key: str = field(default_factory=lambda: uuid4().hex)
    counted = "tar shards to index"

    def __call__(self, units: Sequence[int]) -> Iterator[tuple[Opened | None, str]]:
        """Index.

        Args:
            units: Which shards.

        Yields:
            Members and labels of each, or None where it cannot be indexed; and on which machine that was tried.
        """
        index = partial(
            index_shard, bucket=self.shards.bucket, label=self.label, cache=ShardCache(None), uri=self.uri
        )  # fmt: skip
        for unit in units:
            try:
                opened = index(self.shards.shards[unit])
            except (DatasetError, IntegrityError):
                opened = None  # the first process finds out what is wrong, and whether it is so there as well
            yield opened, platform.node()


def index_shards(
    uri: str, shards: Shards, label: LabelMember, cache: ShardCache, executor: Executor | None = None
) -> Iterator[Opened]:
    """Index the shards of a data set, but for those of which the index is kept.

    Args:
        uri: The data set, for errors.
        shards: Its shards.
        label: Where their labels are.
        cache: Keeps indices and labels.
        executor: Where they are read, if ``SPREAD_FROM`` or more have to be; None for this process.

    Yields:
        Members and labels of each, in order.

    Raises:
        DatasetError: A shard is damaged or was cut off, cannot be read on one of the machines, or its labels are none.
        IntegrityError: It changed meanwhile.
        StoreUnavailableError: The bucket does not answer.
    """  # noqa: DOC501
    here = partial(index_shard, bucket=shards.bucket, label=label, cache=cache, uri=uri)
    unread = [
        place
        for place, shard in enumerate(shards.shards)
        if executor is not None and kept_index(shard, label, cache) is None
    ]
    if executor is None or len(unread) < SPREAD_FROM:
        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="index")
        try:
            yield from pool.map(here, shards.shards)
        finally:
            pool.shutdown(cancel_futures=True)
        return
    begun = time.time_ns()
    found = executor.run(IndexAnywhere(uri, shards, label), unread, ordered=True)
    waited = set(unread)
    for place, shard in enumerate(shards.shards):
        if place not in waited:
            yield here(shard)
            continue
        opened, machine = next(found)
        if opened is None:
            here(shard)
            raise _not_seen(uri, shard, machine)
        keep_index(opened, label, cache, (shard.signature, begun, partial(signature_now, shard)))
        yield opened


def _not_seen(uri: str, shard: Shard, machine: str) -> DatasetError:
    return DatasetError(
        f"data set {uri!r}: shard {printable(shard.where)} can be read here, and not on {machine}", hint=REACHABLE
    )
