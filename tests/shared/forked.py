"""Programs in processes of their own that start in no time: forked from one that has loaded torch and the rest already.

``python forked.py`` loads what our commands load, and forks a child for each program it is sent. The child is the
program's from then on: its words, folder, environment and files, and its end: threads that are waited for, exit
functions, files that are flushed. Not seen here is what happens while Python, libraries and what numba has compiled are
loaded, and while the interpreter frees what modules hold, which would copy all of it (0.6 s of CPU); tests of that
start a process anew.

Processes that such a program starts are forked as well: its ``sys.executable``, and our commands beside it, are
``forked_client.py``, which asks for the fork, passes signals on and ends as the program does. It starts the real
interpreter where a fork would be another thing: for options of Python's, and for programs that look at ``sys.modules``.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

LIBRARIES = (
    *("faiss", "obstore", "pyarrow.parquet", "sklearn.linear_model", "timm", "torchvision.datasets", "zarr"),
    "multiprocessing.spawn",  # remembers the interpreter that it finds when it is loaded
)
READ_AT_START = ("HF_", "MKL_", "NUMBA_", "OMP_", "OPENBLAS_", "PYTHON")  # variables that a child would read too late
ALWAYS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MESSAGE = 1 << 18
CLIENT = Path(__file__).with_name("forked_client.py")


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
            with suppress(ProcessLookupError):  # it has ended since
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
        self._folder, self._owner = Path(), os.getpid()  # whose children leave it open

    def start(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] = os.environ,
        stdin: IO[Any] | None = None,
        stdout: int | None = None,
        new_session: bool = False,
    ) -> Forked:
        """Start one of our commands, a script, or a program: ``words[0]`` is a name, a path, or ``-c``.

        Args:
            words: The program and its arguments.
            cwd: Its folder.
            env: Its environment.
            stdin: What it reads; nothing if None.
            stdout: The descriptor that it writes to; a file that is read when it has ended if None.
            new_session: Whether it leads a session and process group of its own.

        Returns:
            The running program.
        """
        if self._socket is None:
            self._begin()
        words = [str(word) for word in words]
        if "/" not in words[0] and words[0] != "-c":
            words[0] = str(Path(sys.executable).with_name(words[0]))
        env = {**env, **ALWAYS}
        late = {name for name in env.keys() | self._environment if env.get(name) != self._environment.get(name)}
        late = {name for name in late if name.startswith(READ_AT_START) and name != "PYTHONPATH"}
        assert not late, f"{late} are read when Python or a library starts"
        message = json.dumps({"words": words, "cwd": str(cwd), "env": env, "new_session": new_session}).encode()
        told = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed when they have been read
        status, ends = os.pipe()
        with Path(os.devnull).open("rb") as nothing:
            files = [(stdin or nothing).fileno(), stdout or told[0].fileno(), told[1].fileno(), ends]
            socket.send_fds(self._socket, [message], files)
        os.close(ends)
        return Forked(words, status, told)

    def run(self, words: Sequence[str], *, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run such a program to its end."""
        process = self.start(words, cwd=cwd)
        out, errors = process.communicate(timeout)
        return subprocess.CompletedProcess(process.args, process.wait(), out, errors)

    def executable(self, name: str = "python") -> Path:
        """What to start with ``subprocess`` in place of Python or of one of our commands, for a fork."""
        if self._socket is None:
            self._begin()
        return self._folder / name

    def _begin(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment = os.environ | ALWAYS
        self._folder = Path(tempfile.mkdtemp(prefix="forked"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
            asked.bind(str(self._folder / "socket"))
            asked.listen(64)
            self._make_clients()
            files = [theirs.fileno(), asked.fileno()]
            words = [sys.executable, __file__, *map(str, files), str(self._folder / "python")]
            self._server = subprocess.Popen(words, pass_fds=files, env=self._environment)
        theirs.close()
        atexit.register(self.close)

    def _make_clients(self) -> None:
        """What stands for the folder of the interpreter: clients in place of Python and our commands."""
        at_start = {name: value for name, value in self._environment.items() if name.startswith(READ_AT_START)}
        told = {"socket": str(self._folder / "socket"), "python": sys.executable, "environment": at_start,
                "read_at_start": READ_AT_START}  # fmt: skip
        (self._folder / "forks.json").write_text(json.dumps(told))
        for path in Path(sys.executable).parent.iterdir():
            beside = self._folder / path.name
            if path.name == "python" or path.name.startswith("gstds-"):
                beside.write_text(f"#!{sys.executable} -IS\n{CLIENT.read_text()}")
                beside.chmod(0o755)
            else:
                beside.symlink_to(path)

    def close(self) -> None:
        if self._server is not None and self._socket is not None and self._owner == os.getpid():
            self._socket.close()
            self._server.wait(30)
            shutil.rmtree(self._folder)
            self._server = self._socket = None


FORKS = Forks()  # of the session


def load() -> None:
    """Load what our commands load."""
    for name in ("gstds_cache", "gstds_cache.cli"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)
    import torch

    from gstds_cache.spectral.fiedler import fiedler_vectors

    rows = np.random.default_rng(0).normal(size=(1, 64, 8)).astype(np.float32)  # torch's generator stays as it begins
    fiedler_vectors(torch.from_numpy(rows), k=5)  # loads what numba has compiled: 0.25 s for each who selects


def serve(requests: socket.socket, asked: socket.socket) -> dict[str, Any]:
    """Fork a child for each message. Returns in a child, with the message; ends the process when a socket closes.

    Args:
        requests: Where messages of the tests come from, with the files of the program and one for how it ends.
        asked: Where clients connect; a client's connection is told how its program ends.
    """
    load()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")} - {"jemalloc_bg_thd"}
    assert len(threads) == 1, f"a fork would lose threads of {threads}"  # jemalloc's is started again by itself
    gc.collect()
    gc.freeze()  # no child has to look at what is there, which would copy it
    while True:
        ready, _, _ = select.select([requests, asked], [], [])
        connection = None if requests in ready else asked.accept()[0]
        message, files, _, _ = socket.recv_fds(connection or requests, MESSAGE, 4)
        with suppress(ChildProcessError):  # those who waited for a child, and have ended since
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            if connection is None:
                os._exit(0)
            connection.close()  # of a client that was killed
            continue
        if connection is not None:
            files.append(connection.detach())
        if os.fork() == 0:
            requests.close()
            asked.close()
            child = os.fork()
            if child == 0:
                for number, file in enumerate(files[:3]):
                    os.dup2(file, number)
                for file in files:
                    os.close(file)
                return json.loads(message)
            _tell(files, child, ends_with_client=connection is not None)
        for file in files:
            os.close(file)


def _tell(files: Sequence[int], child: int, *, ends_with_client: bool) -> None:
    """Say which process the program is, and how it ends. A program whose client was killed is killed."""
    for file in files[:3]:  # whoever reads what the program writes waits for all who might
        os.close(file)
    with suppress(OSError):
        os.write(files[3], f"{child}\n".encode())
    if ends_with_client:
        ended = os.pidfd_open(child)
        if ended not in select.select([files[3], ended], [], [])[0]:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):
        os.write(files[3], f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(job: dict[str, Any], executable: str) -> None:
    """Run the program as if the interpreter had been started with it.

    Args:
        job: Words, folder and environment of the program.
        executable: What it finds as Python's interpreter.
    """
    if job.get("new_session"):
        os.setsid()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.executable = executable
    program, words = None, job["words"]
    if words[0] == "-c":
        program, words = words[1], ["-c", *words[2:]]
    sys.argv = words
    folder = str(Path(words[0]).parent) if program is None else ""
    sys.path[0:1] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - of the program
    sys.stdout.reconfigure(write_through=job.get("unbuffered", False))
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None  # found anew, by the program's environment
    np.random.seed()  # noqa: NPY002 - the one of all processes, which a fork would share
    if program is None:
        runpy.run_path(words[0], run_name="__main__")
    else:
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), module.__dict__)


def to_its_end(job: dict[str, Any], executable: str) -> NoReturn:
    """Run the program, and end as the interpreter does: the exit code, or the signal of a Ctrl-C that nobody caught."""
    code = 0
    try:
        become(job, executable)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.modules.pop("__main__")  # what the program left behind has its end too
    gc.collect()
    for file in (sys.stdout, sys.stderr):
        with suppress(ValueError):  # the program has closed it
            try:
                file.flush()
            except OSError as error:
                code = 120
                print(f"Exception ignored in: {file!r}\n{error!r}", file=sys.stderr)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    to_its_end(serve(*(socket.socket(fileno=int(number)) for number in sys.argv[1:3])), sys.argv[3])
