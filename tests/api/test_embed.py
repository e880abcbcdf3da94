"""``gstds_cache.embed`` from Python: what ``gstds-embed`` does, with arguments in the place of flags."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image
from real_store import MODEL
from small_store import fill

from gstds_cache.api.append import append_to_store
from gstds_cache.api.embed import embed, estimate_embedding
from gstds_cache.api.repair import repair_store
from gstds_cache.config import EmbedSettings
from gstds_cache.costs.records import recall_store, store_costs
from gstds_cache.errors import FingerprintMismatchError, IncompleteError, UsageError
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.writer import StoreWriter

SMALL = EmbedSettings(model=MODEL, batch_size=4, shard_rows=8, workers=0, device="cpu")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "stores"))


def test_a_store_with_what_the_call_did_and_a_hit_the_second_time(image_folder: Path, capsys) -> None:
    uri, phases, lines = f"imagefolder:{image_folder}", [], []

    def show(phase: str, done: int, total: int, _shares) -> None:
        phases.append((phase, done, total))

    store = embed(uri, progress=show, notify=lines.append, **SMALL)
    assert isinstance(store, EmbeddingStore)
    assert store.location.path.parent == Path.cwd() / "stores"
    assert (len(store), store.report.ok, store.report.embedded, store.report.cache_hit) == (60, 58, 60, False)
    assert ("embed", 60, 60) in phases
    cost = recall_store(store.location, store.fingerprint)
    assert (cost.samples, cost.reused, cost.device) == (60, 0, "cpu")
    assert cost.joules_from

    again = embed(uri, progress=False, notify=lines.append, **SMALL)
    assert (again.location, again.report.cache_hit, again.report.embedded) == (store.location, True, 0)
    assert recall_store(store.location) == cost
    assert json.loads(json.dumps(again.report.to_dict()))["store"] == str(store.location)
    assert EmbeddingStore(store.location).report is None
    assert capsys.readouterr() == ("", "")


def test_rows_of_one_store_are_taken_over_and_the_default_bar_and_log_are_quiet_or_told(
    image_folder: Path, capsys, caplog
) -> None:
    uri = f"imagefolder:{image_folder}"
    embed(uri, "first.store", progress=None, **SMALL)
    with caplog.at_level(logging.WARNING, "gstds_cache"):
        second = embed(uri, image_folder / "second.store", reuse="first.store", **SMALL)
    assert (second.report.reused, second.report.embedded) == (58, 2)
    assert f"lies inside the image folder {image_folder}" in caplog.text
    assert "give a `cache` outside of it" in caplog.text
    assert capsys.readouterr().out == ""


def test_what_an_append_cost_is_added_and_the_store_as_it_was_keeps_its_cost(tmp_path: Path) -> None:
    def pairs(count: int) -> list[tuple[Image.Image, int]]:
        return [(Image.new("RGB", (20, 20), (row * 9, 80, 200 - row * 5)), row % 2) for row in range(count)]

    old = embed(pairs(12), "s.store", progress=False, **SMALL)
    before = recall_store(old.location, old.fingerprint)
    report = append_to_store("s.store", pairs(20), progress=False, device="cpu", workers=0)
    cost = recall_store(old.location, report.fingerprint)
    assert (cost.samples, cost.reused, cost.device) == (20, 0, "cpu")
    assert cost.seconds == pytest.approx(before.seconds + report.seconds["total"])
    assert recall_store(old.location, old.fingerprint) == before
    assert recall_store(old.location) == cost
    # Where it is not known what a store cost before, it is not known afterwards.
    store_costs(old.location)[0].unlink()
    report = append_to_store("s.store", pairs(24), progress=False, device="cpu", workers=0)
    assert (report.appended, recall_store(old.location)) == (4, None)


def test_a_data_set_may_be_an_object(tmp_path: Path) -> None:
    pairs = [(Image.new("RGB", (20, 20), (row * 9, 80, 200 - row * 5)), row % 2) for row in range(20)]
    store = embed(pairs, "pairs.store", progress=False, notify=lambda _line: None, **SMALL)
    assert (len(store), store.labels.tolist()) == (20, [0, 1] * 10)
    assert embed(pairs, "pairs.store", progress=False, notify=lambda _line: None, **SMALL).report.cache_hit
    (tmp_path / "pairs.store" / layout.object_key(1)).unlink()
    with pytest.raises(UsageError, match="object in a Python program"):
        repair_store("pairs.store", progress=False)
    assert repair_store("pairs.store", dataset=pairs, workers=0, progress=False).shards == (1,)


def test_an_estimate_writes_nothing(image_folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    estimate = estimate_embedding(f"imagefolder:{image_folder}", "new.store", notify=pytest.fail, **SMALL)
    assert (estimate.items, estimate.images, estimate.batch_size) == (60, 60, 4)
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_name_arguments(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"imagefolder:{image_folder}"
    for message, call in (
        ("`batch_size`: got 0", lambda: embed(uri, **SMALL | {"batch_size": 0})),
        ("`cache`: got 'http://x'", lambda: embed(uri, "http://x", **SMALL)),
        ("`reuse`: got 'http://x'", lambda: embed(uri, "s", reuse=["http://x"], **SMALL)),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    for call in (embed, estimate_embedding):
        with pytest.raises(TypeError, match=rf"^{call.__name__}\(\) has no setting 'modle'; did you mean 'model'\?$"):
            call(uri, modle="x")
    (tmp_path / "stores").write_text("a file in the place of the folder")
    with pytest.raises(UsageError, match="the default place for stores cannot be written") as caught:
        embed(uri, progress=False, **SMALL)
    assert "pass `cache=STORE`" in caught.value.hint
    monkeypatch.delenv("GSTDS_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", _no_home)
    with pytest.raises(UsageError, match="no default place for stores") as caught:
        embed(uri, **SMALL)
    assert "give `cache`, or set GSTDS_CACHE" in caught.value.hint


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("reuse", [None, 3])
def test_stores_to_reuse_that_cannot_be_meant(image_folder: Path, tmp_path: Path, reuse: object) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"^`reuse`: got {reuse}, expected locations of stores"):
        embed(f"imagefolder:{image_folder}", reuse=reuse, progress=False, **SMALL)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_type_checks")
def test_an_open_store_to_reuse_stands_for_its_location(tmp_path: Path) -> None:
    fill(tmp_path / "other.store")
    with pytest.raises(FingerprintMismatchError, match="^`reuse`: the rows of .*other.store were made in another way"):
        embed("digits", reuse=EmbeddingStore(tmp_path / "other.store"), progress=False, **SMALL)


def _no_home() -> Path:
    raise RuntimeError("no home")


@pytest.mark.parametrize("error", [PermissionError(1, "Operation not permitted"), FileNotFoundError(2, "No such file")])
def test_an_error_after_commits_says_how_many_and_never_that_nothing_changed(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    uri, commit = f"imagefolder:{image_folder}", StoreWriter.commit

    def fails_at_three(self, shard, rows, quarantined=()):
        if shard == 3:
            raise error
        return commit(self, shard, rows, quarantined)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit", fails_at_three)
        with pytest.raises(IncompleteError) as caught:
            embed(uri, progress=False, notify=lambda _line: None, **SMALL)  # in the default place
    assert caught.value.hint.endswith("3 of the 8 shards of this run are committed, and it goes on from there")
    assert "nothing" not in str(caught.value)
    store = embed(uri, progress=False, notify=lambda _line: None, **SMALL)
    assert (store.report.committed_before, store.report.embedded) == (24, 36)
