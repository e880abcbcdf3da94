"""How fast selection goes on this machine, from a few batches of which nothing is kept."""

from __future__ import annotations

import time

from gstds_cache.selection.run import BatchSelector

SECONDS = 2.0


def samples_per_second(selector: BatchSelector) -> float:
    """Select batches for some two seconds.

    The first batches are left out: they open the store and compile.

    Args:
        selector: The run; nothing of it is written.

    Returns:
        Samples looked at per second.
    """
    batches = selector.run()
    first = next(batches)
    begun, samples, now = time.perf_counter(), 0, 0.0
    for batch in batches:
        samples += batch.n_in
        now = time.perf_counter() - begun
        if now > SECONDS:
            break
    batches.close()  # type: ignore[attr-defined]
    return samples / now if samples else first.n_in / max(selector.counts.elapsed, 1e-9)
