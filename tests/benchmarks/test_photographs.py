"""Archives of photographs: unpacked whole or not at all, counted, and read with the labels and splits asked for."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study.labels import confused  # noqa: E402
from benchmarks.study.settings import load_setting, resolved  # noqa: E402
from benchmarks.study.unpack import ARCHIVES, Archive, main, unpack  # noqa: E402
from gstds_cache.data.sources import open_source  # noqa: E402
from gstds_cache.errors import DatasetError  # noqa: E402

FLOWERS = Archive("flowers89", "flowers89.tar", 2, {"train": 2, "val": 4, "test": 6})
CLOTHES = Archive(
    "clothing14", "clothing14.tar", 3, {"train": 9, "test": 3}, beside="clothing14_corrected.csv", lines=2
)
CIFAR = Archive("cifar10", "cifar10.tar.gz", 2, {"train": 20, "test": 4})
CLASSES = {"flowers89": ("004_sweet_pea", "074_rose"), "clothing14": ("dress", "hat", "t-shirt"), "cifar10": ("a", "b")}


def jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, 7)).save(file, "JPEG")
    return file.getvalue()


def pack(archive: Archive, folder: Path, *, leave_out: int = 0, escape: bool = False) -> None:
    """An archive with the counts it should have, less ``leave_out`` images; ids are numbered within a split."""
    names = [
        f"{split}/{name}/{split}{number:02d}.jpg"
        for split, images in archive.images.items()
        for number in range(images)
        for name in [CLASSES[archive.name][number % archive.classes]]
    ]
    mode = "w:gz" if archive.file.endswith("gz") else "w"
    with tarfile.open(folder / archive.file, mode) as tar:
        for shade, name in enumerate(names[leave_out:]):
            data = jpeg(shade * 5)
            member = tarfile.TarInfo(f"../{name}" if escape else name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the three archives."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for archive in (CIFAR, FLOWERS, CLOTHES):
        pack(archive, folder)
    (folder / CLOTHES.beside).write_text(
        "image,split,csv_label,corrected_label\ntrain01,train,hat,t-shirt\ntest00,test,hat,dress\n"
    )
    return folder


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_one_command_unpacks_all_and_again_does_nothing(folder, tmp_path, capsys) -> None:
    arguments = [str(folder), "--to", str(tmp_path / "data")]
    assert main(arguments, (CIFAR, FLOWERS, CLOTHES)) == 0
    first = files(tmp_path / "data")
    assert len(first) == 24 + 12 + 12 + 1
    assert "cifar10: unpacked: train 20, test 4; 2 classes" in capsys.readouterr().out
    assert main(arguments, (CIFAR, FLOWERS, CLOTHES)) == 0
    assert files(tmp_path / "data") == first
    out = capsys.readouterr().out
    assert out.count("there already") == 3
    assert f"export DATA={tmp_path / 'data'}" in out


def test_a_missing_archive_is_named_and_the_others_are_unpacked(folder, tmp_path, capsys) -> None:
    (folder / FLOWERS.file).unlink()
    (folder / CLOTHES.beside).unlink()
    assert main([str(folder), "--to", str(tmp_path / "data")], (FLOWERS, CLOTHES, CIFAR)) == DatasetError.exit_code
    printed = capsys.readouterr()
    assert "flowers89.tar: no such file" in printed.err
    assert "clothing14_corrected.csv: no such file" in printed.err
    assert "cifar10: unpacked" in printed.out
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar10"]


def test_an_archive_of_other_counts_is_no_data_set(folder, tmp_path) -> None:
    pack(FLOWERS, folder, leave_out=1)
    with pytest.raises(DatasetError, match="train: got 1 images of 1 classes, expected 2 of 2"):
        unpack(FLOWERS, folder, tmp_path)
    assert not (tmp_path / "flowers89").exists()
    pack(FLOWERS, folder)
    assert unpack(FLOWERS, folder, tmp_path)  # what the first try left is no obstacle
    next((tmp_path / "flowers89" / "val").rglob("*.jpg")).unlink()
    with pytest.raises(DatasetError, match="val: got 3 images of 2 classes, expected 4 of 2") as caught:
        unpack(FLOWERS, folder, tmp_path)
    assert "rm -r" in caught.value.hint


def test_a_cut_archive_and_one_that_leads_out_are_refused(folder, tmp_path) -> None:
    path = folder / CIFAR.file
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DatasetError, match=r"cifar10.tar.gz: cannot be unpacked"):
        unpack(CIFAR, folder, tmp_path / "data")
    pack(FLOWERS, folder, escape=True)
    with pytest.raises(DatasetError, match="cannot be unpacked"):
        unpack(FLOWERS, folder, tmp_path / "data")
    assert not list(tmp_path.rglob("val/*/*.jpg"))


def test_flowers_are_tested_on_two_parts_and_clothes_have_corrected_labels(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    for archive in (CIFAR, FLOWERS, CLOTHES):
        unpack(archive, folder, tmp_path / "data")
    flowers = {name: open_source(resolved(getattr(load_setting("flowers89"), name))) for name in ("train", "test")}
    assert (len(flowers["train"]), len(flowers["test"])) == (6, 2 + 4)
    assert flowers["train"].classes == flowers["test"].classes == CLASSES["flowers89"]
    assert {name.split("/")[0] for name in flowers["test"].ids} == {"train", "val"}
    assert [name.split("/")[1] for name in flowers["test"].ids] == [
        CLASSES["flowers89"][label] for label in flowers["test"].labels
    ]
    assert flowers["test"].mirror_safe
    crowd = open_source(resolved(load_setting("clothing14").train))
    corrected = open_source(resolved(load_setting("clothing14-corrected").train))
    assert crowd.classes == corrected.classes
    assert [f"train/{name}" for name in crowd.ids] == list(corrected.ids)
    changed = np.flatnonzero(crowd.labels != corrected.labels)
    assert [Path(crowd.ids[int(row)]).stem for row in changed] == ["train01"]  # the other line is of the test part
    assert corrected.classes[corrected.labels[changed[0]]] == "t-shirt"
    assert np.array_equal(np.asarray(corrected.image(3)), np.asarray(crowd.image(3)))
    for name in ("cifar10-validation", "flowers89-validation"):  # held out of what the setting trains on
        setting = load_setting(name)
        parts = [open_source(resolved(uri)).ids for uri in (setting.train, setting.test)]
        whole = open_source(resolved(load_setting(setting.same_images_as).train)).ids
        assert sorted([*parts[0], *parts[1]]) == sorted(whole)
    assert load_setting("clothing14-validation").train == load_setting("clothing14").train
    (tmp_path / "data" / "clothing14" / "corrected.csv").write_text(
        "image,split,csv_label,corrected_label\nnowhere,train,hat,dress\n"
    )
    with pytest.raises(DatasetError, match="no such image or class"):
        open_source(resolved(load_setting("clothing14-corrected").train))


def test_labels_of_some_classes_become_those_of_another() -> None:
    targets = np.repeat(np.arange(4), 50)
    changed = confused(targets, {1: 2, 3: 1}, 0.4)
    for label, other in {0: 0, 1: 2, 2: 2, 3: 1}.items():
        of_class = changed[targets == label]
        assert (of_class == label).sum() == (50 if other == label else 30)
        assert set(of_class.tolist()) <= {label, other}
    assert np.array_equal(changed, confused(targets, {1: 2, 3: 1}, 0.4))
    assert np.array_equal(targets, confused(targets, {1: 2, 3: 1}, 0.0))


def test_the_archives_counts_are_those_of_the_settings() -> None:
    assert {archive.name: sum(archive.images.values()) for archive in ARCHIVES} == {
        "cifar10": 60_000,
        "flowers89": 5_543,
        "clothing14": 4_961,
    }
