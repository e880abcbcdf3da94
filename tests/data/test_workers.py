"""Decoding in processes: the same pixels as in one, whatever a data set keeps open; and an end that is told."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import handles
import numpy as np
import pytest
import torch
from forked import ALWAYS, FORKS
from PIL import Image

from gstds_cache.data import workers as workers_module
from gstds_cache.data.copies import Copies, NotCopiedError, OpenFiles
from gstds_cache.data.loading import PixelBatches, pixel_batches
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.mapstyle import MapStyleSource
from gstds_cache.data.sources import open_source
from gstds_cache.data.split import split_by_content
from gstds_cache.errors import DatasetError, IncompleteError

# Theirs, as users' data sets are.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
SPANS = [range(start, start + 10) for start in range(0, handles.ITEMS, 10)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("items")
    handles.write(folder)
    return folder


@pytest.fixture
def here(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current directory of a user with those files, and the module of data sets."""
    for file in written.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    yield
    handles.forget()


def lines(image: Image.Image) -> torch.Tensor:
    """The first column of an item, uint8 [3, 64, 1]."""
    return torch.from_numpy(np.asarray(image)[:, :1].copy()).permute(2, 0, 1)


def decoded(source, workers: int, spans=SPANS, *, shape=(3, handles.SIDE, 1), transform=lines) -> PixelBatches:
    return pixel_batches(source, transform, shape, spans, workers=workers, pin=False)


EXPECTED = torch.stack([lines(Image.fromarray(handles.pixels(row))) for row in range(handles.ITEMS)])


@pytest.mark.parametrize("factory", handles.FACTORIES)
def test_pixels_do_not_depend_on_the_number_of_processes(here, factory: str) -> None:
    source = open_source(f"handles:{factory}")
    for workers in (0, 1, 4):
        with closing(decoded(source, workers)) as batches:
            assert batches.workers == workers
            found = list(batches)
        assert [batch.rows for batch in found] == [tuple(span) for span in SPANS]
        assert all(batch.failures == () for batch in found)
        assert torch.equal(torch.cat([batch.pixels for batch in found]), EXPECTED), f"{factory}, {workers} workers"
    assert multiprocessing.active_children() == []


def test_a_part_of_a_data_set_has_an_object_for_each_process_as_well(here) -> None:
    part = split_by_content(open_source("handles:RawFile"), "train", 0.2)
    spans = [range(start, min(start + 10, len(part))) for start in range(0, len(part), 10)]
    found = torch.cat([batch.pixels for batch in decoded(part, 3, spans)])
    assert torch.equal(found, EXPECTED[part.rows])


def test_what_can_be_made_only_once_is_read_by_one_process_and_said(here, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source("handles:once")
    batches = decoded(source, 3)
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), EXPECTED)
    assert batches.workers == 0
    assert "'handles:once' is read by one process" in caplog.text
    assert "File exists" in caplog.text
    assert multiprocessing.active_children() == []


def test_what_nobody_knows_how_to_make_is_read_by_one_process(here, caplog: pytest.LogCaptureFixture) -> None:
    source = MapStyleSource(handles.RawFile(), uri="mine", kind="mine")
    with closing(decoded(source, 2)) as batches:
        assert batches.workers == 0
        assert torch.equal(torch.cat([batch.pixels for batch in batches]), EXPECTED)
    assert "does not pickle: cannot pickle" in caplog.text


@pytest.mark.parametrize(
    ("factory", "what"),
    [
        ("changing", r"row \d+ \(\d+\) is another image now"),
        ("failing", "could be read when it was hashed, and cannot"),
    ],
)
def test_an_item_that_depends_on_the_process_is_an_error(here, factory: str, what: str) -> None:
    source = open_source(f"handles:{factory}")
    build_manifest(source)
    assert torch.equal(torch.cat([batch.pixels for batch in decoded(source, 0)]), EXPECTED)
    with pytest.raises(DatasetError, match=what) as caught, closing(decoded(source, 2)) as batches:
        list(batches)
    assert "row" in caught.value.message
    assert "random" in caught.value.hint
    assert "`workers=0`" in caught.value.hint


