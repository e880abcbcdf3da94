"""RS2: repeated sampling of random subsets.

Okanovic et al. 2024, "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning" (ICLR), section 3,
without replacement: the data set is permuted, each epoch takes the next r N samples, and when it is used up it is
permuted again.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from gstds_cache.seeding import rng_for


def rs2(items: int, keep: int, epochs: int, seed: int) -> list[Int64[np.ndarray, " M"]]:
    """Rows of each epoch.

    Args:
        items: Items of the data set (N).
        keep: Rows of an epoch (M).
        epochs: Epochs.
        seed: Key of the permutations.

    Returns:
        For each epoch int64 [M]; any run of N rows from the start of a permutation has no row twice.
    """
    rounds = -(-keep * epochs // items)
    order = np.concatenate([rng_for(seed, "rs2", r).permutation(items) for r in range(rounds)])
    return [order[epoch * keep : (epoch + 1) * keep] for epoch in range(epochs)]
