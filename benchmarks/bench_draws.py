"""Accuracy at a quarter of the gradients: rows drawn by training losses, at random, by the default rule, and all rows.

    python benchmarks/bench_draws.py imagefolder:cifar/train imagefolder:cifar/test --store STORE --out draws.json

``conv7`` at 32 pixels, batches of 512 of which 128 are trained on, ``--epochs`` passes. Every method gets the same
number of learning rates, one seed each, on a tenth of the training set that is held out; the best is run with
``--seeds`` seeds on the test set. ``all, as many gradients`` trains on all rows of a quarter of the passes, ``all, 4 x
the gradients`` in all passes.

Several processes share the GPU, for a small network leaves most of it idle, so seconds are no measurement here. Each
run is a line in ``OUT.lines`` as it ends; called again, runs that are there are not made again. ``--seconds`` ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_train_gpu import RECIPE, Data, decoded, made_up, run_trainer, write_everything
from harness import parser, report, spread
from PIL import Image

from gstds_cache import embed, select
from gstds_cache.config import TrainConfig
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.store.reader import EmbeddingStore

KEEP = 0.25
RATES = (0.1, 0.2, 0.4)
STAGES = ("validation", "test")


@dataclass(frozen=True)
class Method:
    """A way to choose rows.

    Attributes:
        name: What the result calls it.
        settings: For ``gstds_cache.select``; None trains on all rows.
        passes: Share of the epochs.
    """

    name: str
    settings: dict[str, Any] | None
    passes: float = 1.0


METHODS = (
    Method("random", {"rule": "random"}),
    Method("loss-minus-reference, 8 strata", {"draw": "loss-minus-reference"}),
    Method("default rule", {}),
    Method("all, as many gradients", None, KEEP),
    Method("damped-loss, 8 strata", {"draw": "damped-loss"}),
    Method("loss, 8 strata", {"draw": "loss"}),
    Method("loss-minus-reference, no strata", {"draw": "loss-minus-reference", "strata": 1}),
    Method("all, 4 x the gradients", None),
)


def folder_of(stage: str, arguments: argparse.Namespace) -> Path:
    """Where a stage's selections are."""
    return Path(arguments.work) / stage


def split(train: str, work: Path) -> tuple[str, str]:
    """Nine tenths of a folder's images and the rest, as folders of hard links."""
    root = Path(train.partition(":")[2])
    uris = [f"imagefolder:{work / 'held-out' / part}" for part in ("train", "test")]
    if not (work / "held-out").exists():
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            for number, file in enumerate(sorted(folder.iterdir())):
                to = work / "held-out.making" / ("test" if number % 10 == 0 else "train") / folder.name
                to.mkdir(parents=True, exist_ok=True)
                os.link(file, to / file.name)
        (work / "held-out.making").rename(work / "held-out")
    return uris[0], uris[1]


def sets_of(stage: str, arguments: argparse.Namespace) -> tuple[str, str]:
    """What a stage trains on, and what it is measured on."""
    if stage == "test":
        return arguments.train, arguments.test
    return split(arguments.train, Path(arguments.work))


