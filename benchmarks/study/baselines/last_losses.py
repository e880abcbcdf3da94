"""A method that decides by the last loss of each row seen in training."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Int64

from benchmarks.study.baselines.batch_method import BatchMethod

START = 3.0  # last loss of a row that was never trained on, in the code of InfoBatch, SeTa and OrderDP alike


class LastLosses(BatchMethod):
    """Keeps the last loss of each row; no forward pass is spent.

    Attributes:
        scores: Last losses, float32 [N].
    """

    needs_losses = False

    def __init__(self, items: int) -> None:
        """Start with all losses equal.

        Args:
            items: Items of the data set (N).
        """
        self.scores: Float32[np.ndarray, " N"] = np.full(items, START, np.float32)

    def observe(
        self,
        rows: Int64[np.ndarray, " M"],
        losses: Float32[np.ndarray, " M"],
        correct: Bool[np.ndarray, " M"],  # noqa: ARG002
    ) -> None:
        """A score is the last loss seen."""
        self.scores[rows] = losses
