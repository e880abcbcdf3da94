"""A folder is listed once and its files' times are read once, however many parts of it one command needs."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from gstds_cache.cli.embed_command import main as embed_main
from gstds_cache.cli.select_command import main as select_main
from gstds_cache.cli.train_command import main as train_main
from PIL import Image

from gstds_cache.data import files as files_module
from gstds_cache.data import hash_cache as hash_cache_module
from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source, open_sources
from gstds_cache.data.subset import Subset
from gstds_cache.training.planning import IMAGES as PLANNED_IMAGES

CLASSES, IMAGES = 3, 80


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(CLASSES * IMAGES):
        path = tmp_path / "photos" / "abc"[number % CLASSES] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path)
    return tmp_path / "photos"


@pytest.fixture
def calls(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often a folder was listed, a file asked about, and a file hashed."""
    counts: Counter[str] = Counter()
    scandir, stat, sha256 = os.scandir, os.stat, Files.sha256

    def counted_scandir(path: str = ".") -> object:
        counts["scandir"] += str(path).startswith(str(photos))
        return scandir(path)

    def counted_stat(path: str, **more: object) -> os.stat_result:
        counts["stat"] += str(path).endswith(".png")
        return stat(path, **more)  # type: ignore[arg-type]

    def counted_sha256(self: Files, row: int) -> bytes:
        counts["sha256"] += 1
        return sha256(self, row)

    monkeypatch.setattr(hash_cache_module, "RACY_NS", 0)  # Trust a signature at once.
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", counted_scandir)
        patch.setattr(os, "stat", counted_stat)
        patch.setattr(Files, "sha256", counted_sha256)
        yield counts


def test_train_and_test_of_one_folder(photos, tmp_path, calls) -> None:
    uris = [f"imagefolder:{photos}?split={part}" for part in ("train", "test")]
    single = [build_manifest(open_source(uri)).root for uri in uris]
    for stats in (2, 1):  # Before and after a file is read; then before, since none has changed.
        calls.clear()
        hash_cache = HashCache(tmp_path / "hashes")
        train, test = open_sources(uris, hash_cache=hash_cache)
        roots = [build_manifest(source, hash_cache=hash_cache).root for source in (train, test)]
        assert roots == single
        assert len(train) + len(test) == CLASSES * IMAGES
        assert (train.uri, test.uri) == tuple(uris)
        assert calls["scandir"] == 1 + CLASSES
        assert calls["stat"] == stats * CLASSES * IMAGES
        assert calls["sha256"] == (stats - 1) * CLASSES * IMAGES


def test_the_whole_is_hashed_once(photos, tmp_path, calls) -> None:
    hash_cache = HashCache()
    whole, test = open_sources([f"imagefolder:{photos}", f"imagefolder:{photos}?split=test"], hash_cache=hash_cache)
    assert isinstance(test, Subset)
    assert test.base is whole
    for source in (whole, test, whole):
        build_manifest(source, hash_cache=hash_cache)
    assert calls["sha256"] == CLASSES * IMAGES
    build_manifest(whole, hash_cache=HashCache())  # Another command, which does not know what happened meanwhile.
    assert calls["sha256"] == 2 * CLASSES * IMAGES


def test_the_digits_are_hashed_once() -> None:
    hash_cache = HashCache()
    train, test = open_sources(["digits?split=train", "digits?split=test"], hash_cache=hash_cache)
    assert isinstance(train, Subset)
    assert isinstance(test, Subset)
    assert train.base is test.base
    assert (train.uri, test.uri) == ("digits?split=train", "digits?split=test")
    assert build_manifest(train, hash_cache=hash_cache).root == build_manifest(train).root


class TestWithoutReading:
    def test_names_stand_in_for_what_is_not_hashed(self, photos, tmp_path, calls) -> None:
        uris = [f"imagefolder:{photos}?split={part}" for part in ("train", "test")]
        train, test = open_sources(uris, hash_cache=HashCache(tmp_path / "hashes"), read=False)
        assert calls["sha256"] == 0
        assert not (tmp_path / "hashes").exists()
        assert sorted([*train.ids, *test.ids]) == sorted(open_source(f"imagefolder:{photos}").ids)
        assert abs(len(test) - CLASSES * IMAGES / 5) < 25
        assert train.estimated
        assert test.estimated
        assert test.notes[-1].endswith("(holdout 0.2; about, as 240 files are not hashed)")

    def test_what_is_hashed_is_exact(self, photos, tmp_path, calls) -> None:
        uri = f"imagefolder:{photos}?split=train"
        exact = open_source(uri, hash_cache=HashCache(tmp_path / "hashes"))
        calls.clear()
        train = open_source(uri, hash_cache=HashCache(tmp_path / "hashes"), read=False)
        assert (train.ids, train.estimated, calls["sha256"]) == (exact.ids, exact.estimated, 0)
        assert not train.estimated
        (photos / "a" / "000.png").write_bytes(b"another")
        assert open_source(uri, hash_cache=HashCache(tmp_path / "hashes"), read=False).estimated


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Image files that were opened."""
    names: set[str] = set()

    def counted(path: str, **options: Any) -> io.FileIO:
        names.add(path)
        return io.FileIO(path, **options)

    monkeypatch.setattr(files_module, "io", SimpleNamespace(FileIO=counted))
    return names


def run(main: click.Command, *words: str) -> str:
    done = CliRunner().invoke(main, [*words, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_dry_run_and_a_plan_open_what_they_decode(photos, tiny_model, opened, calls, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "stores"))
    uri = f"imagefolder:{photos}?split=train"
    embed = [uri, "--model", tiny_model, "--batch-size", "8", "--cache", "store"]
    run(embed_main, *embed, "--dry-run")
    assert (calls["sha256"], 0 < len(opened) < 50, (tmp_path / "store").exists()) == (0, True, False)
    run(embed_main, *embed)
    run(
        select_main,
        "store",
        "--rule",
        "random",
        "--batch-size",
        "10",
        "--knn",
        "3",
        "--epochs",
        "1",
        "--out",
        "s.arrow",
    )
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "elsewhere"))  # where no hash is known
    opened.clear()
    calls.clear()
    run(embed_main, *embed, "--dry-run")
    train = [uri, "--selection", "s.arrow", "--eval", uri.replace("train", "test"), "--arch", "timm:test_resnet"]
    assert "plan: nothing was trained" in run(train_main, *train, "--image-size", "16", "--plan")
    assert (calls["sha256"], 0 < len(opened) <= 50 + PLANNED_IMAGES) == (0, True)
