"""Labels that are ids: told by gstds-embed, refused by gstds-train, and no matrix of millions of columns in between."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gstds_cache.cli.cache_command import main as cache_main
from gstds_cache.cli.embed_command import main as embed_main
from gstds_cache.cli.select_command import main as select_main
from gstds_cache.cli.train_command import main as train_main

from gstds_cache.data.label_counts import LabelCounts, label_notes
from gstds_cache.errors import UsageError
from gstds_cache.selection.linear_probe import ProbeSettings, probe_columns
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.training.classes import count_classes

MODULE = """
import numpy as np
KINDS = {
    "row": lambda rows: np.arange(rows), "far": lambda rows: 10**9 + np.arange(rows) % 4,
    "spread": lambda rows: np.arange(rows) * 2**40, "text": lambda rows: [f"photo of {row}" for row in range(rows)],
}


class Ids:
    def __init__(self, kind, rows):
        self.targets, self.rows = KINDS[kind](int(rows)), int(rows)

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        return np.random.default_rng(row).integers(0, 255, (8, 8, 3), np.uint8), self.targets[row]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "id_sets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("id_sets", None)


@pytest.mark.parametrize(
    ("labels", "named", "doubt"),
    [
        (np.arange(64) % 4, 0, ""),
        (np.arange(64) % 4 * 300, 1000, ""),  # a few of ImageNet's classes, all of which have names
        (np.arange(200) % 100 * 10, 0, ""),  # a tenth of them, without names
        (np.array([0, 139]), 0, "labels up to 139, but only 2 different"),
        (np.array([0, 118]), 0, ""),
        (np.array([5, 10**9]), 7, "labels up to 1,000,000,000, but only 2 different"),
        (np.array([3, 2**62, -1]), 0, "labels up to 4,611,686,018,427,387,904, but only 2 different"),
        (np.arange(1000), 0, ""),
        (np.arange(1001), 1001, "1,001 different labels for 1,001 items"),
        (np.repeat(np.arange(1500), 2), 0, ""),
        (np.array([-1, -1]), 0, ""),
    ],
)
def test_classes_and_ids_are_told_apart(array_source, labels: np.ndarray, named: int, doubt: str) -> None:
    counts = LabelCounts.of(labels)
    assert counts == LabelCounts(int((labels >= 0).sum()), len(set(labels[labels >= 0].tolist())), int(labels.max()))
    said = counts.doubt(named)
    assert said.startswith(doubt)
    assert bool(said) == bool(doubt)
    source = array_source(len(labels), uri="mine", classes=tuple(f"c{number}" for number in range(named)))
    source.labels = labels
    if doubt or not counts.labelled:
        with pytest.raises(UsageError, match=doubt or "has no labels"):
            count_classes(source, None)
        assert label_notes(labels, named)
    else:
        assert count_classes(source, None) == max(named, int(labels.max()) + 1)
        assert not label_notes(labels, named)


def test_an_evaluation_set_with_labels_beyond_the_outputs_is_refused(array_source) -> None:
    other = array_source(8, uri="other")
    other.labels = np.arange(8) + 10**9
    with pytest.raises(
        UsageError, match=r"`evaluation` other has labels up to 1,000,000,007, and the network 3 outputs"
    ):
        count_classes(array_source(8), other)


def test_an_evaluation_set_without_labels_is_refused(array_source) -> None:
    without = array_source(3, uri="other")
    without.labels = np.full(3, -1)
    with pytest.raises(UsageError, match="`evaluation` other has no labels"):
        count_classes(array_source(8), without)


def run(main: object, *words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, list(words), catch_exceptions=False)  # type: ignore[arg-type]
    assert done.exit_code == code, done.output + str(done.exception)
    return done


@pytest.mark.parametrize(("kind", "rows"), [("far", "80"), ("spread", "80"), ("row", "1100"), ("text", "1100")])
def test_every_command_copes_with_ids(kind: str, rows: str, tiny_model: str) -> None:
    uri = f"id_sets:Ids?kind={kind}&rows={rows}"
    sizes = ["--batch-size", "40", "--workers", "0", "--device", "cpu"]
    said = run(embed_main, uri, "--model", tiny_model, "--cache", "s", *sizes).output
    doubt = "labels up to 1,000,000,003, but only 4 different" if kind == "far" else "different"
    assert any(line.startswith("note: ") and doubt in line for line in said.splitlines())
    select = ["--batch-size", "40", "--knn", "4", "--epochs", "1", "--device", "cpu"]
    done = run(select_main, "s", *select, "--out", "a.arrow", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kept"] > 0
    assert len(result["classes"]) == {"far": 4, "spread": 80, "row": 0, "text": 0}[kind]
    floor = run(select_main, "s", *select, "--min-per-class", "1", "--out", "b.arrow", code=0 if kind == "far" else 2)
    assert kind == "far" or "that need 40 together" in floor.output
    run(cache_main, "export", "s", "scores.parquet", "--scores", "a.arrow")
    run(cache_main, "report", "a.arrow", "--out", "page.html")
    refused = run(train_main, uri, "--selection", "a.arrow", "--arch", "conv3", "--device", "cpu", code=2).output
    assert doubt in refused
    assert "they look like ids" in refused
    assert not Path("runs").exists()
    if rows == "1100":
        assert "labels look like ids" in done.output
        with pytest.raises(UsageError, match="1,100 different labels for 1,100 rows"):
            probe_columns(EmbeddingStore("s"), ProbeSettings())
        run(select_main, "s", *select, "--guidance", "probe", "--out", "c.arrow", code=2)
