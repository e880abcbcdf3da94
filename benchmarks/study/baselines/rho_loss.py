"""RHO-LOSS: what is not learned yet, but can be.

Mindermann et al. 2022, "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt" (ICML),
equation 3 and algorithm 1: of each large batch take the b samples with the largest loss of the learner minus
*irreducible loss*, the loss under a model trained on held-out data. Here that model is a probe on the cached
embeddings, cross-fitted on two halves, so that no sample's reference saw the sample.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64

from benchmarks.study.baselines.batch_method import Choice, Offer, WholeBatchMethod, kept_of


class RhoLoss(WholeBatchMethod):
    """The method with its reference losses."""

    name = "rho-loss"

    def __init__(self, reference: Float32[np.ndarray, " N"], ratio: float) -> None:
        """Take the irreducible losses.

        Args:
            reference: Irreducible loss of each item, float32 [N].
            ratio: Share of each batch that is left out.
        """
        self._reference, self.ratio = reference, ratio
        self._there = torch.from_numpy(reference)

    def choose(self, offer: Offer) -> Choice:
        """The largest reducible losses."""
        assert offer.losses is not None
        reducible = offer.losses - self._reference[offer.rows]
        keep = kept_of(len(offer.rows), self.ratio)
        return Choice(np.sort(np.argsort(-reducible, kind="stable")[:keep]))

    def prepare(self, device: torch.device) -> None:
        """The irreducible losses go there."""
        self._there = self._there.to(device)

    def keys(
        self,
        losses: Float32[torch.Tensor, " B"],
        rows: Int64[torch.Tensor, " B"],
        gumbel: Float32[torch.Tensor, " B"],  # noqa: ARG002
    ) -> Float32[torch.Tensor, " B"]:
        """The reducible losses."""
        return losses - self._there[rows]
