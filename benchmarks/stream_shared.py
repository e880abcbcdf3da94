"""Several readers on one service, one of which takes nothing: what the others and the service's memory notice of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness import spread

READER = """
import sys, time
from gstds_cache.stream.reader import open_selection
import gstds_cache.stream.flight_client
where = sys.argv[1]
print("ready", flush=True)
for line in sys.stdin:
    begun = time.perf_counter()
    with open_selection(where) as stream:
        if line == "stall\\n":
            next(iter(stream))
            print("stalled", flush=True)
            sys.stdin.readline()
            continue
        count = sum(1 for _ in stream)
    print(count / (time.perf_counter() - begun), flush=True)
"""


@contextmanager
def serving(store: Path, *flags: str) -> Iterator[tuple[int, str]]:
    """``gstds-select STORE --serve`` as a process; yields its number and address, and stops it."""
    words = [Path(sys.executable).with_name("gstds-select"), store, *flags, "--serve", "127.0.0.1:0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as service:
        try:
            events = (json.loads(line) for line in service.stderr if line.startswith("{"))
            yield service.pid, next(event["location"] for event in events if event["event"] == "serving")
        finally:
            service.terminate()
            service.stderr.read()


def one_stalled(store: Path, digest: str, trials: int, *flags: str, readers: int) -> dict[str, Any]:
    """Records/s of all readers but one together: alone, and while that one stalls after one record; in turn.

    Args:
        store: A store in whose folder of selections ``digest`` is, larger than all socket buffers.
        digest: The selection.
        trials: Of each, after one of each that is not counted.
        flags: For ``gstds-select --serve``.
        readers: Processes.
    """
    rates: dict[str, list[float]] = {"alone": [], "beside_a_stalled_one": []}
    with ExitStack() as stack:
        pid, where = stack.enter_context(serving(store, *flags))
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", READER, f"{where}/{digest[:16]}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(readers)
        ]
        assert {reader.stdout.readline() for reader in processes} == {"ready\n"}
        *others, stalled = processes

        def ask(reader: subprocess.Popen[str], word: str) -> None:
            reader.stdin.write(f"{word}\n")
            reader.stdin.flush()

        def read() -> float:
            for reader in others:
                ask(reader, "read")
            return sum(float(reader.stdout.readline()) for reader in others)

        for trial in range(trials + 1):
            alone = read()
            if trial == 0:
                before = _memory(pid, "VmRSS")
            ask(stalled, "stall")
            assert stalled.stdout.readline() == "stalled\n"
            beside_stalled = read()
            ask(stalled, "leave")
            if trial:
                rates["alone"].append(alone)
                rates["beside_a_stalled_one"].append(beside_stalled)
        peak = _memory(pid, "VmHWM")
        for reader in processes:
            reader.stdin.close()
    ratio = [b / a for a, b in zip(rates["alone"], rates["beside_a_stalled_one"], strict=True)]
    return {
        "readers": readers,
        "records_per_second_of_the_others": {name: spread(values) for name, values in rates.items()},
        "beside_over_alone": spread(ratio),
        "service_bytes": {"after_the_first_round": before, "peak_at_the_end": peak, "rise": peak - before},
    }


def _memory(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
