"""Running totals of a selection: what was seen, what stayed, and where the time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from gstds_cache.selection.selected import Selection
from gstds_cache.spectral.status import Status

PHASES = ("guidance", "gather", "knn", "graph", "solve", "rule")


@dataclass
class SelectionCounts:
    """Running totals of a selection.

    Attributes:
        batches: Batches done.
        rows: Rows they held.
        kept: Rows that stayed.
        status: Batches by status flag; a batch with two flags counts in both.
        iterations: Batches by LOBPCG iterations, of those that have been solved.
        seconds: Work by phase, summed over the threads.
        elapsed: Seconds that whoever reads the selections waited for them.
        classes: By label, how many rows were seen and how many of them stayed.
    """

    batches: int = 0
    rows: int = 0
    kept: int = 0
    status: Counter[str] = field(default_factory=Counter)
    iterations: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    elapsed: float = 0.0
    classes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, selection: Selection, labels: Int64[np.ndarray, " B"], kept_labels: Int64[np.ndarray, " M"]) -> None:
        """Count one batch."""
        kept = dict(zip(*(part.tolist() for part in np.unique(kept_labels, return_counts=True)), strict=True))
        for label, count in zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True):
            seen, stayed = self.classes.get(label, (0, 0))
            self.classes[label] = seen + count, stayed + kept.get(label, 0)
        self.batches += 1
        self.rows += selection.n_in
        self.kept += len(selection.kept)
        self.status.update(flag.name.lower() for flag in selection.status if flag.name)
        if selection.status == Status.CONVERGED:
            self.status["converged"] += 1

    def share(self, status: Status) -> float:
        """Batches with this flag over all batches."""
        return self.status[str(status.name).lower()] / max(self.batches, 1)
