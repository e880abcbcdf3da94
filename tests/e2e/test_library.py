"""The four lines of the README: embed, select, load, train; and the same again, which computes nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import gstds_cache

ITEMS, EPOCHS, KEEP = 96, 3, 0.25


class Squares(Dataset[tuple[np.ndarray, int]]):
    """A data set as a program has it: bright, dark and medium squares of 16 x 16 pixels."""

    classes = ("dark", "medium", "bright")

    def __init__(self) -> None:
        self.targets = [item % 3 for item in range(ITEMS)]
        self.read = 0

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, item: int) -> tuple[np.ndarray, int]:
        self.read += 1
        noise = np.random.default_rng(item).integers(0, 40, (16, 16, 3))
        return (noise + 80 * self.targets[item]).astype(np.uint8), self.targets[item]


def as_tensors(items: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([torch.from_numpy(image) for image, _ in items]), torch.tensor([label for _, label in items])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))


def test_embed_select_load_train(tiny_model: str) -> None:
    module = importlib.import_module(tiny_model.partition(":")[0])
    passes = 0

    def count(*_arguments: Any) -> None:
        nonlocal passes
        passes += 1

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    quiet: dict[str, Any] = {"progress": False, "device": "cpu"}
    choice: dict[str, Any] = {"keep": KEEP, "epochs": EPOCHS, "batch_size": 24, "knn": 5}
    dataset = Squares()
    try:
        store = gstds_cache.embed(dataset, cache="squares.store", model=tiny_model, workers=0, batch_size=16, **quiet)
        selection = gstds_cache.select(store, **choice, **quiet)
        embedding_passes = passes
    finally:
        hook.remove()
    assert embedding_passes > 0
    assert module.Tiny is not None

    sampler = selection.sampler()
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=as_tensors)
    batches = [batch for _ in range(EPOCHS) for batch in loader]
    assert len(batches) == selection.total_steps == EPOCHS * ITEMS // 24
    assert sum(len(labels) for _, labels in batches) == EPOCHS * ITEMS * KEEP
    for images, labels in batches:
        assert torch.equal((images.float().mean((1, 2, 3)) / 80 - 0.25).round().long(), labels)

    settings: dict[str, Any] = {"arch": "conv3", "lr": 0.05, "workers": 0}
    report = gstds_cache.train(dataset, selection, evaluation=dataset, **settings, **quiet)
    assert report.gradient_samples == EPOCHS * ITEMS * KEEP
    assert (report.run_dir / "ledger.json").is_file()
    assert report.ledger.embed is not None
    assert report.ledger.select is not None
    assert report.accuracy is not None
    assert report.accuracy.items == ITEMS

    # The same again embeds nothing and selects nothing.
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*.arrow")}
    again = gstds_cache.embed(Squares(), cache="squares.store", model=tiny_model, workers=0, batch_size=16, **quiet)
    assert again.report is not None
    assert (again.report.embedded, again.report.cache_hit) == (0, True)
    found = gstds_cache.select(again, **choice, **quiet)
    assert Path(found.path) == Path(selection.path)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*.arrow")} == before
    assert (
        gstds_cache.train(Squares(), found, evaluation=dataset, resume=True, **settings, **quiet).steps == report.steps
    )
