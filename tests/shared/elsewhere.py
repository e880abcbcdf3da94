"""Commands run where nothing may be written: in a private mount namespace, or as a user that nobody knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from forked import FORKS

MOUNTED = """
import ctypes, json, subprocess, sys
sys.dont_write_bytecode = True
script = sys.argv[-1]  # of mounts that nobody else sees
if script:
    new_namespace, recursive_private = 0x20000, 0x44000
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(new_namespace) == 0 and libc.mount(b"none", b"/", None, recursive_private, None) == 0
    subprocess.run(["bash", "-ec", script], check=True)
"""
DRIVER = f"""{MOUNTED}
from importlib.metadata import entry_points
from click.testing import CliRunner
commands = {{point.name: point for point in entry_points(group="console_scripts") if point.name.startswith("gstds-")}}
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(commands[words[0]].load(), words[1:])
    print("\\0" + json.dumps([done.exit_code, done.stdout, done.stderr, repr(done.exception)]), flush=True)
"""
UNKNOWN = 4242
AS_NOBODY = (
    f"setpriv --reuid {UNKNOWN} --regid {UNKNOWN} --clear-groups "
    # The interpreter and the checkout may lie in a folder of root's: they may be read, and nothing may be written.
    "--inh-caps +dac_read_search --ambient-caps +dac_read_search env -u HOME -u GSTDS_CACHE -u USER -u LOGNAME"
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    exception: str


@cache
def _can(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, timeout=30, check=False).returncode == 0
    except OSError:
        return False


def need_mounts() -> None:
    """Skip where this user may not mount."""
    if not _can("unshare", "-m", "true"):
        pytest.skip("needs root and unshare, to mount where nobody else sees it")


def need_users() -> None:
    """Skip where this user may not become another."""
    if not _can(*AS_NOBODY.split(), "true"):
        pytest.skip("needs root and setpriv, to become a user that nobody knows")


def run_commands(
    folder: Path, *commands: list[str], before: str = "", prefix: str = "", **environment: str
) -> list[Ended]:
    """Run several commands one after the other in one process, after a shell script in its own mount namespace.

    Args:
        folder: Where they run.
        commands: Their words.
        before: The script.
        prefix: What the process is run by, e.g. :data:`AS_NOBODY`.
        environment: More variables; an empty one is unset.

    Returns:
        How each ended.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables = {name: value for name, value in variables.items() if value}
    if prefix:  # another user loads the libraries himself
        script = f'set -e\n{before}\nexec {prefix} "$@"\n'
        words = ["bash", "-c", script, "bash", sys.executable, "-B", "-c", DRIVER, json.dumps(commands), ""]
        words = ["unshare", "-m", *words] if before else words
        done = subprocess.run(
            words, cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False
        )
        out, errors = done.stdout, done.stderr
    else:
        with NamedTemporaryFile("w", suffix=".py") as driver:
            driver.write(DRIVER)
            driver.flush()
            process = FORKS.start([driver.name, json.dumps(commands), before], cwd=folder, env=variables)
            out, errors = process.communicate(240)
    ended = [Ended(*json.loads(line[1:])) for line in out.splitlines() if line.startswith("\0")]
    assert len(ended) == len(commands), (out, errors)
    return ended


def codes(ended: list[Ended]) -> list[int]:
    """The exit codes; none of them is that of a traceback."""
    for one in ended:
        assert one.exception in {"None", f"SystemExit({one.code})"}, one
    return [one.code for one in ended]


def executable(name: str) -> str:
    """One of our commands."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None
    return found
