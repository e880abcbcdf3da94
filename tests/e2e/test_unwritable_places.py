"""Stores beside which nothing can be written, users without a home, installations that may only be read.

What lies beside a store is a convenience: it goes to the cache, or is left out with a note.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from elsewhere import AS_NOBODY, UNKNOWN, codes, executable, need_mounts, need_users, run_commands
from forked import FORKS
from small_store import fill

import gstds_cache

FAST = ["--batch-size", "8", "--epochs", "1", "--knn", "3", "--device", "cpu"]
PLACES = {
    "read-only mount": "mount --bind there there; mount -o remount,ro,bind there",
    "full disk": "cp -r there copy; mount -t tmpfs -o size=200k tmpfs there; cp -r copy/. there; "
    "cat /dev/zero > there/filler 2> /dev/null || true",
    "another user's folder": "",
}


def selects(store: str) -> list[list[str]]:
    select = ["gstds-select", store, *FAST]
    return [
        [*select, "--rule", "random", "--out", "out/a.arrow"],
        [*select, "--rule", "random", "--seed", "1"],
        [*select, "--guidance", "none"],
        [*select, "--guidance", "uncertainty?folds=2&epochs=1&steps=20"],
        [*select, "--guidance", "uncertainty?folds=2&epochs=1&steps=20", "--seed", "2"],
        [*select, "--rule", "random", "--seed", "1"],
        ["gstds-cache", "verify", store],
    ]


@pytest.mark.parametrize("kind", PLACES)
def test_what_cannot_lie_beside_a_store_lies_in_the_cache(tmp_path: Path, kind: str) -> None:
    need_mounts()
    need_users()
    for name in ("there", "out", "cache"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "there" / "store")
    prefix = ""
    if kind == "another user's folder":
        for name in ("out", "cache"):
            os.chown(tmp_path / name, UNKNOWN, UNKNOWN)
        (tmp_path / "there").chmod(0o555)
        prefix = f"{AS_NOBODY} GSTDS_CACHE={tmp_path}/cache"
    commands = selects("there/store")
    if prefix:  # to compile once more for this user takes long, and tells nothing
        commands[2:5] = [[*commands[1], "--epochs", str(epochs)] for epochs in (2, 3, 4)]
    ended = run_commands(tmp_path, *commands, before=PLACES[kind], prefix=prefix, GSTDS_CACHE=str(tmp_path / "cache"))
    assert codes(ended) == [0] * 7, ended
    derived = tmp_path / "cache" / "derived"
    (selections,) = derived.glob("store-*.selections")
    assert len(list(selections.glob("*.arrow"))) == 5
    assert f"wrote: {selections}" in ended[1].stdout
    assert "note: kept in" in ended[1].stderr
    assert "cache hit" in ended[5].stderr
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["store"]
    if not prefix:
        (guidance,) = derived.glob("store-*.guidance/*.npy")
        assert guidance.stat().st_mode & 0o777 == 0o644  # as the umask says
        assert f"found in {guidance}" in ended[4].stdout
        # As root the store itself can be removed, and what was derived from it is found
        (removed,) = run_commands(
            tmp_path, ["gstds-cache", "rm", "there/store", "--yes"], GSTDS_CACHE=str(tmp_path / "cache")
        )
        assert removed.code == 0, removed
        assert list(derived.iterdir()) == []


def test_without_a_cache_either_it_is_left_out_with_a_note(tmp_path: Path) -> None:
    need_mounts()
    for name in ("there", "out"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "there" / "store")
    (tmp_path / "cache").write_text("a file")
    ended = run_commands(
        tmp_path, *selects("there/store"), before=PLACES["read-only mount"], GSTDS_CACHE=str(tmp_path / "cache")
    )
    assert codes(ended) == [0, 2, 2, 2, 2, 2, 0], ended
    assert "note: not kept for other runs: " in ended[0].stderr
    assert "give --out, or set GSTDS_CACHE" in ended[1].stderr


def test_a_volume_takes_a_store_though_nothing_can_be_written_beside_it(
    tmp_path: Path, image_folder: Path, tiny_model: str
) -> None:
    need_mounts()
    (tmp_path / "vol" / "store").mkdir(parents=True)
    mounts = "mount --bind vol vol; mount --bind vol/store vol/store; mount -o remount,ro,bind vol"
    embed = ["gstds-embed", f"imagefolder:{image_folder}", "--model", tiny_model, "--cache", "vol/store", "--json"]
    where = {"GSTDS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    first, again = run_commands(tmp_path, embed, embed, before=mounts, **where)
    assert codes([first, again]) == [0, 0], (first, again)
    assert json.loads(first.stdout.splitlines()[-1])["ok"] == 58
    assert json.loads(again.stdout.splitlines()[-1])["cache_hit"]
    (cost,) = (tmp_path / "cache" / "derived").glob("store-*.cost.json")
    assert json.loads(cost.read_text())["samples"] == 60
    (tmp_path / "file").write_text("in the way of a cache")
    shutil.rmtree(tmp_path / "vol" / "store")
    (tmp_path / "vol" / "store").mkdir()
    (without,) = run_commands(tmp_path, embed, before=mounts, **where | {"GSTDS_CACHE": str(tmp_path / "file")})
    assert codes([without]) == [0], without
    assert "note: what it cost is not kept: " in without.stderr


def test_a_disk_that_fills_while_a_pipe_is_served_ends_the_keeping_alone(tmp_path: Path) -> None:
    need_mounts()
    (tmp_path / "there").mkdir()
    fill(tmp_path / "there" / "store")
    select = [executable("gstds-select"), "there/store", *FAST, "--rule", "random", "--epochs", "400", "--out"]
    environment = os.environ | {"GSTDS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    whole = FORKS.start([*select, "whole.arrow"], cwd=tmp_path, env=environment)
    told = whole.communicate(120)
    assert whole.returncode == 0, told
    small = (
        "rm -rf there/store.*; cp -r there copy; mount -t tmpfs -o size=140k tmpfs there; cp -r copy/. there; "
        '"$@" > pipe.arrow; ls -A there/store.selections; df --output=used there | tail -1'
    )
    done = subprocess.run(
        ["unshare", "-m", "bash", "-ec", small, "bash", *select, "-"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    assert "note: this selection is not kept for the next time: " in done.stderr
    assert "No space left on device" in done.stderr
    assert ".partial" not in done.stdout  # the room is given back: a trainer's checkpoint may need it
    assert _records(tmp_path / "pipe.arrow") == _records(tmp_path / "whole.arrow")


def _records(path: Path) -> list[tuple[int, bytes]]:
    from gstds_cache.stream.reader import open_selection

    with open_selection(path) as stream:
        return [(selection.seq, selection.kept.tobytes()) for selection in stream]


@pytest.fixture
def here() -> Iterator[Path]:
    """A folder of a user that nobody knows, the way to which anybody may search."""
    need_users()
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, UNKNOWN, UNKNOWN)
        yield Path(folder)


def test_no_command_needs_a_home(tmp_path: Path, here: Path, image_folder: Path, tiny_model: str) -> None:
    """Nor a place in the installation: no passwd entry, no HOME, the package read-only, NUMBA_CACHE_DIR no place."""
    need_mounts()
    data, package = f"imagefolder:{image_folder}", Path(gstds_cache.__file__).parent
    ended = run_commands(
        here,
        ["gstds-embed", data, "--model", tiny_model, "--cache", "s", "--batch-size", "4"],
        ["gstds-select", "s", *FAST, "--rule", "random", "--out", "a.arrow"],
        ["gstds-train", data, "--selection", "a.arrow", "--arch", "conv3", "--out", "run", "--workers", "0"],
        ["gstds-cache", "verify", "s", "--level", "sample"],
        ["gstds-cache", "report", "a.arrow", "run", "--out", "r.html"],
        ["gstds-cache", "ls", "."],
        ["gstds-embed", data, "--model", tiny_model],
        ["gstds-embed", data, "--model", tiny_model, "--cache", "~nobodyatall/s"],
        ["gstds-select", "s", *FAST, "--out", "~nobodyatall/a.arrow"],
        ["gstds-train", data, "--selection", "~nobodyatall/a.arrow"],
        ["gstds-embed", "imagefolder:~nobodyatall/x", "--cache", "t"],
        before=f"mount --bind {package} {package}; mount -o remount,ro,bind {package}",
        prefix=f"{AS_NOBODY} NUMBA_CACHE_DIR=/nonexistent/numba TMPDIR={here}",
        PYTHONPATH=str(tmp_path),
        GSTDS_CACHE="",
    )
    assert codes(ended) == [0] * 6 + [2] * 5, ended
    assert "GSTDS_CACHE" in ended[6].stderr
    assert "give --cache" in ended[6].stderr
    for one in ended[7:]:
        assert "~nobodyatall" in one.stderr
    assert not [path.name for path in here.iterdir() if path.name.startswith(("~", "None"))]
    assert (here / f"gstds-cache-compiled-{UNKNOWN}").stat().st_mode & 0o777 == 0o700


# An empty one in the long suite: test_no_command_needs_a_home has none at all.
@pytest.mark.parametrize("home", ["/nonexistent", "/root", pytest.param("", marks=pytest.mark.faults)])
def test_a_home_that_cannot_be_written_changes_nothing(
    tmp_path: Path, here: Path, image_folder: Path, tiny_model: str, home: str
) -> None:
    data = f"imagefolder:{image_folder}"
    embed = ["gstds-embed", data, "--model", tiny_model]
    ended = run_commands(
        here,
        [*embed, "--cache", "s", "--batch-size", "4"],
        ["gstds-select", "s", *FAST, "--rule", "random"],
        embed,
        prefix=f"{AS_NOBODY} HOME={home}",
        PYTHONPATH=str(tmp_path),
        GSTDS_CACHE="",
    )
    assert codes(ended) == [0, 0, 2], ended
    assert "note: the next run hashes every file again: cannot write" in ended[0].stderr
    assert "the default place for stores cannot be written" in ended[2].stderr
    assert sorted(path.name for path in here.iterdir()) == ["s", "s.cost.json", "s.selections"]
