"""A selection of random batches, for what only cares which rows come when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.schema import Header
from gstds_cache.stream.writer import SelectionWriter

ITEMS = 72
KEPT = [[7, 5, 9, 4], [6, 8, 3, 5], [4, 7, 6, 10]]  # uneven on purpose; three epochs of four batches


def write_selection(
    path: Path, *, digest: str = "d" * 64, seed: int = 0, rows_seed: int | None = None
) -> list[list[int]]:
    """Write a whole selection of ``KEPT`` rows to ``path`` and return its batches; ``rows_seed`` is in no header."""
    kept_per_epoch = [sum(epoch) for epoch in KEPT]
    header = Header(
        "c" * 64, digest, ITEMS, "r" * 64, seed, len(KEPT), len(KEPT[0]), 12, sum(kept_per_epoch), kept_per_epoch, {}
    )
    rng, rows = np.random.default_rng(seed if rows_seed is None else rows_seed), []
    with path.open("wb") as file, SelectionWriter(file, header) as writer:
        for epoch, sizes in enumerate(KEPT):
            for batch_id, size in enumerate(sizes):
                kept = rng.permutation(ITEMS)[:size]
                writer.write(SelectedBatch(len(rows), epoch, batch_id, 18, kept, None, Status.CONVERGED, 0.5, 0.0))
                rows.append(kept.tolist())
    return rows


@pytest.fixture
def uneven(tmp_path: Path) -> tuple[Path, list[list[int]]]:
    """A selection whose batches differ in size, and its rows."""
    return tmp_path / "uneven.arrow", write_selection(tmp_path / "uneven.arrow")


@pytest.fixture
def write() -> Callable[..., list[list[int]]]:
    return write_selection
