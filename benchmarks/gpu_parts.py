"""The parts of ``on_gpu.py``: their commands, how long they may take, what they need, and what their output tells."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KERNELS = "regex:^(graph|fiedler|finish|cells|resize)_block$"
"""What the profiler looks at: our kernels by name, none of torch's."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: Its name in ``--parts`` and in the JSON.
        command: The program and its words; ``{out}``, ``{scratch}`` (its folder), ``{results}``, ``{seconds}`` and
            ``{data}`` are filled in.
        limit: Seconds it may take.
        least: With fewer seconds left it is not started.
        smoke: Words added for a smoke run.
        instead: The whole command of a smoke run, where words are not enough.
        optional: Words added where the file that is named first is there.
        needs: Files or folders of ``--data`` without which it is left out.
        times_the_cpu: It measures compiled CPU code, so that has to be compiled by then.
        read: From the output to the result, for programs that write no JSON.
        environment: Variables set for it.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    least: int
    smoke: tuple[str, ...] = ("--smoke",)
    needs: tuple[str, ...] = ()
    times_the_cpu: bool = False
    read: Callable[[str], dict[str, Any]] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    instead: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def words(self, out: Path, seconds: float, arguments: argparse.Namespace) -> list[str]:
        """The command as it is started."""
        filled = {"{out}": str(out), "{seconds}": f"{seconds - 3:.0f}", "{data}": str(arguments.data)}
        filled["{results}"], filled["{scratch}"] = str(arguments.out), str(out.parent)
        words = list(self.command)
        if arguments.smoke:
            words = list(self.instead) or words + list(self.smoke)
        elif self.optional and (arguments.data / self.optional[0]).exists():
            words += self.optional[1:]
        for place, value in filled.items():
            words = [word.replace(place, value) for word in words]
        return words

    def missing(self, arguments: argparse.Namespace) -> str:
        """What this part cannot run without and is not there, in words; empty where all is there."""
        program = self.command[0]
        if shutil.which(program) is None:
            return f"{program} is not on the PATH"
        scripts = [word for word in self.command if word.endswith(".py") and not Path(word).exists()]
        data = [] if arguments.smoke else [name for name in self.needs if not (arguments.data / name).exists()]
        return ", ".join(f"{name} is not there" for name in scripts + data)


def script(name: str, *words: str) -> tuple[str, ...]:
    """A benchmark of this folder, writing its JSON where it is told."""
    return (sys.executable, str(HERE / name), "--out", "{out}", *words)


