"""Compiled code is kept where one can write, for this user alone, or nowhere; what is kept wrongly costs compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gstds_cache.runtime import jit
from gstds_cache.runtime.jit import place_of_code, settings, sources_digest, why_not_kept

PROGRAM = """
import sys
import numpy as np
from gstds_cache.runtime.jit import code_cache, why_not_kept
from numba import njit
sys.path.insert(0, sys.argv[1])
from mine import twice
made = njit(twice)
kept = code_cache(twice)
if kept is not None:
    made._cache = kept
assert made(np.arange(3)).tolist() == [0, 2, 4]
print(len(made.stats.cache_hits), made.stats.cache_path)
"""


@pytest.fixture
def blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for compiled code that cannot be one, whoever looks; no other is known yet."""
    file = tmp_path / "file"
    file.write_text("in the way")
    place_of_code.cache_clear()
    monkeypatch.setattr(settings, "CACHE_DIR", "")
    monkeypatch.setenv("GSTDS_CACHE", str(file / "cache"))
    monkeypatch.setattr(jit.mapped, "folder", lambda: None)
    yield file / "__pycache__"
    place_of_code.cache_clear()


def test_the_first_place_that_takes_a_file_is_taken(blocked: Path, tmp_path: Path, monkeypatch) -> None:
    assert place_of_code(tmp_path / "tree").path == tmp_path / "tree"
    assert place_of_code(blocked).path is None
    user = os.geteuid()
    for setting, expected in (
        (
            lambda: monkeypatch.setattr(jit.mapped, "folder", lambda: str(tmp_path)),
            f"gstds-cache-compiled-{user}",
        ),
        (lambda: monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "c")), f"c/compiled-{user}"),
        (lambda: monkeypatch.setattr(settings, "CACHE_DIR", str(tmp_path / "named")), "named"),
    ):
        setting()
        place_of_code.cache_clear()
        assert place_of_code(blocked).path == tmp_path / expected
    assert (tmp_path / f"gstds-cache-compiled-{user}").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(settings, "CACHE_DIR", str(blocked))  # named, and no place
    place_of_code.cache_clear()
    assert place_of_code(blocked).path == tmp_path / f"c/compiled-{user}"


def test_where_nothing_can_be_written_it_says_what_to_set(blocked: Path, monkeypatch) -> None:
    monkeypatch.setattr(jit, "__file__", str(blocked.parent / "jit.py"))
    assert "set NUMBA_CACHE_DIR" in why_not_kept()
    assert str(blocked) in why_not_kept()


@pytest.mark.parametrize("how", ["others may write", "a link", "a file"])
def test_code_is_not_run_from_a_folder_that_others_may_have_filled(blocked: Path, tmp_path, monkeypatch, how) -> None:
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path))
    folder = tmp_path / f"compiled-{os.geteuid()}"
    if how == "others may write":
        folder.mkdir()
        folder.chmod(0o777)
    elif how == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.write_text("")
    assert place_of_code(blocked).path is None


def run(tmp_path: Path, program: str = PROGRAM, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(tmp_path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_damaged_files_cost_compiling_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def twice(x):\n    return x + x\n")
    where = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    assert run(tmp_path, **where).startswith("0 ")
    assert run(tmp_path, **where).startswith("1 ")
    files = sorted((tmp_path / "kept").rglob("*.nb?"))
    assert [file.suffix for file in files] == [".nbc", ".nbi"]
    for file in files:
        file.write_bytes(b"nonsense")
        assert run(tmp_path, **where).startswith("0 "), file
        assert run(tmp_path, **where).startswith("1 "), file


def test_code_of_another_signature_is_not_run(tmp_path: Path) -> None:
    """Two processes that save their first signatures at once give both one name; here they are given each other's."""
    (tmp_path / "mine.py").write_text(
        "def twice(x):\n    out = x.copy()\n    for i in range(len(x)):\n        out[i] += x[i]\n    return out\n"
    )
    where = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    both = PROGRAM.replace("made(np.arange(3))", "made(np.array([0, 9, 1, 9, 2, 9])[::2])").replace(
        "print(", "assert made(np.arange(3)).tolist() == [0, 2, 4]\nprint("
    )
    assert run(tmp_path, both, **where).startswith("0 ")
    assert run(tmp_path, both, **where).startswith("2 ")
    one, other = sorted((tmp_path / "kept").rglob("*.nbc"))
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    assert run(tmp_path, both, **where).startswith("0 ")
    assert run(tmp_path, both, **where).startswith("2 ")  # mended


def test_what_older_sources_were_compiled_to_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def twice(x):\n    return x + x\n")
    where = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    run(tmp_path, **where)
    files = sorted((tmp_path / "kept").rglob("*.nb?"))
    for file in files:
        older = file.with_name(file.name.replace(sources_digest()[:12], "0" * 12))
        assert older != file
        file.rename(older)
    run(tmp_path, **where)
    assert sorted((tmp_path / "kept").rglob("*.nb?")) == files


def test_an_edit_of_what_is_called_makes_code_stale(tmp_path: Path, monkeypatch) -> None:
    before = sources_digest()
    for part in ("graph", "spectral", "selection"):
        (tmp_path / part).mkdir()
        for path in (jit.PACKAGE / part).glob("*.py"):
            (tmp_path / part / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(jit, "PACKAGE", tmp_path)
    monkeypatch.setattr(jit, "sources_digest", sources_digest.__wrapped__)
    assert jit.sources_digest() == before
    with (tmp_path / "spectral" / "result.py").open("a") as file:  # constants alone
        file.write("\nMORE = 1\n")
    assert jit.sources_digest() != before
