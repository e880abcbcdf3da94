"""Runs many command lines, each in a forked process of its own, in a folder of its own: ``FOLDER CASES OUTCOMES``.

The libraries are loaded once, so that a case takes as long as what it does. Reads a JSON list of lists of words, of
which the first may be ``NAME=VALUE`` for the environment; writes a line of JSON with exit code (negative: a signal),
stdout, stderr and seconds for each.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

LIMIT = 60  # seconds; longer is taken for a hang
FILE_SIZE = 200 << 20  # no case has reason to write more, whatever number it was given


def main(folder: Path, cases: Path, outcomes: Path) -> None:
    commands = load()
    gc.freeze()  # no case has to look at what is loaded, which would copy it
    with outcomes.open("w") as file:
        for number, words in enumerate(json.loads(cases.read_text())):
            file.write(json.dumps(run(commands, words, folder / "inputs", folder / f"case{number}")) + "\n")
            file.flush()


def load() -> dict[str, object]:
    """The commands by name; with what they load where it is used, which would else be loaded anew by every case."""
    for name in ("matplotlib.pyplot", "timm", "torchvision.datasets", "torchvision.models", "gstds_cache.report.page",
                 "gstds_cache.selection.run", "gstds_cache.stream.deliver", "gstds_cache.training.loop"):  # fmt: skip
        importlib.import_module(name)
    names = ("embed", "select", "train", "cache")
    return {f"gstds-{name}": importlib.import_module(f"gstds_cache.cli.{name}_command").main for name in names}


def run(commands: dict[str, object], words: list[str], inputs: Path, work: Path) -> dict[str, object]:
    shutil.copytree(inputs, work, symlinks=True)
    begun = time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(_as_command(commands, words, work))
    status = _wait(child, begun + LIMIT)
    out, err = ((work / name).read_text(errors="backslashreplace") for name in (".stdout", ".stderr"))
    shutil.rmtree(work, ignore_errors=True)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": out,
        "stderr": err,
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _as_command(commands: dict[str, object], words: list[str], work: Path) -> int:
    """What the interpreter does with a command of its own: run it, print what nobody caught, give the exit code."""
    os.setsid()  # so that what it leaves running can be ended with it
    os.chdir(work)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    for name, number in ((".stdout", 1), (".stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["GSTDS_CACHE"] = str(work / "stores")
    while "=" in words[0]:
        name, _, value = words[0].partition("=")
        os.environ[name], words = value, words[1:]
    sys.argv = words
    sys.path.insert(0, "")
    code = 0
    try:
        commands[words[0]](args=words[1:], prog_name=words[0])  # type: ignore[operator]
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(child: int, until: float) -> int:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.perf_counter() > until:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
