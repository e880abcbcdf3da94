"""One bad item of a user's own data set: quarantined like an image file; wrong code is told with row and id."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from gstds_cache.cli.embed_command import main as embed_main
from gstds_cache.cli.train_command import main as train_main
from PIL import Image

from gstds_cache.config import SelectConfig
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.mapstyle import MapStyleSource
from gstds_cache.data.sources import open_source
from gstds_cache.errors import DatasetError, IncompleteError
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.writer import write_file

MODULE = """
import io, os, struct, zipfile
import numpy as np, torch
from PIL import Image

X = np.random.default_rng(1).integers(0, 255, (40, 16, 16, 3)).astype("uint8")
HOME = os.getpid()


def png(row, cut=None):
    file = io.BytesIO()
    Image.fromarray(X[row]).save(file, "PNG")
    return file.getvalue()[:cut]


def fail(error):
    raise error


BAD = {
    "value": lambda i: fail(ValueError("buffer at 0x7f00 of /data/somewhere/y.jpg is short")),
    "member": lambda i: zipfile.ZipFile(io.BytesIO(b"PK\\5\\6" + bytes(18))).read("y.jpg"),
    "runtime": lambda i: fail(RuntimeError("decoder: corrupt frame")),
    "index": lambda i: [][i],
    "stop": lambda i: next(iter(())),
    "assertion": lambda i: fail(AssertionError("no image")),
    "struct": lambda i: struct.unpack("<Q", b"1"),
    "file": lambda i: open(f"/nowhere/{i}.png", "rb"),
    "cut": lambda i: Image.open(io.BytesIO(png(i, 200))),
    "nothing": lambda i: None,
    "float": lambda i: X[i] / 255,
    "two": lambda i: X[i][..., :2],
    "five": lambda i: np.zeros((4, 4, 5), "uint8"),
    "empty": lambda i: X[i][:0],
    "flat": lambda i: Image.new("RGB", (0, 5)),
    "code": lambda i: undefined_name,
    "type": lambda i: X[i] + None,
    "method": lambda i: X[i].permute(2, 0, 1),
    "missing": lambda i: __import__("surely_not_installed"),
    "files": lambda i: fail(OSError(24, "Too many open files")),
    "memory": lambda i: fail(MemoryError("Unable to allocate 9 GiB")),
}


class Mine:
    def __init__(self, kind, bad="37", only_in_a_worker=""):
        self.kind, self.bad, self.workers_only = kind, range(40) if bad == "all" else [int(bad)], only_in_a_worker
        self.ids = [f"photo {row}" for row in range(40)]
        self.targets = [row % 4 for row in range(40)]

    def __len__(self):
        return 40

    def __getitem__(self, row):
        there = not self.workers_only or os.getpid() != HOME
        if row in self.bad and there and self.kind == "no pair":
            return None
        return BAD[self.kind](row) if row in self.bad and there else Image.open(io.BytesIO(png(row))), row % 4


def attribute(name, what):
    mine = Mine("value", "-1")
    setattr(mine, name, eval(what))
    return mine


def broken(what):
    class Broken(Mine):
        pass
    def now(self):
        raise ValueError("not now")
    setattr(Broken, what, now if what == "__len__" else property(now))
    made = Broken.__new__(Broken)
    made.kind, made.bad, made.workers_only = "value", (), ""
    return made


def lies(rows):
    class Lies(list):
        def __len__(self):
            return int(rows)
    return Lies((X[row], row % 4) for row in range(40))


def never():
    return open("/nowhere/list.csv")


def calls_wrongly():
    return len(3)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "bad_items.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("bad_items", None)


def embed(tiny_model: str, dataset: str, code: int, workers: int = 0, store: str = "store") -> str:
    words = [dataset, "--model", tiny_model, "--cache", store, "--device", "cpu", "--batch-size", "8"]
    done = CliRunner().invoke(embed_main, [*words, "--shard-rows", "16", "--workers", str(workers)])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


