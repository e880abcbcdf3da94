"""The manifest: its root is the data set's identity, and its file is read back or refused."""

from __future__ import annotations

import hashlib
import io
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gstds_cache.data.arrays import ArraySource
from gstds_cache.data.blocks import in_blocks
from gstds_cache.data.hashing import UNREADABLE
from gstds_cache.data.item_hashes import hash_items
from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.errors import IntegrityError


def manifest(
    ids: tuple[str, ...] = ("a", "b", "c"), labels: tuple[int, ...] = (0, -1, 2), salt: bytes = b"", **more: object
) -> DatasetManifest:
    digests = np.frombuffer(b"".join(hashlib.sha256(name.encode() + salt).digest() for name in ids), np.uint8)
    return DatasetManifest(
        kind=more.get("kind", "digits"),
        ids=ids,
        sha256=digests.reshape(len(ids), 32),
        labels=np.array(labels, np.int64),
        classes=more.get("classes", ("zero", "\u00fcber")),
    )


def naive_root(of: DatasetManifest) -> str:
    """RFC 6962's tree, written down recursively over the documented leaves."""

    def leaf(row: int) -> bytes:
        name = of.ids[row].encode()
        label = int(of.labels[row]).to_bytes(8, "big", signed=True)
        return hashlib.sha256(b"\0" + len(name).to_bytes(8, "big") + name + bytes(of.sha256[row]) + label).digest()

    def tree(start: int, stop: int) -> bytes:
        if stop - start == 1:
            return leaf(start)
        half = 1 << (stop - start - 1).bit_length() - 1
        return hashlib.sha256(b"\1" + tree(start, start + half) + tree(start + half, stop)).digest()

    return tree(0, len(of)).hex() if len(of) else hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 13])
def test_root_is_the_documented_one(rows: int) -> None:
    made = manifest(tuple(f"item {n}" for n in range(rows)), tuple(range(-1, rows - 1)))
    assert made.root == naive_root(made)


def test_root_changes_with_order_name_content_label_and_number() -> None:
    roots = [
        manifest().root,
        manifest(("b", "a", "c")).root,
        manifest(("a", "b", "d")).root,
        manifest(salt=b"x").root,
        manifest(labels=(0, -1, 3)).root,
        manifest(("a", "b"), (0, -1)).root,
    ]
    assert len(set(roots)) == len(roots)


def test_root_does_not_change_with_provenance() -> None:
    assert manifest(kind="other", classes=()).root == manifest().root


def test_ids_do_not_run_into_each_other() -> None:
    digest = bytes(32)
    one = DatasetManifest("k", ("a" + digest.decode(),), np.zeros((1, 32), np.uint8), np.zeros(1, np.int64))
    two = DatasetManifest("k", ("a",), np.zeros((1, 32), np.uint8), np.zeros(1, np.int64))
    assert one.root != two.root


@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8")), st.binary(min_size=32, max_size=32), st.integers(-1, 2**62))
    ),
    st.lists(st.text(st.characters(codec="utf-8")), max_size=4),
)
@settings(deadline=None)
def test_round_trip(rows: list[tuple[str, bytes, int]], classes: list[str]) -> None:
    made = DatasetManifest(
        kind="k",
        ids=tuple(name for name, _, _ in rows),
        sha256=np.frombuffer(b"".join(d for _, d, _ in rows), np.uint8).reshape(len(rows), 32),
        labels=np.array([label for _, _, label in rows], np.int64),
        classes=tuple(classes),
    )
    data = made.to_arrow()
    assert made.to_arrow() == data
    back = DatasetManifest.from_arrow(data)
    assert (back.kind, back.ids, back.classes) == (made.kind, made.ids, made.classes)
    assert np.array_equal(back.sha256, made.sha256)
    assert np.array_equal(back.labels, made.labels)
    assert back.root == made.root
    assert back.to_arrow() == data


def test_a_manifest_of_more_than_one_record_batch() -> None:
    rows = 70_000
    made = DatasetManifest(
        kind="k",
        ids=tuple(f"{row:06d}" for row in range(rows)),
        sha256=np.random.default_rng(0).integers(0, 256, (rows, 32), np.uint8),
        labels=np.arange(rows, dtype=np.int64) - 1,
    )
    data = made.to_arrow()
    assert pa.ipc.open_file(io.BytesIO(data)).num_record_batches == 2
    back = DatasetManifest.from_arrow(data)
    assert (back.ids, back.root) == (made.ids, made.root)
    assert np.array_equal(back.sha256, made.sha256)
    assert np.array_equal(back.labels, made.labels)


def test_any_arrow_reader_opens_the_file() -> None:
    table = pa.ipc.open_file(io.BytesIO(manifest().to_arrow())).read_all()
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "string"),
        ("sha256", "fixed_size_binary[32]"),
        ("label", "int64"),
    ]
    assert table.schema.metadata == {b"kind": b"digits", b"classes": '["zero", "\u00fcber"]'.encode()}
    assert table["sha256"][1].as_py() == hashlib.sha256(b"b").digest()


def arrow_file(columns: dict[str, pa.Array], metadata: dict[str, str] | None = None) -> bytes:
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


GOOD = {"id": pa.array(["a"]), "sha256": pa.array([bytes(32)], pa.binary(32)), "label": pa.array([1])}
META = {"kind": "k", "classes": "[]"}


