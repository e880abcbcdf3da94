"""A selection from rows that are known before training: a subset chosen once, or one for each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from gstds_cache.files.digest import digest_of
from gstds_cache.seeding import rng_for
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.record_writer import SelectionWriter
from gstds_cache.stream.schema import Header


def write_fixed(
    path: Path, like: Header, rows: Sequence[Int64[np.ndarray, " M"]], *, step: int, method: str, seed: int
) -> Header:
    """Write a selection that any trainer reads: each epoch's rows, shuffled, in batches of ``step``.

    The last batch of an epoch takes a remainder below half a batch, as in a plan (``selection/plan.py``).

    Args:
        path: Where the selection goes.
        like: Header of any selection of the same store: which data set the rows are of.
        rows: Rows of each epoch, int64 [M], all of one length.
        step: Rows of a batch.
        method: Who chose them; part of the selection's identity.
        seed: Key of the order.

    Returns:
        The header written.
    """
    kept = len(rows[0])
    batches = max(1, (kept + step // 2) // step)
    settings = {
        "method": method,
        "step": step,
        "seed": seed,
        "epochs": len(rows),
        "rows": digest_of([r.tolist() for r in rows]),
    }
    header = replace(
        like,
        selection_digest=digest_of({"cache": like.cache_fingerprint, "fixed": settings}),
        seed=seed,
        epochs=len(rows),
        batches_per_epoch=batches,
        total_batches=batches * len(rows),
        kept_per_epoch=[kept] * len(rows),
        total_kept=kept * len(rows),
        settings=settings,
    )
    with path.open("wb") as file, SelectionWriter(file, header) as writer:
        for epoch, of_epoch in enumerate(rows):
            order = of_epoch[rng_for(seed, "fixed", epoch).permutation(kept)]
            for batch_id in range(batches):
                end = kept if batch_id == batches - 1 else (batch_id + 1) * step
                part = order[batch_id * step : end]
                writer.write(
                    SelectedBatch(
                        seq=epoch * batches + batch_id,
                        epoch=epoch,
                        batch_id=batch_id,
                        n_in=len(part),
                        kept=part,
                        score=None,
                        status=Status.NOT_COMPUTED,
                        value=float("nan"),
                        residual=float("nan"),
                    )
                )
    return header
