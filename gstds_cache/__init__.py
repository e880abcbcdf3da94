"""Offline data selection for image training: an embedding cache, spectral batch selection, a stream of kept indices.

The public names load what they need when they are first used, so ``import gstds_cache`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gstds_cache.config import EmbedConfig, SelectConfig, TrainConfig
    from gstds_cache.data.sources import open_source
    from gstds_cache.embedding.run import embed_dataset
    from gstds_cache.errors import GstdsError
    from gstds_cache.graph.knn import knn_graph
    from gstds_cache.selection.run import BatchSelector
    from gstds_cache.spectral.fiedler import fiedler_vectors
    from gstds_cache.store.reader import EmbeddingStore
    from gstds_cache.stream.reader import SelectionStream, open_selection
    from gstds_cache.training.sampler import SelectedBatchSampler
    from gstds_cache.training.selected_dataset import SelectedDataset

_HOME = {
    "BatchSelector": "selection.run",
    "EmbedConfig": "config",
    "EmbeddingStore": "store.reader",
    "GstdsError": "errors",
    "SelectConfig": "config",
    "SelectedBatchSampler": "train.sampler",
    "SelectedDataset": "train.selected_dataset",
    "SelectionStream": "stream.reader",
    "TrainConfig": "config",
    "embed_dataset": "embed.run",
    "fiedler_vectors": "spectral.fiedler",
    "knn_graph": "graph.knn",
    "open_selection": "stream.reader",
    "open_source": "data.sources",
}

__all__ = [
    "BatchSelector",
    "EmbedConfig",
    "EmbeddingStore",
    "GstdsError",
    "SelectConfig",
    "SelectedBatchSampler",
    "SelectedDataset",
    "SelectionStream",
    "TrainConfig",
    "embed_dataset",
    "fiedler_vectors",
    "knn_graph",
    "open_selection",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gstds_cache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gstds_cache.{_HOME[name]}"), name)