def test_an_item_that_changes_later_is_an_error_in_one_process_too() -> None:
    class Later(handles.Items):
        reads = 0

        def read(self, row: int) -> bytes:
            self.reads += row == 170
            return handles.pixels(row + (self.reads > 1)).tobytes()

    source = MapStyleSource(Later(), uri="mine", kind="mine")
    build_manifest(source)
    with pytest.raises(DatasetError, match=r"'mine': row 170 \(0000170\) is another image now"):
        list(decoded(source, 0))


def test_large_images_that_differ_in_one_part_are_told_apart() -> None:
    pixels = np.zeros((2, 900, 1200, 3), np.uint8)
    source = MapStyleSource([(pixels[0], 0)], uri="mine", kind="mine")
    build_manifest(source)
    source.image(0)
    pixels[0, 500:560, :40] = 1  # as much as a reader gets that stops in the middle of an item
    with pytest.raises(DatasetError, match="another image"):
        source.image(0)


class Big:
    """Much in memory: an array, text, bytes, a tensor and images."""

    def __init__(self) -> None:
        self.array = np.arange(handles.ITEMS, dtype=np.uint8).repeat(10000)
        self.tensor = torch.zeros(1 << 20)
        self.data, self.text = b"x" * (1 << 20), "y" * (1 << 20)
        self.image = Image.new("RGB", (500, 500))
        self.parts = [self.array[:5000], self.array[5000:]]
        self.nothing = np.array([None, "object"], object)

    def places(self) -> list[int]:
        return [
            self.array.ctypes.data,
            self.tensor.data_ptr(),
            id(self.data),
            id(self.text),
            id(self.image),
            self.parts[1].ctypes.data,
        ]

    def __len__(self) -> int:
        return handles.ITEMS

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        with Path("places").open("a") as file:
            file.write(f"{os.getpid()} {self.places()} {id(self)}\n")
        return np.full((4, 4), row % 256, np.uint8), 0


