"""Commits of finished shards, beside the embedding of the next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from gstds_cache.embedding.clock import Clock
from gstds_cache.embedding.plan import ShardWork
from gstds_cache.store.commit_record import CommitRecord, Quarantined
from gstds_cache.store.spec import CacheSpec


@runtime_checkable
class ShardWriter(Protocol):
    """What commits shards: :class:`gstds_cache.store.writer.StoreWriter`, or another process's."""

    @property
    def spec(self) -> CacheSpec:
        """What the store holds."""
        ...

    def commit(
        self, shard: int, rows: Float[np.ndarray, "R D"], quarantined: Sequence[Quarantined] = ()
    ) -> CommitRecord:
        """Commit one shard."""
        ...


class CommitThread:
    """Commits shards in a thread of its own, one at a time, so that embedding goes on meanwhile.

    At most one shard is under way. An error of its commit is raised by the next :meth:`collect`. Leaving the block
    waits for what is under way and ends the thread.
    """

    def __init__(self, writer: ShardWriter, clock: Clock) -> None:
        self._writer, self._clock = writer, clock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gstds-commit")
        self._pending: Future[CommitRecord] | None = None

    def __enter__(self) -> CommitThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @property
    def done(self) -> bool:
        """Whether a commit has ended that was not collected."""
        return self._pending is not None and self._pending.done()

    def begin(self, work: ShardWork) -> None:
        """Commit a shard in the background. Its block is the thread's from now on."""
        assert self._pending is None, "the commit before was not collected"
        self._pending = self._pool.submit(self._commit, work)

    def collect(self) -> Iterator[CommitRecord]:
        """Wait for the commit under way, if there is one.

        Yields:
            Its commit record.
        """
        if self._pending is not None:
            begun = time.perf_counter()
            pending, self._pending = self._pending, None
            commit = pending.result()
            self._clock.commit_wait += time.perf_counter() - begun
            yield commit

    def _commit(self, work: ShardWork) -> CommitRecord:
        begun = time.perf_counter()
        try:
            commit = self._writer.commit(work.shard, work.block, work.quarantined)
            self._clock.shards += 1
            return commit
        finally:
            self._clock.commit += time.perf_counter() - begun
