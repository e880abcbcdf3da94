"""What the commands wrote into an image folder is no class of the next run; nothing of the user's is taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zarr
from PIL import Image

from gstds_cache.config import EmbedConfig, SelectConfig
from gstds_cache.data import hash_cache, outputs
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.files.derived import derived_paths
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store import layout, mirror
from gstds_cache.store.export import export_rows
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.deliver import kept_paths
from gstds_cache.stream.writer import write_file
from gstds_cache.training import run_dir as runs
from gstds_cache.training.checkpoint import Checkpoint
from gstds_cache.training.run_dir import RunDir


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(12):
        path = tmp_path / "photos" / "ans"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number * 20).save(path)
    return tmp_path / "photos"


def folder(root: Path) -> ImageSource:
    return open_source(f"imagefolder:{root}")


def embed(root: Path, where: Path, model: str):
    config = EmbedConfig(model=model, batch_size=4, shard_rows=4, workers=0, device="cpu")
    return embed_dataset(folder(root), config, where=where).report


def identity(source: ImageSource) -> tuple[str, list[int], list[str]]:
    return build_manifest(source).root, source.labels.tolist(), list(source.classes)


def test_names_are_those_that_are_written() -> None:
    assert outputs.STORE == layout.OWN_NAMES
    assert set(runs.FILES) == outputs.RUN
    assert {mirror.ROWS, mirror.RECORD} == outputs.MIRROR
    assert runs.LOCK == mirror.LOCK == outputs.LOCK


@pytest.mark.parametrize("place", ["emb.store", "n/emb.store", "out/deep/emb.store"])
def test_a_store_and_what_goes_with_it(root: Path, tiny_model: str, place: str) -> None:
    before = identity(folder(root))
    store = EmbeddingStore(embed(root, root / place, tiny_model).location)
    selector = BatchSelector(store, SelectConfig(batch_size=4, knn=2, epochs=1, rule="random", device="cpu"))
    list(write_file(selector, kept_paths(selector)[0]))
    list(write_file(selector, root / "selections" / "s.arrow"))
    (root / "tables").mkdir()
    export_rows(store, root / "tables" / "x.parquet")
    derived_paths(store.location, ".guidance")[0].mkdir()
    after = folder(root)
    assert identity(after) == before
    assert any("passed over" in note and f"{place} (a store)" in note for note in after.notes)
    assert embed(root, root / place, tiny_model).cache_hit
    shutil.move(root / place, root / "renamed")
    shutil.rmtree(derived_paths(store.location, ".guidance")[0])  # empty, and no longer beside its store
    assert identity(folder(root)) == before


@pytest.mark.parametrize("kept", [[".lock"], [".lock", "items.arrow"], ["items.arrow", "embeddings", "label"]])
def test_a_store_that_was_interrupted(root: Path, tiny_model: str, kept: list[str]) -> None:
    before = identity(folder(root))
    embed(root, root / "emb.store", tiny_model)
    for path in list((root / "emb.store").iterdir()):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert identity(folder(root)) == before


@pytest.mark.parametrize("where", ["runs/a", "a/run", "b-run"])
@pytest.mark.parametrize("state", ["whole", "begun", "locked"])
def test_a_run(root: Path, where: str, state: str) -> None:
    before = identity(folder(root))
    with RunDir(root / where, {"selection_digest": "d"}, provenance={}, resume=False) as run_dir:
        if state == "locked":  # another process of a sweep is still decoding
            assert identity(folder(root)) == before
            return
        run_dir.begin()
        if state == "whole":
            run_dir.save_checkpoint(
                Checkpoint(network={}, optimizer={}, step=1, samples=2, loss_sum=0.5, loss=0.5, sha="", seconds={})
            )
            shutil.copy(root / "a" / "0.png", root / where / "chart.png")
    source = folder(root)
    assert identity(source) == before
    assert any(f"{where} (a run)" in note for note in source.notes)


def test_hashes_a_mirror_and_a_report(root: Path) -> None:
    before = identity(folder(root))
    (root / "b-cache" / "hashes").mkdir(parents=True)
    for name in (hash_cache.FILE, f"{hash_cache.FILE}-journal", "photos-0123456789abcdef.hashes"):
        (root / "b-cache" / "hashes" / name).write_bytes(b"")
    (root / "m").mkdir()
    (root / "m" / "embeddings.npy").write_bytes(b"")
    (root / "m" / "mirror.json").write_text(json.dumps({"fingerprint": "x", "signature": []}))
    (root / "page").mkdir()
    (root / "page" / "report.html").write_text("<!doctype html><head><title>gstds-cache report</title>")
    assert identity(folder(root)) == before


def test_folders_of_the_users_own_are_classes_whatever_they_are_called_or_hold(root: Path) -> None:
    names = ["runs", "emb.store", "emb.store.selections", "label"]
    for name in names:
        (root / name).mkdir()
        shutil.copy(root / "a" / "0.png", root / name / "x.png")
    zarr.create_group(root / "emb.store" / "zarr", attributes={"title": "masks"}, zarr_format=3)
    shutil.copy(root / "emb.store" / "zarr" / "zarr.json", root / "emb.store" / "zarr.json")
    shutil.copy(root / "a" / "0.png", root / "emb.store" / "zarr" / "y.png")
    (root / "runs" / "config.json").write_text('{"model": "vit"}')
    (root / "label" / ".lock").write_bytes(b"")
    for number, odd in enumerate(
        ("5", "true", '{"config": 5}', '{"config": "selection_digest"}', '{"attributes": "gstds"}')
    ):
        names.append(f"odd{number}")
        (root / names[-1]).mkdir()
        shutil.copy(root / "a" / "0.png", root / names[-1] / "x.png")
        for name in ("config.json", "zarr.json"):
            (root / names[-1] / name).write_text(odd)
    source = folder(root)
    assert source.classes == tuple(sorted([*names, "a", "n", "s"]))
    assert "emb.store/zarr/y.png" in source.ids
    assert len(source) == 12 + 5 + 5
    assert not any("passed over" in note for note in source.notes)


def test_the_first_run_warns_and_the_second_is_a_hit(command, image_folder, tiny_model) -> None:
    words = ["gstds-embed", f"imagefolder:{image_folder}", "--model", tiny_model]
    first = command(*words, "--cache", str(image_folder / "emb.store"))
    assert "warning: the store" in first.stderr
    assert "lies inside the image folder" in first.stderr
    assert "cache hit" in command(*words, "--cache", str(image_folder / "emb.store")).stdout
