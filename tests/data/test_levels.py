"""A note where the classes are probably one level lower than the folder that was named."""

from __future__ import annotations

from pathlib import Path

import pytest

from gstds_cache.data.sources import open_source


def plant(root: Path, paths: str) -> None:
    for path in paths.split():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


@pytest.mark.parametrize(
    ("paths", "meant"),
    [
        ("train/a/1.png train/b/1.png val/a/1.png", "train"),
        ("Val/a/1.png Training/b/1.png TEST/a/1.png", "Training"),
        ("test/1.png train/a/1.png", "train"),  # unlabelled test images
        ("photos/cat/1.png photos/dog/1.png", "photos"),
        ("photos/train/cat/1.png photos/test/cat/1.png", "photos/train"),
        ("images/cat/1.png images/dog/1.png annotations/x.xml", "images"),
        ("fold0/cat/1.png fold1/cat/1.png", "fold0"),
        ("Training/Apple/1.jpg Test/Apple/1.jpg test-multiple_fruits/1.jpg", "Training"),
        ("seg_train/seg_train/sea/1.jpg seg_test/seg_test/sea/1.jpg seg_pred/seg_pred/1.jpg", "seg_train/seg_train"),
        ("train_images/cat/1.png test_images/cat/1.png", "train_images"),
        ("train2017/cat/1.png val2017/cat/1.png docs/fig/1.png", "train2017"),
    ],
)
def test_what_was_probably_meant(tmp_path: Path, paths: str, meant: str) -> None:
    plant(tmp_path, paths)
    notes = open_source(f"imagefolder:{tmp_path}").notes
    assert any(f"imagefolder:{tmp_path}/{meant}" in note for note in notes)
    named = open_source(f"imagefolder:{tmp_path}/{meant}")
    assert not any("directly in a class" in note or "parts of a data set" in note for note in named.notes)


@pytest.mark.parametrize(
    "paths",
    [
        "cat/1.png dog/2.png",
        "cat/1.png dog/2021/2.png",
        "cat/1.png cat/more/2.png",
        "train/1.png car/2.png bus/3.png",  # vehicles
        "train/1.png",
        "Cat/1.png cat/1.png",
        "drug_test/1.png training_shoes/2.png",
    ],
)
def test_classes_as_they_should_be(tmp_path: Path, paths: str) -> None:
    plant(tmp_path, paths)
    assert open_source(f"imagefolder:{tmp_path}").notes == ()
