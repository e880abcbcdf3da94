"""Selective backprop: the larger a sample's loss, the likelier its gradient.

Jiang et al. 2019, "Accelerating Deep Learning by Focusing on the Biggest Losers" (arXiv 1910.00762), section 3.1: a
sample is trained on with probability CDF(loss)^beta. With u the loss's rank quantile and beta = 1/keep - 1 the expected
share is ``keep``, since the mean of u^beta is 1/(beta + 1). Here exactly that many are drawn without replacement, in
proportion to u^beta, and the quantiles are those of the batch (the paper: of the last losses seen).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from benchmarks.study.baselines.batch_method import Choice, Offer, WholeBatchMethod, kept_of


class SelectiveBackprop(WholeBatchMethod):
    """The method."""

    name = "selective-backprop"

    def __init__(self, ratio: float) -> None:
        """Set the budget.

        Args:
            ratio: Share of each batch that is left out.
        """
        self.ratio = ratio

    def choose(self, offer: Offer) -> Choice:
        """Draw by rank."""
        assert offer.losses is not None
        keep = kept_of(len(offer.rows), self.ratio)
        chance = chances(offer.losses.astype(np.float64), keep)
        return Choice(np.sort(offer.rng.choice(len(chance), keep, replace=False, p=chance)))

    def keys(
        self,
        losses: Float32[torch.Tensor, " B"],
        rows: Int64[torch.Tensor, " B"],  # noqa: ARG002
        gumbel: Float32[torch.Tensor, " B"],
    ) -> Float32[torch.Tensor, " B"]:
        """The logarithm of :func:`chances`, but for a constant, with noise."""
        size = len(losses)
        rank = losses.argsort(stable=True).argsort() + 1
        return (rank / size).log() * (size / kept_of(size, self.ratio) - 1) + gumbel


def chances(losses: Float64[np.ndarray, " B"], keep: int) -> Float64[np.ndarray, " B"]:
    """u^(B / keep - 1) over its sum, u = (rank + 1) / B with rank 0 for the smallest loss."""
    size = len(losses)
    rank = np.empty(size)
    rank[np.argsort(losses, kind="stable")] = np.arange(1, size + 1)
    chance = (rank / size) ** (size / keep - 1)
    return np.asarray(chance / chance.sum())
