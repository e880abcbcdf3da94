"""RHO-LOSS: what is not learned yet, but can be.

Mindermann et al. 2022, "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt" (ICML),
equation 3 and algorithm 1: of each large batch take the b samples with the largest loss of the learner minus
*irreducible loss*, the loss under a model trained on held-out data. Here that model is a probe on the cached
embeddings, cross-fitted on two halves, so that no sample's reference saw the sample.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from benchmarks.study.baselines.batch_method import BatchMethod, Choice, Offer, kept_of


class RhoLoss(BatchMethod):
    """The method with its reference losses."""

    name = "rho-loss"
    needs_losses = True

    def __init__(self, reference: Float32[np.ndarray, " N"], ratio: float) -> None:
        """Take the irreducible losses.

        Args:
            reference: Irreducible loss of each item, float32 [N].
            ratio: Share of each batch that is left out.
        """
        self._reference, self._ratio = reference, ratio

    def choose(self, offer: Offer) -> Choice:
        """The largest reducible losses."""
        assert offer.losses is not None
        reducible = offer.losses - self._reference[offer.rows]
        keep = kept_of(len(offer.rows), self._ratio)
        return Choice(np.sort(np.argsort(-reducible, kind="stable")[:keep]))
