"""A store that most tests of selections begin with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from images import TINY_ENCODER, ArraySource

from gstds_cache.config import EmbedConfig
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.store.reader import EmbeddingStore


@pytest.fixture(scope="session")
def copied_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., EmbeddingStore]:
    """Copies a store of random images to ``where``; each is embedded once a session, which takes ten times longer."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "tiny_encoder_of_stores.py").write_text(TINY_ENCODER)

    @cache
    def embedded(items: int, bad: frozenset[int], dtype: str) -> Path:
        model = "tiny_encoder_of_stores:build"
        config = EmbedConfig(model=model, batch_size=16, shard_rows=64, workers=0, device="cpu", dtype=dtype)
        where = folder / f"{items}-{sorted(bad)}-{dtype}"
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            embed_dataset(ArraySource(items, bad=bad), config, where=where)
        return where

    def copy(where: Path, *store: object) -> EmbeddingStore:
        shutil.copytree(embedded(*store), where)
        return EmbeddingStore(where)

    return copy
