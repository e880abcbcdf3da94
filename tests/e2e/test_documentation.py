"""What the documentation shows is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import gstds_cache
from gstds_cache.config import EmbedConfig, SelectConfig
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.writer import write_file

ROOT = Path(__file__).parents[2]


def python_block(document: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.S)
    assert len(blocks) == 1
    return blocks[0]


@pytest.fixture
def workplace(array_source, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    embed = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=32, workers=0, device="cpu")
    embed_dataset(array_source(60), embed, where=tmp_path / "photos.store")
    config = SelectConfig(batch_size=20, epochs=2, knn=5, guidance="none")
    selector = BatchSelector(EmbeddingStore(tmp_path / "photos.store"), config)
    list(write_file(selector, tmp_path / "selection.arrow"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("workplace")
def test_the_readmes_training_loop() -> None:
    code = python_block("README.md")
    assert len(code.splitlines()) < 10
    seen = []
    # Workers would be forked from this process, which has threads; everything else is as the README has it.
    code = code.replace("num_workers=4", "num_workers=0").replace("...  # your step", "seen.append(labels.tolist())")
    dataset = TensorDataset(torch.rand(60, 3), torch.arange(60))
    exec(code, {"dataset": dataset, "seen": seen})
    assert [len(batch) for batch in seen] == [5] * 6
    assert all(len(set(batch)) == 5 for batch in seen)


@pytest.mark.usefixtures("workplace")
def test_any_zarr_reader_opens_a_store() -> None:
    names: dict[str, object] = {}
    exec(python_block("docs/cache-format.md"), names)
    assert names["rows"].shape == (60, 48)
    assert names["fine"].all()


def test_the_functions_for_anyone() -> None:
    names: dict[str, object] = {}
    exec(python_block("docs/spectral.md"), names)
    assert (names["agreement"] > 0.95).all()
    assert names["remedies"] == ["converged: nothing to do"] * 4
    assert tuple(names["nearest"].shape) == (4, 100, 10)


@pytest.mark.usefixtures("workplace")
def test_a_rule_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rule.py").write_text(python_block("docs/method.md"))
    monkeypatch.syspath_prepend(tmp_path)
    store = EmbeddingStore("photos.store")
    np.save("scores.npy", np.arange(60.0))
    config = SelectConfig(batch_size=20, epochs=1, knn=5, rule="own_rule:rule", guidance="file:scores.npy")
    selector = BatchSelector(store, config)
    for selection in selector.run():
        assert selection.kept.min() > np.sort(selector.plan.batch(selection.seq).indices)[-6]


def test_tests_named_as_proof_of_a_promise_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/cache-format.md").read_text())
    assert len(named) >= 16
    for path, function in named:
        text = (ROOT / path).read_text()
        assert (f"def {function}(" if function else "def test_") in text, (path, function)


def test_public_names_are_there() -> None:
    assert all(getattr(gstds_cache, name) for name in gstds_cache.__all__)
    assert sorted(gstds_cache._HOME) == sorted(gstds_cache.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gstds_cache.nothing  # noqa: B018


def test_links_in_the_documentation_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_files_named_in_the_documentation_exist() -> None:
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md", ROOT / "CONTRIBUTING.md"]
    named = {(page.name, path) for page in pages for path in re.findall(r"`([\w/]+/\w+\.py)`", page.read_text())}
    assert len(named) >= 80
    folders = (ROOT, ROOT / "gstds_cache", ROOT / "benchmarks")
    assert [name for name in sorted(named) if not any((folder / name[1]).exists() for folder in folders)] == []