def test_what_is_large_in_memory_is_not_copied_for_each_process(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    big = Big()
    source = MapStyleSource(big, uri="mine", kind="mine")
    Path("places").unlink()
    found = decoded(source, 3, shape=(3, 4, 1))
    assert [int(batch.pixels[3, 0, 0, 0]) for batch in found] == [span[3] % 256 for span in SPANS]
    told = {tuple(line.split(" ", 1)) for line in Path("places").read_text().splitlines()}
    assert len({process for process, _ in told}) == 3
    for process, places in told:
        assert int(process) != os.getpid()
        assert places.startswith(f"{big.places()} "), "copied"
        assert not places.endswith(f" {id(big)}"), "the object itself is not a process's own"


class Holding(Big):
    """64 MB, of which an item tells how many megabytes its process has for itself, as the kernel counts."""

    def __init__(self) -> None:
        self.array = np.ones(64 << 20, np.uint8)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        assert self.array[:: 1 << 12].all()
        rollup = Path("/proc/self/smaps_rollup").read_text()
        private = sum(int(kb) for kb in re.findall(r"Private_\w+: +(\d+) kB", rollup))
        return np.full((4, 4), min(255, private >> 10), np.uint8), 0


def test_memory_does_not_grow_with_the_number_of_processes() -> None:
    source = MapStyleSource(Holding(), uri="mine", kind="mine")
    most = max(int(batch.pixels.max()) for batch in decoded(source, 2, shape=(3, 4, 1)))
    assert 0 < most < 48, f"{most} MB of a worker's own"


def no_way() -> None:
    raise ValueError("no way")


def test_locks_are_new_and_what_does_not_pickle_is_made_again() -> None:
    lock = threading.Lock()
    lock.acquire()
    held = {"lock": lock, "again": threading.RLock(), "event": threading.Event(), "here": threading.local()}
    copy = Copies(held, None).make(bool)
    assert copy["lock"].acquire(blocking=False)
    assert not copy["event"].is_set()
    assert copy["lock"] is not lock
    made = []
    assert Copies(iter([lambda: 0]), lambda: made.append(1) or "made").make(bool) == "made"
    with pytest.raises(NotCopiedError, match="does not pickle"):
        Copies(lambda: 0, None)
    with pytest.raises(NotCopiedError, match="making it again failed: no way"):
        Copies(lambda: 0, no_way).make(bool)


def test_an_object_that_pickles_and_does_not_unpickle_is_made_again() -> None:
    class Half:
        def __reduce__(self):
            return (int, ("not a number",))

    assert Copies(Half(), lambda: "made").make(bool) == "made"


def in_a_fork(work: Callable[[], None]) -> None:
    context = multiprocessing.get_context("fork")
    child = context.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_files_that_are_open_have_a_position_of_their_own_after_a_fork(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with path.open("rb") as reading, path.open("r+b") as both, path.open("ab") as writing:
        reading.read(10)
        before = os.lseek(reading.fileno(), 0, os.SEEK_CUR)
        both.seek(50)
        path.unlink()  # A file need not have a name any more.
        files = OpenFiles.now()
        os.lseek(both.fileno(), 3, os.SEEK_SET)  # What the parent does meanwhile does not matter.

        def child() -> None:
            files.open_anew()
            assert both.read(1) == bytes([50])
            assert os.read(reading.fileno(), 1) == b"" if before == 100 else True
            os.lseek(reading.fileno(), 77, os.SEEK_SET)
            os.write(writing.fileno(), b"end")

        in_a_fork(child)
        assert os.lseek(reading.fileno(), 0, os.SEEK_CUR) == before
        assert os.lseek(both.fileno(), 0, os.SEEK_CUR) == 3
        assert os.fstat(writing.fileno()).st_size == 103
        numbers = {file.number for file in files.files}
        assert {reading.fileno(), both.fileno()} <= numbers
        assert writing.fileno() not in numbers
        assert not numbers & {0, 1, 2}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_number_that_means_another_file_by_now_is_left_alone(tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"0123456789")
    number = os.open(tmp_path / "one", os.O_RDONLY)
    files = OpenFiles.now()
    os.close(number)
    other = os.open(tmp_path / "two", os.O_RDWR)
    assert other == number

    def child() -> None:
        files.open_anew()
        os.lseek(other, 4, os.SEEK_SET)
        os.write(other, b"x")

    in_a_fork(child)
    os.close(other)
    assert (tmp_path / "two").read_bytes() == b"0123x56789"


class Plain:
    """A source whose items may do anything."""

    uri = kind = "plain"
    files, labels, ids = None, np.zeros(100, np.int64), [str(row) for row in range(100)]
    classes, notes, mirror_safe = (), (), True

    def __init__(self, act: Callable[[int], object] = lambda _row: None) -> None:
        self.act = act

    def payload(self, row: int) -> bytes:
        return bytes([row])

    def __len__(self) -> int:
        return 100

    def image(self, row: int) -> Image.Image:
        self.act(row)
        return Image.new("RGB", (2, 2), (row, row, row))


TINY = {"shape": (3, 2, 1)}


def at(row: int, act: Callable[[], object]) -> Plain:
    return Plain(lambda seen: act() if seen == row else None)


def kill(number: signal.Signals) -> Callable[[], None]:
    def end() -> None:
        faulthandler.disable()  # pytest's, which would print this process's trace
        os.kill(os.getpid(), number)

    return end


@contextmanager
def soon(seconds: float = 30) -> Iterator[None]:
    """Far longer than this takes on a busy machine, and far shorter than for ever."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("act", "told", "hint"),
    [
        (kill(signal.SIGKILL), "was killed by SIGKILL", "memory ran out"),
        (kill(signal.SIGBUS), "was killed by SIGBUS", "shm size"),
        (kill(signal.SIGSEGV), "was killed by SIGSEGV", "`workers=0`"),
        (lambda: os._exit(7), "ended with exit code 7", "look for its last message above"),
        (lambda: sys.exit(9), "ended with exit code 9", "look for its last message above"),
    ],
)
def test_a_worker_that_ends_is_told_at_once(act, told: str, hint: str, workers: int) -> None:
    with soon(), pytest.raises(IncompleteError, match=told) as caught:
        list(decoded(at(37, act), workers, [range(start, start + 4) for start in range(0, 100, 4)], **TINY))
    assert "pid" in caught.value.message
    assert "36 to 39" in caught.value.message
    assert hint in caught.value.hint
    del caught
    assert multiprocessing.active_children() == []


def test_a_worker_that_was_killed_while_nobody_waited_is_told() -> None:
    with soon(), closing(decoded(Plain(), 2, [[row] for row in range(100)], **TINY)) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(IncompleteError, match="SIGKILL"):
            list(batches)


def no_memory() -> None:
    raise MemoryError


def no_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.open("/dev/null", os.O_RDONLY)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (no_memory, "ran out of memory at rows 36 to 39: MemoryError"),
        (lambda: torch.empty(1 << 50), "ran out of memory at rows 36 to 39: .*can't allocate memory"),
        (no_files, "ran out of open files at rows 36 to 39: .*Too many open files"),
    ],
)
def test_a_resource_that_runs_out_in_a_worker_is_told(act, told: str) -> None:
    with pytest.raises(IncompleteError, match=told) as caught:
        list(decoded(at(37, act), 2, [range(start, start + 4) for start in range(0, 100, 4)], **TINY))
    assert "`workers" in caught.value.hint


def test_memory_for_a_batch_that_cannot_be_had_is_told() -> None:
    """A batch of more than there is: the worker cannot have its memory."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises((IncompleteError, OSError), match="File too large|memory"):
            list(decoded(Plain(), 1, [range(100)] * 2, shape=(3, 64, 64), transform=lambda _: torch.zeros(3, 64, 64)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


class Mine(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_mine() -> None:
    raise Mine(1, 2)


def test_a_users_error_keeps_its_kind_and_the_workers_trace() -> None:
    def broken() -> None:
        raise KeyError("a bug of mine")

    with pytest.raises(KeyError, match="a bug of mine") as caught:
        list(decoded(at(3, broken), 1, [range(8)], **TINY))
    assert 'raise KeyError("a bug of mine")' in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="Mine: 1 and 2"):  # It pickles, and does not unpickle.
        list(decoded(at(3, raise_mine), 1, [range(8)], **TINY))


def test_a_worker_that_is_stopped_is_named_and_killed_in_the_end(monkeypatch, caplog) -> None:
    monkeypatch.setattr(workers_module, "SILENCE", 0.1)
    monkeypatch.setattr(workers_module, "_GRACE", 0.2)
    caplog.set_level(logging.WARNING)
    waits = []

    def interrupted_at_the_third(*_: object) -> None:
        waits.append(1)
        if len(waits) == 3:
            raise KeyboardInterrupt

    with soon(), closing(decoded(at(5, kill(signal.SIGSTOP)), 2, [range(4), range(4, 8)], **TINY)) as batches:
        assert next(batches).rows == (0, 1, 2, 3)
        caplog.handler.addFilter(lambda _record: interrupted_at_the_third() is None)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    assert "which decodes rows 4 to 7, has not answered for 0 seconds" in caplog.text
    begun = time.monotonic()
    while multiprocessing.active_children():  # killed; on a busy machine it is collected a moment later
        assert time.monotonic() - begun < 30
        time.sleep(0.05)


def test_a_system_without_room_for_processes_is_told(monkeypatch) -> None:
    started = []
    fork = os.fork

    def refused_the_third_time() -> int:
        started.append(1)
        if len(started) == 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", refused_the_third_time)
    with pytest.raises(IncompleteError, match="starting 4 .*refused number 3: Resource temporarily") as caught:
        decoded(Plain(), 4, [range(4)], **TINY)
    assert "ulimit -u" in caught.value.hint
    assert multiprocessing.active_children() == []


def test_a_system_without_room_for_open_files_is_told() -> None:
    script = """
import os, resource, torch
from PIL import Image
from gstds_cache.data.loading import pixel_batches
from gstds_cache.errors import IncompleteError
class Plain:
    def image(self, row): return Image.new("RGB", (2, 2))
first = max(map(int, os.listdir("/proc/self/fd")))
for room in range(16):
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + room, 4096))
    try:
        list(pixel_batches(Plain(), lambda image: torch.zeros(3, 2, 2, dtype=torch.uint8), (3, 2, 2), [[0], [1]],
                           workers=4, pin=False))
    except IncompleteError as error:
        print(room, "Too many open files" in error.message, "ulimit -n" in error.hint)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[:9] == [f"{room} True True" for room in range(9)]


def test_workers_go_without_a_word_when_their_parent_is_killed(tmp_path) -> None:
    script = """
import os, signal, time, torch
from PIL import Image
from gstds_cache.data.loading import pixel_batches
class Slow:
    def image(self, row):
        time.sleep(0.05)
        return Image.new("RGB", (2, 2))
batches = pixel_batches(Slow(), lambda image: torch.zeros(3, 2, 2, dtype=torch.uint8), (3, 2, 2),
                        ([row] for row in range(10**6)), workers=3, pin=False)
next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # The workers have its stdout and stderr: their end is the end of all of them.
    with soon(60):
        words, environment = [FORKS.executable(), "-c", script], os.environ | ALWAYS
        run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGKILL, "", "")


def test_batches_of_any_size_in_any_order() -> None:
    """Memory grows with a batch, and a batch that is there is not changed by those after it."""
    rng = np.random.default_rng(0)
    spans = [rng.integers(0, 100, int(size)).tolist() for size in rng.integers(1, 90, 60)]
    for workers in (0, 2, 3):
        found = list(decoded(Plain(), workers, spans, **TINY))
        assert [batch.rows for batch in found] == [tuple(span) for span in spans]
        for batch, span in zip(found, spans, strict=True):
            assert batch.pixels[:, 0, 0, 0].tolist() == span


def test_a_loader_that_nobody_needs_any_more_ends_its_workers() -> None:
    batches = decoded(Plain(), 2, [range(4)] * 9, **TINY)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert multiprocessing.active_children() == []


def process_number(_image: Image.Image) -> torch.Tensor:
    """The number of the process that decodes, in three bytes."""
    return torch.tensor([os.getpid() >> shift & 255 for shift in (0, 8, 16)], dtype=torch.uint8).view(3, 1, 1)


def test_a_batch_is_decoded_by_all_processes() -> None:
    with closing(decoded(Plain(), 4, [range(96), range(8)], shape=(3, 1, 1), transform=process_number)) as batches:
        processes = {tuple(pixels.flatten().tolist()) for pixels in next(batches).pixels}
        assert len(processes) == 4
        assert len({tuple(pixels.flatten().tolist()) for pixels in next(batches).pixels}) == 1  # not worth to be shared


def test_slow_images_hold_up_no_other_process_and_what_is_ahead_has_a_limit(tmp_path) -> None:
    seen = tmp_path / "seen"

    def act(row: int) -> None:
        with seen.open("a") as file:
            file.write(".")
        time.sleep(2.0 if row == 0 else 0.001)

    spans = [range(16), *[range(16, 32)] * 99]
    with closing(decoded(Plain(act), 3, spans, **TINY)) as batches:
        assert next(batches).rows == tuple(range(16))
        done = seen.stat().st_size // 16
        assert 8 < done < 40  # By turns it would have been five.
        begun = time.monotonic()
        assert all(next(batches).rows == tuple(range(16, 32)) for _ in range(8))
        assert time.monotonic() - begun < 1.0


def test_an_error_is_told_when_its_batch_is_the_next(tmp_path) -> None:
    def broken() -> None:
        raise KeyError("a bug of mine")

    spans = [range(start, start + 10) for start in range(0, 100, 10)]
    with closing(decoded(at(55, broken), 3, spans, **TINY)) as batches:
        assert [next(batches).rows[0] for _ in range(5)] == [0, 10, 20, 30, 40]
        with pytest.raises(KeyError, match="a bug of mine"):
            next(batches)
