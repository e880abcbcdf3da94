"""CIFAR-10 on a GPU: every method of the study, each with the best of its learning rates. A part of ``on_gpu.py``.

    python benchmarks/gpu_study.py --data FOLDER --results FOLDER [--seconds 300] [--jobs 12]

``conv7`` for 16 epochs: rates (on a fifth of the training set, held out), then seeds on the test set at ratio 0.75, the
draws and random also in twice as many epochs; half of each batch; 64 epochs of everything beside 128 of a quarter.
ResNet-18 for 30 epochs, and the rivals with it. ``--networks noise30`` is ``conv7`` with 30 % of the labels wrong. A
line for each run is in the folder of results as it ends; runs that are there, or in ``benchmarks/study/results/``, are
not made again. At home the lines go there. Networks can be two commands side by side, each with a ``--folder`` of its
own.

Runs beside each other share the GPU in turns, and better through CUDA's multi-process service: on an H200 six processes
that replay conv7's step made 1,228 steps a second with it, 824 without. ``nvidia-cuda-mps-control -d`` starts it, in
``CUDA_MPS_PIPE_DIRECTORY``, ``echo quit | nvidia-cuda-mps-control`` ends it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.study.lines import RESULTS, append, read_lines  # noqa: E402

DRAWS = "draw:damped-loss,draw:loss-minus-reference,draw:largest-damped-loss,draw:largest-loss-minus-reference^1"
RIVALS = "infobatch,seta,orderdp,jest,rho-loss,selective-backprop"
RATES = "0.1,0.2,0.4"


def times(methods: str, budget: int) -> str:
    """The same methods with so many times the epochs."""
    return ",".join(f"{method}*{budget}" for method in methods.split(","))


def of_conv7(seeds: int) -> list[list[str]]:
    """The study's commands for the small network, the most important first."""
    head, rest = f"full,random,{DRAWS}", f"default,{RIVALS}"  # the longest first
    validation, setting = "cifar10-conv7-validation", "cifar10-conv7"
    tune = ["benchmarks.study.tune", validation, "--into", setting]
    twice, half = times(f"random,{DRAWS}", 2), ["--ratios", "0.5", "--seeds", "3"]
    long, budgets = "cifar10-conv7-64", f"full*4,{times(f'random,{DRAWS}', 8)}"
    return [
        ["benchmarks.study", validation, "--methods", head, "--lrs", RATES, "--seeds", "1"],
        [*tune, "--methods", head],
        ["benchmarks.study", validation, "--methods", rest, "--lrs", RATES, "--seeds", "1"],
        tune,
        # Half of the gradients of training on everything, and a quarter, beside it; everything in fewer epochs.
        ["benchmarks.study", setting, "--methods", f"full,{twice},full*0.5,full*0.25,random,{DRAWS},{rest}",
         "--seeds", "3"],
        ["benchmarks.study", setting, "--methods", f"random,{DRAWS}", *half],
        # So many epochs that the network has learned most rows.
        ["benchmarks.study", validation, "--methods", budgets, "--lrs", "0.1,0.2", "--seeds", "1"],
        ["benchmarks.study.tune", validation, "--into", long, "--epochs", "64", "--methods", "full"],
        ["benchmarks.study.tune", validation, "--into", long, "--epochs", "128", "--methods", f"random,{DRAWS}"],
        ["benchmarks.study", long, "--methods", f"full,{twice}", "--seeds", "2"],
        ["benchmarks.study", setting, "--methods", RIVALS, *half],
        ["benchmarks.study", setting, "--methods", f"full,{twice},full*0.5,full*0.25,random,{DRAWS},{rest}",
         "--seeds", str(seeds)],
    ]  # fmt: skip


def of_resnet18(seeds: int) -> list[list[str]]:
    """The study's commands for ResNet-18, at two rates: 30 epochs of everything take half a minute of a GPU."""
    head, setting = f"full,random,{DRAWS}", "cifar10-jpegs-resnet18"
    twice, validation = times(f"random,{DRAWS}", 2), f"{setting}-validation"
    tune = ["benchmarks.study.tune", validation, "--into", setting]
    return [
        ["benchmarks.study", validation, "--methods", head, "--lrs", "0.1,0.2", "--seeds", "1"],
        tune,
        ["benchmarks.study", setting, "--methods", f"full,{twice},random,{DRAWS}", "--seeds", str(min(seeds, 3))],
        ["benchmarks.study", validation, "--methods", RIVALS, "--lrs", "0.1,0.2", "--seeds", "1"],
        tune,
        ["benchmarks.study", setting, "--methods", RIVALS, "--seeds", str(min(seeds, 3))],
    ]


