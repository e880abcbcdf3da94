"""Run the study, or go on with it: every line that is there already is not run again.

    python -m benchmarks.study glyphs --methods full,random,default,infobatch --ratios 0.75 --seeds 5 --folder .study
    python -m benchmarks.study.tables          # then: the tables of docs/study.md from the result lines

Each run is a process of its own, forked from this one, which holds the decoded images; ``--jobs`` at a time, one
thread each. With ``--device cuda`` rows are selected and networks trained there, by those processes alone: one that is
forked from one that has used CUDA cannot. Several at a time share the GPU, and their seconds with it. Methods are
interleaved seed by seed, so that what else the machine does meets them alike.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, limit_threads
from benchmarks.study.data import StudyData
from benchmarks.study.lines import RESULTS, append, read_lines
from benchmarks.study.methods import find_method
from benchmarks.study.runs import Task, one_run
from benchmarks.study.scores import Scores
from benchmarks.study.settings import load_setting, names
from gstds_cache.errors import GstdsError
from gstds_cache.runtime.allocator import keep_freed_memory

Job = tuple[Task, multiprocessing.process.BaseProcess]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("settings", nargs="+", metavar="SETTING", help=", ".join(names()))
    made.add_argument(
        "--methods", default="full,random,default", help="names, comma between; NAME*N for N x the epochs"
    )
    made.add_argument("--ratios", default="0.75", help="filter ratios, comma between")
    made.add_argument("--lrs", default="", help="learning rates to try; default: each method's own of the setting")
    made.add_argument("--seeds", default="5", help="how many, or FIRST-LAST")
    made.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    made.add_argument("--device", default="cpu", help="where rows are selected and networks trained")
    made.add_argument("--folder", type=Path, default=Path(".study"), help="stores and scores")
    made.add_argument("--reuse", type=Path, action="append", default=[], help="a store to take embeddings over from")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the result lines")
    return made.parse_args(arguments)


def tasks_of(arguments: argparse.Namespace, setting: str) -> Iterator[Task]:
    """All runs of a setting, methods interleaved seed by seed."""
    first, _, last = arguments.seeds.partition("-")
    seeds = range(int(first), int(last) + 1) if last else range(int(first))
    known = load_setting(setting)
    seen = set()
    for seed in seeds:
        for ratio in map(float, arguments.ratios.split(",")):
            for text in arguments.methods.split(","):
                name, _, times = text.partition("*")
                epochs = round(known.epochs * float(times or 1))
                for lr in map(float, arguments.lrs.split(",")) if arguments.lrs else (known.lr_of(name),):
                    task = Task(setting, name, 0.0 if name == "full" else ratio, epochs, seed, lr)
                    if task not in seen:
                        seen.add(task)
                        yield task


def work(function: Callable[..., Any], arguments: tuple[Any, ...], end: Connection) -> None:
    """In a process of its own: call, and send what it returns or the error's text."""
    try:
        end.send(function(*arguments))
    except Exception:
        end.send(traceback.format_exc())


def start(function: Callable[..., Any], *arguments: Any) -> tuple[Connection, multiprocessing.process.BaseProcess]:
    """A forked process that calls ``function``; its answer comes through the connection."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(function, arguments, theirs))
    process.start()
    theirs.close()
    return ours, process


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns, called in a process of its own.

    Raises:
        RuntimeError: It ended with an error.
    """
    ours, process = start(function, *arguments)
    try:
        result = ours.recv()
    except EOFError:
        result = "the process was killed"
    process.join()
    if isinstance(result, str):
        raise RuntimeError(result)  # noqa: TRY004 - a traceback's text
    return result


def cpu_of_all() -> float:
    """CPU seconds of this process and of the decoders it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def run_setting(name: str, arguments: argparse.Namespace, stamp: dict[str, Any]) -> int:
    """All runs of one setting; returns how many failed."""
    path = arguments.results / f"{name}.jsonl"
    lines = read_lines(path)
    usual = load_setting(name).lr  # lines of earlier versions name none
    done = {
        Task(*(line[k] for k in ("setting", "method", "ratio", "epochs", "seed")), line.get("lr", usual))
        for line in lines
        if line["kind"] == "run"
    }
    left = [task for task in tasks_of(arguments, name) if task not in done]
    print(f"{name}: {len(left)} runs to do, {len(done)} there", flush=True)
    if not left:
        return 0
    data = StudyData(load_setting(name), arguments.folder, arguments.device)
    cpu_begun = cpu_of_all()
    report = data.embed(arguments.reuse)
    if report.embedded:
        append(
            path,
            {
                "kind": "embedding",
                "setting": name,
                "images": report.embedded,
                "seconds": report.seconds["total"],
                "cpu_seconds": round(cpu_of_all() - cpu_begun, 3),
                **stamp,
            },
        )
    decoded = data.decode()
    print(
        f"{name}: {len(data.train):,} images to train on, {len(data.test):,} to test; decoded in {decoded:.1f} s",
        flush=True,
    )
    scores = Scores(data)
    for need in sorted({need for task in left for need in find_method(task.method).needs}):
        line = apart(scores.prepare, need)
        if line:
            append(path, line | stamp)
            print(f"{name}: {need} took {line['seconds']:.1f} s", flush=True)
    failed = 0
    running: dict[Connection, Job] = {}
    queue = iter(left)
    begun, count = time.perf_counter(), 0
    while True:
        while len(running) < arguments.jobs and (task := next(queue, None)) is not None:
            ours, process = start(one_run, task, data, scores)
            running[ours] = task, process
        if not running:
            return failed
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            task, process = running.pop(ready)
            try:
                result = ready.recv()
            except EOFError:
                result = "the process was killed"
            process.join()
            count += 1
            if isinstance(result, str):
                failed += 1
                print(f"{task} failed:\n{result}", file=sys.stderr, flush=True)
                continue
            append(path, result | stamp | {"time": datetime.now(UTC).isoformat(timespec="seconds")})
            paid = sum(result["seconds"].values())
            left_s = (time.perf_counter() - begun) / count * (len(left) - count)
            print(
                f"{name} {task.method} ratio {task.ratio} epochs {task.epochs} seed {task.seed} lr {task.lr}: "
                f"{result['test_accuracy']:.2%}, {result['gradient_samples']:,} gradients, {paid:.1f} s; "
                f"{count}/{len(left)}, {left_s / 60:.0f} min left",
                flush=True,
            )


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    keep_freed_memory()
    limit_threads(1)
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    stamp = {**apart(environment), "jobs": arguments.jobs, "host": os.uname().release}
    if arguments.device != "cpu":
        stamp["device"] = arguments.device
    try:
        return 1 if sum(run_setting(name, arguments, stamp) for name in arguments.settings) else 0
    except GstdsError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
