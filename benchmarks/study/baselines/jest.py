"""JEST: joint example selection, in chunks, by learnability.

Evans et al. 2024, "Data curation via joint example selection further accelerates multimodal learning" (NeurIPS),
section 3.2 and its listing: b samples of a super-batch are drawn in N = 16 chunks without replacement, each chunk from
softmax(S_ii + sum over the chosen k of S_ki + S_ik), S the learner's loss matrix minus the reference's. For a
contrastive loss S has entries between samples. **A classifier's loss is a sum over single samples, so S is diagonal,
the sums vanish, and JEST reduces to softmax sampling of learner loss minus reference loss.** That is what this is.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from benchmarks.study.baselines.batch_method import Choice, Offer, WholeBatchMethod, kept_of

CHUNKS = 16


class Jest(WholeBatchMethod):
    """The method with its reference losses."""

    name = "jest"

    def __init__(self, reference: Float32[np.ndarray, " N"], ratio: float) -> None:
        """Take the reference losses.

        Args:
            reference: Loss of each item under the reference model, float32 [N].
            ratio: Share of each batch that is left out.
        """
        self._reference, self.ratio = reference, ratio
        self._there = torch.from_numpy(reference)

    def choose(self, offer: Offer) -> Choice:
        """Draw by learnability."""
        assert offer.losses is not None
        scores = (offer.losses - self._reference[offer.rows]).astype(np.float64)
        return Choice(np.sort(draw_in_chunks(scores, kept_of(len(offer.rows), self.ratio), offer.rng)))

    def prepare(self, device: torch.device) -> None:
        """The reference losses go there."""
        self._there = self._there.to(device)

    def keys(
        self, losses: Float32[torch.Tensor, " B"], rows: Int64[torch.Tensor, " B"], gumbel: Float32[torch.Tensor, " B"]
    ) -> Float32[torch.Tensor, " B"]:
        """Learnability, with noise: drawn at once, which chunks without sums between them are as well."""
        return losses - self._there[rows] + gumbel


def draw_in_chunks(
    scores: Float64[np.ndarray, " B"], keep: int, rng: np.random.Generator, chunks: int = CHUNKS
) -> Int64[np.ndarray, " M"]:
    """Draw ``keep`` of B without replacement, chunk by chunk, by softmax over those not drawn yet.

    Args:
        scores: Logits, float64 [B].
        keep: How many (M).
        rng: Random numbers.
        chunks: In how many draws; sizes differ by one at most.

    Returns:
        Positions in the order drawn, int64 [M].
    """
    left = np.arange(len(scores))
    drawn: list[Int64[np.ndarray, " c"]] = []
    for chunk in np.array_split(np.arange(keep), min(chunks, keep)):
        # The Gumbel trick: the largest of logits + Gumbel noise are a softmax draw without replacement.
        noisy = scores[left] + rng.gumbel(size=len(left))
        order = np.argsort(-noisy, kind="stable")
        drawn.append(left[order[: len(chunk)]])
        left = np.sort(left[order[len(chunk) :]])
    return np.concatenate(drawn)
