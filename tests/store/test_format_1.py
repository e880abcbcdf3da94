"""A store that the version before format 2 wrote (tests/store/format_1: 22 images, three shards, row 3 broken).

It is read, resumed, repaired and removed as what it is: format 1, with the fingerprint and the bytes it had.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import real_store
import zarr
from real_store import BAD, ITEMS, Images, objects_of, shards_written

from gstds_cache.config import EmbedConfig, SelectConfig
from gstds_cache.data.outputs import Listing
from gstds_cache.embedding import reuse
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import ChunkCorruptError, FingerprintMismatchError
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store import layout
from gstds_cache.store.describe import summarise
from gstds_cache.store.embed_report import EmbedReport
from gstds_cache.store.format import FORMATS
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.remove import remove_store
from gstds_cache.store.verify import verify

FIXTURE = Path(__file__).parent / "format_1"
FINGERPRINT = "0a230d3c3b6753de21b7c442853b5317aae73909b7d57354699be16134906491"
GOOD = np.array([row for row in range(ITEMS) if row != BAD])
# Written anew by other versions of zarr and pyarrow with other bytes; COMPLETE holds the hashes of these.
BY_LIBRARIES = {"zarr.json", "embeddings/zarr.json", "label/zarr.json", "valid/zarr.json", layout.ITEMS}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURE, tmp_path / "old.store")
    return tmp_path / "old.store"


def embed(where: Path, source: Images | None = None, **settings) -> EmbedReport:
    config = EmbedConfig(model=real_store.MODEL, workers=0, device="cpu", **settings.pop("sizes", {}))
    return embed_dataset(source or Images(), config, where=where, **settings).report


def require_format_1(store: Path) -> None:
    """Every record and every row is, byte for byte, what the version before wrote."""
    now, before = objects_of(store), objects_of(FIXTURE)
    assert now.keys() == before.keys()
    for key in now.keys() - BY_LIBRARIES - {layout.COMPLETE}:
        assert now[key] == before[key], key
    complete, expected = json.loads(now[layout.COMPLETE]), json.loads(before[layout.COMPLETE])
    del complete["objects"], expected["objects"]
    assert complete == expected
    assert json.loads(now["zarr.json"])["attributes"] == json.loads(before["zarr.json"])["attributes"]


def test_it_is_read_and_keeps_its_fingerprint(old: Path, tmp_path: Path) -> None:
    store = EmbeddingStore(old)
    assert (store.fingerprint, store.spec.format, store.spec.shard_rows, store.spec.shards) == (FINGERPRINT, 1, 8, 3)
    assert [item.row for item in store.quarantined] == [BAD]
    assert (store.classes, store.dataset_uri, store.labels[:4].tolist()) == (("a", "b", "c"), "memory", [0, 1, 2, 0])
    assert store.manifest().root == store.spec.items_root
    assert summarise(old).fingerprint == FINGERPRINT
    np.testing.assert_array_equal(store.gather(GOOD), zarr.open_group(old, mode="r")["embeddings"][:][GOOD])
    new = EmbeddingStore(real_store.embed(tmp_path / "new.store").location)
    assert (new.spec.format, new.fingerprint == FINGERPRINT) == (2, False)
    np.testing.assert_allclose(store.gather(GOOD), new.gather(GOOD), atol=1e-3)
    assert objects_of(old) == objects_of(FIXTURE)


@pytest.mark.parametrize("sizes", [{"batch_size": 4, "shard_rows": 8}, {}], ids=["given", "the store's"])
def test_the_same_data_set_is_a_hit(old: Path, sizes: dict[str, int]) -> None:
    report = embed(old, sizes=sizes)
    assert (report.cache_hit, report.embedded, report.fingerprint) == (True, 0, FINGERPRINT)
    assert objects_of(old) == objects_of(FIXTURE)


def test_what_differs_is_named_by_the_words_of_today(old: Path) -> None:
    with pytest.raises(FingerprintMismatchError, match="shard_rows: the store has 8, this run has 16") as caught:
        embed(old, sizes={"batch_size": 4, "shard_rows": 16})
    assert "format" not in caught.value.message
    assert "unit" not in caught.value.message
    assert objects_of(old) == objects_of(FIXTURE)


def test_a_run_that_was_interrupted_is_finished_in_its_format(old: Path) -> None:
    for key in (layout.COMPLETE, "receipts/1.json", layout.object_key(1)):
        (old / key).unlink()
    (old / "embeddings/c/2/.0.4194303.tmp").write_bytes(b"of a run that was killed")
    with shards_written() as shards:
        assert real_store.embed(old).fingerprint == FINGERPRINT
    assert shards == [1]
    require_format_1(old)
    assert verify(old, "full").problems == ()


def test_it_is_repaired_in_its_format(old: Path) -> None:
    data = bytearray((old / layout.object_key(0)).read_bytes())
    data[40] ^= 1
    (old / layout.object_key(0)).write_bytes(data)
    (old / "receipts/1.json").write_text("{")
    assert {problem.key for problem in verify(old, "full").problems} >= {layout.object_key(0), "receipts/1.json"}
    with pytest.raises(ChunkCorruptError, match="shard 1"):
        EmbeddingStore(old)
    assert real_store.repair(old).shards == (0, 1)
    require_format_1(old)


def test_a_repair_that_the_version_before_began_is_finished(old: Path) -> None:
    for key in (layout.COMPLETE, "receipts/1.json", layout.object_key(1)):
        (old / key).unlink()
    (old / layout.REPAIR).write_text('{"units":[1]}')
    assert real_store.repair(old).shards == (1,)
    require_format_1(old)


def test_what_is_selected_from_it_is_what_is_selected_from_a_new_store(old: Path, tmp_path: Path) -> None:
    config = SelectConfig(batch_size=10, epochs=2, knn=3, guidance="none", device="cpu")
    new = EmbeddingStore(real_store.embed(tmp_path / "new.store").location)
    kept = [
        [batch.kept.tolist() for batch in BatchSelector(store, config).run()] for store in (EmbeddingStore(old), new)
    ]
    assert kept[0] == kept[1]


def test_its_rows_are_taken_over_where_the_code_of_its_model_is_known(old: Path, tmp_path: Path, monkeypatch) -> None:
    report = embed(tmp_path / "unknown.store", Images(ITEMS + 5), reuse=[old])
    assert (report.reused, report.embedded) == (0, ITEMS + 5)  # its model is a user's own
    monkeypatch.setattr(reuse, "_same_code_is_known", lambda *_: True)
    report = embed(tmp_path / "grown.store", Images(ITEMS + 5), reuse=[old])
    assert (report.reused, report.embedded) == (ITEMS - 1, 6)  # the broken one is tried again


def test_it_is_removed_whole(old: Path) -> None:
    assert remove_store(old) == len(objects_of(FIXTURE))
    assert not old.exists()


@pytest.mark.parametrize("missing", [(), ("zarr.json", layout.COMPLETE)], ids=["whole", "unfinished"])
def test_in_an_image_folder_it_is_no_class(old: Path, missing: tuple[str, ...]) -> None:
    for key in missing:
        (old / key).unlink()
    listing = Listing()
    for path in old.iterdir():
        listing.add(path.name)
    assert (listing.kind(str(old)), listing.strange) == ("a store", False)


def test_a_mirror_that_the_version_before_made_is_taken_and_is_no_class(old: Path) -> None:
    EmbeddingStore(old, access="mirror").gather(GOOD)
    folder = old.with_name("old.store.mirror")
    assert set(json.loads((folder / "mirror.json").read_text())) == {"fingerprint", "receipts_sha256", "signature"}
    listing = Listing(own={path.name for path in folder.iterdir()})
    assert listing.kind(str(folder)) == "a mirror"


def test_the_names_of_a_format_are_translated_there_and_back() -> None:
    fields = {"shard_rows": 8, "shard": 1, "shards": 3, "commits_sha256": "x", "items": 22}
    assert FORMATS[1].to_disk(fields) == {"unit_rows": 8, "unit": 1, "units": 3, "receipts_sha256": "x", "items": 22}
    for names in FORMATS.values():
        assert names.from_disk(names.to_disk(fields)) == fields
