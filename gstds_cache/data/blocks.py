"""Work on blocks of rows, in one thread or in several, whichever is quicker."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from gstds_cache.files import mapped
from gstds_cache.runtime.progress import Counted

BLOCK = 100
"""Rows of a block."""
CLEARLY = 0.8
"""Share of the time of one thread that several have to do with, to be taken."""
_WAVE = 200  # blocks that are handed to threads at once, at most
_TRIAL, _TRIAL_SECONDS = 16, 0.1  # blocks that are done alone, for so long at most, and as many in threads


def in_blocks(
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

    blocks = (range(first, min(first + BLOCK, rows)) for first in range(0, rows, BLOCK))
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
