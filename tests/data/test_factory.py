"""A user's own data set: found, called, adapted, and refused with a reason where it cannot be meant."""

from __future__ import annotations

import pickle
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.hashing import UNREADABLE
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import ImageSource, open_source
from gstds_cache.errors import DatasetError, UsageError

MODULE = """
    import numpy as np, torch
    from PIL import Image

    GREY = np.arange(6, dtype=np.uint8).reshape(2, 3)
    RGB = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)

    class Items:
        def __init__(self, items):
            self.items = items
        def __len__(self):
            return len(self.items)
        def __getitem__(self, row):
            item = self.items[row]
            if isinstance(item, Exception):
                raise item
            return item

    class Named(Items):
        ids = ["first", "second"]
        classes = ["no", "yes"]
        mirror_safe = False

    def kinds():
        return Items([
            (GREY, 0), (GREY[..., None], np.int64(1)), (RGB, torch.tensor(2)),
            (torch.from_numpy(RGB.transpose(2, 0, 1).copy()), 3), (torch.from_numpy(GREY), 4),
            (Image.fromarray(RGB), True), (Image.new("LA", (3, 2), (0, 0)), float("nan")),
            (np.dstack([RGB, np.zeros((2, 3), np.uint8)]), None),
        ])

    def named(shade="7"):
        return Named([(np.full((2, 2), int(shade), np.uint8), 1), (GREY, 0)])

    def with_targets(right="yes"):
        items = Items([(GREY, 3), (RGB, 1), (GREY, 2)])
        items.targets = [3, 1, 2] if right == "yes" else [0, 1, 2]
        return items

    def damaged():
        return Items([OSError(5, "Input/output error"), (GREY, 1), SyntaxError("broken PNG file"), (RGB, 2)])

    def buggy():
        class Buggy(Items):
            def __getitem__(self, row):
                return (GREY, 0) if row != 1 else (gray, 0)
        return Buggy([0, 0, 0])

    def augmented():
        class Random(Items):
            def __getitem__(self, row):
                return np.random.default_rng().integers(0, 256, (8, 8), np.uint8), 0
        return Random([0, 0])

    def one(what):
        return Items([(eval(what), 0)])

    def unpicklable():
        items = Items([(GREY, 0), (RGB, 1)])
        items.transform = lambda image: image
        return items

    def raw(what):
        return eval(what)

    def lazy():
        import neighbour
        return Items([(neighbour.IMAGE, 0)])
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current directory of a user with ``userdata.py`` in it."""
    (tmp_path / "userdata.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "neighbour.py").write_text("import numpy as np\nIMAGE = np.zeros((2, 2), np.uint8)\n")
    (tmp_path / "needs.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield
    assert sys.path == before
    for name in ("userdata", "neighbour", "needs"):
        sys.modules.pop(name, None)


def test_every_kind_of_image_and_label() -> None:
    source = open_source("userdata:kinds")
    grey = np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1), 3, axis=2)
    rgb = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    white = np.full((2, 3, 3), 255, np.uint8)
    for row, expected in enumerate((grey, grey, rgb, rgb, grey, rgb, white, white)):
        assert np.array_equal(np.asarray(source.image(row)), expected), row
        assert source.payload(row) == b"RGB|3x2|" + expected.tobytes(), row
    assert source.labels.tolist() == [0, 1, 2, 3, 4, 1, -1, -1]
    assert source.ids[0] == "0000000"
    assert len(source) == 8


def test_attributes_and_parameters() -> None:
    source = open_source("userdata:named?shade=12")
    assert (source.ids, source.classes, source.mirror_safe) == (("first", "second"), ("no", "yes"), False)
    assert source.image(0).getpixel((0, 0)) == (12, 12, 12)
    assert (source.kind, source.uri) == ("module:userdata:named", "userdata:named?shade=12")
    assert open_source("module:userdata:named").image(0).getpixel((0, 0)) == (7, 7, 7)


def test_split_belongs_to_the_factory() -> None:
    with pytest.raises(
        DatasetError, match=r"userdata:kinds\(split='test'\) failed: .*unexpected keyword argument"
    ) as caught:
        open_source("userdata:kinds?split=test")
    assert "passed to the factory by name" in caught.value.hint


@pytest.mark.parametrize("right", ["yes", "no"])
def test_labels_come_from_items_where_an_attribute_disagrees(right: str) -> None:
    assert open_source(f"userdata:with_targets?right={right}").labels.tolist() == [3, 1, 2]


