"""InfoBatch: prune what is learned well, at random, and weigh what is left of it up.

Qin et al. 2024, "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning" (ICLR), section 2. Scores
start at 3. In each epoch a sample whose score is below the mean of all scores is kept with probability 1 - r, its loss
weighted by 1 / (1 - r), so that the expected gradient is that of the whole set. A score becomes the sample's loss when
the sample is trained on. The last 12.5 % of the epochs use everything, unweighted.

It needs no forward pass of its own, and cannot be given a budget: what it keeps depends on the losses. A sample is
offered once an epoch, so deciding batch by batch against the mean at the epoch's start is the paper's decision; here
each sample is drawn by itself, where the paper's code draws a fixed number.
"""

from __future__ import annotations

import numpy as np

from benchmarks.study.baselines.batch_method import Choice, Offer
from benchmarks.study.baselines.last_losses import START, LastLosses

ANNEAL = 0.875  # share of the epochs after which nothing is pruned


class InfoBatch(LastLosses):
    """The method with its scores, which are the last losses."""

    name = "infobatch"

    def __init__(self, items: int, prune: float = 0.5, step: int = 0) -> None:
        """Start with all scores equal, so that the first epoch uses everything.

        Args:
            items: Items of the data set (N).
            prune: r, probability with which a well-learned sample is left out.
            step: Samples of a training step; 0 takes a step on what is kept of each batch.
        """
        super().__init__(items)
        self.prune, self.step_rows = prune, step
        self._epoch, self._mean = -1, START

    def choose(self, offer: Offer) -> Choice:
        """Everything at or above the mean, and the share 1 - r of the rest with weight 1 / (1 - r)."""
        if offer.epoch != self._epoch:
            self._epoch, self._mean = offer.epoch, float(self.scores.mean(dtype=np.float64))
        everything = np.arange(len(offer.rows))
        if offer.epoch >= ANNEAL * offer.epochs:
            return Choice(everything)
        learned = self.scores[offer.rows] < self._mean
        keep = ~learned | (offer.rng.random(len(learned)) >= self.prune)
        if not keep.any():
            keep[int(offer.rng.integers(len(keep)))] = True
        weights = np.where(learned, 1 / (1 - self.prune), 1.0).astype(np.float32)
        return Choice(everything[keep], weights[keep])
