"""One command for a machine with a GPU: parts end in time, nothing measured is lost, it goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import WHY_NOT
from forked import ALWAYS, FORKS
from vector_store import clustered, vector_store

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(ROOT)]

import bring  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_rows  # noqa: E402
import gpu_study  # noqa: E402
import on_gpu  # noqa: E402
from gpu_parts import Part  # noqa: E402
from gpu_summary import FIGURES, Figure, line, summary  # noqa: E402

from benchmarks.study.__main__ import parse, tasks_of  # noqa: E402
from benchmarks.study.lines import read_lines  # noqa: E402
from benchmarks.study.methods import find_method  # noqa: E402
from benchmarks.study.settings import load_setting, names  # noqa: E402
from gstds_cache.data.sources import open_source  # noqa: E402
from gstds_cache.store.reader import EmbeddingStore  # noqa: E402

WRITES = "import json, sys; json.dump({'n': 1}, open(sys.argv[1], 'w'))"
FAILS = f"{WRITES}; print('about to fail'); raise SystemExit('no such thing')"
HANGS = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
pathlib.Path(sys.argv[2], 'child').write_text(str(child.pid))
json.dump({'n': 1}, open(sys.argv[1], 'w'))
time.sleep(600)
"""

Command = Callable[..., int]


def part(name: str, code: str, *words: str, **options: Any) -> Part:
    options = {"limit": 30, "least": 1, "smoke": ()} | options
    return Part(name, (sys.executable, "-c", code, "{out}", *words), **options)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command with other parts."""
    monkeypatch.setattr(on_gpu, "GRACE", 0.5)
    monkeypatch.setattr(on_gpu, "SMOKE", 1)
    before = signal.getsignal(signal.SIGTERM)

    def run(*parts: Part, words: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(on_gpu, "PARTS", {made.name: made for made in parts})
        return on_gpu.main(["--smoke", "--out", str(tmp_path / "out"), "--data", str(tmp_path), *words])

    yield run
    signal.signal(signal.SIGTERM, before)


def parts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())["parts"]


def test_a_part_that_hangs_is_ended_with_all_it_started_and_keeps_what_it_measured(command, tmp_path) -> None:
    begun = time.monotonic()
    assert command(part("hangs", HANGS, str(tmp_path), limit=2), part("writes", WRITES)) == 1
    assert time.monotonic() - begun < 15
    found = parts_of(tmp_path)
    assert (found["hangs"]["status"], found["hangs"]["result"]) == ("timed out", {"n": 1})
    assert not is_running(int((tmp_path / "child").read_text()))
    assert (found["writes"]["status"], found["writes"]["result"]) == ("done", {"n": 1})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.json", "summary.md"]


def test_a_part_that_fails_tells_why_in_the_results_and_the_log(command, tmp_path, capsys) -> None:
    assert command(part("fails", FAILS)) == 1
    found = parts_of(tmp_path)["fails"]
    assert (found["status"], found["returncode"], found["result"]) == ("failed", 1, {"n": 1})
    assert found["output_tail"] == "about to fail\nno such thing\n"
    assert "==== fails: failed after" in (log := (tmp_path / "out" / "log.txt").read_text())
    assert "no such thing" in log
    assert "no such thing" in capsys.readouterr().out


def test_it_goes_on_where_it_stopped(command, tmp_path, capsys) -> None:
    counts = "import pathlib, sys; pathlib.Path(sys.argv[2]).open('a').write('x')"
    good, bad = (tmp_path / name for name in ("good", "bad"))
    parts = (part("good", counts, str(good)), part("bad", counts + "; sys.exit(3)", str(bad)))
    command(*parts)
    command(*parts)
    assert "good: done before" in capsys.readouterr().out
    assert (good.read_text(), bad.read_text()) == ("x", "xx")
    assert command(*parts, words=("--parts", "good", "--again")) == 0
    assert (good.read_text(), bad.read_text()) == ("xx", "xx")
    assert parts_of(tmp_path)["bad"]["status"] == "failed"  # what was not asked for stays as it was


def test_parts_that_do_not_fit_or_cannot_run_are_named(command, tmp_path, capsys) -> None:
    nowhere = Part("gone", ("no-such-program",), 9, 1)
    assert command(part("long", WRITES, least=50), nowhere, part("writes", WRITES), words=("--seconds", "40")) == 1
    found = parts_of(tmp_path)
    assert found["long"]["status"] == "no time"
    assert found["long"]["why"].endswith("50 s needed")
    assert found["gone"] == {"status": "left out", "why": "no-such-program is not on the PATH"}
    assert found["writes"]["status"] == "done"
    assert found["writes"]["limit_s"] == 30
    assert "gone left out (no-such-program is not on the PATH)" in capsys.readouterr().out
    assert command(part("gone", WRITES), words=("--parts", "gone")) == 0  # what it lacked is there now
    assert parts_of(tmp_path)["gone"]["status"] == "done"


def test_a_part_without_its_data_is_left_out(tmp_path) -> None:
    made = part("writes", WRITES, needs=("cifar10",))
    arguments = on_gpu.parse(["--data", str(tmp_path)])
    assert made.missing(arguments) == "cifar10 is not there"
    (tmp_path / "cifar10").mkdir()
    assert not made.missing(arguments)


def test_an_unknown_part_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        on_gpu.parse(["--parts", "correct,corect"])
    assert "--parts: got corect, expected some of store, rows, correct" in capsys.readouterr().err


def test_when_it_is_stopped_its_part_ends_too(tmp_path) -> None:
    hangs = f"Part('hangs', (sys.executable, '-c', {HANGS!r}, '{{out}}', {str(tmp_path)!r}), 99, 1, smoke=())"
    program = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nimport on_gpu; from gpu_parts import Part\n"
        f"on_gpu.PARTS = {{'hangs': {hangs}}}\non_gpu.main(['--smoke', '--out', {str(tmp_path / 'out')!r}])"
    )
    running = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not (tmp_path / "child").exists() or not parts_of(tmp_path)["hangs"].get("result"):
            assert running.poll() is None
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 143
    finally:
        running.kill()
    assert not is_running(int((tmp_path / "child").read_text()))
    assert parts_of(tmp_path)["hangs"]["result"] == {"n": 1}


SANITIZED = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at fiedler_block+0x4f0 in solve.cu:212
========= ERROR SUMMARY: 2 errors
"""
TESTED = """..F..s
FAILED tests/a.py::test_one - AssertionError
SKIPPED [2] tests/b.py:3: needs faiss
== 1 failed, 4 passed, 2 skipped, 90 deselected in 12.30s ==
"""
PROFILED = """==PROF== Connected to process 12
[12] python3.12@127.0.0.1
  graph_block(const float *, int) (264, 1, 1)x(512, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Duration                         us       812.64
    Compute (SM) Throughput           %        61.20
    Registers Per Thread                          64
    Elapsed Cycles                cycle    1,234,567
    ----------------------- ----------- ------------
"""


