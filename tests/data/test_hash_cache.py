"""Digests kept in a file: never another digest than reading would give, and no file opened that has not changed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import FORKS

from gstds_cache.data import hash_cache as hash_cache_module
from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import FILE, RACY_NS, HashCache, old_enough, signatures_of
from gstds_cache.data.hashing import UNREADABLE
from gstds_cache.data.item_hashes import hash_items
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.data.subset import Subset

TICK = 0.02
"""Longer than a tick of the clock that file times are taken from (a hundredth of a second at most)."""


def plant(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {name}".encode())
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return plant(tmp_path / "photos", *(f"{label}/{n}.png" for label in ("cats", "dogs") for n in range(4)))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust a signature at once; tests that change a file then wait for the next tick themselves."""
    monkeypatch.setattr(hash_cache_module, "RACY_NS", 0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files whose bytes were hashed."""
    names: list[str] = []
    sha256 = Files.sha256

    def counted(self: Files, row: int) -> bytes:
        names.append(self.names[row])
        return sha256(self, row)

    monkeypatch.setattr(Files, "sha256", counted)
    return names


def rows_in(place: Path) -> int:
    with closing(sqlite3.connect(place / FILE)) as database:
        return int(database.execute("SELECT count(*) FROM files").fetchone()[0])


def root_of(photos: Path, hash_cache: HashCache | None) -> str:
    return build_manifest(open_source(f"imagefolder:{photos}", hash_cache=hash_cache), hash_cache=hash_cache).root


COUNT_OPENS = """
import json, os, sys
folder, place, query = sys.argv[1:]
opened, by_system_call = [], []  # a file object, and where it is opened by a function of ours the call in that
sys.addaudithook(lambda event, args: event == "open" and isinstance(args[0], (str, bytes))
                 and (by_system_call if args[1] is None else opened).append(os.path.abspath(os.fsdecode(args[0]))))
from pathlib import Path
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.sources import open_source
hash_cache = HashCache(Path(place))
source = open_source(f"imagefolder:{folder}{query}", hash_cache=hash_cache)
manifest = build_manifest(source, hash_cache=hash_cache)
of_images = [[path for path in paths if path.startswith(os.path.abspath(folder) + "/") and path.endswith(".png")]
             for paths in (opened, by_system_call)]
inside = max(of_images, key=len)
print(json.dumps([manifest.root, len(inside), len(set(inside)), hash_cache.notes]))
"""


def test_an_unchanged_folder_is_not_opened_by_the_next_process(photos: Path, place: Path) -> None:
    def run(query: str = "") -> list[object]:
        done = FORKS.run(["-c", COUNT_OPENS, str(photos), str(place), query], cwd=photos)
        assert done.returncode == 0, done.stderr
        result: list[object] = json.loads(done.stdout)
        return result

    time.sleep(RACY_NS / 1e9 + 0.1)
    # A split is decided by the digests of all files, and then has a manifest of its own: each is opened once all the
    # same.
    root, *opens = run("?split=train&holdout=0.5")
    assert opens == [8, 8, []]
    assert run("?split=train&holdout=0.5") == [root, 0, 0, []]
    assert run() == [root_of(photos, None), 0, 0, []]


@pytest.mark.usefixtures("_no_waiting")
class TestChanges:
    """One file of eight is changed; it and no other is read again."""

    @pytest.fixture
    def again(self, photos: Path, place: Path, read: list[str]) -> Callable[[], list[str]]:
        """Hash once; each call hashes as a new process would, compares, and returns what was read."""
        root_of(photos, HashCache(place))
        time.sleep(TICK)

        def run() -> list[str]:
            plain = root_of(photos, None)
            read.clear()
            hash_cache = HashCache(place)
            assert root_of(photos, hash_cache) == plain
            assert not hash_cache.notes
            return sorted(read)

        return run

    def test_nothing(self, again) -> None:
        assert again() == []

    def test_what_was_edited_is_read_and_nothing_else(self, again, photos) -> None:
        os.utime(photos / "cats/2.png", ns=(0, -5_000_000_000))
        (photos / "dogs/0.png").write_bytes(b"other")
        (photos / "dogs/1.png").rename(photos / "held")
        (photos / "dogs/2.png").rename(photos / "dogs/1.png")
        (photos / "held").rename(photos / "dogs/2.png")
        plant(photos, "cats/10.png", "birds/0.png")
        (photos / "cats/3.png").unlink()
        edited = ["birds/0.png", "cats/10.png", "cats/2.png", "dogs/0.png", "dogs/1.png", "dogs/2.png"]
        assert again() == edited
        time.sleep(TICK)
        assert again() == []
        plant(photos, "cats/3.png")
        assert again() == ["cats/3.png"]

    @pytest.mark.parametrize("replaced", [False, True])
    def test_same_size_and_mtime(self, again, photos, replaced) -> None:
        path, before = photos / "dogs/0.png", root_of(photos, None)
        stat, other = path.stat(), photos / "held" if replaced else path
        other.write_bytes(path.read_bytes().swapcase())
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(path)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert again() == ["dogs/0.png"]
        assert root_of(photos, None) != before

    def test_dated_in_the_future_is_read_every_time(self, again, photos) -> None:
        for year in (2100, 2400):
            os.utime(photos / "cats/2.png", (0, (year - 1970) * 31_556_952))
            assert again() == ["cats/2.png"]
            assert again() == ["cats/2.png"]

    def test_unreadable_then_readable(self, again, photos) -> None:
        (photos / "cats/3.png").rename(photos / "held")
        (photos / "cats/3.png").symlink_to(photos / "gone.png")
        assert again() == ["cats/3.png"]
        assert again() == ["cats/3.png"]
        (photos / "held").rename(photos / "gone.png")
        assert again() == ["cats/3.png"]
        time.sleep(TICK)
        assert again() == []
        (photos / "gone.png").unlink()
        assert again() == ["cats/3.png"]

    def test_a_disk_error_is_not_kept(self, again, photos, place, read, monkeypatch) -> None:
        counted = Files.sha256

        def fail(self: Files, row: int) -> bytes:
            if self.names[row] == "cats/3.png":
                raise OSError(5, "Input/output error")
            return counted(self, row)

        os.utime(photos / "cats/3.png")
        time.sleep(TICK)
        with monkeypatch.context() as patch:
            patch.setattr(Files, "sha256", fail)
            failed = build_manifest(open_source(f"imagefolder:{photos}"), hash_cache=HashCache(place))
        assert bytes(failed.sha256[3]) == UNREADABLE
        assert again() == ["cats/3.png"]
        assert again() == []

    def test_many_random_edits(self, photos, place, read) -> None:
        rng = random.Random(11)
        names = [f"{label}/{n}.png" for label in ("cats", "dogs") for n in range(6)]

        def edit(path: Path) -> None:
            stat = path.stat() if path.exists() else None
            kind = rng.choice(["write", "same size", "touch", "delete", "swap", "link", "append"])
            if kind == "delete" or (path.is_symlink() and kind != "link"):
                path.unlink(missing_ok=True)
            elif kind == "swap":
                other = photos / rng.choice(names)
                if stat and other.exists() and other != path:
                    path.rename(photos / "held")
                    other.rename(path)
                    (photos / "held").rename(other)
            elif kind == "link":
                path.unlink(missing_ok=True)
                path.symlink_to(photos / rng.choice(names))
            elif kind == "append" and stat:
                with path.open("ab") as file:
                    file.write(b"+")
            elif kind == "touch" and stat:
                os.utime(path, ns=(0, rng.randrange(10**18)))
            elif kind == "same size" and stat:
                path.write_bytes(rng.randbytes(stat.st_size))
                os.utime(path, ns=(0, stat.st_mtime_ns))
            else:
                path.write_bytes(rng.randbytes(9))

        kept = HashCache(place)
        total = 0
        for _ in range(60):
            for name in rng.sample(names, rng.randrange(3)):
                edit(photos / name)
            time.sleep(TICK)
            source = open_source(f"imagefolder:{photos}")
            plain = hash_items(source)
            read.clear()
            hash_cache = kept if rng.random() < 0.5 else HashCache(place)
            assert np.array_equal(hash_items(source, hash_cache=hash_cache), plain)
            total += len(read)
            kept = hash_cache
        assert total < 60 * 12 / 2


class TestRacyFiles:
    def test_a_file_written_just_now_is_read_again(self, photos, place, read, monkeypatch) -> None:
        monkeypatch.setattr(hash_cache_module, "RACY_NS", 3600 * 10**9)  # However slow the machine, it was just now.
        hash_cache = HashCache(place)
        for _ in range(2):
            root_of(photos, hash_cache)
        assert len(read) == 16
        assert len(read) == 16

    def test_a_change_within_one_tick_is_seen(self, photos, place, monkeypatch) -> None:
        """A file system whose clock stands still: only the rule about recent files can help."""
        monkeypatch.setattr(hash_cache_module, "RACY_NS", 3600 * 10**9)
        true = hash_cache_module.signature_of
        now = time.time_ns()
        monkeypatch.setattr(hash_cache_module, "signature_of", lambda path: (true(path)[0], now, now, true(path)[3]))
        before = root_of(photos, HashCache(place))
        (photos / "cats/0.png").write_bytes(b"CONTENT OF cats/0.png")
        assert root_of(photos, HashCache(place)) == root_of(photos, None) != before

    @pytest.mark.usefixtures("_no_waiting")
    def test_a_file_that_is_another_while_it_is_read_is_not_kept(self, photos, place, monkeypatch) -> None:
        one, other, link = photos / "dogs/0.png", photos / "dogs/1.png", photos / "cats/link.png"
        link.symlink_to(one)
        time.sleep(TICK)
        sha256 = Files.sha256

        def pointed_elsewhere(self: Files, row: int) -> bytes:
            if self.names[row] == "cats/link.png":
                link.unlink()
                link.symlink_to(other)
            return sha256(self, row)

        with monkeypatch.context() as patch:
            patch.setattr(Files, "sha256", pointed_elsewhere)
            root_of(photos, HashCache(place))
        link.unlink()
        link.symlink_to(one)
        assert root_of(photos, HashCache(place)) == root_of(photos, None)

    @pytest.mark.usefixtures("_no_waiting")
    def test_what_is_read_but_too_young_replaces_what_was_known(self, photos, place) -> None:
        one, other, link = photos / "dogs/0.png", photos / "dogs/1.png", photos / "cats/link.png"
        link.symlink_to(one)
        time.sleep(TICK)
        root_of(photos, HashCache(place))
        os.utime(other, (0, time.time() + 10**6))  # Too young for days.
        link.unlink()
        link.symlink_to(other)
        plant(photos, "cats/new.png")
        time.sleep(TICK)
        root_of(photos, HashCache(place))
        link.unlink()
        link.symlink_to(one)
        assert root_of(photos, HashCache(place)) == root_of(photos, None)

    def test_old_enough(self) -> None:
        now = 10**18
        old, new = now - RACY_NS - 1, now - RACY_NS
        rows = [(1, old, old, 1), (1, new, old, 1), (1, old, new, 1), (1, old, now + 5, 1), (-1, -1, -1, -1)]
        assert old_enough(np.array(rows), now).tolist() == [True, False, False, False, False]


@pytest.mark.usefixtures("_no_waiting")
class TestOneProcess:
    def test_what_is_known_of_other_files_stays(self, photos, place, read) -> None:
        whole = open_source(f"imagefolder:{photos}")
        hash_items(whole, hash_cache=HashCache(place))
        time.sleep(TICK)
        (photos / "cats/0.png").write_bytes(b"other")
        rows = np.array([0])
        part = Subset(base=whole, uri="part", rows=rows, ids=("x",), labels=whole.labels[rows])
        time.sleep(TICK)
        hash_items(part, hash_cache=HashCache(place))
        read.clear()
        root_of(photos, HashCache(place))
        assert not read

    def test_deleted_files_are_forgotten_before_they_are_half_of_the_rows(self, photos, place) -> None:
        root_of(photos, HashCache(place))
        for number in range(40):
            plant(photos, f"cats/new {number}.png")
            (photos / "cats" / f"new {number - 1}.png").unlink(missing_ok=True)
            root_of(photos, HashCache(place))
            assert rows_in(place) <= 2 * 9
        assert rows_in(place) >= 9

    def test_interrupted(self, tmp_path, place, read, monkeypatch) -> None:
        photos = plant(tmp_path / "many", *(f"a/{n:04d}.png" for n in range(1500)))
        source = open_source(f"imagefolder:{photos}")
        time.sleep(TICK)
        stopped, counted = threading.Event(), Files.sha256

        def waiting(self: Files, row: int) -> bytes:
            if row >= 1000:  # Else a quick machine, or one that lets the main thread wait, would be done by then.
                stopped.wait()
                time.sleep(0.002)
            return counted(self, row)

        def progress(done: int, _total: int) -> None:
            if done >= 300:
                stopped.set()
                raise KeyboardInterrupt

        monkeypatch.setattr(Files, "sha256", waiting)

        with pytest.raises(KeyboardInterrupt):
            hash_items(source, hash_cache=HashCache(place), progress=progress)
        done = len(read)
        assert 300 <= done < 1500
        monkeypatch.setattr(Files, "sha256", counted)
        assert np.array_equal(hash_items(source, hash_cache=HashCache(place)), hash_items(source))
        assert len(read) == 1500 + 1500
        assert len(set(read[:1500])) == 1500

    def test_progress_counts_known_items(self, photos, place) -> None:
        calls: list[tuple[int, int]] = []

        def progress(done: int, total: int) -> None:
            calls.append((done, total))

        for _ in range(2):
            calls.clear()
            hash_cache = HashCache(place)
            source = open_source(
                f"imagefolder:{photos}?split=train&holdout=0.5", hash_cache=hash_cache, progress=progress
            )
            build_manifest(source, hash_cache=hash_cache, progress=progress)
            assert calls == [(8, 8), (len(source), len(source))]

    @pytest.mark.parametrize("name", [b"caf\xe9.png", "caf\u00e9 \U0001f600.png".encode(), b"a\nb'\"\\x.png"])
    def test_odd_names(self, photos, place, read, name) -> None:
        Path(os.fsdecode(os.fsencode(photos / "cats") + b"/" + name)).write_bytes(b"odd")
        folder = photos.rename(Path(os.fsdecode(os.fsencode(photos.parent) + b"/\xff odd")))
        hash_cache = HashCache(place)
        root_of(folder, hash_cache)
        read.clear()
        assert root_of(folder, HashCache(place)) == root_of(folder, hash_cache)
        assert not read
        assert not hash_cache.notes

    def test_sources_without_files_are_hashed_each_time(self, array_source, place) -> None:
        digits = open_source("digits", hash_cache=HashCache(place))
        assert digits.files is None
        assert open_source("digits?split=test", hash_cache=HashCache(place)).files is None
        hash_cache = HashCache(place)
        for _ in range(2):
            assert np.array_equal(hash_items(array_source(30), hash_cache=hash_cache), hash_items(array_source(30)))
        assert not place.exists()


PROCESS = """
import sys
from pathlib import Path
from gstds_cache.data import hash_cache
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
hash_cache.RACY_NS = 0
for _ in range(10):
    for folder in sys.argv[2:]:
        kept = hash_cache.HashCache(Path(sys.argv[1]))
        print(build_manifest(open_source(f"imagefolder:{folder}"), hash_cache=kept).root, *kept.notes)
        Path(folder, "cats/0.png").touch()
"""


@pytest.mark.usefixtures("_no_waiting")
class TestSeveralProcesses:
    def test_that_write_at_once(self, photos, place, tmp_path, read) -> None:
        other = plant(tmp_path / "other", "cats/0.png", "cats/1.png")
        words = ["-c", PROCESS, str(place), str(photos), str(other)]
        processes = [FORKS.start(words, cwd=tmp_path) for _ in range(3)]
        printed = [process.communicate()[0].splitlines() for process in processes]
        assert printed == [[root_of(photos, None), root_of(other, None)] * 10] * 3
        time.sleep(TICK)
        root_of(photos, HashCache(place))
        read.clear()
        root_of(photos, HashCache(place))
        assert not read

    def test_one_that_is_killed_while_it_writes(self, photos, place, read) -> None:
        root_of(photos, HashCache(place))
        code = f"""
import os, sqlite3
database = sqlite3.connect({str(place / FILE)!r}, isolation_level=None)
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE files SET entry = zeroblob(100000)")
os._exit(9)
"""
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
        assert (place / f"{FILE}-journal").exists()
        read.clear()
        hash_cache = HashCache(place)
        root_of(photos, hash_cache)
        assert (read, hash_cache.notes) == ([], ())


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


@pytest.mark.usefixtures("_no_waiting")
class TestDamage:
    @pytest.fixture
    def stored(self, photos: Path, place: Path) -> Path:
        root_of(photos, HashCache(place))
        assert [path.name for path in place.iterdir()] == [FILE]
        return place / FILE

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[:10],
            lambda data: data[: len(data) // 2],
            lambda data: data[:60] + (2).to_bytes(4, "big") + data[64:],  # user_version
            lambda data: data[:60] + (4).to_bytes(4, "big") + data[64:],
            lambda _data: b"not a database at all",
            lambda data: data.replace(b"entry", b"entri"),
            lambda data: data.replace(b"files", b"filez"),
        ],
    )
    def test_is_noted_and_mended(self, photos, place, stored, read, damage) -> None:
        right = root_of(photos, None)
        stored.write_bytes(damage(stored.read_bytes()))
        read.clear()
        hash_cache = HashCache(place)
        assert root_of(photos, hash_cache) == right
        assert hash_cache.notes == (f"every file is hashed again: {stored} is damaged, or of another version",)
        assert len(read) == 8
        mended = HashCache(place)
        assert root_of(photos, mended) == right
        assert (mended.notes, len(read)) == ((), 8)

    def test_anywhere_is_never_taken_for_a_digest(self, photos, place, stored, read) -> None:
        """Each bit that is flipped costs a note and a reading, or nothing; SQLite itself sees a few of them."""
        right, data, noted = root_of(photos, None), stored.read_bytes(), 0
        filled = [at for at in range(len(data)) if data[at]]
        for at in filled[:: max(1, len(filled) // 40)]:
            stored.write_bytes(flipped(at)(data))
            hash_cache = HashCache(place)
            assert root_of(photos, hash_cache) == right, at
            noted += bool(hash_cache.notes)
        assert noted > 8

    def test_that_cannot_be_read(self, photos, place, stored) -> None:
        stored.unlink()
        stored.mkdir()
        hash_cache = HashCache(place)
        assert root_of(photos, hash_cache) == root_of(photos, None)
        assert [note.partition(":")[0] for note in hash_cache.notes] == [
            "every file is hashed again",
            "the next run hashes every file again",
        ]
        assert list(place.iterdir()) == [stored]

    def test_that_cannot_be_written(self, photos, place, stored, read, monkeypatch) -> None:
        """What is in it is used; what is new is not kept, and that is noted once."""
        connect = sqlite3.connect

        def read_only(address: str, **more: Any) -> sqlite3.Connection:
            return connect(address.replace("mode=rw", "mode=ro"), **more)

        monkeypatch.setattr(sqlite3, "connect", read_only)  # Tests may run as root, whom no permission stops.
        plant(photos, "cats/new.png")
        hash_cache = HashCache(place)
        read.clear()
        assert root_of(photos, hash_cache) == root_of(photos, None)
        assert read[0] == "cats/new.png"
        root_of(photos, hash_cache)
        (note,) = hash_cache.notes
        assert note.startswith(
            f"the next run hashes every file again: cannot write {stored}: attempt to write a readonly"
        )

    def test_full_disk(self, place, tmp_path) -> None:
        """A limit on the size of files stands for the disk's; what was kept stays whole."""
        code = """
import resource, sys
from pathlib import Path
import numpy as np
from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache
signatures, digests = np.ones((50_000, 4), np.int64), np.ones((50_000, 32), np.uint8)
files, all_of_them = Files("/data/", [str(row) for row in range(50_000)]), np.ones(50_000, bool)
HashCache(Path(sys.argv[1])).record(Files("/data/", ["a"]), signatures[:1], digests[:1], all_of_them[:1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
full = HashCache(Path(sys.argv[1]))
full.record(files, signatures, digests, all_of_them)
print(full.notes[0], HashCache(Path(sys.argv[1])).recall(Files("/data/", ["a"]))[0].tolist())
"""
        done = FORKS.run(["-c", code, str(place)], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
        assert printed.startswith(f"the next run hashes every file again: cannot write {place / FILE}: ")
        assert printed.endswith(" [[1, 1, 1, 1]]\n")

    def test_old_formats_are_removed(self, photos, place) -> None:
        place.mkdir(parents=True)
        (place / "photos-0123456789abcdef.hashes").write_bytes(b"gstds-cache hashes 2\n")
        hash_cache = HashCache(place)
        root_of(photos, hash_cache)
        assert [path.name for path in place.iterdir()] == [FILE]
        assert not hash_cache.notes

    def test_the_umask_decides_who_may_use_it(self, photos, place) -> None:
        before = os.umask(0o002)
        try:
            root_of(photos, HashCache(place))
        finally:
            os.umask(before)
        assert (place / FILE).stat().st_mode & 0o777 == 0o664


def test_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"four")
    (row, missing, impossible) = signatures_of([str(tmp_path / "a"), str(tmp_path / "b"), "a\0b"]).tolist()
    stat = (tmp_path / "a").stat()
    assert row == [4, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    assert missing == impossible == [-1] * 4
    assert signatures_of([]).shape == (0, 4)
    monkeypatch.setattr(hash_cache_module, "signature_of", lambda _path: (1, 2, -(2**70), 2**64 - 1))
    assert signatures_of(["x"]).tolist() == [[1, 2, -(2**63), 2**63 - 1]]


def test_recall_of_unknown_files() -> None:
    signatures, digests = HashCache().recall(Files("nowhere/", ("a", "b")))
    assert signatures.tolist() == [[-1] * 4] * 2
    assert not digests.any()
    assert bytes(digests[0]) == UNREADABLE
    assert HashCache().recall(Files("", ()))[0].shape == (0, 4)


def test_record_then_recall_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_cache_module, "_ROWS", 7)
    names = tuple(f"{n}" for n in range(50))
    signatures = np.arange(200).reshape(50, 4)
    digests = np.array([list(hashlib.sha256(name.encode()).digest()) for name in names], np.uint8)
    changed = np.arange(50) != 9
    HashCache(tmp_path).record(Files("/data/", names), signatures, digests, changed)
    for order in (random.Random(3).sample(range(50), 20), sorted(range(0, 50, 3), key=str), [9]):
        got = HashCache(tmp_path).recall(Files("/data/", (*(names[row] for row in order), "unknown")))
        known = changed[order]
        assert got[0][:-1].tolist() == np.where(known[:, None], signatures[order], -1).tolist()
        assert got[1][:-1].tolist() == np.where(known[:, None], digests[order], 0).tolist()
        assert got[0][-1].tolist() == [-1] * 4
    HashCache(tmp_path).record(Files("/data/", names[:30]), np.full((30, 4), -1), digests[:30], changed[:30])
    assert HashCache(tmp_path).recall(Files("/data/", names[29:32]))[0][:, 0].tolist() == [-1, 120, 124]
