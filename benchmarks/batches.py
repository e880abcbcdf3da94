"""Batches of embeddings for the benchmarks: of real images, out of stores, or made up for a smoke run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gstds_cache.config import SelectConfig
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore

MADE_UP_DIM = 64


def made_up(count: int, batch_size: int, dim: int = MADE_UP_DIM, seed: int = 0) -> np.ndarray:
    """``[count, batch_size, dim]`` float32: clusters of several sizes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, dim))
    label = rng.integers(0, 20, (count, batch_size))
    return (centres[label] + rng.normal(size=(count, batch_size, dim))).astype(np.float32)


def batches_of(stores: Sequence[Path], count: int, batch_size: int, seed: int = 0) -> np.ndarray:
    """``[count, batch_size, D]`` float32: full batches as gstds-select plans them, an equal share of each store.

    The stores must agree in D.
    """
    if not stores:
        return made_up(count, batch_size, seed=seed)
    full: list[np.ndarray] = []
    for n, path in enumerate(stores):
        store = EmbeddingStore(path, access="memory")
        plan = BatchSelector(
            store, SelectConfig(batch_size=batch_size, knn=1, epochs=10_000, batch_assignments=0, seed=seed)
        ).plan
        seq, wanted = 0, count * (n + 1) // len(stores)
        while len(full) < wanted:
            batch = plan.batch(seq)
            if len(batch.indices) == batch_size:
                full.append(store.gather(batch.indices).astype(np.float32))
            seq += 1
    return np.stack(full)