def test_damaged_items_keep_their_rows() -> None:
    source = open_source("userdata:damaged")
    assert source.labels.tolist() == [-1, 1, -1, 2]
    assert [bytes(digest) == UNREADABLE for digest in build_manifest(source).sha256] == [True, False, True, False]
    for row, reason in ((0, "unreadable: Input/output error"), (2, "unreadable: SyntaxError")):
        with pytest.raises(UndecodableError) as caught:
            source.image(row)
        assert caught.value.reason == reason


def test_fault_of_the_users_code_is_not_hidden() -> None:
    with pytest.raises(
        DatasetError, match=r"item '0000001' \(row 1\): NameError: name 'gray' is not defined"
    ) as caught:
        open_source("userdata:buggy")
    assert "(userdata.py:" in caught.value.message


def test_random_transforms_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"item '0000000' \(row 0\): got two different images") as caught:
        open_source("userdata:augmented")
    assert "augmentation comes after the cache" in caught.value.hint


@pytest.mark.parametrize(
    ("what", "got"),
    [
        ("torch.zeros(3,4,4)", "a tensor of float32 3x4x4"),
        ("GREY.astype(float)", "a value of float64 2x3"),
        ("GREY[0]", "a value of uint8 3"),
        ("np.zeros((4,4,2),np.uint8)", "a value of uint8 4x4x2"),
        ("np.zeros((0,4),np.uint8)", "a value of uint8 0x4"),
        ("'a path'", "a value of str"),
    ],
)
def test_images_that_are_none(what: str, got: str) -> None:
    with pytest.raises(DatasetError, match=f"got an image that is {got}, expected a PIL image, a uint8 array"):
        open_source(f"userdata:one?what={what}")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("None", "got a NoneType, expected an object with __len__ and __getitem__"),
        ("(x for x in ())", "got a generator, expected an object with __len__"),
        ("[]", "got 0 items, expected at least 1"),
        ("[GREY]", r"item '0000000' \(row 0\): not a pair: got ndarray, expected a pair \(image, label\)"),
        ("[(GREY,1,2)]", r"row 0\): not a pair: got 3 values, expected a pair"),
        ("Named([(GREY,0)])", "got 2 ids, 2 of them different, expected 1 different ones"),
    ],
)
def test_datasets_that_are_none(what: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_source(f"userdata:raw?what={what}")


def test_missing_module_and_factory() -> None:
    with pytest.raises(DatasetError, match="module 'userdat:named'; there are: .*imagefolder:PATH"):
        open_source("userdat:named")
    with pytest.raises(DatasetError, match="module userdata 'kindz'; there are: kinds,") as caught:
        open_source("userdata:kindz")
    assert caught.value.hint == "did you mean 'kinds'?"
    with pytest.raises(DatasetError, match="imports what is not installed: No module named 'surely_not_installed'"):
        open_source("needs:anything")


def test_factory_may_import_its_neighbours() -> None:
    assert len(open_source("userdata:lazy")) == 1


def image_bytes(source: ImageSource, row: int) -> bytes:
    return source.image(row).tobytes()


def test_pickled_to_a_process_that_starts_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("userdata:named")
    expected = image_bytes(source, 1)
    data = pickle.dumps(source)
    monkeypatch.chdir("/")
    del sys.modules["userdata"]
    copy = pickle.loads(data)
    assert copy.image(1).tobytes() == expected
    assert (copy.ids, copy.labels.tolist()) == (source.ids, source.labels.tolist())


def test_dataset_that_cannot_be_pickled() -> None:
    source = open_source("userdata:unpicklable")
    assert len(source) == 2
    with pytest.raises(DatasetError, match="cannot be sent to worker processes") as caught:
        pickle.dumps(source)
    assert caught.value.hint == "decode in this process: pass `workers=0`"


def test_items_are_read_one_at_a_time() -> None:
    source = open_source("userdata:raw?what=Items([(GREY,0)]*300)")
    inside, most = [0], [0]

    class Counting:
        def __len__(self) -> int:
            return 300

        def __getitem__(self, row: int) -> tuple[Image.Image, int]:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.0005)
            inside[0] -= 1
            return Image.new("L", (2, 2), row % 256), 0

    source._dataset = Counting()
    build_manifest(source, threads=4)
    assert most[0] == 1


@pytest.mark.parametrize("uri", ["a b:c", "1x:y", "userdata:", ":named", "userdata", "userdata:named:more"])
def test_names_that_are_no_factory(uri: str) -> None:
    with pytest.raises(UsageError, match="unknown data set"):
        open_source(uri)
