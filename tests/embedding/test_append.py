"""A store that grows in place is the old one or the new one, and the new one is what a run over everything gives."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import real_store
from real_store import GROWN, ITEMS, Images, append, embed, files_of, objects_of
from small_store import fill as fill_small

import gstds_cache
import gstds_cache.embedding.append as appending
from gstds_cache.data.align import in_order
from gstds_cache.embedding.append import AppendReport
from gstds_cache.errors import FingerprintMismatchError, IncompleteError, IntegrityError, StoreNotFoundError, UsageError
from gstds_cache.store import layout
from gstds_cache.store.describe import summarise
from gstds_cache.store.grown import growth_key, read_metadata
from gstds_cache.store.local import LocalTransport
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.remove import remove_store
from gstds_cache.store.verify import verify

BAD = 18  # in the shard that is not full


def images(count: int = ITEMS, **options) -> Images:
    return Images(count, **({"bad": BAD} | options))


def only(source: Images, rows: list[int]) -> Images:
    """Some rows of a data set."""
    part = Images(len(rows), bad=None)
    part.ids = [source.ids[row] for row in rows]
    part.labels = source.labels[rows]
    part.payload = lambda row: source.payload(rows[row])
    part.image = lambda row: source.image(rows[row])
    return part


def untouched(store: Path) -> dict[str, str]:
    """Hash, inode and time of every object."""
    return {
        key: f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_ino} {path.stat().st_mtime_ns}"
        for key, path in files_of(store).items()
        if not path.name.startswith(".")
    }


def same_rows(one: EmbeddingStore, other: EmbeddingStore) -> None:
    assert one.fingerprint == other.fingerprint
    assert one.quarantined == other.quarantined
    assert one.manifest().root == other.manifest().root
    np.testing.assert_array_equal(one.labels, other.labels)
    good = np.delete(np.arange(len(one)), one.without_embedding)
    np.testing.assert_array_equal(one.gather(good), other.gather(good))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    embed(tmp_path / "s", images())
    return tmp_path / "s"


def test_a_grown_store_is_what_a_run_over_everything_gives_and_nothing_old_is_touched(store, tmp_path) -> None:
    before, old = untouched(store), EmbeddingStore(store).fingerprint
    report = append(store, images(GROWN))
    assert before.items() <= untouched(store).items()
    assert (report.items_before, report.appended, report.items, report.in_order) == (ITEMS, GROWN - ITEMS, GROWN, True)
    assert (report.embedded, report.already_there, report.quarantined) == (GROWN - ITEMS, ITEMS, 0)
    embed(tmp_path / "fresh", images(GROWN))
    fresh, grown = EmbeddingStore(tmp_path / "fresh"), EmbeddingStore(store)
    same_rows(grown, fresh)
    assert (report.fingerprint_before, report.fingerprint) == (old, fresh.fingerprint)
    for access in ("memory", "mirror", "window"):
        same_rows(EmbeddingStore(store, access=access), fresh)
    windows = [EmbeddingStore(where, access="window", memory_budget=1) for where in (store, tmp_path / "fresh")]
    orders = [[row for rows, _ in window.shuffled(5, seed=1, epoch=0) for row in rows.tolist()] for window in windows]
    assert orders[0] == orders[1]
    settings = {"batch_size": 11, "epochs": 1, "knn": 3, "guidance": "none", "device": "cpu", "progress": False}
    digests = {gstds_cache.select(where, keep=0.5, order="window:8", **settings).summary.selection_digest
               for where in (store, tmp_path / "fresh")}  # fmt: skip
    assert len(digests) == 1
    assert verify(store, "full").problems == ()
    assert (summarise(store).items, summarise(store).appended) == (GROWN, GROWN - ITEMS)
    tables = [tmp_path / name for name in ("grown.parquet", "fresh.parquet")]
    for opened, table in zip((grown, fresh), tables, strict=True):
        gstds_cache.export_store(opened, table)
    assert pq.read_table(tables[0]).equals(pq.read_table(tables[1]), check_metadata=True)
    # A run over everything finds its rows there, and so does the next append.
    assert embed(store, images(GROWN)).cache_hit
    assert append(store, images(GROWN)).appended == 0


def test_it_grows_again_from_a_shard_that_was_filled_once(store, tmp_path) -> None:
    counts = [25, 27, 32, 40]
    for count in counts:
        append(store, images(count))
    embed(tmp_path / "fresh", images(40))
    same_rows(EmbeddingStore(store), EmbeddingStore(tmp_path / "fresh"))
    assert verify(store, "full").problems == ()
    for before, count in zip([ITEMS, *counts], counts, strict=False):
        embed(tmp_path / f"f{before}", images(before))
        then = EmbeddingStore(tmp_path / f"f{before}")
        same_rows(EmbeddingStore(store, state=then.fingerprint), then)
        assert count
    with pytest.raises(StoreNotFoundError, match="never had"):
        EmbeddingStore(store, state="0" * 64)
    removed = remove_store(store)
    assert removed > 30
    assert not store.exists()


def test_new_images_alone_come_last_and_their_bytes_may_be_known(store) -> None:
    source = images(GROWN)
    copy = only(source, [30, 5, 28])
    copy.ids[1] = "copy/of/5"
    report = append(store, copy)
    assert (report.appended, report.already_there, report.not_in_dataset, report.in_order) == (3, 0, ITEMS, False)
    assert (report.embedded, report.reused) == (2, 1)
    grown = EmbeddingStore(store)
    assert grown.manifest().ids[ITEMS:] == ("item/0030", "copy/of/5", "item/0028")
    np.testing.assert_array_equal(grown.gather(np.array([23])), grown.gather(np.array([5])))
    assert grown.dataset_uri is None
    items = only(source, [5, *reversed(range(GROWN))])
    items.ids[0] = "copy/of/5"
    assert in_order(items, grown.manifest().ids).labels.tolist()[:ITEMS] == images().labels.tolist()
    with pytest.raises(FingerprintMismatchError, match="1 of 25 items are not in memory, first 'item/0028'"):
        in_order(only(items, [row for row in range(GROWN + 1) if items.ids[row] != "item/0028"]), grown.manifest().ids)


@pytest.mark.parametrize(
    "what", ["bytes", "label", "classes", "names", "ids", "object", "model", "imported", "incomplete"]
)
def test_what_does_not_belong_is_refused_by_name_and_nothing_changes(what, store, tmp_path, monkeypatch) -> None:
    source, error, words = images(GROWN), FingerprintMismatchError, ""
    if what == "bytes":
        payload = source.payload
        source.payload = lambda row: payload(row if row != 7 else 8)
        words = r"1 items have other bytes here .*'item/0007' \(row 7"
    elif what == "label":
        source.labels[4] = 0
        words = r"1 items have another label here .*'item/0004'"
    elif what == "classes":
        source.classes = ("a", "c", "b")
        words = "class 1 is 'b' in .* and 'c' in the data set"
    elif what == "names":
        store, plain = tmp_path / "n", images()
        plain.classes = ()
        embed(store, plain)
        words = "labels in .* are numbers without names, and the data set has the classes 'a' to 'c'"
    elif what == "ids":
        source.ids = [f"a/{row:04d}" for row in range(GROWN)]
        words = r"the bytes of all 22 images of .* but under other ids, as 'a/0000' \(the store has 'item/0000'\)"
    elif what == "object":  # none of its ids is in the store, and of its hashes only some could be
        source = only(source, list(range(1, GROWN)))
        source.ids, source.kind = [f"{row}" for row in range(GROWN - 1)], "python:torchvision.datasets.ImageFolder"
        words = "is of files, and has none of these items, which are of a data set that is a Python object"
    elif what == "model":
        monkeypatch.setattr(real_store.Tiny, "preprocessing", real_store.Preprocessing(resize=9, crop=(9, 9)))
        words = "encoder.preprocessing: the store has"
    elif what == "imported":
        store, error, words = tmp_path / "i", UsageError, "holds imported rows"
        gstds_cache.import_embeddings(np.eye(4, dtype=np.float32), store, progress=False)
    else:
        (store / layout.COMPLETE).unlink()
        error, words = IncompleteError, "is not complete"
    before = untouched(store)
    with pytest.raises(error, match=words):
        append(store, source)
    assert untouched(store) == before


def test_images_of_which_some_are_there_under_other_ids_are_appended(store) -> None:
    source = only(images(GROWN), list(range(1, GROWN)))  # not row 0
    source.ids = [f"a/{name}" for name in source.ids]
    report = append(store, source)
    assert (report.appended, report.already_there, report.items) == (GROWN - 1, 0, ITEMS + GROWN - 1)
    assert report.reused == ITEMS - 2  # one of them has no embedding


@pytest.mark.parametrize("count", [25, GROWN])
def test_of_two_appends_at_once_the_first_one_counts_and_the_store_can_be_opened(store, monkeypatch, count) -> None:
    """As in a bucket, where writers do not exclude one another: one runs while the other hashes its data set."""
    build, reports = appending.build_manifest, []

    def meanwhile(*args, **options):
        monkeypatch.setattr(appending, "build_manifest", build)
        reports.append(append(store, images(count)))
        return build(*args, **options)

    monkeypatch.setattr(LocalTransport, "lock", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(appending, "build_manifest", meanwhile)
    with pytest.raises(IncompleteError, match="another process appended to it meanwhile"):
        append(store, images(GROWN))
    opened = EmbeddingStore(store)
    assert (len(opened), opened.fingerprint) == (count, reports[0].fingerprint)
    assert verify(store, "full").problems == ()
    assert append(store, images(GROWN)).items == GROWN


def test_a_shard_that_a_later_part_has_is_not_one_to_repair(store) -> None:
    for count in (25, 27, GROWN):  # the second and the third part begin with shard 3, the first with shard 2
        append(store, images(count))
    parts = read_metadata(store).parts
    assert [first for first, _, _ in parts] == [0, 2, 3, 3]
    for number, found in ((0, {0}), (1, {2}), (2, set()), (3, {3})):
        note = parts[number][2].location.path / layout.REPAIR
        note.write_text(json.dumps({parts[number][2].spec.names.shards: [0, 1]} if number else {"shards": [0, 2]}))
        assert read_metadata(store).discarded() == (found if number != 3 else {3, 4}), number
        note.unlink()


def test_a_selection_of_before_is_valid_still(store, tmp_path) -> None:
    settings = {"batch_size": 11, "epochs": 1, "knn": 3, "guidance": "none", "device": "cpu", "progress": False}
    selection = gstds_cache.select(store, keep=0.5, out=tmp_path / "old.arrow", **settings)
    append(store, images(GROWN))
    with gstds_cache.open_selection(selection.path) as stream:
        state = stream.header.cache_fingerprint
    report = gstds_cache.export_scores(
        EmbeddingStore(store, state=state), selection.path, tmp_path / "scores.parquet", progress=False
    )
    assert report.rows == ITEMS
    report = gstds_cache.export_scores(store, selection.path, tmp_path / "scores2.parquet", progress=False)
    assert report.rows == ITEMS


def test_damage_of_what_was_appended_is_found_and_named(store) -> None:
    append(store, images(GROWN))
    whole = objects_of(store)
    part = next((store / layout.PARTS).iterdir())
    damaged = part / layout.object_key(1)  # rows 24 to 31 of the whole
    data = bytearray(damaged.read_bytes())
    data[3] ^= 1
    rows = EmbeddingStore(store).gather(np.array([25]))
    damaged.write_bytes(data)
    assert verify(store, "full").bad_shards == [3]
    with pytest.raises(IntegrityError, match="shard 3: parts/"):
        EmbeddingStore(store).gather(np.array([25]))
    damaged.unlink()
    with pytest.raises(IntegrityError, match="shard 3: parts/.* is missing"):
        EmbeddingStore(store)
    report = real_store.repair(read_metadata(store), images(GROWN))
    assert (report.shards, report.images, report.after.problems) == ((3,), 8, ())
    assert objects_of(store) == whole
    np.testing.assert_array_equal(rows, EmbeddingStore(store).gather(np.array([25])))
    record = store / growth_key(1)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"items": 33}))
    with pytest.raises(IntegrityError, match=r"grown/1.json is damaged"):
        read_metadata(store)


def test_an_append_of_other_items_clears_away_one_that_was_interrupted(store, tmp_path) -> None:
    whole = append_interrupted(store, images(GROWN))
    assert whole == []
    append(store, images(30))
    embed(tmp_path / "fresh", images(30))
    same_rows(EmbeddingStore(store), EmbeddingStore(tmp_path / "fresh"))
    assert len(list((store / layout.PARTS).iterdir())) == 1


def append_interrupted(store: Path, source: Images) -> list[AppendReport]:
    """Stop while the second new image is decoded."""
    image = source.image

    def stop(row: int):
        if row > ITEMS + 1:
            raise KeyboardInterrupt
        return image(row)

    source.image = stop
    with pytest.raises(KeyboardInterrupt):
        append(store, source)
    assert (store / layout.PARTS).exists()
    assert len(EmbeddingStore(store)) == ITEMS
    return []


def test_a_bucket(s3_prefix, tmp_path) -> None:
    embed(s3_prefix, images())
    append(s3_prefix, images(GROWN))
    embed(tmp_path / "fresh", images(GROWN))
    same_rows(EmbeddingStore(s3_prefix), EmbeddingStore(tmp_path / "fresh"))
    assert verify(s3_prefix, "full").problems == ()


def test_the_command(image_folder, tiny_model, tmp_path, command, result_of) -> None:
    uri = "imagefolder:photos"
    held = sorted((tmp_path / "photos").rglob("*.png"))[-5:]
    kept = [path.read_bytes() for path in held]
    for path in held:
        path.unlink()
    command("gstds-embed", uri, "--model", tiny_model, "--cache", "s", "--batch-size", "4", "--shard-rows", "8",
            "--device", "cpu", "--workers", "0")  # fmt: skip
    for path, data in zip(held, kept, strict=True):
        path.write_bytes(data)
    done = command("gstds-cache", "append", "s", uri, "--device", "cpu", "--workers", "0", "--json")
    assert result_of(done)["appended"] == 5
    assert result_of(done)["in_order"]
    assert objects_of(tmp_path / "s")["grown/1.json"]
    hit = command("gstds-embed", uri, "--model", tiny_model, "--cache", "s", "--device", "cpu", "--workers", "0")
    assert "cache hit" in hit.stdout


def test_a_plain_zarr_reader_finds_the_parts(tmp_path, monkeypatch) -> None:
    embed(tmp_path / "photos.store", images())
    append(tmp_path / "photos.store", images(27))
    append(tmp_path / "photos.store", images(GROWN))
    monkeypatch.chdir(tmp_path)
    text = (Path(gstds_cache.__file__).parents[1] / "docs/cache-format.md").read_text()
    names: dict[str, np.ndarray] = {}
    exec(text.split("```python\n")[2].partition("```")[0], names)
    good = np.delete(np.arange(GROWN), BAD)
    np.testing.assert_array_equal(names["rows"][good], EmbeddingStore("photos.store").gather(good))


def test_a_store_of_format_1_and_one_of_others_are_read_as_before(tmp_path) -> None:
    fill_small(tmp_path / "s")
    assert type(read_metadata(tmp_path / "s")).__name__ == "StoreMetadata"
