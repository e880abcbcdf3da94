"""The main job end to end on scikit-learn's digits, with the commands a user types; prints one table.

Embeds the training part of the digits once, then trains the same small network on everything, on a random quarter of
each batch, and on the quarter that the default rule selects; with several seeds each, since 360 test images and one
seed tell nothing. Each run takes steps of 32 samples. Run it a second time and it embeds nothing.

    python benchmarks/demo.py [--epochs 12] [--seeds 4] [--folder .demo]
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.study.analysis import Study
from benchmarks.study.lines import RESULTS
from benchmarks.study.tables import studies_of

TRAIN, TEST = "digits?split=train", "digits?split=test"
Lines = list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]
"""Of each run: its name, its selections and its trainings."""
STEP = 32  # samples of a training step, in all three runs
BATCH = 128  # rows of a batch before selection: 32 / (1 - 0.75)
SELECTIONS = {
    "everything": ["--rule", "random", "--schedule", "constant:0.0", "--batch-size", str(STEP)],
    "random 1/4": ["--rule", "random", "--schedule", "constant:0.75", "--batch-size", str(BATCH)],
    "selected 1/4": ["--schedule", "constant:0.75", "--batch-size", str(BATCH)],
}


def run(*command: str) -> dict[str, Any]:
    """Run one of our commands, let its progress through, and return the JSON it ends with."""
    print("$ " + shlex.join(command), flush=True)
    begun = time.perf_counter()
    executable = Path(sys.executable).with_name(command[0])
    done = subprocess.run([executable, *command[1:], "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"process_seconds": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4, help="training seeds of each run; the table shows the mean")
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    arguments = parser.parse_args()
    begun = time.perf_counter()
    store = arguments.folder / "digits.store"
    embedded = run("gstds-embed", TRAIN, "--cache", str(store))
    if embedded["cache_hit"]:
        print("cache hit: embedded nothing\n")
    lines = []
    for name, flags in SELECTIONS.items():
        selected, trained = [], []
        for seed in range(arguments.seeds):
            common = ["--epochs", str(arguments.epochs), "--seed", str(seed)]
            selected.append(run("gstds-select", str(store), *flags, *common))
            out = arguments.folder / "runs" / f"{name.replace(' ', '-').replace('/', '-')}-{seed}"
            shutil.rmtree(out, ignore_errors=True)
            flow = [
                "--selection",
                selected[-1]["out"],
                "--eval",
                TEST,
                "--arch",
                "conv3",
                "--lr",
                "0.05",
                "--seed",
                str(seed),
                "--out",
                str(out),
            ]
            trained.append(run("gstds-train", TRAIN, *flow))
        lines.append((name, selected, trained))
    print_table(embedded, lines)
    print(f"\n{time.perf_counter() - begun:.0f} s in all, starting {1 + 6 * arguments.seeds} processes counted")


def print_table(embedded: dict[str, Any], lines: Lines) -> None:
    """One table: embedding above, a line for each training run below."""
    seconds = embedded["seconds"]
    if embedded["cache_hit"]:
        print(f"\nembedding: cache hit, 0 of {embedded['items']:,} images embedded, {seconds['total']:.1f} s")
    else:
        print(
            f"\nembedding: {embedded['embedded']:,} images, {embedded['images_per_second']:.1f} images/s, "
            f"{seconds['total']:.1f} s (forward {seconds['forward']:.1f}, waiting for images {seconds['waiting']:.1f})"
        )
    head = ("trained on", "selection samples/s", "gradient samples", "test accuracy", "select s", "train s", "eval s")
    rows = [head]
    for name, selected, trained in lines:

        def mean(values: list[float]) -> float:
            return statistics.fmean(values)

        fresh = [s for s in selected if not s["cache_hit"]]
        rate = f"{mean([s['samples_per_second'] for s in fresh]):,.0f}" if fresh else "cache hit"
        accuracies = [100 * t["test_accuracy"] for t in trained]
        spread = f" +- {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        rows.append(
            (
                name,
                rate,
                f"{mean([t['gradient_samples'] for t in trained]):,.0f}",
                f"{mean(accuracies):.2f} %{spread}",
                f"{mean([s['seconds']['total'] for s in selected]):.1f}",
                f"{mean([t['seconds']['total'] - t['seconds']['eval'] for t in trained]):.1f}",
                f"{mean([t['seconds']['eval'] for t in trained]):.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    tested = lines[0][2][0]["test_items"]
    seeds = len(lines[0][2])
    print(f"\n{tested} test images, {seeds} seed(s): one image is {100 / tested:.2f} points. A demonstration only.")
    print(what_to_expect(lines))


def what_to_expect(lines: Lines, results: Path = RESULTS) -> str:
    """What this run shows, and what the study measured on more images than these."""
    (_, _, everything), _, (_, selecting, selected) = lines

    def train_seconds(runs: list[dict[str, Any]]) -> float:
        return statistics.fmean(run["seconds"]["total"] - run["seconds"]["eval"] for run in runs)

    lost = 100 * statistics.fmean(
        a["test_accuracy"] - b["test_accuracy"] for a, b in zip(everything, selected, strict=True)
    )
    spent = statistics.fmean(one["seconds"]["total"] for one in selecting)
    words = (
        f"What to expect: these images are too few to leave any out. Selecting took {spent:.1f} s, training on a "
        f"quarter {train_seconds(selected):.1f} s instead of {train_seconds(everything):.1f} s, and accuracy is "
        f"{lost:.2f} points lower."
    )
    study = studies_of(results).get("cifar10", Study(()))  # each method's runs with its own learning rate
    drawn, random = (study.of(method, 0.75, 8).values() for method in ("draw:loss-minus-reference", "random"))
    if not drawn or not random:
        return words
    reached, beside = (100 * statistics.fmean(run["test_accuracy"] for run in runs) for runs in (drawn, random))
    return (
        f"{words}\nOn the 50,000 photographs of CIFAR-10 a quarter drawn by training losses reached {reached:.1f} %, a "
        f"random quarter {beside:.1f} %, in the same epochs ({len(drawn)} seeds). docs/results.md says where it pays."
    )


if __name__ == "__main__":
    main()
