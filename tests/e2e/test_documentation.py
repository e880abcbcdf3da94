"""What the documentation shows is run as it stands."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import gstds_cache
from gstds_cache.config import EmbedConfig, SelectConfig
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.writer import write_file

ROOT = Path(__file__).parents[2]


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.S)


@pytest.fixture
def workplace(array_source, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    embed = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=32, workers=0, device="cpu")
    embed_dataset(array_source(60), embed, where=tmp_path / "photos.store")
    config = SelectConfig(batch_size=20, epochs=2, knn=5, guidance="none")
    selector = BatchSelector(EmbeddingStore(tmp_path / "photos.store"), config)
    list(write_file(selector, tmp_path / "selection.arrow"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_first_lines(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = python_blocks("README.md")[0]
    for written, small in (
        ('cache="photos.store"', f'cache="photos.store", model={tiny_model!r}, workers=0, device="cpu"'),
        ("epochs=20", 'epochs=2, batch_size=20, knn=5, guidance="none"'),
        ('arch="resnet18"', 'arch="conv3", device="cpu", threads=1'),
    ):
        assert written in code
        code = code.replace(written, small)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
    items = [(Image.fromarray(image), row % 3) for row, image in enumerate(pixels)]
    names: dict[str, Any] = {"dataset": items, "train_dataset": items}
    exec(code, names)
    assert len(names["store"]) == 60
    assert names["selection"].total_steps == names["report"].steps == 6
    assert [len(batch) for batch in names["loader"].batch_sampler] == [5] * 3


@pytest.mark.usefixtures("workplace")
def test_the_readmes_training_loop() -> None:
    code = python_blocks("README.md")[1]
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
    exec(python_blocks("docs/cache-format.md")[0], names)
    assert names["rows"].shape == (60, 48)
    assert names["fine"].all()


def test_the_functions_for_anyone() -> None:
    names: dict[str, object] = {}
    exec(python_blocks("docs/spectral.md")[0], names)
    assert (names["agreement"] > 0.95).all()
    assert names["remedies"] == ["converged: nothing to do"] * 4
    assert tuple(names["nearest"].shape) == (4, 100, 10)


@pytest.mark.usefixtures("workplace")
def test_a_rule_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rule.py").write_text(python_blocks("docs/method.md")[0])
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
    assert {"embed", "select", "train", "Selection", "Rule", "RuleBatch", "Status"} <= set(gstds_cache.__all__)
    assert dir(gstds_cache) == sorted([*gstds_cache.__all__, "__version__"])
    assert all(getattr(gstds_cache, name) for name in gstds_cache.__all__)
    assert gstds_cache.__version__ == version("gstds-cache")
    documented = re.findall(r"^::: gstds_cache\.[\w.]*\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(gstds_cache.__all__)
    with pytest.raises(AttributeError, match="nothing"):
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
