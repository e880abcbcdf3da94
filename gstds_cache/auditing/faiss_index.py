"""Cells of a store by faiss's k-means. With ``graph/faiss_search.py`` the only file that imports faiss."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32

from gstds_cache.errors import UsageError
from gstds_cache.graph.faiss_search import INSTALL

ITERATIONS = 8
"""Of k-means: cells only have to be of about one size."""


def require_faiss() -> None:
    """Make sure that faiss is there.

    Raises:
        UsageError: It is not installed, or cannot be loaded.
    """
    try:
        import faiss  # noqa: F401
    except Exception as error:  # a wheel of another CUDA ends its import with whatever its loader raises
        raise UsageError(f"an audit needs faiss, which cannot be loaded: {error}", hint=INSTALL) from error


def cell_centroids(
    sample: Float32[np.ndarray, "b D"], cells: int, seed: int, device: torch.device
) -> Float32[np.ndarray, "C D"]:
    """Unit centroids of k-means with cosines.

    Args:
        sample: Unit rows to learn from, as many as there are cells at least.
        cells: How many.
        seed: Of the rows that it begins with.
        device: Where; a GPU is used where this faiss has one.

    Returns:
        ``[cells, D]`` float32.
    """
    import faiss

    use_gpu = device.type == "cuda" and faiss.get_num_gpus() > 0
    means = faiss.Kmeans(
        sample.shape[1],
        cells,
        niter=ITERATIONS,
        seed=1 + seed % (1 << 30),  # 0 is a random one
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=max(1, -(-len(sample) // cells)),
        gpu=use_gpu,
    )
    means.train(sample)
    return np.ascontiguousarray(means.centroids, np.float32)
