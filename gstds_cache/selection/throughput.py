"""How fast selection goes on this machine, from a few batches of which nothing is kept."""

from __future__ import annotations

import time

from gstds_cache.selection.run import BatchSelector

SECONDS = 2.0


def samples_per_second(selector: BatchSelector) -> float:
    """Select batches for some two seconds.

    The first batches are left out: they open the store and compile. Of epochs that find their graphs from earlier ones
    the rule's time alone is counted, and of candidates that are offered again none.

    Args:
        selector: The run; nothing of it is written.

    Returns:
        Samples looked at per second, on average over the whole run.
    """
    if not selector.device_run.why_not:
        return _of_stacks(selector)
    plan, counts = selector.plan, selector.counts
    batches = selector.run()
    first = next(batches)
    begun, choosing, done, samples, now = time.perf_counter(), counts.seconds["rule"], 0, 0, 0.0
    for batch in batches:
        done, samples = done + 1, samples + batch.n_in
        now = time.perf_counter() - begun
        if now > SECONDS or done == plan.batches_per_epoch - 1:  # later ones may find their graphs
            break
    batches.close()  # type: ignore[attr-defined]
    if not samples:
        return first.n_in / max(counts.elapsed, 1e-9)
    computed = min(1.0, plan.batch_assignments / plan.epochs) if plan.batch_assignments else 1.0
    again = selector.offers_again_from(0) < plan.total_batches
    repeated = 0.0 if again else min(now, (counts.seconds["rule"] - choosing) / selector.threads)
    return samples / (computed * now + (1 - computed) * repeated)


def _of_stacks(selector: BatchSelector) -> float:
    """The same on a device, where batches come in stacks, and graphs are made in every epoch but for candidates."""
    counts, again, whole = selector.counts, selector.offers_again_from(0), selector.plan.total_batches
    _ = selector.guidance, selector.device_run.rows  # once in a run
    begun, batches = counts.elapsed, selector.run()
    for batch in batches:
        if counts.elapsed - begun > SECONDS or batch.seq + 1 == again:
            break
    batches.close()  # type: ignore[attr-defined]
    return counts.rows / max(again / whole * (counts.elapsed - begun), 1e-9)
