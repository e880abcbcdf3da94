"""Tar archives as writers write them: members where tarfile finds them, and archives that are cut, damaged or none."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gstds_cache.data import tar_index
from gstds_cache.data.shard_reading import _Stream
from gstds_cache.data.tar_index import BLOCK, TarError, TarIndex, TarScan, read_at

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(members: list[tuple[str, bytes]], form: str = "pax") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[form]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def scan(data: bytes, **options: object) -> TarScan:
    return TarScan(lambda offset, size: data[offset : offset + size], len(data), **options).run()  # type: ignore[arg-type]


def members(index: TarIndex) -> list[tuple[str, str, int, int]]:
    return [
        (index.key(int(sample)).decode(), index.extensions[int(code)], int(offset), int(size))
        for sample, code, offset, size in zip(index.sample, index.extension, index.offset, index.size, strict=True)
    ]


LONG = "folder/" * 30 + "0001"


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_where_tarfile_finds_them(form: str) -> None:
    names = [
        "a/0001.jpg",
        "a/0001.cls",
        "b.c/0002.seg.PNG",
        ("folder/" * 20 if form == "ustar" else LONG + "/") + "3.jpg",
    ]
    names += [] if form == "ustar" else ["größe/ß.jpg", "n" * 300 + ".jpg"]
    data = archive([(name, os.urandom(place * 700)) for place, name in enumerate(names)], form)
    index = scan(data).index
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(f"{key}.{name}", offset, size) for key, name, offset, size in members(index)] == [
        (name.replace("PNG", "png"), offset, size) for name, offset, size in expected
    ]
    assert len(index) == len(names) - 1
    again = TarIndex.from_bytes(index.to_bytes())
    assert members(again) == members(index)
    assert list(again.all_keys()) == [index.key(sample) for sample in range(len(index))]
    assert (again.extensions, again.ignored) == (index.extensions, index.ignored)


def test_what_is_no_member() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "a"), (tarfile.SYMTYPE, "a/l.jpg"), (tarfile.FIFOTYPE, "p.jpg")):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        for name in ("__meta__/1.jpg", "README", "a/.hidden", "a/1.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    index = scan(file.getvalue()).index
    assert [key for key, *_ in members(index)] == ["a/1"]
    expected = {"folders": 1, "links": 1, "pipes": 1, "files of metadata": 1, "files without an extension": 2}
    assert index.ignored == expected


def test_more_members_than_are_checked_at_a_time_and_a_size_in_base_256(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "_CHECKED", 8)
    data = bytearray(archive([(f"{number:05d}.txt", b"x") for number in range(100)], "ustar"))
    assert len(scan(bytes(data)).index) == 100
    size = data[124:136]
    data[124:136] = b"\x80" + (1).to_bytes(11, "big")
    checksum = sum(data[:148]) + sum(data[156:512]) + 8 * 32
    data[148:156] = f"{checksum:06o}\0 ".encode()
    assert size != data[124:136]
    assert members(scan(bytes(data)).index)[0] == ("00000", "txt", 512, 1)


def test_contents_and_digests_also_of_a_stream(tmp_path: Path) -> None:
    written = [(f"{number}.{kind}", os.urandom(number * 9000)) for number in range(6) for kind in ("jpg", "cls")]
    data = archive(written)
    (tmp_path / "a.tar").write_bytes(data)
    descriptor = os.open(tmp_path / "a.tar", os.O_RDONLY)
    pieces = iter([data[start : start + 3000] for start in range(0, len(data), 3000)])
    try:
        for read in (read_at(descriptor), _Stream(pieces)):
            found = TarScan(read, len(data), wanted="cls".__eq__, hashed="jpg".__eq__).run()
            assert found.contents == {2 * number + 1: written[2 * number + 1][1] for number in range(6)}
            assert found.digests == {2 * number: hashlib.sha256(written[2 * number][1]).digest() for number in range(6)}
    finally:
        os.close(descriptor)


THREE = archive([("1.jpg", b"a" * 700), ("1.cls", b"1"), ("2.jpg", b"b" * 40)], "ustar")
END = 2 * BLOCK + 512 + 2 * BLOCK + 2 * BLOCK  # of the last member


@pytest.mark.parametrize("length", [*range(1, END + 1, 397), BLOCK, 3 * BLOCK, 5 * BLOCK, END, END + 511])
def test_an_archive_that_is_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(TarError, match="was cut off|is no tar archive"):
        scan(THREE[:length])
    assert len(scan(THREE[: END + BLOCK]).index) == 2


@given(st.integers(0, 3 * BLOCK - 1).filter(lambda at: at % 1536 < BLOCK), st.integers(1, 255))
@settings(max_examples=20)
def test_a_damaged_header_is_refused(at: int, change: int) -> None:
    data = bytearray(THREE)
    data[at] ^= change
    try:
        index = scan(bytes(data)).index
    except TarError:
        return
    assert members(index) == members(scan(THREE).index)  # a blank for a zero in the checksum


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no tar archive: it has 0 bytes"),
        (b"\x1f\x8b" + bytes(1000), "is compressed \\(gzip\\), expected a plain tar archive"),
        (b"text" * 1000, "is no tar archive: its first 512 bytes"),
        (THREE[:1536] + b"x" * 512 + THREE[2048:], "no member's header at byte 1536"),
        (THREE + THREE, "goes on after its end at byte"),
        (archive([("1.jpg", b""), ("1.JPG", b"")]), "has the member '1.JPG' twice"),
    ],
)
def test_what_is_no_archive(data: bytes, message: str) -> None:
    with pytest.raises(TarError, match=message):
        scan(data)


def test_pax_records_that_are_none() -> None:
    data = bytearray(archive([("n" * 300 + ".jpg", b"x")], "pax"))
    data[BLOCK : BLOCK + 3] = b"zzz"
    with pytest.raises(TarError, match="PAX records at byte 512"):
        scan(bytes(data))


def test_an_index_of_another_kind() -> None:
    good = scan(THREE).index.to_bytes()
    for data in (b"", good[:-1], good + b"1", b"\1" + good):
        with pytest.raises((ValueError, KeyError, TypeError)):
            TarIndex.from_bytes(data)
    assert np.array_equal(TarIndex.from_bytes(good).size, [700, 1, 40])
