"""Names of data sets, the digits, and splits by content."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from gstds_cache.data.arrays import ArraySource
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import KINDS, ImageSource, open_source
from gstds_cache.data.split import split_by_content
from gstds_cache.errors import DatasetError, UsageError


def test_digits() -> None:
    source = open_source("digits")
    digits = load_digits()
    assert isinstance(source, ImageSource)
    assert len(source) == 1797
    assert (source.ids[0], source.ids[-1]) == ("digits/0000", "digits/1796")
    assert np.array_equal(source.labels, digits.target)
    assert source.labels.dtype == np.int64
    assert source.classes == tuple("0123456789")
    assert (source.uri, source.kind, source.mirror_safe, source.notes) == ("digits", "digits", False, ())
    for row in (0, 1000, 1796):
        grey = np.array([round(value * 255 / 16) for value in digits.images[row].ravel()], np.uint8)
        assert source.payload(row) == grey.tobytes()
        image = source.image(row)
        assert (image.mode, image.size) == ("RGB", (8, 8))
        assert np.array_equal(np.asarray(image)[..., 1].ravel(), grey)


def test_digits_pickled() -> None:
    source = open_source("digits")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.ids == source.ids
    assert copy.payload(77) == source.payload(77)


@pytest.mark.parametrize("uri", ["digit", "", "cifar10", "imagenet:/data", "/no/such/path", "Digits?split=test"])
def test_unknown_names_list_the_kinds(uri: str) -> None:
    with pytest.raises(UsageError, match="unknown data set") as caught:
        open_source(uri)
    assert all(kind in caught.value.message for kind in KINDS)
    assert caught.value.hint.startswith("did you mean")


def test_nearest_kind_first() -> None:
    with pytest.raises(UsageError) as caught:
        open_source("digit")
    assert caught.value.hint == "did you mean 'digits'?"


def test_bare_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is a folder") as caught:
        open_source(str(tmp_path))
    assert caught.value.hint == f"did you mean 'imagefolder:{tmp_path}'? Without class folders: 'folder:{tmp_path}'"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("splt=train", "'splt'; there are: split, holdout"),
        ("root=x", "'root'; there are: "),
        ("split=val", "got split=val, expected split=train or split=test"),
        ("split=", "got split=, expected"),
        ("holdout=0.3", "got holdout=0.3 without split"),
        ("split=test&holdout=0", "got holdout=0, expected a fraction"),
        ("split=test&holdout=1.0", "got holdout=1.0, expected a fraction"),
        ("split=test&holdout=nan", "got holdout=nan, expected a fraction"),
        ("split=test&holdout=some", "got holdout=some, expected a fraction"),
        ("split=test&split=train", "given more than once: split"),
        ("split", "expected name=value pairs"),
    ],
)
def test_bad_queries(query: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source("digits?" + query)


def test_empty_query_is_none() -> None:
    assert len(open_source("digits?")) == 1797


@pytest.mark.parametrize("holdout", [None, 0.05, 0.5])
def test_parts_make_the_whole(holdout: float | None) -> None:
    more = "" if holdout is None else f"&holdout={holdout}"
    whole, train, test = (open_source(f"digits{q}") for q in ("", "?split=train" + more, "?split=test" + more))
    assert not set(train.ids) & set(test.ids)
    assert sorted([*train.ids, *test.ids]) == list(whole.ids)
    assert list(train.ids) == sorted(train.ids)
    assert abs(len(test) / len(whole) - (holdout or 0.2)) < 0.04
    at = {name: row for row, name in enumerate(whole.ids)}
    for part in (train, test):
        assert isinstance(part, ImageSource)
        for row in (0, len(part) - 1):
            assert part.payload(row) == whole.payload(at[part.ids[row]])
            assert part.image(row).tobytes() == whole.image(at[part.ids[row]]).tobytes()
            assert part.labels[row] == whole.labels[at[part.ids[row]]]
        assert (part.classes, part.kind, part.mirror_safe) == (whole.classes, "digits", False)
    assert test.notes == (f"test part: {len(test)} of 1797 items (holdout {holdout or 0.2:g})",)


def test_split_is_the_documented_one() -> None:
    whole, test = open_source("digits"), open_source("digits?split=test")
    expected = [
        name
        for row, name in enumerate(whole.ids)
        if int.from_bytes(hashlib.sha256(whole.payload(row)).digest()[:8], "big") / 2**64 < 0.2
    ]
    assert list(test.ids) == expected


def test_part_pickled() -> None:
    part = open_source("digits?split=test")
    copy = pickle.loads(pickle.dumps(part))
    assert copy.ids == part.ids
    assert build_manifest(copy).root == build_manifest(part).root


def tiny(shades: list[int]) -> ArraySource:
    pixels = np.array(shades, np.uint8).reshape(-1, 1, 1)
    ids = tuple(f"{row}" for row in range(len(shades)))
    return ArraySource(uri="tiny", kind="tiny", ids=ids, labels=np.arange(len(shades)), pixels=pixels)


@given(st.lists(st.integers(0, 255), min_size=2, max_size=60), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_duplicates_stay_together_and_nothing_is_lost(shades: list[int], holdout: float) -> None:
    source = tiny(shades)
    sides: dict[str, list[str]] = {}
    for split in ("train", "test"):
        try:
            sides[split] = list(split_by_content(source, split, holdout).ids)
        except DatasetError:
            sides[split] = []
    assert sorted(map(int, [*sides["train"], *sides["test"]])) == list(range(len(shades)))
    seen = {split: {shades[int(name)] for name in ids} for split, ids in sides.items()}
    assert not seen["train"] & seen["test"]


@given(st.lists(st.integers(0, 255), min_size=2, max_size=30, unique=True), st.randoms())
@settings(deadline=None)
def test_split_does_not_depend_on_order_or_names(shades: list[int], random: object) -> None:
    def test_shades(order: list[int]) -> set[int]:
        try:
            part = split_by_content(tiny(order), "test", 0.5)
        except DatasetError:
            return set()
        return {order[int(name)] for name in part.ids}

    other = list(shades)
    random.shuffle(other)
    assert test_shades(shades) == test_shades(other)


def test_empty_part() -> None:
    first_byte = hashlib.sha256(bytes([3])).digest()[0]
    empty = "train" if first_byte < 128 else "test"
    with pytest.raises(DatasetError, match=f"got 0 of 1 items in its {empty} part"):
        split_by_content(tiny([3]), empty, 0.5)


def test_unreadable_items_go_to_both_sides(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L", (1, 1)).save(tmp_path / "a" / "ok.png")
    for number in range(60):
        (tmp_path / "a" / f"{number}.png").symlink_to(tmp_path / "gone.png")
    test = open_source(f"imagefolder:{tmp_path}?split=test&holdout=0.5")
    assert 15 < len(test) < 45