def test_same_columns_written_by_another_program() -> None:
    assert DatasetManifest.from_arrow(arrow_file(GOOD, META)).ids == ("a",)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"ARROW1",
        b"hello",
        manifest().to_arrow()[:-9],
        manifest().to_arrow()[:200],
        arrow_file(GOOD),
        arrow_file(GOOD, {"kind": "k"}),
        arrow_file(GOOD, {**META, "classes": "[1,"}),
        arrow_file({"id": GOOD["id"], "label": GOOD["label"]}, META),
        arrow_file({**GOOD, "more": pa.array([1])}, META),
        arrow_file({**GOOD, "sha256": pa.array([bytes(16)], pa.binary(16))}, META),
        arrow_file({**GOOD, "label": pa.array([None], pa.int64())}, META),
        arrow_file({**GOOD, "id": pa.array([None], pa.utf8())}, META),
        arrow_file({**GOOD, "sha256": pa.array([None], pa.binary(32))}, META),
    ],
)
def test_damaged_files_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="manifest of items is damaged"):
        DatasetManifest.from_arrow(data)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match=r"manifest of 2 ids: got sha256 \(3, 32\) and labels \(3,\)"):
        DatasetManifest("k", ("a", "b"), np.zeros((3, 32), np.uint8), np.zeros(3, np.int64))


def source(rows: int) -> ArraySource:
    return ArraySource(
        uri="tiny",
        kind="tiny",
        ids=tuple(f"{row}" for row in range(rows)),
        labels=np.arange(rows),
        pixels=np.arange(rows * 4, dtype=np.uint32).view(np.uint8).reshape(rows, 4, 4),
        classes=("a",),
    )


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_build_keeps_order(threads: int) -> None:
    items = source(1234)
    built = build_manifest(items, threads=threads)
    expected = [hashlib.sha256(items.pixels[row].tobytes()).digest() for row in range(1234)]
    assert [bytes(digest) for digest in built.sha256] == expected
    assert (built.ids, built.kind, built.classes) == (items.ids, "tiny", ("a",))
    assert np.array_equal(built.labels, items.labels)
    assert len(built) == 1234


@pytest.mark.parametrize(
    ("alone", "beside", "several"),
    [(0.01, 0.01, True), (0.001, 0.01, False)],  # waiting for a disk; handing a lock to each other
    ids=["waits", "contends"],
)
def test_threads_hash_where_they_are_quicker(alone: float, beside: float, several: bool) -> None:
    """A block takes ``alone`` seconds in this thread, ``beside`` in each of four that run side by side."""
    seen: list[tuple[int, int]] = []
    told: list[int] = []

    def work(block: range) -> None:
        here = threading.get_ident() == me
        time.sleep(alone if here else beside)
        seen.append((block.start, threading.get_ident()))

    me, rows = threading.get_ident(), 6050
    in_blocks(work, rows, lambda done, total: told.append(done) or total, 4)
    assert sorted(start for start, _ in seen) == list(range(0, rows, 100))
    assert told == [*range(100, 6001, 100), 6050]
    rest = [thread == me for start, thread in seen if start >= 3200]  # after both trials
    assert (sum(rest) < len(rest) / 2) == several  # a machine that is busy may try both again


def test_where_other_files_begin_it_is_found_out_again() -> None:
    """Files that are known are looked at, and not read; those behind them wait for the disk."""
    me, rest = threading.get_ident(), set()

    def work(block: range) -> None:
        time.sleep(0.01 if block.start >= 5000 else 0.0005 if threading.get_ident() == me else 0.005)
        if block.start >= 14_000:
            rest.add(threading.get_ident())

    in_blocks(work, 16_000, None, 4)
    assert len(rest - {me}) > 1


@pytest.mark.parametrize("rows", [1, 100, 101, 1234])
def test_progress(rows: int) -> None:
    calls: list[tuple[int, int]] = []
    threads: set[int] = set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.get_ident())

    build_manifest(source(rows), progress=progress)
    assert calls == [(min(done, rows), rows) for done in range(100, rows + 100, 100)]
    assert threads == {threading.get_ident()}


class Failing(ArraySource):
    """Raises for item 7."""

    error: Exception = OSError(5, "Input/output error")

    def payload(self, row: int) -> bytes:
        if row == 7:
            raise self.error
        return super().payload(row)


def test_unreadable_items_are_marked() -> None:
    items = Failing(**vars(source(9)))
    digests = hash_items(items)
    assert [bytes(digest) == UNREADABLE for digest in digests] == [row == 7 for row in range(9)]


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "error", KeyError("a bug"))
    with pytest.raises(KeyError, match="a bug"):
        build_manifest(Failing(**vars(source(9))))


def test_root_of_the_digits_is_the_same_everywhere() -> None:
    built = build_manifest(open_source("digits"))
    assert built.root == naive_root(built)
    assert built.root == "dcef319fdd8db76e3b9945cc56fe59e7e0d16f7b61b31b56ef4d91b31a12f9a5"


def test_one_changed_pixel_changes_the_root(tmp_path: object) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("L", (4, 4), 1).save(folder / "x.png")
    before = build_manifest(open_source(f"imagefolder:{tmp_path}")).root
    assert build_manifest(open_source(f"imagefolder:{tmp_path}")).root == before
    image = Image.new("L", (4, 4), 1)
    image.putpixel((0, 0), 2)
    image.save(folder / "x.png")
    assert build_manifest(open_source(f"imagefolder:{tmp_path}")).root != before
