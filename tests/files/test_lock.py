"""One writer at a time: among processes, among threads, and whatever is closed or deleted meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from gstds_cache.errors import IncompleteError
from gstds_cache.files.lock import exclusive, shared

HOLD = """
import sys, time
from pathlib import Path
from gstds_cache.files.lock import exclusive
with exclusive(Path(sys.argv[1]), of=Path("it")):
    print("held", flush=True)
    time.sleep(60)
"""


def held_elsewhere(lock: Path) -> bool:
    """Whether another process is refused."""
    code = HOLD.replace("time.sleep(60)", "pass")
    done = subprocess.run([sys.executable, "-c", code, str(lock)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "is being written by another process" in done.stderr
    return done.returncode != 0


def test_threads_of_one_process_are_kept_apart(tmp_path: Path) -> None:
    inside, most, refused, entered, begin = 0, 0, 0, 0, threading.Barrier(8)
    count = threading.Lock()

    def work() -> None:
        nonlocal inside, most, refused, entered
        begin.wait()
        for _ in range(20):
            try:
                with exclusive(tmp_path / "lock", of=tmp_path):
                    with count:
                        entered += 1
                        inside += 1
                        most = max(most, inside)
                    with count:
                        inside -= 1
            except IncompleteError as error:
                with count:
                    refused += "another thread of this process" in error.message

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == 1
    assert refused == 8 * 20 - entered


def test_a_refused_thread_does_not_give_up_the_lock_for_others(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with exclusive(tmp_path / "lock", of=tmp_path):
        for path in (tmp_path / "lock", tmp_path / "link" / "lock"):  # closing another descriptor would give it up
            with pytest.raises(IncompleteError), exclusive(path, of=tmp_path):
                pass
        assert held_elsewhere(tmp_path / "lock")
    assert not held_elsewhere(tmp_path / "lock")


def test_a_lock_file_that_was_deleted_keeps_nobody_out_and_nobody_holds_it(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", of=tmp_path):
        (tmp_path / "lock").unlink()
    with exclusive(tmp_path / "lock", of=tmp_path):
        assert held_elsewhere(tmp_path / "lock")


def test_the_lock_of_a_killed_process_is_free_though_its_forked_child_lives(tmp_path: Path) -> None:
    code = HOLD.replace(
        "    time.sleep(60)", "    import os\n    if os.fork() == 0: time.sleep(20)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(IncompleteError, match="another process"), exclusive(tmp_path / "lock", of=tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with exclusive(tmp_path / "lock", of=tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(_file: int, _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(IncompleteError, match="has no file locks") as caught, exclusive(tmp_path / "lock", of=tmp_path):
        pass
    assert "local folder" in caught.value.hint


@pytest.mark.parametrize(
    ("held", "refused"), [("exclusive", {"exclusive", "shared"}), ("shared", {"exclusive"}), ("", set())]
)
def test_who_shares_a_lock_keeps_out_who_wants_it_alone_and_no_other(
    tmp_path: Path, held: str, refused: set[str]
) -> None:
    def refused_elsewhere(kind: str) -> bool:
        code = HOLD.replace("exclusive", kind).replace("time.sleep(60)", "pass")
        words = [sys.executable, "-c", code, str(tmp_path / "lock")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "is being written by another process" in done.stderr
        return done.returncode != 0

    holding = {"exclusive": exclusive, "shared": shared, "": lambda *_, **_of: nullcontext()}[held]
    with holding(tmp_path / "lock", of=tmp_path):
        assert {kind for kind in ("exclusive", "shared") if refused_elsewhere(kind)} == refused
        if held:
            for again in (exclusive, shared):
                with pytest.raises(IncompleteError, match="another thread"), again(tmp_path / "lock", of=tmp_path):
                    pass
            assert refused_elsewhere("exclusive")
    assert not refused_elsewhere("exclusive")
