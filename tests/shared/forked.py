"""Programs in processes of their own that start in no time: forked from one that has loaded torch and the rest already.

``python forked.py`` loads what our commands load, and forks a child for each program it is sent. The child is the
program's from then on: its words, folder, environment and files, and the interpreter's own end. Only what happens while
Python and libraries are loaded is not seen here; tests of that start a process anew.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

LIBRARIES = ("faiss", "obstore", "pyarrow.parquet", "sklearn.linear_model", "timm", "torchvision.datasets", "zarr")
READ_AT_START = ("HF_", "MKL_", "NUMBA_", "OMP_", "OPENBLAS_", "PYTHON")  # variables that a child would read too late
ALWAYS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MESSAGE = 1 << 18


class Forked:
    """A running program, with what a test needs of ``subprocess.Popen``."""

    def __init__(self, args: Sequence[str], status: int, files: tuple[IO[bytes], IO[bytes]]) -> None:
        self.args, self.returncode, self._files = args, None, files
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; a program that takes longer is killed, and an error."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0, *map(str.encode, self.communicate()))
            with self._status as status:
                self.returncode = int(status.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what it wrote to stdout and stderr."""
        self.wait(timeout)
        texts = []
        for file in self._files:
            with file:
                file.seek(0)
                texts.append(file.read().decode())
        return texts[0], texts[1]


class Forks:
    """The process that has everything loaded, seen from a test; started when it is first needed."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._environment: dict[str, str] = {}

    def start(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] = os.environ,
        stdin: IO[Any] | None = None,
        stdout: int | None = None,
    ) -> Forked:
        """Start one of our commands, or a script: ``words[0]`` is a name or a path."""
        if self._socket is None:
            self._begin()
        words = [str(word) for word in words]
        if "/" not in words[0]:
            words[0] = str(Path(sys.executable).with_name(words[0]))
        env = {**env, **ALWAYS}
        late = {name for name in env.keys() | self._environment if env.get(name) != self._environment.get(name)}
        late = {name for name in late if name.startswith(READ_AT_START) and name != "PYTHONPATH"}
        assert not late, f"{late} are read when Python or a library starts"
        message = json.dumps({"words": words, "cwd": str(cwd), "env": env}).encode()
        told = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed when they have been read
        status, ends = os.pipe()
        with Path(os.devnull).open("rb") as nothing:
            files = [(stdin or nothing).fileno(), stdout or told[0].fileno(), told[1].fileno(), ends]
            socket.send_fds(self._socket, [message], files)
        os.close(ends)
        return Forked(words, status, told)

    def _begin(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment = os.environ | ALWAYS
        words = [sys.executable, __file__, str(theirs.fileno())]
        self._server = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=self._environment)
        theirs.close()

    def close(self) -> None:
        if self._server is not None and self._socket is not None:
            self._socket.close()
            self._server.wait(30)


FORKS = Forks()  # of the session


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a child for each message. Returns in a child, with the message; ends the process when the socket closes."""
    for name in ("gstds_cache", "gstds_cache.cli"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")} - {"jemalloc_bg_thd"}
    assert len(threads) == 1, f"a fork would lose threads of {threads}"  # jemalloc's is started again by itself
    gc.collect()
    gc.freeze()  # no child has to look at what is there, which would copy it
    while True:
        message, files, _, _ = socket.recv_fds(requests, MESSAGE, 4)
        with suppress(ChildProcessError):  # those who waited for a child, and have ended since
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            child = os.fork()
            if child == 0:
                for number, file in enumerate(files[:3]):
                    os.dup2(file, number)
                for file in files:
                    os.close(file)
                return json.loads(message)
            os.write(files[3], f"{child}\n".encode())
            _, status = os.waitpid(child, 0)
            os.write(files[3], f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        for file in files:
            os.close(file)


def become(job: dict[str, Any]) -> None:
    """Run the program as if the interpreter had been started with it."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    words = sys.argv = job["words"]
    sys.path[0:1] = [str(Path(words[0]).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - of the program
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None  # found anew, by the program's environment
    np.random.seed()  # noqa: NPY002 - the one of all processes, which a fork would share
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
