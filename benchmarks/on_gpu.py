r"""Everything that needs a GPU, in one command, for a bare machine, a quarter of an hour and no network.

    python benchmarks/on_gpu.py [--seconds 520] [--parts correct,throughput] [--out FOLDER]

Parts run one after the other, the most important first, each in a process of its own with a time limit. What a part has
measured stands in FOLDER/results.json while it runs and after it was stopped; what it printed, in FOLDER/log.txt; the
figures beside their targets are printed last and are FOLDER/summary.md. Called again with the same FOLDER it goes on
where it stopped: parts that ended well are not run again (unless --again). A part that does not fit into what is left
of --seconds is not started, and is named.

The machine: Linux, x86-64, Python 3.11 or later; a GPU of compute capability 8.0 or later with its driver; torch >= 2.8
with CUDA, torchvision, cuda-bindings, CuPy, numba, pyarrow, scikit-learn, scipy, timm, safetensors, threadpoolctl,
jaxtyping, lazy-loader, click, pytest with pytest-xdist, and hypothesis; compute-sanitizer and ncu from CUDA's toolkit.
What has to be brought along, apart from a checkout of this repository (8 MB), 38 MB, is put together by bring.py where
there is a network; a wheel of faiss-gpu of CUDA's major version there may lie beside its wheels. Without one what asks
for faiss is skipped, and named.

    python benchmarks/bring.py FOLDER     here; FOLDER holds CIFAR-10's images
    . .bring/setup.sh                     there, in the checkout
    python benchmarks/on_gpu.py

With --smoke everything runs on a CPU, on made-up data, with the kernels emulated (it needs g++).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, Part, read_log
from gpu_summary import summary
from harness import RESULTS, commit, write

ROOT = Path(__file__).parents[1]
TAIL = 4000  # characters of a failed part's output that go into the JSON
LOG_ROOM = 1 << 20  # bytes of a part's output that go into the log: its end
GRACE = 5.0  # seconds between asking a part to end and killing it
SMOKE = 4  # times the time limit of a part where kernels are emulated, and compiled code may have to be made first
NO_FAILURE = ("done", "left out")


class Run:
    """The parts' results, on the disk at every moment."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        """Take up what is in ``folder``."""
        self.folder, self.arguments = folder, arguments
        self.scratch = Path(tempfile.mkdtemp(prefix="on_gpu-"))
        self.state: dict[str, Any] = {"benchmark": "on_gpu", "parts": {}}
        if (folder / "results.json").exists():
            self.state = json.loads((folder / "results.json").read_text())
        self.state["commit"] = os.environ.get("BENCHMARK_COMMIT") or commit()
        self.state["gpu"] = gpu()

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's result by name."""
        return self.state["parts"]  # type: ignore[no-any-return]

    def save(self) -> None:
        """Write results.json and summary.md."""
        write(self.folder / "results.json", json.dumps(self.state, indent=1) + "\n")
        write(self.folder / "summary.md", summary(self.state))

    def run(self, part: Part, seconds: float) -> None:
        """Run one part for at most so many seconds, its process and all that it started."""
        out, printed = self.scratch / f"{part.name}.json", self.scratch / f"{part.name}.txt"
        out.unlink(missing_ok=True)
        words = part.words(out, seconds, self.arguments)
        said = told(words, self.scratch, self.arguments.data)
        entry: dict[str, Any] = {"status": "running", "limit_s": round(seconds), "command": said}
        self.parts[part.name] = entry
        self.save()
        begun, seen = time.monotonic(), 0.0
        with printed.open("wb") as file:
            process = subprocess.Popen(
                words, cwd=ROOT, env=os.environ | dict(part.environment), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() - begun < seconds:
                    time.sleep(0.2)
                    if out.exists() and out.stat().st_mtime != seen:  # a case more has been measured
                        seen = out.stat().st_mtime
                        entry["result"] = json.loads(out.read_text())
                        self.save()
                timed_out = process.poll() is None
            finally:
                end(process)
        entry["seconds"] = round(time.monotonic() - begun, 1)
        text = printed.read_text(errors="replace")
        entry["result"] = read_log(part, text, out)
        entry["status"] = "timed out" if timed_out else "done" if process.returncode == 0 else "failed"
        if entry["status"] != "done":
            entry |= {"returncode": process.returncode, "output_tail": text[-TAIL:]}
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"\n==== {part.name}: {entry['status']} after {entry['seconds']} s: {entry['command']}\n")
            log.write(text[-LOG_ROOM:])
        self.save()

    def close(self) -> None:
        """Remove what parts wrote for themselves."""
        shutil.rmtree(self.scratch, ignore_errors=True)


