"""Embedding on workers of Ray gives the store that this process makes, byte by byte, in a folder and in a bucket."""

from __future__ import annotations

import shutil
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_cluster import LoopbackCluster
from s3_api import S3Server

import gstds_cache
from gstds_cache.cluster import versions as versions_module
from gstds_cache.errors import (
    DatasetError,
    EncoderError,
    FingerprintMismatchError,
    IncompleteError,
    IntegrityError,
    UsageError,
)
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore

pytestmark = pytest.mark.ray
SETTINGS: dict[str, Any] = {
    "model": "cluster_tasks:build",
    "batch_size": 4,
    "shard_rows": 8,
    "device": "cpu",
    "dtype": "float32",
    "progress": False,
}


def contents(path: Path) -> dict[str, bytes]:
    """All that a store holds, but when and where it was made."""
    parts = ("embeddings/c/", "commits/", "label/", "valid/", "items.arrow")
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name.startswith(parts)}


@pytest.fixture(scope="session")
def here(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that this process makes."""
    path = tmp_path_factory.mktemp("ray") / "local.store"
    gstds_cache.embed(f"imagefolder:{photos}", path, workers=0, **SETTINGS)
    return path


def test_a_folder_has_the_same_bytes(cluster: LoopbackCluster, photos: Path, here: Path, tmp_path: Path) -> None:
    told: list[str] = []
    seen: list[tuple[int, int]] = []
    settings = SETTINGS | {"progress": lambda phase, done, total, _: phase == "embed" and seen.append((done, total))}
    store = gstds_cache.embed(
        f"imagefolder:{photos}", tmp_path / "ray.store", engine="ray", notify=told.append, **settings
    )
    assert contents(tmp_path / "ray.store") == contents(here)
    assert store.report is not None
    assert (store.report.embedded, len(store.report.quarantined)) == (60, 2)
    assert seen[-1] == (60, 60)
    again = gstds_cache.embed(f"imagefolder:{photos}", tmp_path / "ray.store", engine="ray", **SETTINGS)
    assert again.report is not None
    assert again.report.cache_hit


def test_a_bucket_has_the_same_bytes(
    cluster: LoopbackCluster, photos: Path, here: Path, bucket: str, tmp_path: Path, s3_server: S3Server
) -> None:
    gstds_cache.embed(f"imagefolder:{photos}", bucket, engine="ray", **SETTINGS)
    got = EmbeddingStore(bucket)
    want = EmbeddingStore(here)
    assert {shard: commit.object_sha256 for shard, commit in got.commits.items()} == {
        shard: commit.object_sha256 for shard, commit in want.commits.items()
    }
    assert gstds_cache.verify_store(bucket, level="full").problems == ()


def test_what_is_committed_is_not_embedded_again(
    cluster: LoopbackCluster, photos: Path, here: Path, tmp_path: Path
) -> None:
    path = tmp_path / "begun.store"
    shutil.copytree(here, path)
    (path / layout.COMPLETE).unlink()
    for shard in (2, 5):
        (path / EmbeddingStore(here).spec.names.commit_key(shard)).unlink()
    store = gstds_cache.embed(f"imagefolder:{photos}", path, engine="ray", **SETTINGS)
    assert store.report is not None
    assert store.report.embedded == 16
    assert contents(path) == contents(here)


def test_rows_are_taken_over(cluster: LoopbackCluster, photos: Path, here: Path, tmp_path: Path) -> None:
    store = gstds_cache.embed(f"folder:{photos}", tmp_path / "reused.store", engine="ray", reuse=str(here), **SETTINGS)
    assert store.report is not None
    assert (store.report.reused, store.report.embedded) == (58, 2)


def test_a_data_set_in_memory_travels(cluster: LoopbackCluster, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 9, 9, 3), np.uint8)
    dataset = [(image, row % 3) for row, image in enumerate(pixels)]
    gstds_cache.embed(dataset, tmp_path / "here.store", workers=0, **SETTINGS)
    gstds_cache.embed(dataset, tmp_path / "ray.store", engine="ray", **SETTINGS)
    assert contents(tmp_path / "ray.store") == contents(tmp_path / "here.store")


def test_a_data_set_that_does_not_pickle_is_refused(cluster: LoopbackCluster, tmp_path: Path) -> None:
    class Locked(list[Any]):
        def __init__(self) -> None:
            super().__init__([(np.full((9, 9, 3), row, np.uint8), 0) for row in range(8)])
            self.own = threading.Lock()

    with pytest.raises(UsageError, match="cannot be handed to another machine"):
        gstds_cache.embed(Locked(), tmp_path / "ray.store", engine="ray", **SETTINGS)


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_changed_or_went_away_since_it_was_hashed_is_told(
    cluster: LoopbackCluster, photos: Path, tmp_path: Path, gone: bool
) -> None:
    mine = tmp_path / "photos"
    shutil.copytree(photos, mine)
    one = mine / "dogs" / "10.png"

    def after_hashing(phase: str, done: int, total: int, _shares: Any) -> None:
        if phase == "hash" and done == total:
            one.unlink() if gone else shutil.copy(mine / "cats" / "01.png", one)

    expected = (IncompleteError, "and cannot now: No such file") if gone else (IntegrityError, "since it was hashed")
    with pytest.raises(expected[0], match=rf"dogs/10\.png \(row 30\)(.|\n)*{expected[1]}"):
        gstds_cache.embed(
            f"imagefolder:{mine}", tmp_path / "ray.store", engine="ray", **SETTINGS | {"progress": after_hashing}
        )
    assert not (tmp_path / "ray.store" / layout.COMPLETE).exists()


def test_a_data_set_that_a_worker_does_not_see_is_refused(
    cluster: LoopbackCluster, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a machine that has another folder under the same name: hashed here, gone when the workers look.
    from gstds_cache.embedding import elsewhere

    mine = tmp_path / "photos"
    shutil.copytree(photos, mine)
    samples = elsewhere.samples_of

    def and_gone(*arguments: Any) -> Any:
        found = samples(*arguments)
        mine.rename(tmp_path / "elsewhere")
        return found

    monkeypatch.setattr(elsewhere, "samples_of", and_gone)
    with pytest.raises(DatasetError, match=r"cannot be read on .*(.|\n)*every machine has to see"):
        gstds_cache.embed(f"imagefolder:{mine}", tmp_path / "ray.store", engine="ray", **SETTINGS)
    assert not list((tmp_path / "ray.store" / "commits").glob("*"))  # and no image was quarantined for it


def test_other_weights_on_a_worker_are_refused(cluster: LoopbackCluster, photos: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"model": "cluster_tasks:build_by_process"}
    with pytest.raises(EncoderError, match="has another model than the store is made with(.|\n)*weights"):
        gstds_cache.embed(f"imagefolder:{photos}", tmp_path / "ray.store", engine="ray", **settings)


def test_other_versions_on_a_worker_are_refused(
    cluster: LoopbackCluster, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gstds_cache.cluster import executor

    monkeypatch.setattr(executor, "versions", lambda: versions_module.versions() | {"gstds-cache": "0.0.9"})
    with pytest.raises(FingerprintMismatchError, match="gstds-cache: got .*, expected 0.0.9"):
        gstds_cache.embed(f"imagefolder:{photos}", tmp_path / "ray.store", engine="ray", **SETTINGS)


def test_workers_index_tar_shards(
    cluster: LoopbackCluster, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gstds_cache.data import indexing

    files = sorted(photos.rglob("*.png"))
    for number in range(indexing.SPREAD_FROM):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            for file in files[number :: indexing.SPREAD_FROM]:
                shard.add(file, f"{file.parent.name}-{file.name}")
    dataset = f"webdataset:{tmp_path}/*.tar"
    time.sleep(2.1)  # what was written this recently is indexed again the next time
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "here"))  # with an index of its own
    gstds_cache.embed(dataset, tmp_path / "here.store", workers=0, **SETTINGS)

    def not_here(*_: Any, **__: Any) -> None:
        raise AssertionError("this process indexed a shard")

    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "ray"))
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "index_shard", not_here)
        gstds_cache.embed(dataset, tmp_path / "ray.store", engine="ray", **SETTINGS)
    assert contents(tmp_path / "ray.store") == contents(tmp_path / "here.store")
    # What the workers found was kept: the next run asks nobody.
    monkeypatch.setattr(indexing, "IndexAnywhere", not_here)
    assert gstds_cache.embed(dataset, tmp_path / "ray.store", engine="ray", **SETTINGS).report.cache_hit  # type: ignore[union-attr]


def test_a_damaged_tar_shard_has_the_error_of_one_process(cluster: LoopbackCluster, tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.tar").write_bytes(b"no archive" * 200)
    words: list[str] = []
    for engine in ("local", "ray"):
        with pytest.raises(DatasetError) as caught:
            gstds_cache.embed(f"webdataset:{tmp_path}/*.tar", tmp_path / "store", engine=engine, **SETTINGS)
        words.append(str(caught.value))
    assert words[0] == words[1]


def test_a_relative_name_means_the_same_to_workers(
    cluster: LoopbackCluster, photos: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)  # where no worker is
    gstds_cache.embed(f"imagefolder:{photos.name}", tmp_path / "ray.store", engine="ray", **SETTINGS)
    assert contents(tmp_path / "ray.store") == contents(here)
