"""CIFAR-10 on a GPU: every method of the study, each with its best of three learning rates. A part of ``on_gpu.py``.

    python benchmarks/gpu_study.py --data FOLDER --results FOLDER [--seconds 300] [--jobs 12]

``conv7`` for 16 epochs: random, the draws and everything first, their rates (on a fifth of the training set, held out),
then seeds on the test set at ratio 0.75 in as many epochs and in twice as many; the rivals; rates and a seed of
ResNet-18 for 30 epochs; more seeds, ratios and epochs. A line for each run is in the folder of results as it ends; runs
that are there, or in ``benchmarks/study/results/``, are not made again. At home the lines go there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.study.lines import RESULTS, append, read_lines  # noqa: E402

DRAWS = "draw:loss-minus-reference,draw:damped-loss"
RIVALS = "infobatch,seta,orderdp,jest,rho-loss,selective-backprop"
RATES = "0.1,0.2,0.4"


def times(methods: str, budget: int) -> str:
    """The same methods with so many times the epochs."""
    return ",".join(f"{method}*{budget}" for method in methods.split(","))


def commands(seeds: int) -> list[list[str]]:
    """The study's commands, the most important first."""
    head, rest = f"full,random,{DRAWS}", f"default,{RIVALS}"  # the longest first
    twice, validation = times(f"random,{DRAWS}", 2), "cifar10-conv7-validation"
    tune = ["benchmarks.study.tune", validation, "--into", "cifar10-conv7"]
    large = "cifar10-jpegs-resnet18"
    return [
        ["benchmarks.study", validation, "--methods", head, "--lrs", RATES, "--seeds", "1"],
        [*tune, "--methods", head],
        # Half of the gradients of training on everything, and a quarter, beside it.
        ["benchmarks.study", "cifar10-conv7", "--methods", f"{head},{twice}", "--seeds", str(seeds)],
        # As many gradients as the quarter and the half have, on everything in fewer epochs.
        ["benchmarks.study", "cifar10-conv7", "--methods", "full*0.25,full*0.5", "--seeds", "5"],
        ["benchmarks.study", validation, "--methods", rest, "--lrs", RATES, "--seeds", "1"],
        tune,
        ["benchmarks.study", "cifar10-conv7", "--methods", rest, "--seeds", "3"],
        ["benchmarks.study", f"{large}-validation", "--methods", head, "--lrs", RATES, "--seeds", "1"],
        ["benchmarks.study.tune", f"{large}-validation", "--into", large],
        ["benchmarks.study", large, "--methods", f"{head},{twice}", "--seeds", "1"],
        ["benchmarks.study", large, "--methods", f"{head},{twice}", "--seeds", "3"],
        ["benchmarks.study", "cifar10-conv7", "--methods", f"random,{DRAWS},{RIVALS}", "--ratios", "0.5",
         "--seeds", "3"],
        ["benchmarks.study", "cifar10-conv7", "--methods", f"{times(f'random,{DRAWS}', 4)},full*2", "--seeds", "3"],
        ["benchmarks.study", "cifar10-conv7", "--methods", rest, "--seeds", str(seeds)],
        ["benchmarks.study", f"{large}-validation", "--methods", RIVALS, "--lrs", RATES, "--seeds", "1"],
        ["benchmarks.study.tune", f"{large}-validation", "--into", large],
        ["benchmarks.study", large, "--methods", RIVALS, "--seeds", "3"],
    ]  # fmt: skip


def take_up(results: Path, todo: list[list[str]]) -> None:
    """Begin with the runs of earlier visits."""
    for name in sorted({words[1] for words in todo}):
        known, here = read_lines(RESULTS / f"{name}.jsonl"), results / f"{name}.jsonl"
        for line in [] if here.exists() else known:
            if line["kind"] == "run":  # what scores took is counted again where they are made again
                append(here, line)


def main() -> int:
    """Run what is left, until the time is up.

    Returns:
        The first exit code that is not 0; 0 where time ran out.
    """
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=Path(".data"), help="holds cifar10/, and maybe cifar10.store")
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu/study"))
    made.add_argument("--seconds", type=float, default=300.0)
    made.add_argument("--seeds", type=int, default=6)
    made.add_argument("--jobs", type=int, default=12)
    made.add_argument("--device", default="cuda")
    made.add_argument("--smoke", action="store_true", help="letters, two methods, on the CPU")
    arguments = made.parse_args()
    until, todo = time.monotonic() + arguments.seconds, commands(arguments.seeds)
    shared = ["--results", str(arguments.results.resolve())]
    study = ["--folder", str((arguments.data / "study").resolve()), "--jobs", str(arguments.jobs)]
    if arguments.smoke:
        arguments.device, todo = "cpu", [["benchmarks.study", "glyphs-smoke", "--methods", "random,draw:damped-loss",
                                          "--lrs", "0.1,0.2", "--seeds", "1"]]  # fmt: skip
    elif (arguments.data / "cifar10.store").exists():
        study += ["--reuse", str((arguments.data / "cifar10.store").resolve())]
    take_up(arguments.results, todo)
    environment = os.environ | {"DATA": str(arguments.data.resolve())}
    for words in todo:
        more = shared + ([*study, "--device", arguments.device] if words[0] == "benchmarks.study" else [])
        try:
            done = subprocess.run([sys.executable, "-m", *words, *more], cwd=ROOT, env=environment, check=False,
                                  timeout=max(0.0, until - time.monotonic()))  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"stopped after {arguments.seconds:.0f} s in: {' '.join(words)}", flush=True)
            return 0
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