def told(words: list[str], scratch: Path, data: Path) -> str:
    """A command as someone else would type it: without where Python, this checkout, its data and its results are."""
    places = {f"{scratch}": "OUT", f"{data}": "DATA", f"{ROOT}/": ""}
    said = ["python" if word == sys.executable else word for word in words]
    for place, name in places.items():
        said = [word.replace(place, name) for word in said]
    return " ".join(said)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and what it started: interrupted, asked, killed, ``GRACE`` seconds apart.

    Interrupted, pytest tells of the tests that have failed by then. The group is killed even where its first process
    has ended: that one's children are in it.
    """
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        if process.poll() is None:
            signal_group(process.pid, number)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    signal_group(process.pid, signal.SIGKILL)


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to all processes of a group, if there still are any."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def gpu() -> dict[str, str] | None:
    """The card, its driver and clocks, as ``nvidia-smi`` tells them; None where it does not run."""
    names = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "power.limit")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(names, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, default=520, help="in which all has to end [default: 520]")
    made.add_argument("--parts", default=",".join(PARTS), help="which, with commas between [default: all, in order]")
    made.add_argument("--again", action="store_true", help="also what has ended well before")
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS / "gpu"
    made.add_argument(
        "--out", type=Path, default=out, help="folder for the three files [default: $OUT, or %(default)s]"
    )
    made.add_argument("--data", type=Path, default=ROOT / ".data", help="where cifar10/ is; what is made of it too")
    made.add_argument("--commit", help="what to name as the commit where the checkout is no repository")
    made.add_argument("--smoke", action="store_true", help="on a CPU, kernels emulated, a few seconds a part")
    arguments = made.parse_args(words)
    arguments.parts = arguments.parts.split(",")
    arguments.out, arguments.data = arguments.out.resolve(), arguments.data.resolve()  # parts run in another folder
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        made.error(f"--parts: got {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    if arguments.commit:
        os.environ["BENCHMARK_COMMIT"] = arguments.commit
    return arguments


def compile_for_cpu(scratch: Path) -> subprocess.Popen[bytes]:
    """What numba compiles takes a core half a minute: done beside the first part, which needs little of the CPU."""
    with (scratch / "numba.txt").open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests/shared/compile_all.py")], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run the parts.

    Returns:
        The exit code: 0 where every part that was asked for has ended well or has been left out.
    """
    arguments = parse(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    begun = time.monotonic()
    run = Run(arguments.out, arguments)
    compiling = None if arguments.smoke else compile_for_cpu(run.scratch)
    try:
        for name in arguments.parts:
            part, left = PARTS[name], arguments.seconds - GRACE - (time.monotonic() - begun)
            if run.parts.get(name, {}).get("status") == "done" and not arguments.again:
                print(f"{name}: done before", flush=True)
                continue
            if missing := part.missing(arguments):
                run.parts[name] = {"status": "left out", "why": missing}
            elif left < part.least:
                run.parts[name] = {"status": "no time", "why": f"{left:.0f} s left, {part.least} s needed"}
            else:
                if compiling is not None and part.times_the_cpu:
                    compiling.wait(90)
                run.run(part, min(part.limit * (SMOKE if arguments.smoke else 1), left))
            run.save()
            entry = run.parts[name]
            told = entry.get("why") or f"{entry['seconds']} s of {entry['limit_s']}"
            print(f"{name}: {entry['status']} ({told}); {time.monotonic() - begun:.0f} s in all", flush=True)
            if "output_tail" in entry:
                print("    " + "\n    ".join(entry["output_tail"].splitlines()[-12:]), flush=True)
    finally:
        if compiling is not None:
            end(compiling)
        run.close()
    print(summary(run.state))
    return int(any(run.parts[name]["status"] not in NO_FAILURE for name in arguments.parts))


if __name__ == "__main__":
    sys.exit(main())
