"""A small selection of candidates, written without a store: 72 items, three epochs of the same four batches of 18."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gstds_cache.selection.selected_batch import Candidates, SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.record_writer import SelectionWriter
from gstds_cache.stream.schema import CANDIDATES_FORMAT, Header

ITEMS, EPOCHS, BATCHES, SIZE, KEEP = 72, 3, 4, 18, (6, 7, 5, 6)  # uneven on purpose
CHANCE = 1.25  # loss of a network that knows nothing


def header(draw: str = "loss-minus-reference", *, epochs: int = EPOCHS, seed: int = 0, **changes) -> Header:
    kept = [sum(KEEP)] * epochs
    fields = {
        "cache_fingerprint": "c" * 64, "selection_digest": "d" * 64, "items": ITEMS, "items_root": "r" * 64,
        "seed": seed, "epochs": epochs, "batches_per_epoch": BATCHES, "total_batches": epochs * BATCHES,
        "total_kept": sum(kept), "kept_per_epoch": kept, "settings": {"draw": draw, "strata": 3, "chance": CHANCE},
        "format": CANDIDATES_FORMAT,
    }  # fmt: skip
    return Header(**(fields | changes))


def batch(seq: int) -> SelectedBatch:
    """Batch ``seq``: the rows of an epoch are those of the one before."""
    epoch, batch_id = divmod(seq, BATCHES)
    rng = np.random.default_rng(batch_id)
    rows = np.random.default_rng(7).permutation(ITEMS)[batch_id * SIZE : (batch_id + 1) * SIZE]
    offered = Candidates(
        KEEP[batch_id],
        rng.permutation(np.repeat(np.arange(3, dtype=np.int16), SIZE // 3)),
        rng.gamma(1.0, 1.0, SIZE).astype(np.float32),
        rng.uniform(0.5, 1.5, SIZE).astype(np.float32),
    )
    return SelectedBatch(seq, epoch, batch_id, SIZE, rows, None, Status.CONVERGED, 0.5, 1e-7, offered)


def write(path: Path, draw: str = "loss-minus-reference", **changes) -> Path:
    head = header(draw, **changes)
    with path.open("wb") as file, SelectionWriter(file, head) as writer:
        for seq in range(head.total_batches):
            writer.write(batch(seq))
    return path
