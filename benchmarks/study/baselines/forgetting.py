"""Forgetting events: how often a sample that was right became wrong.

Toneva et al. 2019, "An Empirical Study of Example Forgetting during Deep Neural Network Learning" (ICLR), definition 1
and algorithm 1: accuracy of a sample is noted whenever it is in a training batch; a forgetting event is a change from 1
to 0. Samples that were never right count as forgotten most. The most forgotten stay. It takes a whole training run on
everything to count.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from benchmarks.study.baselines.batch_method import BatchMethod, Choice, Offer


class ForgettingCounter(BatchMethod):
    """Trains on everything and counts."""

    name = "forgetting"
    needs_losses = False

    def __init__(self, items: int) -> None:
        """Start with no sample learned.

        Args:
            items: Items of the data set (N).
        """
        self.events = np.zeros(items, np.int64)
        self._right = np.zeros(items, bool)
        self._ever = np.zeros(items, bool)

    def choose(self, offer: Offer) -> Choice:
        """Everything."""
        return Choice(np.arange(len(offer.rows)))

    def observe(
        self,
        rows: Int64[np.ndarray, " M"],
        losses: Float32[np.ndarray, " M"],  # noqa: ARG002
        correct: Bool[np.ndarray, " M"],
    ) -> None:
        """Count the rows that were right last time and are wrong now."""
        self.events[rows] += self._right[rows] & ~correct
        self._right[rows] = correct
        self._ever[rows] |= correct

    def scores(self) -> Float64[np.ndarray, " N"]:
        """Events of each sample; one more than the maximum for those never right."""
        return np.where(self._ever, self.events, self.events.max(initial=0) + 1).astype(np.float64)
