"""How long one waits for a selection: for its first record, and for indices while training on it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import spread

from gstds_cache.stream.reader import SelectionStream

COMMANDS = Path(sys.executable).parent
IMPORTS = """
import gstds_cache.cli.select_command, gstds_cache.runtime.threads, gstds_cache.costs.energy
import gstds_cache.runtime.allocator
import gstds_cache.selection.run, gstds_cache.store.reader, gstds_cache.stream.pipe, gstds_cache.stream.writer
print(flush=True)
"""


def first_record(store: Path, trials: int, *flags: str) -> dict[str, Any]:
    """Seconds from starting ``gstds-select STORE --out -`` to its first record, beyond those of its imports.

    The imports are timed in a process of their own before each: from its start to the end of what the command
    imports before it looks at its arguments or while it begins. ``not_cached_without_guidance`` is the very first
    selection of a store: the default rule's guidance, a probe on the embeddings, has to be computed as well.

    Args:
        store: The store.
        trials: Of each.
        flags: For ``gstds-select``.
    """
    seconds: dict[str, list[float]] = {"imports": [], "not_cached_without_guidance": [], "not_cached": [], "cached": []}
    for trial in range(trials):
        took = {"imports": _until_first_line([sys.executable, "-c", IMPORTS])}
        words = [COMMANDS / "gstds-select", store, *flags, "--out", "-"]
        shutil.rmtree(store.with_name(f"{store.name}.guidance"), ignore_errors=True)
        took["not_cached_without_guidance"] = _until_first_record([*words, "--seed", str(1000 + trial)])
        for name in ("not_cached", "cached"):
            took[name] = _until_first_record([*words, "--seed", str(2000 + trial)])
        for name, value in took.items():
            seconds[name].append(value)
    beyond = {
        f"{name}_beyond_imports": spread([a - b for a, b in zip(seconds[name], seconds["imports"], strict=True)])
        for name in seconds
        if name != "imports"
    }
    return {name: spread(values) for name, values in seconds.items()} | beyond


def trainers_wait(
    dataset: str, store: Path, trials: int, *, select_flags: list[str], train_flags: list[str]
) -> dict[str, Any]:
    """Share of the training time that a trainer waits for indices: beside their computation, and from a file.

    Args:
        dataset: What the store was made from.
        store: Its store; runs and selections are written beside it.
        trials: Of each.
        select_flags: For ``gstds-select``.
        train_flags: For ``gstds-train``.
    """
    shares: dict[str, list[float]] = {"live": [], "replayed": []}
    seconds: dict[str, list[float]] = {"live": [], "replayed": []}
    steps = 0
    for trial in range(trials):
        select = [COMMANDS / "gstds-select", store, *select_flags, "--seed", str(trial)]
        train = [COMMANDS / "gstds-train", dataset, *train_flags, "--json"]
        with subprocess.Popen(
            [*select, "--out", "-", "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as producer:
            live = _train([*train, "--selection", "-", "--out", store.parent / f"live-{trial}"], producer.stdout)
        file = store.parent / f"{trial}.arrow"
        subprocess.run([*select, "--out", file], check=True, capture_output=True)  # it is kept: no second computation
        replayed = _train([*train, "--selection", file, "--out", store.parent / f"replayed-{trial}"], None)
        steps = live["steps"]
        assert steps == replayed["steps"]
        for name, result in (("live", live), ("replayed", replayed)):
            shares[name].append(result["waited"]["indices"])
            seconds[name].append(result["seconds"]["step"])
    return {
        "dataset": dataset,
        "steps": steps,
        "select_flags": select_flags,
        "train_flags": train_flags,
        "share_of_training_time": {name: spread(values) for name, values in shares.items()},
        "seconds_in_steps": {name: spread(values) for name, values in seconds.items()},
    }


def _train(words: list[object], selection: Any) -> dict[str, Any]:
    done = subprocess.run(words, stdin=selection, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _until_first_line(words: list[object]) -> float:
    begun = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        return time.perf_counter() - begun


def _until_first_record(words: list[object]) -> float:
    begun = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        stream = SelectionStream(process.stdout)
        next(iter(stream))
        took = time.perf_counter() - begun
        for _ in stream:  # to its end, so that it is kept
            pass
    return took
