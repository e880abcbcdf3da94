"""Rows taken over from other stores, stores mended, and stores compared with what they say they hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gstds_cache.config import EmbedConfig
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.python_object import open_object
from gstds_cache.data.sources import open_source
from gstds_cache.embedding import reuse
from gstds_cache.embedding.check import check_sample
from gstds_cache.embedding.repair import repair
from gstds_cache.embedding.reuse import KnownRows
from gstds_cache.embedding.run import NOTHING_TO_REUSE, embed_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import ChunkCorruptError, FingerprintMismatchError, StoreNotFoundError, UsageError
from gstds_cache.store import layout
from gstds_cache.store.format import CURRENT
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.verify import verify


@pytest.fixture
def config(tiny_model: str) -> EmbedConfig:
    return EmbedConfig(model=tiny_model, batch_size=8, shard_rows=16, workers=0, device="cpu")


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def shards_of(path: Path) -> dict[str, bytes]:
    return {key: data for key, data in contents(path).items() if key.startswith(("embeddings/c/", "label/", "valid/"))}


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    return {
        file.relative_to(path).as_posix(): (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def test_a_grown_data_set_embeds_only_what_is_new(array_source, config, tmp_path: Path) -> None:
    embed_dataset(array_source(50, bad=frozenset({7})), config, where=tmp_path / "small")
    grown = array_source(70, bad=frozenset({7}))
    done = embed_dataset(grown, config, where=tmp_path / "grown", reuse=[tmp_path / "small"]).report
    assert (done.reused, done.embedded, done.items) == (49, 21, 70)  # the bad one is tried again
    alone = embed_dataset(grown, config, where=tmp_path / "alone").report
    assert (alone.reused, alone.embedded) == (0, 70)
    assert shards_of(tmp_path / "grown") == shards_of(tmp_path / "alone")
    assert [item.row for item in done.quarantined] == [7]


def test_stores_that_have_none_of_the_items_are_told(image_folder: Path, config, tmp_path: Path) -> None:
    """The same images as files and as a Python object: another hash."""
    source = open_source(f"imagefolder:{image_folder}")
    files = (image_folder / name for name in source.ids)
    pairs = [(Image.open(file), 0) for file in files if file.stat().st_size > 100]  # the others do not decode
    embed_dataset(open_object(pairs), config, where=tmp_path / "object")
    told: list[str] = []
    done = embed_dataset(
        source, config, where=tmp_path / "files", reuse=[tmp_path / "object"], notify=told.append
    ).report
    assert (done.reused, NOTHING_TO_REUSE in told) == (0, True)
    told.clear()
    embed_dataset(source, config, where=tmp_path / "again", reuse=[tmp_path / "files"], notify=told.append)
    assert NOTHING_TO_REUSE not in told


def test_many_items_are_looked_up_in_parts(array_source, config, tmp_path: Path, monkeypatch) -> None:
    embed_dataset(array_source(50), config, where=tmp_path / "small")
    hashes, spec = build_manifest(array_source(90)).sha256, open_encoder(config.model).spec.to_dict()
    whole = KnownRows([tmp_path / "small"], hashes, spec, config.dtype)
    monkeypatch.setattr(reuse, "PART_ROWS", 7)  # 16 parts
    parts = KnownRows([tmp_path / "small"], hashes, spec, config.dtype)
    assert whole.count == parts.count == 50
    for known in (whole, parts):
        which, rows = known(range(90))
        assert which.tolist() == [True] * 50 + [False] * 40
        assert np.array_equal(rows, EmbeddingStore(tmp_path / "small").gather(np.arange(50)))


def test_rows_are_found_by_content_in_any_order_and_from_several_stores(array_source, config, tmp_path: Path) -> None:
    class Reversed(array_source):
        def _pixels(self, row: int) -> np.ndarray:
            return super()._pixels(self.count - 1 - row)

    embed_dataset(array_source(20), config, where=tmp_path / "first")
    embed_dataset(array_source(30), config, where=tmp_path / "second")
    done = embed_dataset(
        Reversed(40), config, where=tmp_path / "reversed", reuse=[tmp_path / "first", tmp_path / "second"]
    ).report
    assert (done.reused, done.embedded) == (30, 10)
    direct = embed_dataset(Reversed(40), config, where=tmp_path / "direct").report
    assert direct.embedded == 40
    assert shards_of(tmp_path / "reversed") == shards_of(tmp_path / "direct")


def test_a_store_that_is_not_complete_can_be_reused(array_source, config, tmp_path: Path) -> None:
    embed_dataset(array_source(50), config, where=tmp_path / "half")
    for key in (layout.COMPLETE, CURRENT.commit_key(1), layout.object_key(1)):
        (tmp_path / "half" / key).unlink()
    done = embed_dataset(array_source(60), config, where=tmp_path / "grown", reuse=[tmp_path / "half"]).report
    assert (done.reused, done.embedded) == (34, 26)


def test_everything_known_embeds_nothing(array_source, config, tmp_path: Path) -> None:
    embed_dataset(array_source(50), config, where=tmp_path / "whole")
    done = embed_dataset(array_source(30), config, where=tmp_path / "part", reuse=[tmp_path / "whole"]).report
    assert (done.reused, done.embedded) == (30, 0)
    rows = np.arange(30)
    np.testing.assert_array_equal(
        EmbeddingStore(tmp_path / "part").gather(rows), EmbeddingStore(tmp_path / "whole").gather(rows)
    )


def test_a_new_store_takes_its_batch_size_from_the_reused_one(array_source, config, tmp_path: Path) -> None:
    embed_dataset(array_source(20), config, where=tmp_path / "small")
    unset = replace(config, batch_size=None)
    done = embed_dataset(array_source(40), unset, where=tmp_path / "grown", reuse=[tmp_path / "small"]).report
    assert done.batch_size == 8


def test_rows_of_another_dtype_or_model_are_refused_by_name(array_source, config, tmp_path: Path) -> None:
    embed_dataset(array_source(20), config, where=tmp_path / "small")
    wide = replace(config, dtype="float32")
    with pytest.raises(FingerprintMismatchError, match="dtype: that store has 'float16'"):
        embed_dataset(array_source(30), wide, where=tmp_path / "grown", reuse=[tmp_path / "small"])
    other = replace(config, model=f"{config.model}_slow")
    with pytest.raises(FingerprintMismatchError, match="model: that store has"):
        embed_dataset(array_source(30), other, where=tmp_path / "grown", reuse=[tmp_path / "small"])
    with pytest.raises(StoreNotFoundError):
        embed_dataset(array_source(30), config, where=tmp_path / "grown", reuse=[tmp_path / "nothing"])
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("key", [layout.object_key(0), layout.ITEMS])
def test_a_damaged_store_is_not_reused(array_source, config, tmp_path: Path, key: str) -> None:
    embed_dataset(array_source(20), config, where=tmp_path / "small")
    path = tmp_path / "small" / key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (tmp_path / "small" / layout.COMPLETE).unlink()  # whose hashes would tell at once
    with pytest.raises(ChunkCorruptError):
        embed_dataset(array_source(30), config, where=tmp_path / "grown", reuse=[tmp_path / "small"])


@pytest.fixture
def store(array_source, config, tmp_path: Path) -> Path:
    embed_dataset(array_source(50, bad=frozenset({7})), config, where=tmp_path / "s")
    return tmp_path / "s"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped byte": ([2], lambda store: flip(store / layout.object_key(2))),
    "two shards": ([0, 3], lambda store: [flip(store / layout.object_key(shard)) for shard in (0, 3)]),
    "deleted": ([1], lambda store: (store / layout.object_key(1)).unlink()),
    "commit record deleted": ([1], lambda store: (store / CURRENT.commit_key(1)).unlink()),
    "commit record damaged": ([1], lambda store: (store / CURRENT.commit_key(1)).write_text("{")),
    "COMPLETE damaged": ([], lambda store: (store / layout.COMPLETE).write_text("{")),
    "COMPLETE deleted": ([], lambda store: (store / layout.COMPLETE).unlink()),
    "labels": ([], lambda store: flip(store / layout.LABEL)),
    "valid": ([], lambda store: flip(store / layout.VALID)),
    "items": ([], lambda store: flip(store / layout.ITEMS)),
    "metadata": ([], lambda store: (store / "embeddings/zarr.json").unlink()),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_repair_makes_again_what_is_damaged_and_nothing_else(store, array_source, config, case: str) -> None:
    bad, damage = DAMAGE[case]
    whole, before = contents(store), stamps(store)
    damage(store)
    report = repair(store, array_source(50, bad=frozenset({7})), open_encoder(config.model))
    # All shards without COMPLETE are what a run leaves that is killed at its very end.
    assert bool(report.before.problems) == (case != "COMPLETE deleted")
    assert list(report.shards) == bad
    assert report.images == sum(len(EmbeddingStore(store).spec.rows_of(shard)) for shard in bad)
    assert (report.changed, report.after.problems, report.after.complete) == ((), (), True)
    assert contents(store) == whole
    rewritten = {key for key, stamp in stamps(store).items() if before[key] != stamp}
    assert not {key for shard in range(4) if shard not in bad for key in (layout.object_key(shard),)} & rewritten


@pytest.mark.parametrize("note", ["as written", "damaged"])
def test_a_killed_repair_of_an_unfinished_store_is_finished_by_repair_and_the_rest_by_embed(
    store, array_source, config, note: str
) -> None:
    whole, source = contents(store), array_source(50, bad=frozenset({7}))
    for key in (layout.COMPLETE, layout.VALID, CURRENT.commit_key(3), layout.object_key(3)):
        (store / key).unlink()  # a run that did not come to shard 3
    flip(store / layout.object_key(1))

    def stop(_phase: str, _done: int, _total: int, _shares: object) -> None:
        if not (store / layout.object_key(1)).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(store, source, open_encoder(config.model), workers=0, progress=stop)
    assert not (store / CURRENT.commit_key(1)).exists()
    assert (store / layout.REPAIR).read_bytes() == b'{"shards":[1]}'
    if note == "damaged":
        (store / layout.REPAIR).write_text("[")
    report = repair(store, source, open_encoder(config.model), workers=0)
    assert report.shards == ((1,) if note == "as written" else (1, 3))
    assert not (store / layout.REPAIR).exists()
    done = embed_dataset(source, config, where=store).report
    assert done.embedded == (2 if note == "as written" else 0)
    assert contents(store) == whole


def test_repair_of_a_sound_store_does_nothing(store, array_source, config) -> None:
    before = stamps(store)
    report = repair(store, array_source(50, bad=frozenset({7})), open_encoder(config.model))
    assert (report.shards, report.images) == ((), 0)
    assert stamps(store) == before


def test_repair_with_other_data_changes_nothing(store, array_source, config) -> None:
    flip(store / layout.object_key(2))
    before = contents(store)
    with pytest.raises(FingerprintMismatchError, match="items_root"):
        repair(store, array_source(50, seed=1), open_encoder(config.model))
    with pytest.raises(FingerprintMismatchError, match="model"):
        repair(store, array_source(50, bad=frozenset({7})), open_encoder(f"{config.model}_slow"))
    with pytest.raises(UsageError, match="shards 0 to 3"):
        repair(store, array_source(50, bad=frozenset({7})), open_encoder(config.model), shards=[4])
    assert contents(store) == before


def test_a_shard_that_is_named_is_made_again(store, array_source, config) -> None:
    whole = contents(store)
    # Whole by every hash, and wrong: what a store looks like that was filled with something else.
    wrong = EmbeddingStore(store)
    rows = np.ones((16, wrong.spec.dim), np.float16)
    for key in (layout.COMPLETE, CURRENT.commit_key(1), layout.object_key(1)):
        (store / key).unlink()
    from gstds_cache.data.manifest import DatasetManifest
    from gstds_cache.store.writer import reopen_writer

    items = (store / layout.ITEMS).read_bytes()
    with reopen_writer(store, labels=DatasetManifest.from_arrow(items).labels, items=items) as writer:
        writer.commit(1, rows)
        writer.finish()
    source, encoder = array_source(50, bad=frozenset({7})), open_encoder(config.model)
    assert verify(store, "full").problems == ()
    found = check_sample(EmbeddingStore(store), source, encoder, rows=50)
    assert {problem.shard for problem in found.problems} == {1}
    assert len(found.problems) == 16
    report = repair(store, source, encoder, shards=[1])
    assert (report.shards, report.changed, report.after.problems) == ((1,), (1,), ())
    assert contents(store) == whole


def test_a_sample_of_a_sound_store_agrees(store, array_source, config) -> None:
    source, encoder = array_source(50, bad=frozenset({7})), open_encoder(config.model)
    found = check_sample(EmbeddingStore(store), source, encoder, rows=20)
    assert (len(found.rows), found.problems) == (20, ())
    assert found.cosine_min > 0.99999
    everything = check_sample(EmbeddingStore(store), source, encoder, rows=1000)
    assert everything.rows == tuple(range(50))


def test_a_sample_notices_an_image_that_decodes_now(store, array_source, config) -> None:
    found = check_sample(EmbeddingStore(store), array_source(50), open_encoder(config.model), rows=50)
    assert [str(problem) for problem in found.problems] == ["shard 0: row 7 (item/0007) decodes now, and did not"]
