"""Objects of a Python program passed to ``embed`` and ``train``: pairs, torchvision's, and Hugging Face's data sets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from real_store import MODEL
from source_kinds import Item, class_folders, hugging_face_object, items
from torchvision.datasets import ImageFolder

from gstds_cache.api.embed import embed
from gstds_cache.api.select_batches import select
from gstds_cache.api.train import train

COUNT = 32


def pairs(made: Sequence[Item], _folder: Path) -> Any:
    return [(Image.open(io.BytesIO(item.data)), item.label) for item in made]


def of_torchvision(made: Sequence[Item], folder: Path) -> Any:
    class_folders(folder, made)
    return ImageFolder(str(folder))


def of_datasets(made: Sequence[Item], _folder: Path) -> Any:
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    return hugging_face_object(made)


@pytest.mark.parametrize("make", [pairs, of_torchvision, of_datasets])
def test_an_object_is_embedded_selected_from_and_trained_on(make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "stores"))
    made = items(COUNT)
    dataset = make(made, tmp_path / "photos")
    silent: dict[str, Any] = {"progress": False, "notify": lambda _line: None}
    store = embed(dataset, "o.store", model=MODEL, batch_size=4, shard_rows=8, workers=0, device="cpu", **silent)
    assert store.labels.tolist() == [item.label for item in made]
    again = embed(dataset, "o.store", model=MODEL, batch_size=4, shard_rows=8, workers=0, device="cpu", **silent)
    assert again.report.cache_hit
    selection = select(store, keep=0.5, epochs=1, batch_size=16, rule="random", **silent)
    report = train(dataset, selection, arch="conv3", lr=0.02, device="cpu", image_size=8, out="run", **silent)
    assert report.steps == 2