def test_what_other_programs_print_is_read() -> None:
    assert gpu_parts.read_sanitizer(SANITIZED)["errors"] == 2
    assert "solve.cu:212" in " ".join(gpu_parts.read_sanitizer(SANITIZED)["first"])
    assert gpu_parts.read_sanitizer("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == {
        "errors": 0,
        "first": [],
    }
    assert gpu_parts.read_sanitizer("killed")["errors"] is None
    tests = gpu_parts.read_tests(TESTED)
    assert tests["counts"] == {"failed": 1, "passed": 4, "skipped": 2}
    assert tests["failed"] == ["FAILED tests/a.py::test_one - AssertionError"]
    assert tests["skipped"] == ["SKIPPED [2] tests/b.py:3: needs faiss"]
    stopped = "[gw1] [ 12%] PASSED tests/a.py::test_two\n[gw0] [100%] FAILED tests/a.py::test_one[3]\nTerminated"
    assert gpu_parts.read_tests(stopped)["counts"] == {"passed": 1, "failed": 1}
    assert gpu_parts.read_tests(stopped)["failed"] == ["FAILED tests/a.py::test_one[3]"]
    (launch,) = gpu_parts.read_profile(PROFILED)["launches"]
    assert launch == {
        "kernel": "graph_block(const float *, int)",
        "Duration, us": 812.64,
        "Compute (SM) Throughput, %": 61.2,
        "Registers Per Thread": 64.0,
        "Elapsed Cycles, cycle": 1234567.0,
    }


def test_one_call_has_time_for_the_kernels_their_tests_the_sanitizers_and_the_trainer() -> None:
    names = list(gpu_parts.PARTS)
    first = names[: names.index("embedding")]
    assert first[2:6] == ["correct", "tests", "memcheck", "racecheck"]
    assert {"throughput", "path", "trainer", "recipe"} <= set(first)
    assert sum(gpu_parts.PARTS[name].limit for name in first) <= 520


def test_a_command_is_told_without_the_places_of_a_machine(tmp_path) -> None:
    out, data = tmp_path / "out", tmp_path / "d"
    words = [sys.executable, str(BENCHMARKS / "x.py"), "--out", f"{out}/x.json", f"imagefolder:{data}/train"]
    told = on_gpu.told(words, out, data)
    assert told == "python benchmarks/x.py --out OUT/x.json imagefolder:DATA/train"


