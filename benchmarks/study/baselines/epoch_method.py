"""A method that settles at an epoch's start which rows are trained on in it, by the last losses seen in training."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from jaxtyping import Int64

from benchmarks.study.baselines.batch_method import Choice, Offer
from benchmarks.study.baselines.last_losses import LastLosses


class EpochMethod(LastLosses):
    """Chooses the rows of an epoch at its start.

    Of a batch it chooses what the epoch's rows have in it, few or many; steps are of one size all the same
    (:attr:`step_rows`), so an epoch of few rows has fewer of them, as with a data loader over those rows.
    """

    def __init__(self, items: int, step: int) -> None:
        """Start with all losses equal.

        Args:
            items: Items of the data set (N).
            step: Samples of a training step.
        """
        super().__init__(items)
        self.step_rows = step
        self._epoch = -1
        self._kept = np.zeros(items, bool)

    @abstractmethod
    def rows_of(self, epoch: int, epochs: int, rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
        """Rows that an epoch is trained on, int64 [M], distinct, in any order.

        Args:
            epoch: Epoch, from 0.
            epochs: Epochs of the run.
            rng: Random numbers of this epoch.
        """

    def choose(self, offer: Offer) -> Choice:
        """The batch's part of the epoch's rows; it may be empty."""
        if offer.epoch != self._epoch:
            self._epoch = offer.epoch
            self._kept[:] = False
            self._kept[self.rows_of(offer.epoch, offer.epochs, offer.rng)] = True
        return Choice(np.flatnonzero(self._kept[offer.rows]))
