"""SeTa: groups of like difficulty, and a window over them that goes from easy to hard, again and again.

Zhou, Gao and Wang 2025, "Scale Efficient Training for Large Datasets" (CVPR, arXiv 2503.13385). In epoch e, with L the
last losses (3 where a row was never trained on):

    S      = k N rows drawn at random without replacement
    G_1..g = S clustered by k-means of L into g groups, from the smallest mean loss to the largest
    kept   = all of S for e = 0, else groups a + 1 .. a + w,  w = round(alpha g),  a = e mod (g - w + 1)

The last eighth of the run ("partial annealing") trains on k N rows drawn at random from everything. Losses are not
weighted.

We had the paper's abstract and the authors' code (github.com/mrazhou/SeTa, seta.py at 341df62); g = 10, alpha = 0.5 are
its defaults (its script for CIFAR prunes less: k = 0.9, g = 5, alpha = 0.9), and a starts at 1 because its counter
does. Where we differ: k is set by the run's budget, such that (1 - ratio) N rows an epoch would be trained on if groups
were of one size. They are not, so what is kept depends on the losses (gradient samples stand in every result line).
Where S has fewer distinct losses than g, there are that many groups (theirs: an error, or g equal parts where all are
alike, as in epoch 0, which uses all of them).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64
from sklearn.cluster import KMeans

from benchmarks.study.baselines.epoch_method import EpochMethod

GROUPS = 10
WINDOW = 0.5
ANNEAL = 0.875  # share of the epochs after which no window is used


class SeTa(EpochMethod):
    """The method with its last losses."""

    name = "seta"

    def __init__(self, items: int, ratio: float, step: int, groups: int = GROUPS, window: float = WINDOW) -> None:
        """Set the budget.

        Args:
            items: Items of the data set (N).
            ratio: Share of the data set to leave out, over the run.
            step: Samples of a training step.
            groups: g.
            window: alpha, the window's share of the groups.
        """
        super().__init__(items, step)
        self._ratio, self._groups, self._window = ratio, groups, window

    def rows_of(self, epoch: int, epochs: int, rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
        """A window's groups of a random share; the share itself at first and at last."""
        items = len(self.scores)
        share = random_share(self._ratio, epochs, self._window)
        drawn = rng.permutation(items)[: max(1, int(share * items + 1e-9))]
        if epoch == 0 or annealed(epoch, epochs):
            return drawn
        group = by_difficulty(self.scores[drawn], self._groups)
        first, width = window_of(epoch, int(group.max()) + 1, self._window)
        return drawn[(group >= first) & (group < first + width)]


def by_difficulty(losses: Float32[np.ndarray, " M"], groups: int) -> Int64[np.ndarray, " M"]:
    """Group of each loss by k-means, int64 [M]; 0 is the group of the smallest losses."""
    groups = min(groups, len(np.unique(losses)))
    means = KMeans(groups, random_state=0).fit(losses[:, None])
    rank = np.argsort(np.argsort(means.cluster_centers_[:, 0], kind="stable"), kind="stable")
    return np.asarray(rank[means.labels_], np.int64)


def window_of(epoch: int, groups: int, window: float) -> tuple[int, int]:
    """First group of an epoch's window, and how many groups it has."""
    width = max(1, round(groups * window))
    return epoch % (groups - width + 1), width


def annealed(epoch: int, epochs: int) -> bool:
    """Whether an epoch is in the last eighth."""
    return epoch + 1 > ANNEAL * epochs


def random_share(ratio: float, epochs: int, window: float = WINDOW) -> float:
    """k, for (1 - ratio) N rows an epoch in the mean over a run in which a window holds the share ``window`` of S."""
    whole = sum(epoch == 0 or annealed(epoch, epochs) for epoch in range(epochs))
    return min(1.0, (1 - ratio) * epochs / (whole + window * (epochs - whole)))
