"""Image folders: order, links, odd names, and an error with a way out for every folder that is not one."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.files import HEIC_EXTENSIONS
from gstds_cache.data.hashing import UNREADABLE
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import ImageSource, open_source
from gstds_cache.errors import DatasetError, UsageError


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), shade).save(buffer, "PNG")
    return buffer.getvalue()


def plant(root: Path, *names: str) -> Path:
    """Write an image of its own shade at each path."""
    for shade, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(shade))
    return root


def folder(root: Path, query: str = "") -> ImageSource:
    return open_source(f"imagefolder:{root}{query}")


def test_order_labels_and_classes(tmp_path: Path) -> None:
    plant(tmp_path, "dog/b.png", "cat/z.PNG", "dog/a/deep/c.jpeg", "cat/10.png", "cat/9.png", "dog/a.png")
    source = folder(tmp_path)
    assert source.ids == ("cat/10.png", "cat/9.png", "cat/z.PNG", "dog/a.png", "dog/a/deep/c.jpeg", "dog/b.png")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.classes == ("cat", "dog")
    assert (source.kind, source.uri, source.mirror_safe) == ("imagefolder", f"imagefolder:{tmp_path}", True)
    assert len(source) == 6
    assert not source.notes
    assert source.payload(1) == (tmp_path / "cat/9.png").read_bytes()
    assert source.image(4).getpixel((0, 0)) == (2, 2, 2)


def test_order_is_by_path_where_a_class_name_begins_another(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png", "a-b/x.png", "a.b/x.png")
    source = folder(tmp_path)
    assert list(source.ids) == sorted(source.ids) == ["a-b/x.png", "a.b/x.png", "a/x.png"]
    assert source.classes == ("a", "a-b", "a.b")
    assert source.labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".ppm", ".pgm", ".bmp", ".Tif", ".tiff", ".webp", ".gif"])
def test_extensions(tmp_path: Path, suffix: str) -> None:
    plant(tmp_path, f"a/x{suffix}", "a/x.png.txt", "a/noext")
    source = folder(tmp_path)
    assert source.ids == (f"a/x{suffix}",)
    assert source.notes == ("ignored 2 files without an image extension (no extension, .txt)",)


def test_hidden_names_are_passed_over(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png", "a/.y.png", "a/.git/z.png", ".cache/w.png")
    source = folder(tmp_path)
    assert source.ids == ("a/x.png",)
    assert source.classes == ("a",)


def test_folder_named_like_an_image_is_descended_into(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png/y.jpg", "b.png/z.jpg")
    source = folder(tmp_path)
    assert source.ids == ("a/x.png/y.jpg", "b.png/z.jpg")
    assert source.classes == ("a", "b.png")


def test_links_are_followed(tmp_path: Path) -> None:
    plant(tmp_path / "elsewhere", "one.png", "two/three.png")
    root = plant(tmp_path / "root", "a/x.png")
    (root / "a" / "linked.png").symlink_to(tmp_path / "elsewhere" / "one.png")
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "two")
    source = folder(root)
    assert source.ids == ("a/linked.png", "a/more/one.png", "a/more/two/three.png", "a/x.png", "b/three.png")
    assert source.classes == ("a", "b")


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png", "b/sub/y.png")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "sub" / "over").symlink_to(tmp_path / "a")
    source = folder(tmp_path)
    assert source.ids == ("a/x.png", "b/sub/over/x.png", "b/sub/y.png")
    # a/self, a/up, and the same two again where the other class links to this one.
    assert source.notes == ("ignored 4 symbolic links back to a folder above",)


def test_two_folders_that_link_to_each_other(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    assert folder(tmp_path).ids == ("a/b/y.png", "a/x.png", "b/a/x.png", "b/y.png")


def test_unreadable_files_are_items(tmp_path: Path) -> None:
    plant(tmp_path, "a/1.png", "a/4.png")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "a" / "3.png").symlink_to(tmp_path / "a" / "3.png")
    source = folder(tmp_path)
    assert source.ids == ("a/1.png", "a/2.png", "a/3.png", "a/4.png")
    for row, why in (
        (1, "unreadable: No such file or directory"),
        (2, "unreadable: Too many levels of symbolic links"),
    ):
        with pytest.raises(OSError, match=why.removeprefix("unreadable: ")):
            source.payload(row)
        with pytest.raises(UndecodableError) as caught:
            source.image(row)
        assert caught.value.reason == why
    assert [bytes(digest) == UNREADABLE for digest in build_manifest(source).sha256] == [False, True, True, False]


def test_pipes_are_no_items(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    source = folder(tmp_path)
    assert source.ids == ("a/x.png",)
    assert source.notes == ("ignored 1 entry that no image can be in: pipes, sockets, devices",)


def test_damaged_file_says_why(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png")
    (tmp_path / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UndecodableError, match="0 bytes"):
        folder(tmp_path).image(0)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/caf\xe9.png")).write_bytes(png(9))
    plant(tmp_path, "a/caf\u00e9.png")
    source = folder(tmp_path)
    assert source.ids == ("a/caf\u00e9.png", "a/caf\\xe9.png")
    assert source.image(1).getpixel((0, 0)) == (9, 9, 9)
    assert pickle.loads(pickle.dumps(source)).payload(1) == png(9)
    "".join(source.ids).encode()


def test_names_that_become_the_same(tmp_path: Path) -> None:
    plant(tmp_path, "a/\\xff.png")
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png")).write_bytes(png())
    with pytest.raises(DatasetError, match="two files that are both spelled"):
        folder(tmp_path)


def test_class_without_images_keeps_its_index(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png", "c/x.png")
    (tmp_path / "b").mkdir()
    source = folder(tmp_path)
    assert source.classes == ("a", "b", "c")
    assert source.labels.tolist() == [0, 2]
    assert source.notes == ("1 class without an image: b",)


def test_images_beside_the_class_folders_are_noted(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png", "stray.png")
    source = folder(tmp_path)
    assert source.ids == ("a/x.png",)
    assert source.notes == ("ignored 1 image outside any class folder",)


def test_path_with_a_colon_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "c:d", "a/x.png")
    assert len(folder(tmp_path / "c:d")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("imagefolder:~/c:d")) == 1


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nothing there, expected a folder") as caught:
        folder(tmp_path / "nope")
    assert caught.value.hint == f"look for it: ls {tmp_path}"


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DatasetError, match="got a file") as caught:
        folder(tmp_path / "data.zip")
    assert "unpack" in caught.value.hint


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="got a folder without class folders") as caught:
        folder(tmp_path)
    assert caught.value.hint.startswith("look at what is there: ls -A")


@pytest.mark.parametrize("name", ["plain", "with a space; and $more"])
def test_images_without_class_folders(tmp_path: Path, name: str) -> None:
    tmp_path = plant(tmp_path / name, "x.png", "y.png")
    with pytest.raises(DatasetError, match="got 2 images directly inside and no class folder") as caught:
        folder(tmp_path)
    assert open_source(f"folder:{tmp_path}").labels.tolist() == [-1, -1]
    command = caught.value.hint.partition("e.g.: ")[2]
    assert os.system(command) == 0  # The hint is the way out, word for word.
    assert folder(tmp_path).ids == ("all/x.png", "all/y.png")


def test_class_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("none here")
    with pytest.raises(
        DatasetError, match="got 1 class folder without an image, expected files that end in .jpg"
    ) as caught:
        folder(tmp_path)
    assert caught.value.hint.startswith("look at what is there: find ")


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "a/x.png", "a/locked/y.png")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # Tests may run as root, whom no permission stops.
    with pytest.raises(DatasetError, match=r"cannot list .*locked.*: Permission denied"):
        folder(tmp_path)


def test_no_path() -> None:
    for uri in ("imagefolder", "imagefolder:"):
        with pytest.raises(UsageError, match="no path given"):
            open_source(uri)


def test_pickled_source_is_the_same(tmp_path: Path) -> None:
    plant(tmp_path, "a/x.png", "b/y.png")
    source = folder(tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy, ImageSource)
    assert (copy.ids, copy.classes, copy.uri) == (source.ids, source.classes, source.uri)
    assert np.array_equal(copy.labels, source.labels)
    assert copy.image(1).tobytes() == source.image(1).tobytes()


def test_represented_briefly(tmp_path: Path) -> None:
    plant(tmp_path, *(f"a/{n}.png" for n in range(50)))
    assert len(repr(folder(tmp_path))) < 300 + len(str(tmp_path))


def test_avif_and_heic_files_are_items_where_something_decodes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.avif", "c.HEIC", "d.heif"):
        (tmp_path / "cats").mkdir(exist_ok=True)
        (tmp_path / "cats" / name).touch()
    monkeypatch.setattr("gstds_cache.data.files.IMAGE_EXTENSIONS", (".png", ".avif", *HEIC_EXTENSIONS))
    assert len(folder(tmp_path)) == 4
    monkeypatch.setattr("gstds_cache.data.files.IMAGE_EXTENSIONS", (".png", ".avif"))
    source = folder(tmp_path)
    assert len(source) == 2
    assert "2 files are HEIC; to have them as images install the extra heic" in source.notes[1]
    for name in ("a.png", "b.avif"):
        (tmp_path / "cats" / name).unlink()
    with pytest.raises(DatasetError) as caught:
        folder(tmp_path)
    assert caught.value.hint.startswith("HEIC images need the extra heic: pip install")
