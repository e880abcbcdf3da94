"""Stands for Python, or for one of our commands: asks for a fork of the process that has everything loaded (forked.py).

Runs as ``python -IS`` in a folder with ``forks.json``; it imports little, since it is started often.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress


def main() -> int:
    folder = os.path.dirname(sys.argv[0])  # noqa: PTH120 - pathlib takes longer to load than everything else here
    with open(os.path.join(folder, "forks.json")) as file:  # noqa: PTH118, PTH123
        forks = json.load(file)
    name, words = os.path.basename(sys.argv[0]), sys.argv[1:]  # noqa: PTH119
    python, loaded = forks["python"], forks["environment"]
    if name != "python":
        words = [os.path.join(os.path.dirname(python), name), *words]  # noqa: PTH118, PTH120
    unbuffered = words[:1] == ["-u"]
    words = words[unbuffered:]
    late = {key for key in os.environ.keys() | loaded if os.environ.get(key) != loaded.get(key)}
    program = words[:1] == ["-c"]
    if (
        not words
        or (words[0].startswith("-") and not program)  # options of Python's
        or (program and "sys.modules" in words[1])  # asks what is loaded
        or any(key.startswith(tuple(forks["read_at_start"])) for key in late - {"PYTHONPATH"})
    ):
        os.execv(python, [python, *["-u"] * unbuffered, *words])
    if not program:
        words[0] = os.path.abspath(words[0])  # noqa: PTH100
    told = {"words": words, "cwd": os.getcwd(), "env": {**os.environ}, "unbuffered": unbuffered}  # noqa: PTH109
    asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked.connect(forks["socket"])
    socket.send_fds(asked, [json.dumps(told).encode()], [0, 1, 2])
    child = int(asked.recv(32))

    def pass_on(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):  # it has ended; we are about to be told
            os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    for file in (0, 1, 2):
        os.close(file)
    code = int(asked.recv(32))
    if code < 0:  # by a signal, and so do we
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    os._exit(main())
