"""The path of a batch on a device, with the kernels compiled by g++ and all tensors on the CPU: the lines that a GPU runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gstds_cache.config import EmbedConfig, SelectConfig
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral import fiedler
from gstds_cache.store.reader import EmbeddingStore

CONFIG = SelectConfig(batch_size=64, epochs=3, knn=6, device="cpu", guidance="none")


@pytest.fixture(params=["float16", "float32"])
def store(array_source, tiny_model, tmp_path: Path, request: pytest.FixtureRequest) -> EmbeddingStore:
    config = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=64, workers=0, device="cpu", dtype=request.param)
    return EmbeddingStore(
        embed_dataset(array_source(300, bad=frozenset({5, 150})), config, where=tmp_path / "store").location
    )


def everything(selections: list[SelectedBatch]) -> list[object]:
    return [
        (s.seq, s.epoch, s.batch_id, s.n_in, s.kept.tobytes(), s.score.tobytes(), s.status, s.value, s.residual)
        for s in selections
    ]


@pytest.fixture
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BatchSelector]:
    """Makes selectors whose stacks run by emulated kernels; what the path leaves to the CPU runs as on any CPU."""

    def make(store: EmbeddingStore, **changes) -> BatchSelector:
        request.getfixturevalue("emulated_kernels")
        monkeypatch.setattr(fiedler, "why_not_solved", lambda *_: "this is the CPU")
        selector = BatchSelector(store, replace(CONFIG, knn_backend="cuda", **changes))
        assert not selector.why_not_on_device
        return selector

    return make


@pytest.mark.parametrize("rule", ["cells", "cells-squared", "coverage", "spread"])
def test_the_same_rows_as_on_the_cpu(store: EmbeddingStore, on_device, rule: str) -> None:
    reference = BatchSelector(store, replace(CONFIG, rule=rule))
    assert reference.why_not_on_device
    theirs = list(reference.run())
    selector = on_device(store, rule=rule)
    assert selector.rule_on_device == rule.startswith("cells")
    ours = list(selector.run())
    assert [len(s.kept) for s in ours] == [len(s.kept) for s in theirs]
    same = [np.isin(a.kept, b.kept).mean() for a, b in zip(ours, theirs, strict=True)]
    assert np.mean(same) >= 0.99, same
    assert [s.status for s in ours] == [s.status for s in theirs]
    for field in ("batches", "rows", "kept", "classes", "status"):
        assert getattr(selector.counts, field) == getattr(reference.counts, field), field
    assert everything(list(on_device(store, rule=rule).run(7))) == everything(ours)[7:]
