"""Core sets beside their naive versions; as selections they are read and trained on like any other."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gstds_cache.cli.select_command import main
from vector_store import clustered, vector_store

from gstds_cache.api.hide import hide_rows
from gstds_cache.api.select_once import select_once
from gstds_cache.config import OnceConfig
from gstds_cache.errors import UsageError
from gstds_cache.report.recompute import selector_of
from gstds_cache.selection import core_set
from gstds_cache.selection.core_set import METHODS, choose_core_set, quotas
from gstds_cache.selection.unit_rows import UnitRows
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.core_set import core_set_header
from gstds_cache.stream.reader import open_selection
from gstds_cache.training.sampler import SelectedBatchSampler

CPU = torch.device("cpu")


def choose(store, count: int, method: str, balance: str = "none", **settings) -> np.ndarray:
    config = OnceConfig(method=method, balance=balance, device="cpu", **settings)
    return choose_core_set(UnitRows.of(store), count, config, CPU)


def unit(store) -> np.ndarray:
    rows = UnitRows.of(store)
    return rows.at(np.arange(len(rows)))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rows, labels = clustered(300, classes=3)
    return vector_store(tmp_path_factory.mktemp("core") / "s", rows, labels)


def test_k_centre_is_farthest_first(store, monkeypatch) -> None:
    x = unit(store)
    picks = [int((x @ x.mean(axis=0)).argmax())]
    distance = 1 - x @ x[picks[0]]
    while len(picks) < 40:
        distance[picks] = -np.inf
        picks.append(int(distance.argmax()))
        distance = np.minimum(distance, 1 - x @ x[picks[-1]])
    for pool in (256, 8):  # a pool of all rows, and one that has to be filled again and again
        monkeypatch.setattr(core_set, "POOL", pool)
        assert choose(store, 40, "k-centre").tolist() == sorted(picks)


def test_facility_location_is_close_to_greedy_and_far_from_chance(store) -> None:
    similar = unit(store) @ unit(store).T + 1

    def value(rows) -> float:
        return float(similar[:, rows].max(axis=1).sum())

    greedy: list[int] = []
    best = np.zeros(len(similar))
    for _ in range(20):
        greedy.append(int(np.maximum(similar, best[:, None]).sum(axis=0).argmax()))
        best = np.maximum(best, similar[:, greedy[-1]])
    found = value(choose(store, 20, "facility-location"))
    chance = np.mean([value(np.random.default_rng(seed).choice(300, 20, replace=False)) for seed in range(20)])
    assert found > 0.99 * value(greedy)
    assert found - chance > 0.7 * (value(greedy) - chance)


def test_cells_cover_clusters_in_proportion(tmp_path) -> None:
    rows = np.concatenate([np.eye(8)[0] + 0.01 * np.random.default_rng(0).normal(size=(90, 8)),
                           np.eye(8)[1] + 0.01 * np.random.default_rng(1).normal(size=(30, 8))])  # fmt: skip
    chosen = choose(vector_store(tmp_path / "s", rows), 12, "cells")
    assert ((chosen < 90).sum(), (chosen >= 90).sum()) == (9, 3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_each_row_once(store, tmp_path, method: str) -> None:
    for count in (1, 7, 299, 300):
        chosen = choose(store, count, method, "equal")
        assert len(np.unique(chosen)) == count == len(chosen)
    assert choose(store, 50, method).tolist() == choose(store, 50, method).tolist()
    equal = vector_store(tmp_path / "equal", np.ones((30, 4)), bad=(4,))
    assert 4 not in choose(equal, 20, method)
    with pytest.raises(UsageError, match="got 30, expected 1 to 29: so many rows of .* have an embedding"):
        choose(equal, 30, method)


def test_quotas() -> None:
    sizes = np.array([100, 10, 3])
    assert quotas(sizes, 30, "equal").tolist() == [17, 10, 3]
    assert quotas(sizes, 7, "equal").tolist() == [3, 2, 2]
    assert quotas(sizes, 113, "equal").tolist() == [100, 10, 3]
    assert quotas(sizes, 30, "proportional").tolist() == [26, 3, 1]
    for count in range(1, 114):
        for balance in ("equal", "proportional"):
            got = quotas(sizes, count, balance)
            assert got.sum() == count
            assert (got <= sizes).all()


def test_rows_without_a_label_are_left_out_where_classes_are_balanced(tmp_path) -> None:
    rows, labels = clustered(60)
    labels[:20] = -1
    store = vector_store(tmp_path / "s", rows, labels)
    assert choose(store, 40, "cells", "equal").min() >= 20
    with pytest.raises(UsageError, match="an embedding and a label"):
        choose(store, 41, "cells", "equal")
    assert len(choose(store, 41, "cells", "none")) == 41


def test_a_core_set_is_a_selection(store, tmp_path) -> None:
    out = tmp_path / "core.arrow"
    made = select_once(store, 70, out=out, method="cells", batch_size=16, epochs=3, device="cpu", progress=False)
    sampler = SelectedBatchSampler(out)
    epochs = [np.concatenate(list(sampler)) for _ in range(3)]
    assert all(np.array_equal(np.sort(rows), np.sort(epochs[0])) for rows in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    with open_selection(out) as stream:
        batches = list(stream)
        header = stream.header
    assert [batch.count for batch in batches[:4]] == [16, 16, 16, 22]
    assert sum(batch.n_in for batch in batches) == 3 * 300  # what is saved is counted against all rows
    listed = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    assert [int(line["row"]) for line in listed] == np.sort(epochs[0]).tolist()
    assert listed[0]["id"] == f"item/{int(listed[0]['row']):05d}"
    assert listed[0]["class"] in store.classes
    assert max(np.bincount([int(line["label"]) for line in listed])) == 24
    before = out.read_bytes()
    again = select_once(store, 70, out=out, method="cells", batch_size=16, epochs=3, device="cpu", progress=False)
    assert (made.summary.cache_hit, again.summary.cache_hit) == (False, True)
    assert out.read_bytes() == before
    with pytest.raises(UsageError, match="holds something else"):
        select_once(store, 71, out=out, device="cpu", progress=False)
    with pytest.raises(UsageError, match="a core set, chosen once"):
        selector_of(store, header)


def test_hidden_rows_are_not_chosen(tmp_path) -> None:
    rows, labels = clustered(60)
    before = core_set_header(vector_store(tmp_path / "s", rows, labels), 30, OnceConfig())
    hide_rows(tmp_path / "s", range(0, 60, 2))
    store = EmbeddingStore(tmp_path / "s")
    assert (choose(store, 30, "cells") % 2 == 1).all()
    with pytest.raises(UsageError, match="expected 1 to 30"):
        choose(store, 31, "cells")
    assert core_set_header(store, 30, OnceConfig()).selection_digest != before.selection_digest


def test_the_command(store, tmp_path) -> None:
    def run(*words: str):
        return CliRunner().invoke(main, [str(store.location), *words])

    done = run("--once", "30", "--out", str(tmp_path / "c.arrow"), "--ids", str(tmp_path / "c.txt"), "--json")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "c.txt").read_text().splitlines()[0].startswith("item/")
    assert len((tmp_path / "c.txt").read_text().splitlines()) == 30
    summary = next(json.loads(line) for line in done.output.splitlines() if line.startswith("{"))
    assert summary["rule"] == "once cells"
    again = run("--once", "30", "--epochs", "3", "--out", str(tmp_path / "three.arrow"))
    assert "3 batches, 30 of 300 rows, the same in each of 3 epochs" in again.output
    for words, said in (
        (("--once", "30", "--schedule", "constant:0.5"), "--schedule says how batches are selected"),
        (("--once", "30", "--keep", "0.5"), "--keep says how batches"),
        (("--once", "30", "--serve", "127.0.0.1:0"), "--serve says how batches"),
        (("--once", "30", "--out", "-"), "--once writes a file"),
        (("--method", "cells"), "--method says how rows are chosen once: it needs --once N"),
        (("--once", "301"), "--once: got 301, expected 1 to 300"),
        (("--once", "0"), "--once: got 0"),
        (("--once", "3", "--ids", str(tmp_path / "x.json")), "expected one of .txt, .csv"),
        (("--once", "3", "--method", "kmeans"), "'cells', 'facility-location', 'k-centre'"),
    ):
        bad = run(*words)
        assert bad.exit_code == 2, bad.output
        assert said in bad.output, bad.output


def test_no_file_of_the_users_is_replaced(store, tmp_path) -> None:
    def once(out: str, **more):
        settings = {"device": "cpu", "progress": False} | more
        return select_once(store, 20, out=tmp_path / out, method="cells", **settings).summary.cache_hit

    mine = tmp_path / "x.csv"
    mine.write_text("my notes\n")
    with pytest.raises(UsageError, match=r"x\.csv: the file exists and holds something else"):
        once("x.arrow")
    assert mine.read_text() == "my notes\n"
    assert not (tmp_path / "x.arrow").exists()
    with pytest.raises(UsageError, match=r"y\.csv: the list of ids has the same name"):
        once("y.csv")
    assert not (tmp_path / "y.csv").exists()
    assert not once("x.arrow", force=True)
    assert mine.read_text().startswith("id,row,label,class\n")
    assert once("x.arrow")
    ids = tmp_path / "ids.txt"
    assert [once("z.arrow", ids=ids), once("z.arrow", ids=ids)] == [False, True]
    ids.write_text("my notes\n")
    with pytest.raises(UsageError, match=r"ids\.txt: the file exists"):
        once("z.arrow", ids=ids)


def test_a_repaired_row_and_those_that_cannot_be_chosen_count(tmp_path) -> None:
    rows, labels = clustered(60)
    whole, broken = (vector_store(tmp_path / name, rows, labels, bad=bad) for name, bad in (("w", ()), ("b", (0, 3))))
    assert whole.fingerprint == broken.fingerprint
    headers = [core_set_header(store, 30, OnceConfig()) for store in (whole, broken)]
    assert headers[0].selection_digest != headers[1].selection_digest
    hide_rows(tmp_path / "b", [1])
    made = select_once(tmp_path / "b", 30, out=tmp_path / "c.arrow", device="cpu", progress=False).summary
    assert {name: counts["seen"] for name, counts in made.classes.items()} == {"a": 18, "b": 19, "c": 20}
