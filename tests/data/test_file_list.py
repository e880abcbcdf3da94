"""Lists of files: what a row may be, and what it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.files import FileSource
from gstds_cache.data.sources import open_source
from gstds_cache.errors import DatasetError, UsageError

NAMES = ("a.png", "b.png", "sub/c, d.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for shade, name in enumerate(NAMES):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2), shade).save(path)
    return tmp_path


def opened(photos: Path, text: str | bytes, query: str = "", name: str = "list.csv") -> FileSource:
    (photos / name).write_bytes(text.encode() if isinstance(text, str) else text)
    source = open_source(f"list:{photos / name}{query}")
    assert isinstance(source, FileSource)
    return source


@pytest.mark.parametrize(
    ("text", "query", "name"),
    [
        ('b.png,owl\n"sub/c, d.png",cat\n', "", "list.csv"),
        ('\ufeffPath,Label\r\nb.png,owl\r\n\r\n"sub/c, d.png",cat\r\n', "", "list.csv"),
        ('label,width,file\nowl,3,b.png\ncat,4,"sub/c, d.png"\n', "", "list.csv"),
        ('a,where,what\n1,b.png,owl\n2,"sub/c, d.png",cat\n', "?path=where&label=what", "list.csv"),
        ('image, breed\n./b.png, owl\n"sub//c, d.png", cat\n', "", "list.csv"),
        ("b.png\towl\nsub/c, d.png\tcat\n", "", "list.tsv"),
    ],
    ids=["plain", "header and byte-order mark", "columns by name", "columns named", "two columns", "tabs"],
)
def test_paths_and_labels(photos: Path, text: str, query: str, name: str) -> None:
    source = opened(photos, text, query, name)
    assert list(source.ids) == ["b.png", "sub/c, d.png"]
    assert (source.labels.tolist(), source.classes) == ([1, 0], ("cat", "owl"))
    assert source.notes == ("labels are text: 2 classes, sorted: cat, owl",)
    assert [source.image(row).getpixel((0, 0))[0] for row in (0, 1)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("a.png,3\nb.png,0\n", [3, 0], ()),
        ("a.png,3.0\nb.png,1e1\n", [3, 10], ()),
        ("a.png,3\nb.png,\n", [3, -1], ()),
        ("path,label\na.png\nb.png,x\n", [-1, 0], ("x",)),
        ("a.png,7\nb.png,x7\n", [0, 1], ("7", "x7")),
        ("a.png\nb.png\n", [-1, -1], ()),
        ("path,note\na.png,x\nb.png,y\n?label=", [-1, -1], ()),
    ],
)
def test_labels_are_numbers_where_all_are(photos: Path, text: str, labels: list[int], classes: tuple[str, ...]) -> None:
    text, mark, query = text.partition("?")
    source = opened(photos, text, mark + query)
    assert (source.labels.tolist(), source.classes) == (labels, classes)


def test_absolute_paths_and_files_that_are_missing(photos: Path) -> None:
    source = opened(photos, f"{photos / 'a.png'}\ngone.png\nsub\n")
    assert source.ids[0] == str(photos / "a.png")
    assert source.image(0).size == (2, 2)
    for row, reason in ((1, "unreadable: No such file or directory"), (2, "unreadable: Is a directory")):
        with pytest.raises(UndecodableError) as caught:
            source.image(row)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("a.png\n./a.png\n", "got the path 'a.png' in lines 1 and 2, expected each image once", "take one"),
        ("x.png\ny.png\n", "got 2 paths of which all are not there, expected paths relative to", "ls "),
        ("path,label\n", "got no row in", ""),
        ("a.png,1\nb.png,2,3\n", "line 2 of", "in quotes"),
        ("a.png,1\n,2\n", "got no path", "take the line out"),
        ("a.png\nhttps://x/y.png\n", "got 'https://x/y.png', expected a path on this machine", "download"),
        ("foo,bar\na.png,1\n", "got 'foo', expected the path of an image, or a header", "?path=foo"),
        ("a.png,b.png,c\n", "got 3 columns and no header", "put a header"),
        ("a.png,0.5\nb.png,0.25\n", "item 'a.png' (row 0): got the label 0.5 (float)", "class index"),
        ("", "list of files is empty", "path,label"),
        (b"a.png\0,1\n", "", ""),
    ],
)
def test_what_cannot_be_meant(photos: Path, text: str | bytes, message: str, hint: str) -> None:
    with pytest.raises(DatasetError) as caught:
        opened(photos, text)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_columns_and_files_that_are_not_there(photos: Path) -> None:
    with pytest.raises(UsageError, match="'lable'; there are: label, path") as caught:
        opened(photos, "path,label\na.png,1\n", "?label=lable")
    assert caught.value.hint == "did you mean 'label'?"
    with pytest.raises(DatasetError, match="not found"):
        open_source(f"list:{photos / 'no.csv'}")
    with pytest.raises(UsageError, match="no file given"):
        open_source("list:")
    with pytest.raises(UsageError) as caught:
        open_source(str(photos / "list.csv"))
    assert caught.value.hint == f"did you mean 'list:{photos / 'list.csv'}'?"


def test_train_and_test_of_a_list(photos: Path) -> None:
    text = "".join(f"{name},1\n" for name in ("a.png", "b.png", '"sub/c, d.png"'))
    opened(photos, text)
    parts = [open_source(f"list:{photos / 'list.csv'}?split={part}&holdout=0.5") for part in ("train", "test")]
    assert sorted(name for part in parts for name in part.ids) == sorted(NAMES)
