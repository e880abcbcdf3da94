"""What a machine runs out of is named, with what to type; and it is never taken for a fault of an image."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import codes, need_mounts, run_commands
from PIL import Image
from small_store import fill

from gstds_cache.data.files import Files, FileSource
from gstds_cache.data.manifest import build_manifest
from gstds_cache.errors import EXIT_INCOMPLETE, EXIT_USAGE, UsageError
from gstds_cache.files import mapped
from gstds_cache.files.atomic import writing
from gstds_cache.runtime.resources import explain
from gstds_cache.selection.plan import SelectionPlan
from gstds_cache.selection.rows import EligibleRows
from gstds_cache.selection.schedule import parse_schedule


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "full", "/none/x"), 4, ["the disk is full: /none/x (the file system at /", "MB free"]),
        (OSError(errno.EDQUOT, "quota", "/x"), 4, ["quota is used up: /x"]),
        (OSError(errno.EROFS, "ro", "/x"), 4, ["read-only: /x", "name a place that can be written"]),
        (OSError(errno.EPERM, "no", "/x"), 4, ["does not permit it: /x"]),
        (OSError(errno.ENOENT, "No such file", "/x"), 2, ["No such file: /x", "check the path"]),
        (OSError(errno.EMFILE, "too many", "/x"), 4, ["too many open files: this process may open", "ulimit"]),
        (RuntimeError("Too many open files. Communication with the workers"), 4, ["too many open files", "`workers`"]),
        (MemoryError(), 4, ["memory ran out", "`batch_size`"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 4, ["memory ran out"]),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 4, ["memory ran"]),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), 4, ["no more processes", "ulimit -u"]),
        (RuntimeError("can't start new thread"), 4, ["no more processes or threads"]),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']"), 4, ["set TMPDIR"]),
    ],
)  # fmt: skip
def test_what_is_short_is_named_with_what_to_type(error: BaseException, code: int, words: list[str]) -> None:
    told = explain(error)
    assert told is not None
    assert told.exit_code == code
    assert code in {EXIT_USAGE, EXIT_INCOMPLETE}
    for word in words:
        assert word in str(told)
    assert "nothing was changed" not in str(told)


def test_other_errors_are_not_explained_away() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("x"), OSError("no number"), KeyError("x")):
        assert explain(error) is None


def test_a_write_names_its_file_and_a_read_meanwhile_does_not(tmp_path: Path) -> None:
    for number, named in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.EPIPE, False)):
        with pytest.raises(OSError, match="words") as caught, writing(tmp_path / "x"):
            raise OSError(number, "words")
        assert (caught.value.filename == str(tmp_path / "x")) is named


def test_the_disk_that_is_full_is_named(tmp_path: Path) -> None:
    need_mounts()
    fill(tmp_path / "store")
    (tmp_path / "small").mkdir()
    ended = run_commands(
        tmp_path,
        ["gstds-cache", "export", "store", "small/x.parquet"],
        ["gstds-cache", "export", "store", "small/x.npy"],
        ["gstds-select", "store", "--batch-size", "8", "--knn", "3", "--rule", "random", "--out", "small/x.arrow"],
        before="mount -t tmpfs -o size=4k tmpfs small; echo x > small/y",
        GSTDS_CACHE=str(tmp_path / "cache"),
    )
    assert codes(ended) == [4, 4, 4], ended
    for one in ended:
        assert "the disk is full: small/" in one.stderr
        assert f"the file system at {tmp_path}/small has" in one.stderr
        assert "run the same command again" in one.stderr


def test_a_temporary_folder_that_is_full_is_named(tmp_path: Path) -> None:
    need_mounts()
    program = (
        "from gstds_cache.files import mapped\nfrom gstds_cache.runtime.resources import explain\n"
        "try: mapped.written(lambda file: file.write(bytes(1 << 20)))\nexcept OSError as error: print(explain(error))"
    )
    done = subprocess.run(
        ["unshare", "-m", "bash", "-ec", 'mount -t tmpfs -o size=100k t "$TMPDIR"; exec "$@"', "-",
         sys.executable, "-c", program],
        env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"the disk is full: {tmp_path} (" in done.stdout
    assert "set TMPDIR" in done.stdout


def png(side: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def test_too_little_memory_is_no_fault_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(6000))
    program = (
        "import resource, sys\nfrom gstds_cache.data.decode import decode_image\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))\n"
        "try: decode_image(data)\nexcept BaseException as error: print(type(error).__name__)"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "large.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "MemoryError\n"


def test_too_few_open_files_are_no_fault_of_the_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8))
    (tmp_path / "link.png").symlink_to("missing")
    files = Files.at([tmp_path / "a.png", tmp_path / "link.png"])
    source = FileSource(uri="x", kind="x", ids=("a", "b"), labels=np.zeros(2, np.int64), files=files)
    root = build_manifest(source).root
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    held = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            held.extend(iter(lambda: os.open(os.devnull, os.O_RDONLY), -1))
        for act in (lambda: source.image(0), lambda: build_manifest(source)):
            with pytest.raises(OSError, match="Too many open files"):
                act()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert build_manifest(source).root == root


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_rows_than_a_graph_takes_are_said_to_be_so(rows: int) -> None:
    with pytest.raises(UsageError, match=f"too few images: {rows} rows have an embedding, a batch has at least 4"):
        SelectionPlan(
            EligibleRows(rows, np.zeros(0, np.int64)),
            batch_size=4,
            epochs=1,
            schedule=parse_schedule("constant:0.5"),
            seed=0,
        )


def test_a_network_that_memory_does_not_hold_is_not_blamed_on_the_size_of_images() -> None:
    from gstds_cache.training.network import check_network

    class Large(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.empty(1 << 60)

    with pytest.raises(RuntimeError) as caught:
        check_network(Large(), "large", 32, 2, torch.device("cpu"))
    assert not isinstance(caught.value, UsageError)
    assert "memory ran out" in str(explain(caught.value))


def test_a_temporary_folder_that_is_not_there_is_passed_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert mapped.folder() != str(tmp_path / "missing")
    with mapped.temporary_file() as file:
        file.write(b"x")
