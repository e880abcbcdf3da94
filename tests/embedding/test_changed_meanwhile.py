"""Files that change, or go away, between being hashed and being decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gstds_cache.config import EmbedConfig
from gstds_cache.data import files as files_module
from gstds_cache.data.align import part_of
from gstds_cache.data.files import FileSource
from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.embedding import jpeg_reader
from gstds_cache.embedding.jpeg_reader import JpegReader
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.errors import FingerprintMismatchError, IncompleteError, IntegrityError
from gstds_cache.store import layout
from gstds_cache.store.embed_report import EmbedReport


def embed(
    folder: Path, store: Path, model: str, workers: int = 0, *, hashed: Callable[[], None] | None = None, after: int = 0
) -> EmbedReport:
    """Embed ``folder``; ``hashed`` is called once all is hashed, and ``after`` images are embedded."""
    waiting = [] if hashed is None else [hashed]

    def progress(phase: str, done: int, total: int, _shares: Mapping[str, float]) -> None:
        if waiting and ((phase == "embed" and done >= after) if after else (phase == "hash" and done == total)):
            waiting.pop()()

    config = EmbedConfig(model=model, batch_size=4, shard_rows=8, workers=workers, device="cpu")
    return embed_dataset(open_source(f"imagefolder:{folder}"), config, where=store, progress=progress).report


def contents(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_was_replaced_meanwhile_is_not_committed(image_folder, tiny_model, tmp_path, workers) -> None:
    one, other = image_folder / "dogs" / "10.png", image_folder / "cats" / "01.png"
    before, times = one.read_bytes(), one.stat()

    def replace() -> None:
        data = other.read_bytes()
        one.write_bytes(data + bytes(max(0, len(before) - len(data))))
        os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))

    store = tmp_path / "store"
    with pytest.raises(IntegrityError, match=r"dogs/10\.png \(row 30\) changed since it was hashed") as caught:
        embed(image_folder, store, tiny_model, workers, hashed=replace)
    assert not isinstance(caught.value, FingerprintMismatchError)
    assert not (store / layout.COMPLETE).exists()
    with pytest.raises(FingerprintMismatchError, match=r"dogs/10\.png"):
        embed(image_folder, store, tiny_model)
    one.write_bytes(before)
    report = embed(image_folder, store, tiny_model)
    embed(image_folder, tmp_path / "whole", tiny_model)
    assert report.complete
    assert contents(store) == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_goes_away_ends_the_run_and_quarantines_nothing(
    image_folder, tiny_model, tmp_path, workers
) -> None:
    away, store = tmp_path / "away", tmp_path / "store"
    with pytest.raises(IncompleteError, match=r"could be read when it was hashed, and cannot now: No such file") as got:
        embed(image_folder, store, tiny_model, workers, hashed=lambda: image_folder.rename(away), after=8)
    assert "the same command" in got.value.hint
    assert not (store / layout.COMPLETE).exists()
    away.rename(image_folder)
    report = embed(image_folder, store, tiny_model, workers)
    assert (report.complete, report.ok, len(report.quarantined)) == (True, 58, 2)
    embed(image_folder, tmp_path / "whole", tiny_model)
    assert contents(store) == contents(tmp_path / "whole")


def test_a_file_that_could_not_be_read_when_it_was_hashed_is_quarantined(image_folder, tiny_model, tmp_path) -> None:
    gone = image_folder / "dogs" / "10.png"
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere")
    report = embed(image_folder, tmp_path / "store", tiny_model)
    assert (report.complete, report.ok, len(report.quarantined)) == (True, 57, 3)
    assert [(item.id, item.reason) for item in report.quarantined if item.row == 30] == [
        ("dogs/10.png", "unreadable: No such file or directory")
    ]


@pytest.mark.parametrize("gone", [False, True])
def test_the_processes_that_read_for_a_device_compare_as_well(image_folder, gone) -> None:
    path = image_folder / "dogs" / "10.jpg"
    Image.new("RGB", (32, 32), (200, 10, 10)).save(path)
    source = open_source(f"imagefolder:{image_folder}")
    row = list(source.ids).index("dogs/10.jpg")
    compared = as_hashed(source, build_manifest(source).sha256)
    reader = JpegReader(compared, Preprocessing(resize=16, crop=(16, 16)), (3, 16, 16))
    if gone:
        path.unlink()
    else:
        Image.new("RGB", (32, 32), (10, 200, 10)).save(path)
    with pytest.raises(IncompleteError if gone else IntegrityError, match=r"dogs/10\.jpg"):
        reader([row], lambda size: pytest.fail(f"room for {size} bytes"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_can_be_read_only_after_it_was_hashed_is_not_committed(
    image_folder, tiny_model, tmp_path, workers
) -> None:
    path, away, store = image_folder / "dogs" / "10.png", tmp_path / "away.png", tmp_path / "store"
    path.rename(away)
    path.symlink_to(tmp_path / "nowhere")

    def back() -> None:
        (tmp_path / "nowhere").write_bytes(away.read_bytes())

    with pytest.raises(IntegrityError, match=r"dogs/10\.png \(row 30\) could not be read when it was hashed") as caught:
        embed(image_folder, store, tiny_model, workers, hashed=back)
    assert "the same command" in caught.value.hint
    assert not (store / layout.COMPLETE).exists()
    assert embed(image_folder, tmp_path / "again", tiny_model, workers).ok == 58


def test_a_file_that_grew_too_large_is_not_committed_and_one_that_was_is_quarantined(
    image_folder, tiny_model, tmp_path, monkeypatch
) -> None:
    path = image_folder / "dogs" / "10.png"
    most = max(file.stat().st_size for file in image_folder.rglob("*.png"))
    monkeypatch.setattr(files_module, "MAX_BYTES", most)

    def grow() -> None:
        path.write_bytes(path.read_bytes().ljust(most + 1, b"\0"))

    with pytest.raises(IntegrityError, match=r"dogs/10\.png \(row 30\) changed since it was hashed"):
        embed(image_folder, tmp_path / "store", tiny_model, hashed=grow)
    report = embed(image_folder, tmp_path / "again", tiny_model)
    assert [item.reason for item in report.quarantined if item.row == 30] == [
        f"too large a file: {most + 1} bytes, at most {most} are decoded"
    ]


def test_a_part_keeps_the_names_of_its_files_when_it_is_compared(image_folder) -> None:
    source = open_source(f"imagefolder:{image_folder}")
    part = part_of(source, np.array([3, 30]), [source.ids[3], source.ids[30]])
    manifest = build_manifest(part)
    compared = as_hashed(part, manifest.sha256)
    assert compared.files is part.files


@pytest.mark.parametrize("in_part", [False, True])
def test_a_jpeg_is_opened_once_to_be_read_for_a_device(image_folder, monkeypatch, in_part) -> None:
    Image.new("RGB", (32, 32), (200, 10, 10)).save(image_folder / "dogs" / "10.jpg")
    source = open_source(f"imagefolder:{image_folder}")
    row = list(source.ids).index("dogs/10.jpg")
    if in_part:
        source, row = part_of(source, np.array([0, row]), [source.ids[0], source.ids[row]]), 1
    manifest, opened = build_manifest(source), list[str]()

    def counted(path: str, flags: int) -> int:
        opened.append(path)
        return files_module.regular_file(path, flags)

    monkeypatch.setattr(jpeg_reader, "regular_file", counted)
    monkeypatch.setattr(FileSource, "payload", lambda *_: pytest.fail("opened again"))
    reader = JpegReader(as_hashed(source, manifest.sha256), Preprocessing(resize=16, crop=(16, 16)), (3, 16, 16))
    items, _ = reader([row], lambda size: torch.zeros(size, dtype=torch.uint8))
    assert (len(opened), items[0].reason) == (1, "")
    other = manifest.sha256.copy()
    other[row] = 1
    with pytest.raises(IntegrityError, match="changed since"):
        JpegReader(as_hashed(source, other), reader.preprocessing, reader.shape)([row], lambda _: pytest.fail("room"))
