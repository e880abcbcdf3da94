"""Proxy mask: of each batch, what a small network finds hardest.

Coleman et al. 2020, "Selection via Proxy: Efficient Data Selection for Deep Learning" (ICLR): a small network trained
for a short time ranks the data for a large one. Here a batch's mask keeps its largest proxy losses; unlike a subset
chosen once, each batch gives its share, so every step has the budget's size.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from benchmarks.study.baselines.batch_method import BatchMethod, Choice, Offer, kept_of


class ProxyMask(BatchMethod):
    """The method with the proxy's losses."""

    name = "proxy-mask"
    needs_losses = False

    def __init__(self, losses: Float32[np.ndarray, " N"], ratio: float) -> None:
        """Take the losses.

        Args:
            losses: Of each item under the proxy, float32 [N].
            ratio: Share of each batch that is left out.
        """
        self._losses, self._ratio = losses, ratio

    def choose(self, offer: Offer) -> Choice:
        """The largest proxy losses of the batch."""
        keep = kept_of(len(offer.rows), self._ratio)
        return Choice(np.sort(np.argsort(-self._losses[offer.rows], kind="stable")[:keep]))