def alone(seeds: int) -> list[list[str]]:
    """The small network's runs one at a time, for their seconds; with ``--jobs 1`` and nothing else on the GPU."""
    setting, validation = "cifar10-conv7-alone", "cifar10-conv7-validation"
    same = f"random,{DRAWS}"
    every = ["benchmarks.study", setting, "--methods", f"{same},{RIVALS},{times(same, 2)},full,full*0.5", "--seeds"]
    return [
        ["benchmarks.study.tune", validation, "--into", setting],
        [*every, "1"],
        ["benchmarks.study", setting, "--methods", same, "--ratios", "0.5", "--seeds", "1"],
        [*every, str(min(seeds, 4))],
    ]


def noise30(seeds: int) -> list[list[str]]:
    """The small network on labels of which 30 % are wrong; a few runs one at a time are :func:`noise30_alone`."""
    setting, validation = "cifar10-conv7-noise30", "cifar10-conv7-noise30-validation"
    draws = f"draw:adaptive,{DRAWS}"
    head, rest = f"full,random,{draws},rho-loss,jest", "infobatch,orderdp,seta,selective-backprop"
    commands = [["benchmarks.study.embed", setting]]
    for methods in (head, rest):
        commands += [
            ["benchmarks.study", validation, "--methods", methods, "--lrs", RATES, "--seeds", "1"],
            *(["benchmarks.study.tune", validation, "--into", into, "--methods", methods]
              for into in (setting, f"{setting}-alone")),
        ]  # fmt: skip
        more = f",full*0.5,{times(f'random,{draws}', 2)}" if methods == head else ""
        commands.append(["benchmarks.study", setting, "--methods", methods + more, "--seeds", str(min(seeds, 3))])
    return commands


def noise30_alone(seeds: int) -> list[list[str]]:
    """Those of :func:`noise30` whose seconds matter most, one at a time, once rates are known."""
    methods = f"random,draw:adaptive,{DRAWS},rho-loss,jest,full,full*0.5,infobatch"
    return [["benchmarks.study", "cifar10-conv7-noise30-alone", "--methods", methods, "--seeds", str(min(seeds, 2))]]


NETWORKS = {
    "conv7": of_conv7,
    "resnet18": of_resnet18,
    "alone": alone,
    "noise30": noise30,
    "noise30-alone": noise30_alone,
}


def commands(networks: Iterable[str], seeds: int) -> list[list[str]]:
    """The study's commands for these networks, one after the other."""
    return [words for name in networks for words in NETWORKS[name](seeds)]


def take_up(results: Path, todo: list[list[str]]) -> None:
    """Begin with the runs of earlier visits."""
    for name in sorted({words[1] for words in todo}):
        known, here = read_lines(RESULTS / f"{name}.jsonl"), results / f"{name}.jsonl"
        for line in [] if here.exists() else known:
            if line["kind"] == "run":  # what scores took is counted again where they are made again
                append(here, line)


def main() -> int:
    """Run what is left, until the time is up.

    A setting of which a run failed does not keep the next one from running, but rates that cannot be told do.

    Returns:
        The first exit code that is not 0; 0 where time ran out.
    """
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=Path(".data"), help="holds cifar10/, and maybe cifar10.store")
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu/study"))
    made.add_argument("--seconds", type=float, default=300.0)
    made.add_argument("--folder", type=Path, help="stores and scores [default: study/ in --data]")
    made.add_argument(
        "--networks",
        default="conv7,resnet18",
        help="comma between; `alone` and `noise30-alone`: one run at a time, after the others [%(default)s]",
    )
    made.add_argument("--seeds", type=int, default=6)
    made.add_argument("--jobs", type=int, default=12)
    made.add_argument("--device", default="cuda")
    made.add_argument("--smoke", action="store_true", help="letters, two methods, on the CPU")
    arguments = made.parse_args()
    until = time.monotonic() + arguments.seconds
    todo = commands(arguments.networks.split(","), arguments.seeds)
    shared = ["--results", str(arguments.results.resolve())]
    study = ["--folder", str((arguments.folder or arguments.data / "study").resolve()), "--jobs", str(arguments.jobs)]
    if arguments.smoke:
        arguments.device, todo = "cpu", [["benchmarks.study", "glyphs-smoke", "--methods", "random,draw:damped-loss",
                                          "--lrs", "0.1,0.2", "--seeds", "1"]]  # fmt: skip
    elif (arguments.data / "cifar10.store").exists():
        study += ["--reuse", str((arguments.data / "cifar10.store").resolve())]
    take_up(arguments.results, todo)
    code = 0
    environment = os.environ | {"DATA": str(arguments.data.resolve())}
    for words in todo:
        more = {
            "benchmarks.study": [*shared, *study, "--device", arguments.device],
            "benchmarks.study.tune": shared,
            "benchmarks.study.embed": [*study[:2], "--device", arguments.device],
        }[words[0]]
        try:
            done = subprocess.run([sys.executable, "-m", *words, *more], cwd=ROOT, env=environment, check=False,
                                  timeout=max(0.0, until - time.monotonic()))  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"stopped after {arguments.seconds:.0f} s in: {' '.join(words)}", flush=True)
            return code
        code = code or done.returncode
        if done.returncode and words[0] != "benchmarks.study":
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
