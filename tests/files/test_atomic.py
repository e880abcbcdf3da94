"""A file that is replaced whole: by two at once, after a failure, with the umask's mode, and durable where asked."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from gstds_cache.files import atomic
from gstds_cache.files.atomic import atomic_create, atomic_write, discard_leftovers


def fail(file: BinaryIO, error: BaseException) -> None:
    file.write(b"new")
    raise error


def test_two_that_write_one_file_at_once_write_two_and_leave_one(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with atomic_write(path, durable=False) as one:
        with atomic_write(path, durable=False) as two:
            assert len(list(tmp_path.glob(".x.npy.*.tmp"))) == 2
            one.write(b"one")
            two.write(b"two")
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one"


@pytest.mark.parametrize("kind", [OSError, KeyError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    error = kind(errno.ENOSPC, "full")
    with pytest.raises(kind), atomic_write(path, durable=True) as file:
        fail(file, error)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as caught, atomic_write(tmp_path / "x", durable=False):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_the_mode(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a", durable=False) as file:
            file.write(b"1")
        atomic_create(tmp_path / "b", b"1")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {mode}


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_file_and_its_name_are_flushed_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    seen: list[str] = []

    def flush(descriptor: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        # The name is not there before the bytes are on the disk.
        assert (tmp_path / "x").exists() == (seen[-1] == "folder")

    monkeypatch.setattr(os, "fsync", flush)
    with atomic_write(tmp_path / "x", durable=durable) as file:
        file.write(b"1")
    assert seen == (["file", "folder"] if durable else [])
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_file_is_created_once(tmp_path: Path) -> None:
    assert atomic_create(tmp_path / "x", b"one")
    assert not atomic_create(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_leftovers_of_killed_processes_go_and_those_of_others_stay(tmp_path: Path) -> None:
    for name in (".x.npy.123-0123abcd.tmp", ".x.npy.124-0123abcd.tmp", ".y.npy.125-0123abcd.tmp", ".x.npy.tmp"):
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / ".x.npy.123-0123abcd.tmp", (0, 0))
    discard_leftovers(tmp_path / "x.npy")
    assert not (tmp_path / ".x.npy.123-0123abcd.tmp").exists()
    assert (tmp_path / ".x.npy.124-0123abcd.tmp").exists()
    with atomic_write(tmp_path / "x.npy", durable=False, leftovers="all"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.npy.tmp", ".y.npy.125-0123abcd.tmp", "x.npy"]
    with atomic_write(tmp_path / ("n" * 250), durable=False):  # as long a name as there may be
        pass
    assert atomic.written_name(".x.npy.123-0123abcd.tmp") == "x.npy"
    assert atomic.written_name(".x.npy.123.tmp") is None