QUARANTINED = {
    "value": "unreadable: ValueError: buffer of y.jpg is short",
    "member": "unreadable: KeyError: \"There is no item named 'y.jpg' in the archive\"",
    "runtime": "unreadable: RuntimeError: decoder: corrupt frame",
    "index": "unreadable: IndexError: list index out of range",
    "stop": "unreadable: StopIteration",
    "assertion": "unreadable: AssertionError: no image",
    "struct": "unreadable: error",
    "file": "unreadable: No such file or directory",
    "cut": "unreadable: OSError",
    "nothing": "not an image: got an image that is a value of NoneType",
    "float": "not an image: got an image that is a value of float64 16x16x3",
    "two": "not an image: got an image that is a value of uint8 16x16x2",
    "five": "not an image: got an image that is a value of uint8 4x4x5",
    "empty": "not an image: got an image that is a value of uint8 0x16x3",
    "flat": "not an image: got an image of 0x5 pixels",
    "no pair": "not a pair: got NoneType",
}


@pytest.mark.parametrize("kind", QUARANTINED)
def test_an_item_that_cannot_be_read_is_quarantined(kind: str, tiny_model: str) -> None:
    said = embed(tiny_model, f"bad_items:Mine?kind={kind.replace(' ', '%20')}", 0)
    store = EmbeddingStore("store")
    (only,) = store.quarantined
    assert (only.row, only.id) == (37, "photo 37")
    assert only.reason.startswith(QUARANTINED[kind])
    assert store.valid.tolist() == [2 if row == 37 else 1 for row in range(40)]
    assert store.labels.tolist() == [row % 4 for row in range(40)]
    assert "e.g. photo 37: " in said


def test_in_a_worker_as_well(tiny_model: str) -> None:
    embed(tiny_model, "bad_items:Mine?kind=runtime", 0, workers=2)
    assert [bad.row for bad in EmbeddingStore("store").quarantined] == [37]


