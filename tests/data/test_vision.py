"""torchvision's data sets, from files laid out on disk as they are after a download."""

from __future__ import annotations

import inspect
import io
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.hashing import UNREADABLE
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import ImageSource, open_source
from gstds_cache.errors import DatasetError, UsageError


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any attempt to download fails the test."""

    def refuse(*_args: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return None


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.Generator(np.random.Philox(1))
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = rng.integers(0, 256, (3, 3072), np.uint8)
        entry = {"data": rows, "labels": [number, 9, 0], "batch_label": name, "filenames": ["a", "b", "c"]}
        (base / name).write_bytes(pickle.dumps(entry, protocol=2))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names, "num_cases_per_batch": 3}, protocol=2))
    # Real checksums belong to the real 60,000 images.
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda *_: True)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})
    return tmp_path


@pytest.mark.parametrize(
    ("query", "labels"),
    [
        ("", [0, 9, 0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0]),
        ("&split=train", [0, 9, 0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0]),
        ("&train=true", [0, 9, 0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0]),
        ("&split=test", [5, 9, 0]),
        ("&train=False", [5, 9, 0]),
    ],
)
def test_cifar10(cifar10: Path, query: str, labels: list[int]) -> None:
    source = open_source(f"torchvision:CIFAR10?root={cifar10}{query}")
    assert source.labels.tolist() == labels
    assert (source.kind, source.mirror_safe) == ("torchvision:CIFAR10", True)
    assert source.classes[9] == "truck"
    assert source.ids[:2] == ("0000000", "0000001")
    # On disk a row is 1024 red values, then green, then blue.
    name = "test_batch" if len(labels) == 3 else "data_batch_1"
    raw = pickle.loads((cifar10 / "cifar-10-batches-py" / name).read_bytes())["data"][1]
    pixels = raw.reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(source.image(1)), pixels)
    assert source.payload(1) == pixels.tobytes()


def test_cifar10_pickled(cifar10: Path) -> None:
    source = open_source(f"torchvision:CIFAR10?root={cifar10}&split=test")
    copy = pickle.loads(pickle.dumps(source))
    assert build_manifest(copy).root == build_manifest(source).root
    assert copy.image(2).tobytes() == source.image(2).tobytes()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    base = tmp_path / "oxford-iiit-pet"
    for part in ("images", "annotations/trimaps"):
        (base / part).mkdir(parents=True)
    lines = {"trainval": ["Abyssinian_1 1 1 1", "beagle_2 2 2 1", "Bombay_3 3 1 2"], "test": ["beagle_9 2 2 1"]}
    for split, rows in lines.items():
        (base / "annotations" / f"{split}.txt").write_text("\n".join(rows) + "\n")
        for row in rows:
            name = row.split()[0]
            (base / "images" / f"{name}.jpg").write_bytes(jpeg(10 * int(name[-1])))
            Image.new("L", (8, 8), 1).save(base / "annotations" / "trimaps" / f"{name}.png")
    return tmp_path


def test_oxford_pets(pets: Path) -> None:
    source = open_source(f"torchvision:OxfordIIITPet?root={pets}&split=trainval")
    assert source.ids == tuple(f"oxford-iiit-pet/images/{n}.jpg" for n in ("Abyssinian_1", "beagle_2", "Bombay_3"))
    assert source.labels.tolist() == [0, 1, 2]
    assert source.classes == ("Abyssinian", "Beagle", "Bombay")
    assert source.payload(2) == jpeg(30)
    assert source.image(2).getpixel((4, 4)) == (30, 30, 30)
    assert open_source(f"torchvision:OxfordIIITPet?root={pets}&split=test").labels.tolist() == [1]


def test_oxford_pets_as_cats_and_dogs(pets: Path) -> None:
    source = open_source(f"torchvision:OxfordIIITPet?root={pets}&target_types=binary-category")
    assert source.labels.tolist() == [0, 1, 0]
    assert source.classes == ("Cat", "Dog")


def test_oxford_pets_with_targets_that_are_no_labels(pets: Path) -> None:
    source = open_source(f"torchvision:OxfordIIITPet?root={pets}&target_types=segmentation")
    assert source.labels.tolist() == [-1, -1, -1]
    assert source.classes == ()
    assert source.payload(0) == jpeg(10)


def test_labels_need_no_decoding(pets: Path) -> None:
    for path in (pets / "oxford-iiit-pet" / "images").iterdir():
        path.write_bytes(b"not a jpeg")
    source = open_source(f"torchvision:OxfordIIITPet?root={pets}")
    assert source.labels.tolist() == [0, 1, 2]
    with pytest.raises(UndecodableError, match="not an image"):
        source.image(0)


def test_deleted_file_is_a_bad_item(pets: Path) -> None:
    (pets / "oxford-iiit-pet" / "images" / "beagle_2.jpg").unlink()
    source = open_source(f"torchvision:OxfordIIITPet?root={pets}")
    assert len(source) == 3
    assert [bytes(digest) == UNREADABLE for digest in build_manifest(source).sha256] == [False, True, False]


def test_file_source_pickled(pets: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(f"torchvision:OxfordIIITPet?root={pets}")))
    assert isinstance(source, ImageSource)
    assert source.payload(0) == jpeg(10)


def test_identity_does_not_depend_on_the_place(pets: Path) -> None:
    before = build_manifest(open_source(f"torchvision:OxfordIIITPet?root={pets}")).root
    moved = pets.rename(pets.with_name("moved + elsewhere"))
    assert build_manifest(open_source(f"torchvision:OxfordIIITPet?root={moved}")).root == before


def test_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for number in range(1, 7):
        (base / "jpg" / f"image_{number:05d}.jpg").write_bytes(jpeg(20 * number))
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 1, 5, 6]])})
    splits = {"trnid": np.array([[2, 1]]), "valid": np.array([[6, 4]]), "tstid": np.array([[3, 5]])}
    scipy.io.savemat(base / "setid.mat", splits)
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda *_: True)
    source = open_source(f"torchvision:Flowers102?root={tmp_path}&split=test")
    assert source.ids == ("flowers-102/jpg/image_00003.jpg", "flowers-102/jpg/image_00005.jpg")
    assert source.labels.tolist() == [101, 4]
    assert source.payload(1) == jpeg(100)
    assert source.classes[0] == "pink primrose"
    assert open_source(f"torchvision:Flowers102?root={tmp_path}").labels.tolist() == [0, 76]


def test_class_with_samples(tmp_path: Path) -> None:
    for name, shade in (("b/x.jpg", 10), ("a/y.jpg", 20)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jpeg(shade))
    source = open_source(f"torchvision:ImageFolder?root={tmp_path}")
    assert source.ids == ("a/y.jpg", "b/x.jpg")
    assert source.labels.tolist() == [0, 1]
    assert source.classes == ("a", "b")
    assert source.payload(0) == jpeg(20)


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's format: a magic number with the type and rank, the sizes, the values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def test_any_other_class_item_by_item(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.Generator(np.random.Philox(2)).integers(0, 256, (5, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array([5, 0, 4, 1, 9]))
    source = open_source(f"torchvision:MNIST?root={tmp_path}&split=test")
    assert source.labels.tolist() == [5, 0, 4, 1, 9]
    assert source.classes[0] == "0 - zero"
    assert source.mirror_safe is False
    rgb = np.repeat(images[3][..., None], 3, axis=2)
    assert source.payload(3) == b"RGB|28x28|" + rgb.tobytes()
    assert np.array_equal(np.asarray(source.image(3)), rgb)
    assert build_manifest(pickle.loads(pickle.dumps(source))).root == build_manifest(source).root


def test_class_without_a_root() -> None:
    source = open_source("torchvision:FakeData?size=4&num_classes=3")
    dataset = datasets.FakeData(size=4, num_classes=3)
    assert source.labels.tolist() == [int(dataset[row][1]) for row in range(4)]
    assert np.array_equal(np.asarray(source.image(2)), np.asarray(dataset[2][0]))


def test_unknown_class() -> None:
    with pytest.raises(
        UsageError, match="unknown torchvision data set 'Cifar10'; there are: CIFAR10, CIFAR100"
    ) as caught:
        open_source("torchvision:Cifar10?root=.")
    assert caught.value.hint == "did you mean 'CIFAR10'?"


@pytest.mark.parametrize("uri", ["torchvision:", "torchvision", "torchvision:VisionDataset?root=.", "torchvision:os"])
def test_no_such_class(uri: str) -> None:
    with pytest.raises(UsageError, match="unknown torchvision data set"):
        open_source(uri)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "got no root, expected root="),
        ("?root=", "got no root, expected root="),
        ("?root=.&download=true", "got download=true, but nothing is downloaded here"),
        ("?root=.&splti=test", "query parameter of data set .* 'splti'; there are: .*train"),
        ("?root=.&transform=os.system", "query parameter of data set .* 'transform'"),
        ("?root=.&self=1", "query parameter of data set .* 'self'"),
        ("?root=.&train=maybe", "got train=maybe, expected true or false"),
        ("?root=.&split=val", "got split=val, expected either split=train or split=test"),
        ("?root=.&split=test&train=true", "expected either split=train or split=test, or train="),
        ("?root=.&root=..", "given more than once: root"),
        ("?root", "expected name=value pairs"),
    ],
)
def test_bad_queries(query: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source("torchvision:CIFAR10" + query)


def test_values_the_class_refuses(pets: Path) -> None:
    with pytest.raises(UsageError, match="Unknown value 'training' for argument split"):
        open_source(f"torchvision:OxfordIIITPet?root={pets}&split=training")
    with pytest.raises(UsageError, match="got size=many, expected a whole number"):
        open_source("torchvision:FakeData?size=many")


def test_strings_of_digits_stay_strings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Unknown value '10' for argument split"):
        open_source(f"torchvision:OxfordIIITPet?root={tmp_path}&split=10")


def test_values_are_converted_by_what_the_constructor_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    class Declares(datasets.FakeData):
        def __init__(self, said: str, number=1, flag=False, text="x", free=None, other=None) -> None:
            super().__init__(size=2)
            seen.append((said, number, flag, text, free, other))

    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(datasets, "Declares", Declares, raising=False)
    open_source("torchvision:Declares?said=1&number=-2&flag=TRUE&text=3&free=4&other=true")
    assert seen == [("1", -2, True, "3", 4, True)]
    with pytest.raises(UsageError, match="got no said, expected said="):
        open_source("torchvision:Declares?number=1")


@pytest.mark.parametrize("name", ["CIFAR10", "OxfordIIITPet", "Flowers102", "SEMEION", "MNIST", "ImageFolder"])
def test_no_data_at_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=f"{name} found no data under {tmp_path}") as caught:
        open_source(f"torchvision:{name}?root={tmp_path}")
    if name != "ImageFolder":
        assert caught.value.hint.endswith(f"{name}('{tmp_path}', download=True)\"")


def test_no_root_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected a folder that exists"):
        open_source(f"torchvision:Caltech101?root={tmp_path / 'nope'}")
    assert not (tmp_path / "nope").exists()


def test_items_that_are_no_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.FakeData, "__getitem__", lambda *_: Image.new("RGB", (8, 8)))
    with pytest.raises(DatasetError, match=r"\(row 0\): not a pair: got Image, expected a pair \(image, label\)"):
        open_source("torchvision:FakeData?size=2")


ODD_QUERIES = (
    "",
    "?root={root}",
    "?root={root}/absent",
    "?root={root}&split=no_such_split",
    "?root={root}&split=train",
    "?root={root}&train=maybe",
    "?root={root}&target_type=bbox&target_types=trimap",
    "?root={root}&num_classes=many&frames_per_clip=ten",
    "?root={root}&frames_per_clip=1&annotation_path={root}/file&annFile={root}/file&ann_file={root}/file",
    "?root={root}&classes=a,b&year=1&mode=x&version=2&background=true&size=-1&image_size=8&num_samples=1e3",
    "?root={root}/file",
    "?download=true&root={root}",
)


def test_no_class_ends_in_a_traceback_whatever_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"neither data nor annotations")
    known = [
        name
        for name, value in vars(datasets).items()
        if isinstance(value, type) and issubclass(value, datasets.VisionDataset)
    ]
    queries = [
        *(query.format(root=tmp_path) for query in ODD_QUERIES),
        *(f"?root={tmp_path}&{key}={value}" for key in ("split", "size", "image_set", "mode") for value in ("x", "7")),
    ]
    refused = opened = tried = 0
    for name in known:
        # Each argument that the class takes, by turns, with text and with a number.
        own = [
            key for key in inspect.signature(getattr(datasets, name).__init__).parameters if key not in {"self", "root"}
        ]
        odd = [f"?root={tmp_path}&{key}={value}" for key in own for value in ("x", "-3", "true", "1,2")]
        for query in (*queries, *odd):
            tried += 1
            try:
                len(open_source(f"torchvision:{name}{query}"))
            except UsageError as error:
                refused += error.exit_code == 2
            else:
                opened += 1
    assert len(known) > 60
    assert refused + opened == tried
    assert refused > 1200
    assert opened < refused / 20  # FakeData's sizes


def test_what_an_odd_argument_raises_inside_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"FakeData\?image_size=8x', item .*: TypeError") as caught:
        open_source("torchvision:FakeData?image_size=8x")
    assert "or its arguments" in caught.value.hint
