"""Stores as a whole from Python: listed, described, verified, repaired, exported and removed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from real_store import MODEL, Images
from real_store import embed as embed_images
from small_store import fill

from gstds_cache.api.cache import (
    describe_store,
    list_derived,
    list_stores,
    remove_store,
    verify_store,
)
from gstds_cache.api.embed import embed
from gstds_cache.api.export import export_store
from gstds_cache.api.repair import repair_store
from gstds_cache.costs.records import store_costs
from gstds_cache.errors import FingerprintMismatchError, StoreNotFoundError, UsageError
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore


@pytest.fixture
def store(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of an image folder, made as a user makes it, in a folder of stores."""
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "stores"))
    uri = f"imagefolder:{image_folder}"
    where = tmp_path / "stores" / "photos.store"
    embed(uri, where, progress=False, notify=lambda _: None, model=MODEL, batch_size=4, shard_rows=8, workers=0)
    return where


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_stores_are_listed_and_described_and_damaged_ones_named(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, store.with_name("broken"))
    (store.with_name("broken") / "zarr.json").write_text("{")
    listed = list_stores()
    assert [Path(one.location).name for one in listed.stores] == ["photos.store"]
    assert list(listed.damaged) == ["broken"]
    assert listed == list_stores(tmp_path / "stores")
    summary = describe_store(store)
    assert (summary.items, summary.shards, summary.complete, len(summary.quarantined)) == (60, 8, True, 2)
    assert json.loads(json.dumps(listed.to_dict()))["stores"] == [json.loads(json.dumps(summary.to_dict()))]
    with pytest.raises(UsageError, match="no folder at"):
        list_stores(tmp_path / "nowhere")


def test_a_sound_store_has_no_problems_at_any_level(store: Path) -> None:
    for level in ("quick", "full", "sample"):
        report = verify_store(store, level=level, rows=10, progress=False)
        assert (report.problems, report.complete, report.level) == ((), True, level)
        assert (len(report.sampled), report.cosine_min is None) == ((10, False) if level == "sample" else (0, True))
        json.dumps(report.to_dict())
    with pytest.raises(UsageError, match="`rows`: got 0"):
        verify_store(store, level="sample", rows=0)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (verify_store, {"level": "ful"}, "`level`: got 'ful', expected one of quick, full, sample"),
        (verify_store, {"level": None}, "`level`: got None, expected one of quick, full, sample"),
        (verify_store, {"level": "sample", "rows": 2.5}, "`rows`: got 2.5, expected a whole number"),
        (verify_store, {"level": "sample", "rows": "8"}, "`rows`: got '8', expected a whole number"),
        (verify_store, {"level": "sample", "seed": -1}, "`seed`: got -1, expected 0 or more"),
        (verify_store, {"level": "sample", "model": 3}, "`model`: got 3, expected text"),
        (repair_store, {"shards": 0}, "`shards`: got 0, expected whole numbers, in a list"),
        (repair_store, {"shards": None}, "`shards`: got None, expected whole numbers, in a list"),
        (repair_store, {"shards": "0"}, "`shards`: got '0', expected whole numbers, in a list"),
        (repair_store, {"shards": [0, 1.5]}, "`shards`: got 1.5, expected a whole number"),
        (repair_store, {"model": 3}, "`model`: got 3, expected text"),
        (repair_store, {"workers": 0.5}, "`workers`: got 0.5, expected a whole number"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_named(tmp_path: Path, call, arguments, message: str) -> None:
    fill(tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError) as caught:
        call(tmp_path / "store", progress=False, **arguments)
    assert str(caught.value) == message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_open_store_stands_for_its_location(
    store: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    opened, typed = EmbeddingStore(store.name), describe_store(store)
    assert (str(opened.location), opened.location.path) == (store.name, store)
    assert repr(opened) == f"EmbeddingStore('photos.store', 60 x {opened.spec.dim}, float16)"
    monkeypatch.chdir(image_folder)
    assert opened.gather(np.array([0])).shape == (1, opened.spec.dim)
    assert replace(describe_store(opened), location="", last_used=0.0) == replace(typed, location="", last_used=0.0)
    assert list_derived(opened) == list_derived(store)
    assert verify_store(opened, level="sample", rows=2, progress=False).problems == ()
    assert repair_store(opened, workers=0, progress=False).shards == ()
    uri = f"imagefolder:{image_folder}"
    again = embed(
        uri, opened, progress=False, notify=lambda _: None, model=MODEL, batch_size=4, shard_rows=8, workers=0
    )
    assert (again.location, again.report.cache_hit) == (opened.location, True)
    with pytest.raises(UsageError, match="`file`: .* is a folder"):
        export_store(opened, store.parent)
    remove_store(opened)
    assert not store.exists()


def test_damage_is_a_part_of_the_report_and_is_repaired(store: Path, image_folder: Path, tmp_path: Path) -> None:
    whole = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    flip(store / layout.object_key(2))
    assert verify_store(store, progress=False).problems == ()
    assert verify_store(store, level="full", progress=False).bad_shards == [2]
    moved = image_folder.rename(tmp_path / "elsewhere")
    report = repair_store(store, dataset=f"imagefolder:{moved}", shards=[5], workers=0, progress=False)
    assert (report.shards, report.images, report.changed, report.after.problems) == ((2, 5), 16, (), ())
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == whole
    assert json.loads(json.dumps(report.to_dict()))["shards_made_again"] == [2, 5]
    with pytest.raises(UsageError, match="`shards`: got 8"):
        repair_store(store, dataset=f"imagefolder:{moved}", shards=[8], progress=False)
    with pytest.raises(FingerprintMismatchError, match="items"):
        repair_store(store, dataset="digits", shards=[0], progress=False)


def test_a_store_that_does_not_say_where_its_data_is_needs_to_be_told(tmp_path: Path) -> None:
    embed_images(tmp_path / "s", Images())
    path = tmp_path / "s" / "zarr.json"
    group = json.loads(path.read_text())
    del group["attributes"]["gstds"]["provenance"]["dataset"]
    path.write_text(json.dumps(group))
    with pytest.raises(UsageError, match="does not say where its data set is") as caught:
        repair_store(tmp_path / "s", progress=False)
    assert "`dataset`" in caught.value.hint


def test_an_export_says_what_is_in_it(store: Path, tmp_path: Path) -> None:
    done = export_store(store, tmp_path / "rows.npy")
    assert (done.rows, done.undecodable, done.bytes) == (60, 2, (tmp_path / "rows.npy").stat().st_size)
    assert np.load(tmp_path / "rows.npy").shape == (done.rows, done.dim)
    with pytest.raises(UsageError, match="the file exists"):
        export_store(store, tmp_path / "rows.npy")
    assert export_store(store, tmp_path / "rows.npy", replace=True) == done


def test_removing_takes_what_was_derived_along(store: Path) -> None:
    folders = [store.with_name(f"photos.store{kind}") for kind in (".selections", ".guidance")]
    for folder in folders:
        folder.mkdir()
    assert list_derived(store) == [*folders, store_costs(store)[0]]
    removed = remove_store(store)
    assert (removed.store, removed.derived, removed.remaining) == (str(store), (*folders, store_costs(store)[0]), ())
    assert not any(path.name.startswith("photos.store") for path in store.parent.iterdir())
    with pytest.raises(StoreNotFoundError):
        remove_store(store)