COMMANDS = gpu_study.commands(gpu_study.NETWORKS, seeds=10)


def test_the_studys_commands_name_methods_and_settings_that_are_there() -> None:
    rates: dict[str, dict[Any, set[float]]] = {}
    for module, setting, *words in COMMANDS:
        if module == "benchmarks.study":
            for task in tasks_of(parse([setting, *words]), setting):
                assert find_method(task.method)
                if "--lrs" in words:
                    rates.setdefault(setting, {}).setdefault((task.method, task.epochs), set()).add(task.lr)
        elif module == "benchmarks.study.tune":
            assert {setting, words[1]} <= set(names())
        else:
            assert (module, words) == ("benchmarks.study.embed", [])
            assert setting in names()
    for setting, of_methods in rates.items():
        for kind in (False, True):  # a long budget may have fewer, the same for each method
            long = [of for (_, epochs), of in of_methods.items() if (epochs > 30) is kind]
            assert len({tuple(sorted(one)) for one in long}) <= 1, setting
            assert all(len(one) >= 2 for one in long)


def test_no_method_meets_the_test_set_before_its_rates_were_tried() -> None:
    tried, tuned = {}, {}
    for module, setting, *words in COMMANDS:
        if module == "benchmarks.study.embed":
            continue
        if module == "benchmarks.study.tune":
            options = dict(zip(words[::2], words[1::2], strict=True))
            epochs = int(options.get("--epochs", load_setting(setting).epochs))
            known = {method for method, budget in tried[setting] if budget == epochs}
            asked = set(options["--methods"].split(",")) if "--methods" in options else known
            assert asked <= known
            tuned.setdefault(words[1], set()).update(asked)
            continue
        tasks = list(tasks_of(parse([setting, *words]), setting))
        if "--lrs" in words:
            assert setting.endswith("-validation")
            tried.setdefault(setting, set()).update((task.method, task.epochs) for task in tasks)
        else:
            methods = {task.method for task in tasks}
            assert methods <= tuned[setting], f"{setting}: {methods - tuned[setting]}"
    assert tuned["cifar10-conv7"] == tuned["cifar10-jpegs-resnet18"] | {"default"}


