"""EL2N: the length of the error early in training.

Paul et al. 2021, "Deep Learning on a Data Diet" (NeurIPS), definition 2.2 and section 3: the score of (x, y) is the
mean over several networks, each trained for a few epochs, of ||softmax(f(x)) - onehot(y)||_2. The hardest stay.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64, Int64


def el2n(probabilities: Float32[np.ndarray, "R N C"], labels: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Scores of all samples.

    Args:
        probabilities: Of R early networks, float32 [R, N, C].
        labels: int64 [N].

    Returns:
        float64 [N], from 0 to sqrt(2).
    """
    truth = np.eye(probabilities.shape[2])[labels]
    return np.asarray(np.linalg.norm(probabilities - truth, axis=2).mean(axis=0))


def hardest(scores: Float64[np.ndarray, " N"], keep: int) -> Int64[np.ndarray, " M"]:
    """Rows of the ``keep`` largest scores, ascending; ties go to the lower row."""
    return np.sort(np.argsort(-scores, kind="stable")[:keep])
