"""k-centre: a subset that leaves no sample far from all of it.

Sener & Savarese 2018, "Active Learning for Convolutional Neural Networks: A Core-Set Approach" (ICLR), algorithm 1: the
greedy 2-approximation of the k-centre problem. Start anywhere; add the sample farthest from what is chosen, again and
again. The distance is Euclidean between unit embeddings. O(M N D).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64


def k_centre(embeddings: Float32[np.ndarray, "N D"], keep: int, first: int) -> Int64[np.ndarray, " M"]:
    """Choose ``keep`` rows.

    Args:
        embeddings: Unit rows, float32 [N, D].
        keep: How many (M).
        first: The row to start from.

    Returns:
        Rows, int64 [M], ascending.
    """
    chosen = np.empty(keep, np.int64)
    chosen[0] = first
    cosine = embeddings @ embeddings[first]  # with the nearest chosen row; the farthest has the smallest
    for count in range(1, keep):
        cosine[chosen[count - 1]] = np.inf
        row = int(cosine.argmin())
        chosen[count] = row
        np.maximum(cosine, embeddings @ embeddings[row], out=cosine)
    return np.sort(chosen)
