"""OrderDP: of a random share of the data, the rows with the largest last losses.

Jin et al. 2026, "OrderDP: A Theoretically Guaranteed Lossless Dynamic Data Pruning Framework" (ICLR, arXiv 2606.08574).
In each epoch, with L the last losses (3 where a row was never trained on) and N rows:

    S = s N rows drawn at random without replacement;  kept = the q rows of S with the largest L

The loss is the plain mean over kept rows: an unbiased estimate of a surrogate objective, which weighs a row by the
chance that its rank is among the q largest of a random S. Nothing is annealed: the last epochs prune as the first.

We had the paper's abstract and the authors' code (github.com/shengze-xu/OrderDP, cifar/orderDP/orderDP.py at b48eacc,
whose weights and whose annealing are commented out); s = 0.8 is that of their command for CIFAR (0.8 x 0.375 kept).
Where we differ: q is the run's budget, (1 - ratio) N, so s grows where the ratio is below 0.2; equal losses fall by a
random order (theirs: as torch.topk has it).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from benchmarks.study.baselines.batch_method import kept_of
from benchmarks.study.baselines.epoch_method import EpochMethod

SHARE = 0.8


class OrderDP(EpochMethod):
    """The method with its last losses."""

    name = "orderdp"

    def __init__(self, items: int, ratio: float, step: int, share: float = SHARE) -> None:
        """Set the budget.

        Args:
            items: Items of the data set (N).
            ratio: Share of the data set that is left out in each epoch.
            step: Samples of a training step.
            share: s, the random share that is looked at.
        """
        super().__init__(items, step)
        self._keep = kept_of(items, ratio)
        self._drawn = max(int(share * items), self._keep)

    def rows_of(self, epoch: int, epochs: int, rng: np.random.Generator) -> Int64[np.ndarray, " M"]:  # noqa: ARG002
        """The top q of a random share."""
        drawn = rng.permutation(len(self.scores))[: self._drawn]
        return drawn[np.argsort(-self.scores[drawn], kind="stable")[: self._keep]]
