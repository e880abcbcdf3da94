"""Errors about a store name what helps where they are raised."""

from __future__ import annotations

from pathlib import Path

import pytest

import gstds_cache
from gstds_cache.config import EmbedConfig
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import DatasetError, FingerprintMismatchError, StoreNotFoundError, UsageError
from gstds_cache.store.reader import EmbeddingStore


@pytest.fixture
def store(image_folder: Path, tiny_model: str, tmp_path: Path) -> Path:
    config = EmbedConfig(model=tiny_model, batch_size=4, shard_rows=32, workers=0, device="cpu")
    embed_dataset(open_source(f"imagefolder:{image_folder}"), config, where=tmp_path / "store")
    return tmp_path / "store"


def test_another_data_set_than_the_stores_names_the_data_set_and_no_other_store(store, image_folder) -> None:
    (image_folder / "dogs" / "00.png").write_bytes((image_folder / "dogs" / "01.png").read_bytes())
    for check in (
        lambda: gstds_cache.verify_store(store, level="sample", device="cpu"),
        lambda: gstds_cache.repair_store(store, shards=[0], device="cpu"),
    ):
        with pytest.raises(FingerprintMismatchError) as caught:
            check()
        assert "give the `dataset` and the `model` that it was made of (imagefolder:" in caught.value.hint
        assert "`cache`" not in caught.value.hint


def test_a_data_set_that_was_moved_is_named_as_the_way_out(store, image_folder, tmp_path) -> None:
    moved = image_folder.rename(tmp_path / "moved")
    with pytest.raises(DatasetError, match=r"where .*store says that its data set is") as caught:
        gstds_cache.verify_store(store, level="sample", device="cpu")
    assert "give `dataset`" in caught.value.hint
    assert not gstds_cache.verify_store(store, level="sample", dataset=f"imagefolder:{moved}", device="cpu").problems
    with pytest.raises(DatasetError) as caught:
        gstds_cache.verify_store(store, level="sample", dataset=f"imagefolder:{image_folder}", device="cpu")
    assert "says that its data set is" not in caught.value.message


def test_what_is_no_store_but_something_else_is_told_so(image_folder, tmp_path) -> None:
    with pytest.raises(StoreNotFoundError, match="holds something else .'cats'.") as caught:
        EmbeddingStore(image_folder)
    assert f"gstds-embed imagefolder:{image_folder}" in caught.value.hint
    with pytest.raises(StoreNotFoundError, match="it is a file"):
        EmbeddingStore(image_folder / "dogs" / "00.png")
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "nowhere"):
        with pytest.raises(StoreNotFoundError) as caught:
            EmbeddingStore(tmp_path / nothing)
        assert "gstds-embed DATASET --cache" in caught.value.hint


def test_a_link_to_a_store_is_not_removed_in_its_place(store, tmp_path) -> None:
    link = tmp_path / "link"
    link.symlink_to(store)
    with pytest.raises(UsageError, match="is a link to") as caught:
        gstds_cache.remove_store(link)
    assert f"gstds-cache rm {store}" in caught.value.hint
    assert len(EmbeddingStore(link)) == 60
    (tmp_path / "folder").symlink_to(tmp_path)
    gstds_cache.remove_store(tmp_path / "folder" / "store")  # a link above it is another matter
    assert not store.exists()