FAULTS = {
    "code": "NameError: name 'undefined_name' is not defined",
    "type": "TypeError: unsupported operand type",
    "method": "AttributeError: 'numpy.ndarray' object has no attribute 'permute'",
    "missing": "ModuleNotFoundError: No module named 'surely_not_installed'",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_wrong_code_ends_the_run_and_names_item_and_line(kind: str, tiny_model: str) -> None:
    said = embed(tiny_model, f"bad_items:Mine?kind={kind}", 2)
    line = next(n for n, text in enumerate(MODULE.splitlines(), 1) if text.strip().startswith(f'"{kind}":'))
    assert f"bad_items:Mine?kind={kind}', item 'photo 37' (row 37): {FAULTS[kind]}" in said
    assert f"(bad_items.py:{line})" in said
    assert "mend it, or its arguments, then run the same command again" in said


def test_wrong_code_that_only_a_worker_runs(tiny_model: str) -> None:
    said = embed(tiny_model, "bad_items:Mine?kind=code&only_in_a_worker=yes", 2, workers=1)
    assert "item 'photo 37' (row 37): NameError" in said
    assert "(bad_items.py:" in said
    assert "Original" not in said


@pytest.mark.parametrize(("kind", "said"), [("files", "Too many open files"), ("memory", "Unable to allocate 9 GiB")])
def test_what_runs_out_is_no_fault_of_the_item(kind: str, said: str, tiny_model: str) -> None:
    assert f"item 'photo 37' (row 37) could not be read: {'OSError' if kind == 'files' else 'MemoryError'}" in embed(
        tiny_model, f"bad_items:Mine?kind={kind}", 4
    )
    with pytest.raises(IncompleteError, match=said):
        open_source(f"bad_items:Mine?kind={kind}&bad=0")


@pytest.mark.parametrize("kind", [*QUARANTINED, *FAULTS])
def test_a_data_set_of_which_every_item_fails_alike_is_refused(kind: str) -> None:
    with pytest.raises(DatasetError, match=r"item 'photo 0' \(row 0\): ") as caught:
        open_source(f"bad_items:Mine?kind={kind.replace(' ', '%20')}&bad=all")
    assert caught.value.hint
    if kind in QUARANTINED:
        assert "so it is with all 8 items that were tried" in caught.value.message


class _Panic(BaseException):
    """As libraries written in Rust raise."""


class _Odd:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        if row == 37:
            raise self.error
        return Image.new("L", (8, 8), row), 0


@pytest.mark.parametrize("error", [ValueError("cannot read \udcff.png"), _Panic("index out of bounds")])
def test_names_in_another_encoding_and_what_is_no_exception(error: BaseException) -> None:
    source = MapStyleSource(_Odd(error), uri="mine", kind="module:mine")
    with pytest.raises(UndecodableError) as caught:
        source.image(37)
    assert caught.value.reason.encode().decode() == caught.value.reason
    assert type(error).__name__ in caught.value.reason


@pytest.mark.parametrize("row", [0, 39])
def test_the_first_or_the_last_item_alone_is_no_fault_of_the_data_set(row: int) -> None:
    source = open_source(f"bad_items:Mine?kind=value&bad={row}")
    assert source.labels.tolist() == [row % 4 for row in range(40)]


def test_training_on_such_an_item(tiny_model: str, tmp_path: Path) -> None:
    embed(tiny_model, "bad_items:Mine?kind=value", 0)
    config = SelectConfig(batch_size=13, epochs=1, knn=4, schedule="constant:0.25", guidance="none", device="cpu")
    list(write_file(BatchSelector(EmbeddingStore("store"), config), tmp_path / "s.arrow"))

    def train(dataset: str, code: int, budget: str, selection: str = "w.arrow") -> str:
        words = [dataset, "--selection", selection, "--arch", "conv3", "--device", "cpu", "--out", f"run{budget}"]
        done = CliRunner().invoke(train_main, [*words, "--workers", "1", "--threads", "1", "--memory-budget", budget])
        assert done.exit_code == code, done.output
        return done.output

    train("bad_items:Mine?kind=value", 0, "64", "s.arrow")  # it was quarantined, and so is not selected
    embed(tiny_model, "bad_items:Mine?kind=code&bad=-1", 0, store="whole")
    list(write_file(BatchSelector(EmbeddingStore("whole"), config), tmp_path / "w.arrow"))
    with open_selection(tmp_path / "w.arrow") as stream:
        row = int(next(iter(stream)).kept[3])
    # In the process that hashes it is fine; in the one that decodes for training it is not.
    for kind, told in (
        ("code", f"item 'photo {row}' (row {row}): NameError: name 'undefined_name' is not defined"),
        ("value", f"row {row} (photo {row}) could be read when it was hashed, and cannot now"),
    ):
        assert told in train(f"bad_items:Mine?kind={kind}&bad={row}&only_in_a_worker=yes", 2, "0")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "attribute?name=ids&what=(str(i) for i in range(40))",
            "an attribute 'ids' that is a generator, expected a list",
        ),
        ("attribute?name=ids&what=5", "an attribute 'ids' that is a int, expected a list of 40 names"),
        ("attribute?name=ids&what=set(range(40))", "an attribute 'ids' that is a set"),
        ("attribute?name=ids&what='x'*40", "an attribute 'ids' that is a str"),
        ("attribute?name=ids&what=[None]*40", "got the id None for row 0, expected text or a number"),
        ("attribute?name=ids&what=list(range(39))%2B[object()]", "got the id <object object at .*> for row 39"),
        ("broken?what=ids", r"its attribute 'ids': ValueError: not now \(bad_items.py:\d+\)"),
        ("broken?what=classes", "its attribute 'classes': ValueError: not now"),
        ("broken?what=targets", "its attribute 'targets': ValueError: not now"),
        ("broken?what=mirror_safe", "its attribute 'mirror_safe': ValueError: not now"),
        ("broken?what=__len__", r"its __len__: ValueError: not now \(bad_items.py:\d+\)"),
        (
            "lies?rows=41",
            r"item '0000040' \(row 40\): its __len__ gives 41, and the last item is not there: IndexError",
        ),
        ("lies?rows=4000", r"item '0003999' \(row 3999\): its __len__ gives 4000"),
        ("never", r"the call bad_items:never\(\) failed: FileNotFoundError: .* \(bad_items.py:\d+\)"),
        (
            "calls_wrongly",
            r"calls_wrongly\(\) failed: TypeError: object of type 'int' has no len\(\) \(bad_items",
        ),
        ("never?really=yes", r"the call bad_items:never\(really='yes'\) failed: got an unexpected keyword argument"),
    ],
)
def test_attributes_lengths_and_factories_that_fail(uri: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_source(f"bad_items:{uri}")