def sanitizer(name: str, limit: int) -> Part:
    """compute-sanitizer over the small case, where no tensor's end is in the memory of another."""
    # cuda-bindings asks the driver for what an older one lacks; those answers are no errors of ours.
    command = ("compute-sanitizer", "--tool", name, "--error-exitcode", "9", "--report-api-errors", "no")
    small = ("--graphs", "1", "--nodes", "40") if name == "racecheck" else ()  # it took more than 60 s for 3 of 96
    return Part(
        name,
        (*command, *script("gpu_small.py", *small)),
        limit,
        20,
        read=read_sanitizer,
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def tests_of_the_gpu() -> list[str]:
    """Test files with a test that is marked ``gpu``: collecting all others takes longer than running these."""
    files = sorted((HERE.parent / "tests").rglob("test_*.py"))
    return [str(path.relative_to(HERE.parent)) for path in files if "mark.gpu" in path.read_text()]


def read_log(part: Part, text: str, out: Path) -> dict[str, Any]:
    """A part's result: the JSON it wrote, and what its output tells."""
    written = json.loads(out.read_text()) if out.exists() else {}
    return written | (part.read(text) if part.read else {})


def read_last_line(text: str) -> dict[str, Any]:
    """The JSON object that our commands end with."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def read_tests(text: str) -> dict[str, Any]:
    """Counts and names out of pytest's summary.

    Examples:
        ``== 2 failed, 31 passed, 4 skipped, 900 deselected in 12.3s ==`` and lines of ``FAILED``, ``SKIPPED``. Where it
        was stopped there is no summary, but a line for each test that had ended: ``[gw0] [ 12%] FAILED tests/...``.
    """
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)}
    lines = text.splitlines()
    ended = [line.partition("] ")[2].partition("] ")[2] for line in lines if re.match(r"\[gw\d+\] \[ *\d+%\] ", line)]
    if not counts:
        counts = Counter(line.split()[0].lower() for line in ended)
    told = [line for line in lines if line.startswith(("FAILED", "ERROR "))]
    return {
        "counts": counts,
        "failed": told or [line for line in ended if line.startswith(("FAILED", "ERROR "))],
        "skipped": [line for line in lines if line.startswith("SKIPPED")],
        "without_faiss": importlib.util.find_spec("faiss") is None,
    }


def read_sanitizer(text: str) -> dict[str, Any]:
    """Errors, or hazards, that compute-sanitizer counted; None where it did not come to an end."""
    memory = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    races = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)
    found = [int(number) for number in memory + races]
    first = [line for line in text.splitlines() if line.startswith("=========")][:40]
    return {"errors": sum(found) if found else None, "first": first if sum(found) else []}


def read_profile(text: str) -> dict[str, Any]:
    """What ncu tells of each launch: lines of ``Metric Name   unit   value`` under the kernel's name."""
    launches: list[dict[str, Any]] = []
    for line in text.splitlines():
        if kernel := re.match(r"\s+(\S.*?) \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\), Context", line):
            launches.append({"kernel": kernel[1]})
        elif launches and (row := re.match(r"\s{4}(\S.*?)\s{2,}(?:(\S+)\s+)?([\d,.]+)\s*$", line)):
            name, unit, value = row.groups()
            launches[-1][f"{name}, {unit}" if unit else name] = float(value.replace(",", ""))
    return {"launches": launches}


def read_study(text: str) -> dict[str, Any]:
    """How many runs there were, and what did not end well; the lines themselves are in the results' folder."""
    lines = text.splitlines()
    return {
        "runs": len([line for line in lines if " gradients, " in line]),
        "failed": [line for line in lines if line.endswith(" failed:")],
        "end": lines[-1:],
    }


EMBED = (sys.executable, "-c", "from gstds_cache.cli.embed_command import main; main()")
TESTS = (
    sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-v", "-rfEs", "--durations=5",
    "--capture=sys",  # what C++ says before it ends a process goes to the log
    "-n", "4", "--dist", "loadfile", "-p", "no:benchmark",  # which, where it is installed, warns of xdist
    # Deprecations in the versions of a machine that we did not choose are no failure there.
    "-W", "ignore::DeprecationWarning", "-W", "ignore::PendingDeprecationWarning", "-W", "ignore::FutureWarning",
)  # fmt: skip
TRAINER = (
    "bench_train_gpu.py", "imagefolder:{data}/cifar10/train", "imagefolder:{data}/cifar10/test",
    "--seconds", "{seconds}",
)  # fmt: skip

ALL = (
    # What all others take their embeddings from: the model of the study's settings.
    Part("store", (*EMBED, "imagefolder:{data}/cifar10/train", "--cache", "{data}/cifar10.store", "--model",
                   "timm:tf_efficientnet_lite0?size=128", "--device", "cuda", "--json"), 45, 20, needs=("cifar10",),
         instead=(*EMBED, "digits", "--cache", "{scratch}/store", "--model", "timm:test_resnet", "--allow-untrained",
                  "--device", "cpu", "--json"), read=read_last_line),
    Part("rows", (sys.executable, str(HERE / "gpu_rows.py"), "{data}/cifar10.store", "{data}/cifar16.npy"), 10, 5,
         needs=("cifar10.store",),
         instead=(sys.executable, str(HERE / "gpu_rows.py"), "{scratch}/store", "{scratch}/rows.npy")),
    Part("correct", script("gpu_correct.py", "--seconds", "{seconds}", "--rows", "{data}/cifar16.npy"), 30, 20,
         needs=("cifar16.npy",)),
    Part("tests", (*TESTS, *tests_of_the_gpu()), 95, 30, smoke=("-k", "test_knn_contract"), read=read_tests),
    sanitizer("memcheck", 20),
    sanitizer("racecheck", 40),
    Part("throughput", script("gpu_throughput.py", "--seconds", "{seconds}", "--rows", "{data}/cifar16.npy"), 65, 40,
         needs=("cifar16.npy",), times_the_cpu=True),
    Part("path", script("bench_path.py", "--seconds", "{seconds}", "--rows", "{data}/cifar16.npy"), 55, 45,
         needs=("cifar16.npy",), times_the_cpu=True),
    Part("trainer", script(*TRAINER, "--only", "conv7", "resnet18"), 85, 40, needs=("cifar10",)),
    Part("recipe", script(*TRAINER, "--only", "accuracy"), 75, 40, needs=("cifar10",),
         optional=("cifar10.store", "--store", "{data}/cifar10.store")),
    # Up to here one call is enough; the same command again goes on.
    Part("embedding", script("bench_embed_gpu.py"), 150, 50),
    Part("profile", ("ncu", "--clock-control", "none", "--set", "basic", "-k", KERNELS, "-c", "12",
                     *script("gpu_small.py", "--full")), 60, 20, read=read_profile),
    Part("study", (sys.executable, str(HERE / "gpu_study.py"), "--data", "{data}", "--results", "{results}/study",
                   "--seconds", "{seconds}"), 300, 60, needs=("cifar10",), read=read_study),
)  # fmt: skip
PARTS = {part.name: part for part in ALL}
