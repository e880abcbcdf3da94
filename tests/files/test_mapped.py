"""Mapped temporary files: the same bytes as memory, none of it the process's, and memory where the disk has no room."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gstds_cache.files import mapped

LARGE = mapped.SMALL // 8 + 1  # int64 numbers


def map_object(array: np.ndarray | memoryview) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap)


def resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) << 10


def test_large_arrays_are_mapped_zeros_and_small_ones_memory() -> None:
    for rows in (0, 1, LARGE - 1, LARGE):
        array = mapped.zeros((rows,), np.int64)
        assert not array.any()
        array[:] = np.arange(rows)
        mapped.release(array[rows // 2 :], array)
        assert array.tolist() == list(range(rows))
        assert map_object(array) == (rows == LARGE)
    assert mapped.zeros((LARGE, 4), np.int64).shape == (LARGE, 4)


def test_release_takes_pages_out_of_the_process() -> None:
    array = mapped.zeros((32 << 20,), np.uint8)
    before = resident("RssAnon"), resident("RssFile")
    array[:] = 7
    full = resident("RssAnon"), resident("RssFile")
    mapped.release(array)
    assert full[0] - before[0] < 1 << 20
    assert full[1] - resident("RssFile") > 31 << 20
    assert int(array.sum()) == 7 * len(array)


def test_without_tmpdir_files_lie_in_var_tmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folders() -> list[str]:
        """The folders of the files without a name that this process has mapped."""
        maps = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
        return [str(Path(words[5]).parent) for words in maps if len(words) == 6 and words[5].endswith("(deleted)")]

    before = folders().count("/var/tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    named = mapped.zeros((LARGE,), np.int64)
    assert str(tmp_path) in folders()
    assert folders().count("/var/tmp") == before
    monkeypatch.delenv("TMPDIR")
    default = mapped.zeros((LARGE,), np.int64)
    assert folders().count("/var/tmp") == before + 1
    assert map_object(named)
    assert map_object(default)


@pytest.mark.parametrize("size", [0, 1, mapped.SMALL, mapped.SMALL + 1, 3 * mapped.PIECE + 5])
def test_what_is_written_is_what_is_read(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    got = mapped.written(lambda file: [file.write(data[start : start + 50_000]) for start in range(0, size, 50_000)])
    assert got.readonly
    assert got == data
    assert map_object(got) == (size > mapped.SMALL)
    assert b"".join(mapped.pieces(got)) == data
    assert max(map(len, mapped.pieces(data))) <= mapped.PIECE
    digest = hashlib.sha256()
    for piece in mapped.pieces(got):
        digest.update(piece)
    assert digest.digest() == hashlib.sha256(data).digest()


def test_a_disk_without_room_leaves_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_descriptor: int, _start: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        array = mapped.zeros((LARGE,), np.int64)
        assert not map_object(array)
        assert not array.any()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert map_object(mapped.zeros((LARGE,), np.int64))  # the next place is taken, as Python's own tempfile does
    monkeypatch.setattr(mapped, "folder", lambda: None)
    assert not map_object(mapped.zeros((LARGE,), np.int64))
    assert mapped.written(lambda file: file.write(bytes(mapped.SMALL + 1))) == bytes(mapped.SMALL + 1)


def test_nothing_is_left_behind_by_a_process_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, signal\nfrom gstds_cache.files import mapped\n"
        "kept = mapped.zeros((1 << 20,), 'u1'), mapped.written(lambda file: file.write(bytes(1 << 20)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == -9
    assert not list(tmp_path.iterdir())