@pytest.mark.faults
def test_the_study_is_a_part(tmp_path) -> None:
    """On the CPU, its smallest setting: two methods with two learning rates each, lines beside the results."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "on_gpu.py"), "--smoke", "--out", str(tmp_path / "out"), "--parts", "study",
         "--data", str(tmp_path)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert parts_of(tmp_path)["study"]["result"]["runs"] == 4
    lines = read_lines(tmp_path / "out" / "study" / "glyphs-smoke.jsonl")
    assert {(line["method"], line["lr"]) for line in lines if line["kind"] == "run"} == {
        (method, lr) for method in ("random", "draw:damped-loss") for lr in (0.1, 0.2)
    }


def test_a_settings_images_are_embedded_before_its_runs(tmp_path, monkeypatch) -> None:
    """Each command has the arguments that it takes; on the CPU, its smallest setting."""
    monkeypatch.setattr(gpu_study, "NETWORKS", {"smoke": lambda _seeds: [["benchmarks.study.embed", "glyphs-smoke"]]})
    arguments = ["gpu_study", "--networks", "smoke", "--device", "cpu", "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--data", str(tmp_path), "--folder", str(tmp_path / "stores")])
    assert gpu_study.main() == 0
    setting, store = load_setting("glyphs-smoke"), tmp_path / "stores" / "stores" / "glyphs-smoke.store"
    assert len(EmbeddingStore(store)) == len(open_source(setting.train))


def test_what_was_brought_is_unpacked_there(tmp_path, monkeypatch) -> None:
    """Packed here, unpacked by a shell in another folder; a pip that does nothing stands for that machine's."""
    image = tmp_path / "images" / "train" / "truck" / "0000.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"not looked at")
    with tarfile.open(tmp_path / "cifar10.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "images" / "train", "train")
    monkeypatch.chdir(tmp_path)
    Path(".bring/wheels").mkdir(parents=True)
    for _ in range(2):
        assert bring.main([str(tmp_path)]) == 0
    python3 = tmp_path / "bin" / "python3"
    python3.parent.mkdir()
    python3.write_text("#!/bin/sh\nexit 0\n")
    python3.chmod(0o755)
    there = "export PATH=bin:$PATH; . .bring/setup.sh && . .bring/setup.sh && echo $PYTHONPATH"
    done = subprocess.run(["sh", "-ec", there], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (str(tmp_path / ".site"), "")
    assert (tmp_path / ".data" / "cifar10" / "train" / "truck" / "0000.jpg").read_bytes() == b"not looked at"


def test_rows_for_the_kernels_are_those_of_the_store(tmp_path) -> None:
    rows, _ = clustered(gpu_rows.ROWS + 100, dim=4)
    vector_store(tmp_path / "rows.store", rows, shard_rows=gpu_rows.ROWS)
    assert gpu_rows.main([str(tmp_path / "rows.store"), str(tmp_path / "rows.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "rows.npy"), rows[: gpu_rows.ROWS].astype(np.float16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.npy", "rows.store"]


def test_the_study_of_a_gpu_begins_with_the_lines_of_earlier_visits(tmp_path) -> None:
    gpu_study.take_up(tmp_path / "study", COMMANDS)
    lines = read_lines(tmp_path / "study" / "cifar10-conv7.jsonl")
    assert len([line for line in lines if line["kind"] == "run"]) >= 38
    (tmp_path / "study" / "cifar10-conv7.jsonl").write_text("")
    gpu_study.take_up(tmp_path / "study", COMMANDS)  # what is there is further than what was known
    assert (tmp_path / "study" / "cifar10-conv7.jsonl").read_text() == ""


def test_figures_stand_beside_their_targets() -> None:
    most = Figure("time", "throughput", ("case", "us"), 10, most=True, unit="us")
    least = Figure("ratio", "throughput", ("case", "ratio"), 20, unit="x")
    case = {"us": {"median": 8.216, "min": 8.0, "max": 9.123}, "ratio": 12}
    parts = {"throughput": {"status": "done", "result": {"case": case}}}
    assert line(most, parts) == "| time | 8.22 (8 to 9.12) us | <= 10 us | yes |"
    assert line(least, parts) == "| ratio | 12 x | >= 20 x | **no** |"
    assert line(least, {"throughput": {"status": "timed out"}}) == (
        "| ratio | not measured (throughput: timed out) | >= 20 x | |"
    )
    page = summary({"parts": {}, "commit": "", "gpu": {"name": "NVIDIA H100", "driver_version": "580"}})
    assert page.startswith("GPU: name NVIDIA H100, driver_version 580\n")
    assert page.count("not measured") == len(FIGURES)


def test_all_kernels_are_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_correct

    monkeypatch.setattr(gpu_correct.build, "why_not", lambda _: "")
    monkeypatch.setattr("gstds_cache.cuda.launch.shared_memory_limit", lambda _: 227 << 10)
    asked = gpu_correct.variants(gpu_correct.torch.device("cuda", 0))
    assert {function for _, function, _ in asked} == {"graph_block", "fiedler_block", "finish_block", "cells_block"}
    assert sum("SPILL" in defines for _, _, defines in asked) == 2
    folder = gpu_correct.build.FOLDER
    assert all(f"{function}(" in (folder / source).read_text() for source, function, _ in asked)


FAKE = """#!/bin/sh
while [ "$1" != {python} ]; do shift; done
"$@" || exit 9
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_all_parts_run_without_a_gpu(tmp_path) -> None:
    """The kernels emulated, and a program in the place of compute-sanitizer that runs what it is given."""
    fake = tmp_path / "bin" / "compute-sanitizer"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(python=FORKS.executable()))
    fake.chmod(0o755)
    done = subprocess.run(
        [FORKS.executable(), str(BENCHMARKS / "on_gpu.py"), "--smoke", "--out", str(tmp_path / "out"),
         "--parts", "correct,throughput,memcheck"],
        env=os.environ | ALWAYS | {"PATH": f"{fake.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = parts_of(tmp_path)
    checks = found["correct"]["result"]["checks"]
    assert len(checks) > 40
    assert all(checks.values())
    times = found["throughput"]["result"]["solve, B=64, Q=1"]["us_per_graph"]
    assert times["kernel"]["median"] > 0 < times["cpu, all cores"]["median"]
    residuals = found["throughput"]["result"]["peers, B=64, Q=1"]["largest_residual"]
    assert residuals["kernel"] <= 1.01e-6
    assert residuals["torch.linalg.eigh, float64"] < 1e-12
    assert found["memcheck"]["result"]["errors"] == 0
    assert found["memcheck"]["result"]["small"] == {
        "same_graphs_from_global_memory": True,
        "same_rows_from_global_memory": True,
        "all_converge": True,
        "components": [2, 1, 1],
        "levels_from_torchs_pixels": 0,
    }
    assert f"correct: {len(checks)} of {len(checks)} checks hold" in done.stdout


def test_the_study_can_take_its_embeddings_from_the_store_that_a_part_makes() -> None:
    words = gpu_parts.PARTS["store"].command
    studied = {words[1] for words in COMMANDS if words[0] == "benchmarks.study"}
    assert {load_setting(name).model for name in studied} == {words[words.index("--model") + 1]}
