"""Labels: whole numbers in any wrapping, text that makes classes, none, and values that are refused by name."""

from __future__ import annotations

import decimal
import fractions
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gstds_cache.cli.embed_command import main as embed_main
from PIL import Image
from torchvision import datasets

from gstds_cache.data.labels import NO_LABEL, LabelColumn, LabelError, parse_label
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.mapstyle import MapStyleSource
from gstds_cache.data.sources import open_source
from gstds_cache.errors import DatasetError


def name(value: object) -> str:
    """An id that is the same in every process that collects tests."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value))


@pytest.mark.parametrize(
    "value",
    [
        3,
        3.0,
        np.int8(3),
        np.uint64(3),
        np.float16(3),
        np.float32(3),
        np.longdouble(3),
        np.array(3),
        np.array([3]),
        np.array([[3.0]]),
        [3],
        (3.0,),
        [np.array([np.float32(3)])],
        torch.tensor(3),
        torch.tensor([3.0]),
        torch.tensor([[3]], dtype=torch.bfloat16),
        torch.tensor(3.0, requires_grad=True),
        decimal.Decimal(3),
        fractions.Fraction(6, 2),
    ],
    ids=name,
)
def test_a_whole_number_in_any_wrapping_is_a_label(value: Any) -> None:
    assert parse_label(value) == 3
    assert type(parse_label(value)) is int


@pytest.mark.parametrize("value", [True, np.True_, np.array([True]), torch.tensor(True)], ids=name)
def test_true_is_one(value: Any) -> None:
    assert parse_label(value) == 1


@pytest.mark.parametrize(
    "value", [None, -1, -7, -3.0, math.nan, np.float32("nan"), [None], torch.tensor([-1])], ids=name
)
def test_none_nan_and_negative_numbers_are_no_label(value: Any) -> None:
    assert parse_label(value) == NO_LABEL


@pytest.mark.parametrize(
    "value", ["owl", b"owl", np.str_("owl"), np.array(["owl"]), np.bytes_(b"owl"), ["owl"]], ids=name
)
def test_text_in_any_wrapping(value: Any) -> None:
    assert parse_label(value) == "owl"


HOLDS_ITSELF: list[Any] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)


@pytest.mark.parametrize(
    ("value", "got", "hint"),
    [
        (np.eye(4)[1], r"a float64 array of 4: \[0.0, 1.0", "np.argmax"),
        (torch.eye(4)[1], r"a float32 tensor of 4: \[0.0, 1.0", "np.argmax"),
        (np.zeros(1000), r"a float64 array of 1000: .*\.\.\.\]", "np.argmax"),
        ([0, 1, 0], r"\[0, 1, 0\] \(list\)", "np.argmax"),
        (np.zeros((4, 4)), "a float64 array of 4x4", "segmentation"),
        (np.zeros(0), "a float64 array of 0", "None for an item without"),
        (3.7, r"3.7 \(float\)", "whole number"),
        (np.float32(0.5), "0.5", "whole number"),
        (math.inf, r"inf \(float\)", "whole number"),
        (3j, r"3j \(complex\)", "whole number"),
        (2**63, r"9223372036854775808 \(int\)", "number the classes from 0"),
        (np.uint64(2**63), "9223372036854775808", "number the classes from 0"),
        (1e30, r"1e\+30 \(float\)", "number the classes from 0"),
        ({"boxes": [1]}, r"\{'boxes': \[1\]\} \(dict\)", "detection"),
        (({"boxes": []}, "x"), r"\(tuple\)", "detection"),
        ((), r"\(\) \(tuple\)", "None for an item without"),
        (object(), r"\(object\)", "None for an item without"),
        (Image.new("L", (2, 2)), r"\(Image\)", "segmentation"),
        (np.datetime64(5, "ns"), "a datetime64", "None for an item without"),
        (b"\xff", r"b'\\xff' \(bytes\)", "UTF-8"),
        ("\ud800", r"'\\ud800' \(str\)", "UTF-8"),
        (HOLDS_ITSELF, "list", "None for an item without"),
    ],
    ids=name,
)
def test_the_rest_is_refused_with_the_value_and_what_to_give(value: Any, got: str, hint: str) -> None:
    with pytest.raises(LabelError, match=got) as caught:
        parse_label(value)
    assert hint in caught.value.hint
    assert "\n" not in caught.value.got


class Items:
    """Images, all alike, with the labels given; attributes as they are given."""

    def __init__(self, given: list[Any], **attributes: Any) -> None:
        self.made = given
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, row: int) -> tuple[Image.Image, Any]:
        return Image.new("L", (2, 2), row % 256), self.made[row]


def source_of(given: list[Any], **attributes: Any) -> MapStyleSource:
    return MapStyleSource(Items(given, **attributes), uri="mine:set", kind="module:mine:set")


def test_an_attribute_that_differs_from_the_items_is_not_taken() -> None:
    given = [row % 4 for row in range(60)]
    between = [0, *([1] * 58), 3]  # the first and the last alone are right
    assert source_of(given, targets=between).labels.tolist() == given
    rare = [*given[:33], 0, *given[34:]]
    source = source_of(given, labels=rare)
    for row in range(33):
        source.payload(row)
    with pytest.raises(DatasetError, match=r"\(row 33\): gives the label 1, and the data set had 0 for it before"):
        source.payload(33)


def test_an_attribute_that_is_no_column_of_labels_is_passed_over() -> None:
    given = [row % 4 for row in range(8)]
    for odd in (np.array(7), torch.tensor(7), torch.tensor(given).to_sparse(), torch.empty(8, device="meta"), object()):
        assert source_of(given, targets=odd).labels.tolist() == given


def test_a_masked_value_is_no_label() -> None:
    masked = np.ma.array(np.arange(8) % 4, mask=np.arange(8) % 3 == 0)
    expected = [-1, 1, 2, -1, 0, 1, -1, 3]
    assert source_of(list(masked)).labels.tolist() == expected
    assert source_of(list(masked), targets=masked).labels.tolist() == expected


def test_a_label_whose_own_code_fails_is_refused() -> None:
    class Fails:
        def __index__(self) -> int:
            raise RuntimeError("not now")

        __repr__ = __array__ = __index__  # type: ignore[assignment]

    for label in (Fails(), torch.tensor(1, device="meta")):
        with pytest.raises(LabelError):
            parse_label(label)


def test_class_names_that_utf_8_cannot_express_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"the class name '\\\\xff', expected text that UTF-8 can express"):
        source_of([0, 1], classes=["a", "\udcff"])


def test_text_makes_classes_and_says_so() -> None:
    source = source_of(["owl", "cat", b"owl", None, "dog"])
    assert source.classes == ("cat", "dog", "owl")
    assert source.labels.tolist() == [2, 0, 2, -1, 1]
    assert source.notes == ("labels are text: 3 classes, sorted: cat, dog, owl",)
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.classes, build_manifest(copy).root) == (source.classes, build_manifest(source).root)


def test_text_is_looked_up_in_the_classes_that_there_are() -> None:
    source = source_of(["owl", "cat"], classes=["owl", "dog", "cat"])
    assert (source.labels.tolist(), source.classes) == ([0, 2], ("owl", "dog", "cat"))
    assert source.notes == ("labels are text: each is one of the data set's 3 classes",)
    with pytest.raises(
        DatasetError, match=r"item '0000001' \(row 1\): got the label 'Cat', expected one of .* 2 classes"
    ):
        source_of(["owl", "Cat", "owl"], classes=["owl", "cat"])


@pytest.mark.parametrize("labels", [[0, 1, "owl", 1], ["owl", "cat", 1, "cat"], [-1, "owl", None, 2.0]])
def test_text_beside_numbers_is_refused_with_both_items(labels: list[Any]) -> None:
    with pytest.raises(DatasetError, match=r"'owl' for item '000000\d' \(row \d\) and \d for item '000000\d'"):
        source_of(labels)


@pytest.mark.parametrize(
    "values",
    [
        [2.0, 0.0, 1.0],
        np.array([2.0, 0.0, 1.0], np.float32),
        np.array([[2], [0], [1]]),
        torch.tensor([2.0, 0.0, 1.0]),
        torch.tensor([[2], [0], [1]]),
        (np.int64(2), np.array([0]), torch.tensor(1)),
        np.array([2, 0, 1], object),
    ],
    ids=name,
)
def test_an_attribute_goes_the_same_way_as_items(values: Any) -> None:
    # Of the middle item the attribute alone knows a label: it was taken.
    source = source_of([2, None, 1], targets=values)
    assert source.labels.tolist() == [2, 0, 1]


def test_an_attribute_of_text_and_one_that_is_something_else() -> None:
    assert source_of(["b", None, "a"], labels=["b", "a", "a"]).labels.tolist() == [1, 0, 0]
    # Names where items have numbers, boxes, scores, another number of values: not the items' labels.
    for other in (["b", "a", "a"], [[1, 2], [3, 4], [5, 6]], np.eye(3), [1], "abc", {"a": 1, "b": 2, "c": 3}, iter([])):
        assert source_of([1, 0, 0], targets=other).labels.tolist() == [1, 0, 0]
    with pytest.raises(DatasetError, match=r"item '0000001' \(row 1\): got the label 0.5"):
        source_of([1, None, 0], targets=[1, 0.5, 0])
    assert source_of([1, 0, 0], targets=[1, 0.5, 0]).labels.tolist() == [1, 0, 0]


def test_labels_beyond_the_class_names_are_refused() -> None:
    with pytest.raises(
        DatasetError, match=r"item '0000002' \(row 2\): got the label 12, expected one below 2, .* names 2"
    ):
        source_of([0, 1, 12, 0], classes=["no", "yes"])
    with pytest.raises(DatasetError, match=r"row 1\): got the label 2\b"):
        source_of([0, 2.0], classes=np.array(["no", "yes"]))


def test_many_labels_are_read_a_part_at_a_time() -> None:
    rows = 40_000
    column = LabelColumn(rows, "mine", "item {}".format)
    labels = column.read(f"class {row % 7 * (row > 20_000)}" for row in range(rows))
    assert column.classes == tuple(f"class {number}" for number in range(7))
    assert labels.tolist() == [row % 7 * (row > 20_000) for row in range(rows)]
    with pytest.raises(DatasetError, match="item 39999: got the label 0.5"):
        LabelColumn(rows, "mine", "item {}".format).read([*range(rows - 1), 0.5])
    with pytest.raises(DatasetError, match="got 3 labels, expected one for each of 5 items"):
        LabelColumn(5, "mine", "item {}".format).read(iter([0, 1, 2]))


def test_torchvisions_classes_go_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def targets(give: Any) -> None:
        image = Image.new("RGB", (8, 8))
        monkeypatch.setattr(datasets.FakeData, "__getitem__", lambda _self, row: (image, give(row)))

    targets(lambda row: np.float32(row % 3))
    assert open_source("torchvision:FakeData?size=5").labels.tolist() == [0, 1, 2, 0, 1]
    targets(lambda row: "ab"[row % 2])
    assert open_source("torchvision:FakeData?size=3").classes == ("a", "b")
    targets(lambda _row: {"bbox": torch.zeros(4)})
    with pytest.raises(DatasetError, match=r"item '0000000' \(row 0\): got the label \{'bbox'.*\(dict\)"):
        open_source("torchvision:FakeData?size=3")
    # One that lists its files.
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    files = SimpleNamespace(samples=[(str(tmp_path / "x.png"), "owl"), (str(tmp_path / "x.png"), [1, 0])])
    monkeypatch.setattr(datasets.FakeData, "samples", property(lambda _self: files.samples), raising=False)
    with pytest.raises(DatasetError, match=r"item '.*x.png' \(row 1\): got the label \[1, 0\]"):
        open_source("torchvision:FakeData?size=2")
    files.samples[1] = (str(tmp_path / "x.png"), "ant")
    source = open_source("torchvision:FakeData?size=2")
    assert (source.labels.tolist(), source.classes) == ([1, 0], ("ant", "owl"))
    assert source.notes == ("labels are text: 2 classes, sorted: ant, owl",)


MODULE = """
import numpy as np
from PIL import Image
X = np.random.default_rng(1).integers(0, 255, (24, 16, 16, 3)).astype("uint8")
KINDS = {
    "float": lambda i: float(i % 4), "text": lambda i: "abcd"[i % 4], "none": lambda i: None,
    "some": lambda i: i % 4 if i % 3 else float("nan"), "onehot": lambda i: np.eye(4)[i % 4],
}
def make(kind):
    return [(Image.fromarray(X[i]), KINDS[kind](i)) for i in range(24)]
"""


def test_embedding_says_what_became_of_labels(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labelled_sets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)

    def embed(kind: str, code: int = 0) -> str:
        words = [f"labelled_sets:make?kind={kind}", "--model", tiny_model, "--cache", kind, "--workers", "0"]
        done = CliRunner().invoke(embed_main, [*words, "--device", "cpu", "--batch-size", "8"])
        assert done.exit_code == code, done.output
        return done.output

    assert "note: labels" not in embed("float")
    assert "note: labels are text: 4 classes, sorted" in embed("text")
    assert "note: labels: none; selection goes by the images alone" in embed("none")
    assert "note: labels: 8 of 24 items have none" in embed("some")
    refused = embed("onehot", code=2)
    assert "item '0000000' (row 0): got the label a float64 array of 4" in refused
    assert not (tmp_path / "onehot").exists()