def prepare(stage: str, arguments: argparse.Namespace, device: torch.device) -> None:
    """Everything that the runs of a stage share: decoded images, the store, the selections."""
    train, test = sets_of(stage, arguments)
    for uri in (train, test):
        decoded(uri, device)
    store = arguments.store
    if stage == "validation":
        whole = EmbeddingStore(store)
        store = Path(arguments.work) / "held-out.store"
        untrained = arguments.smoke
        embed(train, store, reuse=[whole], progress=False, model=arguments.model, allow_untrained=untrained)
    folder = folder_of(stage, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    items, step = len(EmbeddingStore(store)), round(arguments.batch * KEEP)
    for number, method in enumerate(METHODS):
        path, epochs = folder / f"{number}.arrow", max(1, round(arguments.epochs * method.passes))
        if path.exists():
            continue
        if method.settings is None:
            write_everything(path, items, step, epochs, items // step)
        else:
            begun = time.perf_counter()
            select(
                store, keep=KEEP, epochs=epochs, batch_size=arguments.batch, out=path, progress=False, **method.settings
            )
            print(stage, method.name, f"selected in {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)


def runs(stage: str, best: dict[str, float], arguments: argparse.Namespace) -> Iterator[tuple[int, float, int]]:
    """Method, learning rate and seed of each run, the methods in turn."""
    trials = arguments.rates if stage == "validation" else range(1, 1 + arguments.seeds)
    for trial in trials:
        for number, method in enumerate(METHODS):
            if stage == "validation":
                yield number, float(trial), 0
            elif method.name in best:
                yield number, best[method.name], int(trial)


def lines(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What has been measured."""
    path = Path(f"{arguments.out}.lines")
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # cut off while it was written
            found.append(json.loads(line))
    return found


def best_rates(found: list[dict[str, Any]], rates: Sequence[float]) -> dict[str, float]:
    """Of each method that has been run with all learning rates, the best on the held-out rows."""
    best = {}
    for method in METHODS:
        mine = {line["lr"]: line["accuracy"] for line in found
                if line["stage"] == "validation" and line["method"] == method.name}  # fmt: skip
        if len(mine) == len(rates):
            best[method.name] = max(mine, key=lambda rate: mine[rate])
    return best


def work(arguments: argparse.Namespace, device: torch.device) -> None:
    """One process's share of a stage's runs."""
    stage, number, of = arguments.worker.split(",")
    data = Data(*(decoded(uri, device) for uri in sets_of(stage, arguments)), device)
    found = lines(arguments)
    made = {(line["stage"], line["method"], line["lr"], line["seed"]) for line in found}
    todo = [run for run in runs(stage, best_rates(found, arguments.rates), arguments)
            if (stage, METHODS[run[0]].name, *run[1:]) not in made]  # fmt: skip
    config = replace(
        RECIPE, arch=arguments.arch, device=str(device), norm_samples=4096, label_smoothing=0.0, weight_decay=5e-4
    )
    for index, rate, seed in todo[int(number) :: int(of)]:
        if time.time() > arguments.until:
            return
        selection = folder_of(stage, arguments) / f"{index}.arrow"
        trainer, seconds, _ = run_trainer(data, selection, own(config, rate, seed))
        line = {"stage": stage, "method": METHODS[index].name, "lr": rate, "seed": seed,
                "accuracy": data.accuracy(trainer.network), "steps": trainer.step, "seconds": seconds}  # fmt: skip
        with Path(f"{arguments.out}.lines").open("a") as file:
            file.write(json.dumps(line) + "\n")


def start(stage: str, share: int, until: float, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A process for every so-manieth run of a stage."""
    worker = f"{stage},{share},{arguments.processes}"
    return subprocess.Popen([sys.executable, *sys.argv, "--until", str(until), "--worker", worker])


def own(config: TrainConfig, rate: float, seed: int) -> TrainConfig:
    """The configuration of one run."""
    return replace(config, lr=rate, seed=seed)


def result_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """All methods beside each other."""
    found = lines(arguments)
    best = best_rates(found, arguments.rates)
    result: dict[str, Any] = {
        "epochs": arguments.epochs,
        "batch": arguments.batch,
        "keep": KEEP,
        "rates": arguments.rates,
        "lines": found,
    }
    for method in METHODS:
        shares = [line["accuracy"] for line in found if line["stage"] == "test" and line["method"] == method.name]
        result[method.name] = {
            "lr": best.get(method.name),
            "validation": {
                line["lr"]: line["accuracy"]
                for line in found
                if line["stage"] == "validation" and line["method"] == method.name
            },
            "test": spread(shares) | {"deviation": float(np.std(shares, ddof=1))} if len(shares) > 1 else shares,
        }
    return result


def make_smoke(arguments: argparse.Namespace, folder: Path) -> None:
    """A hundred made-up images, a tiny model, and one run of each method."""
    arguments.model, arguments.arch, arguments.work = "timm:test_resnet", "conv3", str(folder / "work")
    arguments.store, arguments.out, arguments.device = str(folder / "store"), folder / "draws.json", "cpu"
    arguments.batch, arguments.epochs, arguments.seeds, arguments.processes = 16, 2, 2, 1
    arguments.rates, uris = RATES[:1], []
    for part, items in (("train", 100), ("test", 20)):
        images = made_up(items, items)
        for row, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
            (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / part / str(label) / f"{row}.png")
        uris.append(f"imagefolder:{folder / part}")
    arguments.train, arguments.test = uris
    embed(uris[0], arguments.store, progress=False, model=arguments.model, allow_untrained=True)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("train", nargs="?")
    made.add_argument("test", nargs="?")
    made.add_argument("--store", help="embeddings of the training set")
    made.add_argument("--batch", type=int, default=512, help="candidates of a step")
    made.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates that are tried")
    made.add_argument("--model", default="timm:tf_efficientnet_lite0?size=96", help="that it was made with")
    made.add_argument(
        "--work", help="folder for selections, on the file system of the images [default: draws beside OUT]"
    )
    made.add_argument("--arch", default=RECIPE.arch)
    made.add_argument("--epochs", type=int, default=16)
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--processes", type=int, default=4)
    made.add_argument("--seconds", type=float, default=200.0)
    made.add_argument("--device", default="auto")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            make_smoke(arguments, Path(folder))
        elif None in {arguments.train, arguments.test, arguments.store, arguments.out}:
            made.error("give the training set, the test set, --store and --out FILE, where lines are kept; or --smoke")
        arguments.work = arguments.work or str(Path(arguments.out).resolve().parent / "draws")
        measure(arguments, resolve_device(arguments.device))


def measure(arguments: argparse.Namespace, device: torch.device) -> None:
    """All runs, or those of one worker."""
    if arguments.worker:
        work(arguments, device)
        return
    until = time.time() + arguments.seconds
    for stage in STAGES:
        prepare(stage, arguments, device)
        shares = range(arguments.processes)
        for worker in [start(stage, share, until, arguments) for share in shares] if len(shares) > 1 else []:
            worker.wait()
        if len(shares) == 1:
            arguments.worker, arguments.until = f"{stage},0,1", until
            work(arguments, device)
        result = result_of(arguments)
        Path(arguments.out).write_text(json.dumps(result, indent=1))
        print(stage, json.dumps({name: value for name, value in result.items() if name != "lines"}), file=sys.stderr)
    report("draws", result, arguments)


if __name__ == "__main__":
    main()
