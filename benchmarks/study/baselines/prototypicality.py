"""Prototypicality: distance to the nearest centre of a clustering that needs no labels.

Sorscher et al. 2022, "Beyond neural scaling laws: beating power law scaling via data pruning" (NeurIPS), section 4:
k-means on embeddings of a self-supervised model; a sample's score is its cosine distance to the nearest centroid; where
data is plenty the hardest (farthest) stay.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64
from sklearn.cluster import MiniBatchKMeans


def prototypicality(embeddings: Float32[np.ndarray, "N D"], clusters: int, seed: int) -> Float64[np.ndarray, " N"]:
    """Scores of all samples.

    Args:
        embeddings: Unit rows, float32 [N, D].
        clusters: Centroids (k).
        seed: Seed of k-means.

    Returns:
        Cosine distance to the nearest centroid, float64 [N].
    """
    means = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=4096).fit(embeddings)
    return nearest_distance(embeddings, means.cluster_centers_)


def nearest_distance(
    embeddings: Float32[np.ndarray, "N D"], centres: Float32[np.ndarray, "k D"]
) -> Float64[np.ndarray, " N"]:
    """1 - the largest cosine with a centre; ``embeddings`` are unit rows, ``centres`` need not be."""
    unit = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return np.asarray(1 - (embeddings @ unit.T.astype(np.float32)).max(axis=1), np.float64)
