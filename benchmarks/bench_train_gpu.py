"""The trainer beside a bare loop, both with the same network, precision and augmentation, and the images on the device.

    python benchmarks/bench_train_gpu.py imagefolder:cifar/train imagefolder:cifar/test [--store STORE] [--seconds 70]

Throughput: samples a second of warm steps, ``conv7`` and ResNet-18 at 32 pixels, ``conv7`` also in steps of 128 and
without CUDA graphs, each also compiled. The bare loop draws its rows and random numbers on the device, logs nothing and
saves nothing, and records nothing. ``behind`` is for how many of its steps
the host had to wait for the device at the end: where that is none or one, the host was what took the time.

Accuracy: ``conv7`` by the recipe of docs/trainers.md, seconds and test accuracy: the bare loop, the trainer on all
rows, and the trainer on a selection of half of each batch (needs ``--store``, the embedded training set), in as many
epochs and in as many steps; each is a part of its own.

Parts are measured until ``--seconds`` are over, the most important first. What was left out is named in the result,
which is written to ``--out`` after every part. Decoded images stay in the temporary directory for the next run.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import interleaved, parser, report, spread
from torch import Tensor, nn

from gstds_cache import select
from gstds_cache.config import TrainConfig
from gstds_cache.data.arrays import ArraySource
from gstds_cache.data.loading import default_workers
from gstds_cache.data.sources import open_source
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.record_writer import SelectionWriter, grouped
from gstds_cache.stream.schema import Header
from gstds_cache.training.augment import largest_shift, to_input
from gstds_cache.training.batches import TrainingBatch
from gstds_cache.training.device_images import DeviceImages, gather
from gstds_cache.training.identity import resolved_precision, run_config
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.loop import Trainer
from gstds_cache.training.network import build_network
from gstds_cache.training.optimizer import build_optimizer, one_cycle
from gstds_cache.training.run_dir import RunDir

SIDE, WARM = 32, 5  # steps before the clock starts
RECIPE = TrainConfig(
    arch="conv7", lr=0.6, weight_decay=1e-3, label_smoothing=0.2, image_size=SIDE, augment="crop+flip", images="device"
)


class Data:
    """A training set and a test set, decoded, on the device."""

    def __init__(self, train: ArraySource, test: ArraySource, device: torch.device) -> None:
        self.source, self.device = train, device
        self.feed = DeviceImages(train, side=SIDE, workers=0, device=device)
        self.labels = torch.from_numpy(train.labels).to(device)
        self.test = torch.from_numpy(test.pixels).to(device).permute(0, 3, 1, 2)
        self.test_labels = torch.from_numpy(test.labels).to(device)

    @torch.inference_mode()
    def accuracy(self, network: nn.Module) -> float:
        network.eval()
        right = sum(
            (network(to_input(pixels)).argmax(1) == labels).sum()
            for pixels, labels in zip(self.test.split(1000), self.test_labels.split(1000), strict=True)
        )
        return float(right) / len(self.test)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def decoded(uri: str, device: torch.device) -> ArraySource:
    """A data set's images in one array, from the temporary directory where a run before left them."""
    source = open_source(uri)
    name = hashlib.sha256(f"{source.uri} {len(source)} {SIDE}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"gstds-cache-bench-{name}.npy"
    if not path.exists():
        feed = ImageFeed(source, side=SIDE, memory_budget=1 << 40, workers=default_workers(device))
        pixels = feed.pixels(np.arange(len(source))).permute(0, 2, 3, 1).contiguous().numpy()
        part = path.with_suffix(".part.npy")
        np.save(part, pixels)
        part.rename(path)
    ids = [str(row) for row in range(len(source))]
    return ArraySource(uri=uri, kind="decoded", ids=ids, labels=source.labels, pixels=np.load(path))


def made_up(items: int, seed: int) -> ArraySource:
    """Images whose class is their brightest colour, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, items)
    pixels = rng.integers(0, 120, (items, SIDE, SIDE, 3))
    pixels[np.arange(items), :, :, labels] += 80
    ids = [str(row) for row in range(items)]
    return ArraySource(uri="made-up", kind="made-up", ids=ids, labels=labels, pixels=pixels.astype(np.uint8))


def write_everything(path: Path, items: int, batch: int, epochs: int, steps: int) -> Path:
    """A selection that keeps every row: ``steps`` full batches an epoch, of as many permutations as that takes."""
    kept, rng = [batch * steps] * epochs, np.random.default_rng(0)
    header = Header(
        "c" * 64, "d" * 64, items, "r" * 64, 0, epochs, steps, epochs * steps, sum(kept), kept, {}
    )  # fmt: skip

    def batches() -> Iterator[SelectedBatch]:
        for seq in range(epochs * steps):
            if seq % (items // batch) == 0:
                rows = rng.permutation(items)
            start = seq % (items // batch) * batch
            mine = rows[start : start + batch]
            yield SelectedBatch(seq, seq // steps, seq % steps, batch, mine, None, Status.CONVERGED, 0.5, 0.0)

    with path.open("wb") as file, SelectionWriter(file, header) as writer:
        for group in grouped(batches()):
            writer.write(*group)
    return path


class TimedTrainer(Trainer):
    """The trainer, with the images it is given, timed from the first warm step to the last one's end."""

    given: DeviceImages
    begun = ended = asked = 0.0
    samples = 0

    def open_feed(self) -> ImageFeed:
        return self.given

    def _count(self, batch: TrainingBatch, samples: int, seconds: float) -> None:
        super()._count(batch, samples, seconds)
        if self.step == WARM:
            self._wait()
            self.begun = time.perf_counter()
        self.samples += samples * (self.step > WARM)

    def _save(self) -> None:
        if self.step == self._steps.total and not self.ended:
            self.asked = time.perf_counter()
            self._wait()
            self.ended = time.perf_counter()
        super()._save()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run_trainer(data: Data, selection: Path, config: TrainConfig) -> tuple[TimedTrainer, float, dict[str, float]]:
    """A whole run in a directory of its own: the trainer, seconds from its first step on, seconds by phase."""

    class WithImages(TimedTrainer):
        given = data.feed

    with tempfile.TemporaryDirectory() as folder, open_selection(selection) as stream:
        identity = run_config(config, stream.header, None)
        out = RunDir(Path(folder) / "run", identity, provenance={}, resume=False)
        trainer = WithImages(data.source, stream, config, out)
        with out:
            begun = time.perf_counter()
            result = trainer.run()
            data.wait()
            return trainer, time.perf_counter() - begun, result.seconds


def run_bare(data: Data, config: TrainConfig, batch: int, steps: int) -> tuple[nn.Module, float, float, float]:
    """The bare loop: the network, seconds of its warm steps, of all of them, and of the wait for the device after."""
    device, classes = data.device, int(data.labels.max()) + 1
    network = build_network(config.arch, classes=classes, side=SIDE, seed=config.seed)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    optimizer, shift = build_optimizer(network, config), largest_shift(config)

    def scores(pixels: Tensor) -> Tensor:
        return network(to_input(pixels)).float()

    forward: Callable[[Tensor], Tensor] = scores
    take: Callable[..., Tensor] = gather
    if config.compile != "off":
        forward, take = torch.compile(scores, mode=config.compile), torch.compile(gather)
    lower = resolved_precision(config, device) == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=lower)
    begun = warm = time.perf_counter()
    for step, rows in zip(range(steps), drawn(len(data.labels), batch, device), strict=False):
        if step == WARM:
            data.wait()
            warm = time.perf_counter()
        if config.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        moved = torch.randint(0, 2 * shift + 1, (2, batch), device=device)
        flipped = torch.randint(0, 2, (1, batch), device=device)
        pixels = take(data.feed.images, torch.cat([rows[None], moved, flipped]), shift)
        with autocast:
            found = forward(pixels)
        loss = nn.functional.cross_entropy(found, data.labels[rows], label_smoothing=config.label_smoothing)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * one_cycle(step, steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    asked = time.perf_counter()
    data.wait()
    ended = time.perf_counter()
    return network, ended - warm, ended - begun, ended - asked


def drawn(items: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Rows of each batch, from one permutation after the other, drawn on the device."""
    while True:
        yield from torch.randperm(items, device=device)[: items // batch * batch].split(batch)


def throughput(data: Data, config: TrainConfig, batch: int, steps: int, trials: int) -> dict[str, Any]:
    """Samples a second of both, in turn."""
    rates: dict[str, list[float]] = {"bare": [], "trainer": []}
    behind: dict[str, list[float]] = {"bare": [], "trainer": []}
    phases: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        selection = write_everything(Path(folder) / "all.arrow", len(data.labels), batch, 1, steps)

        def bare() -> None:
            _, warm, _, waited = run_bare(data, config, batch, steps)
            rates["bare"].append((steps - WARM) * batch / warm)
            behind["bare"].append(waited / warm * (steps - WARM))

        def trainer() -> None:
            made, _, seconds = run_trainer(data, selection, config)
            rates["trainer"].append(made.samples / (made.ended - made.begun))
            behind["trainer"].append((made.ended - made.asked) / (made.ended - made.begun) * (steps - WARM))
            phases.append(seconds)

        seconds = interleaved(trials, bare=bare, trainer=trainer)
    ratios = [mine / theirs for mine, theirs in zip(rates["trainer"][1:], rates["bare"][1:], strict=True)]
    return {
        "arch": config.arch,
        "precision": resolved_precision(config, data.device),
        "compile": config.compile,
        "batch": batch,
        "steps": steps,
        "samples_per_second": {name: spread(values[1:]) for name, values in rates.items()},
        "trainer_over_bare": spread(ratios),
        "behind": {name: spread(values[1:]) for name, values in behind.items()},
        "whole_runs_seconds": seconds,
        "phases_of_the_first_run": phases[0],
        "phases_of_the_last_run": phases[-1],
    }


WAYS = ("bare", "trainer", "half of each batch", "half of each batch, as many steps")


def accuracy(
    data: Data, config: TrainConfig, batch: int, epochs: int, trials: int, way: str, store: str | None
) -> dict[str, Any]:
    """Seconds and accuracy of the recipe: the bare loop, the trainer on everything, the trainer on a selection."""
    steps, runs = len(data.labels) // batch, list[tuple[float, float]]()
    found: dict[str, Any] = {
        "recipe": {"epochs": epochs, "batch": batch, "lr": config.lr, "weight_decay": config.weight_decay}
    }
    if way.startswith("half") and store is None:
        return found | {"not measured": "no --store"}
    with tempfile.TemporaryDirectory() as folder:
        chosen, own = Path(folder) / "s.arrow", config
        if way == "trainer":
            write_everything(chosen, len(data.labels), batch, epochs, steps)
        elif store is not None and way != "bare":
            begun, passes = time.perf_counter(), epochs * (2 if way.endswith("steps") else 1)
            select(store, keep=0.5, epochs=passes, out=chosen, progress=False)
            found["selecting, seconds"] = time.perf_counter() - begun
            own = replace(config, repack=batch)
        for seed in range(trials):
            if way == "bare":
                torch.manual_seed(seed)
                network, _, seconds, _ = run_bare(data, replace(own, seed=seed), batch, epochs * steps)
            else:
                trainer, seconds, _ = run_trainer(data, chosen, replace(own, seed=seed))
                network = trainer.network
            runs.append((seconds, data.accuracy(network)))
    return found | {
        "seconds": spread([seconds for seconds, _ in runs]),
        "accuracy": spread([share for _, share in runs]),
    }


def parts(data: Data, arguments: Any, store: str | None) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured, the most important first."""
    batch, trials = arguments.batch, arguments.trials
    small = replace(RECIPE, device=str(data.device), norm_samples=0)
    resnet = replace(small, arch=arguments.resnet, lr=0.1, label_smoothing=0.0)
    few, many = (8, 8) if arguments.smoke else (250, 400)  # what comes once a run is a percent of that
    yield "conv7", lambda: throughput(data, small, batch, many, trials)
    yield "resnet18", lambda: throughput(data, resnet, batch, few, trials)
    yield "conv7, steps of a quarter", lambda: throughput(data, small, batch // 4, many, trials)
    full = replace(small, norm_samples=RECIPE.norm_samples, lr=arguments.lr, weight_decay=arguments.weight_decay)
    for way in WAYS:
        yield (
            f"accuracy, {way}",
            lambda way=way: accuracy(data, full, batch, arguments.epochs, min(trials, 2), way, store),
        )
    eager = replace(small, cuda_graphs=False)
    yield "conv7, without graphs", lambda: throughput(data, eager, batch, many, trials)
    yield "resnet18, without graphs", lambda: throughput(data, replace(resnet, cuda_graphs=False), batch, few, trials)
    if not arguments.smoke:  # compiling takes a minute on a CPU
        yield (
            "conv7, compiled",
            lambda: throughput(data, replace(small, compile="default"), batch, many, trials),
        )
        graphs = replace(small, compile="reduce-overhead")
        yield "conv7, compiled, CUDA graphs", lambda: throughput(data, graphs, batch, many, trials)
        compiled = replace(resnet, compile="default")
        yield "resnet18, compiled", lambda: throughput(data, compiled, batch, few, trials)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("train", nargs="?")
    made.add_argument("test", nargs="?")
    made.add_argument("--store", help="embeddings of the training set, to select from")
    made.add_argument("--batch", type=int, default=512)
    made.add_argument("--epochs", type=int, default=12)
    made.add_argument("--lr", type=float, default=RECIPE.lr, help="of the recipe")
    made.add_argument("--weight-decay", type=float, default=RECIPE.weight_decay, help="of the recipe")
    made.add_argument("--seconds", type=float, default=70.0, help="no part is begun after these")
    made.add_argument("--only", nargs="+", help="parts whose name begins so, e.g. conv7 accuracy")
    made.add_argument("--device", default="auto")
    made.add_argument("--resnet", default="resnet18")
    made.set_defaults(trials=3)
    arguments = made.parse_args()
    begun, device = time.perf_counter(), resolve_device(arguments.device)
    if arguments.smoke:
        arguments.batch, arguments.epochs, arguments.trials, arguments.resnet = 16, 1, 1, "timm:test_resnet"
        device = torch.device("cpu")
        data = Data(made_up(160, 0), made_up(60, 1), device)
    elif arguments.train is None or arguments.test is None:
        made.error("give the training set and the test set, or --smoke")
    else:
        data = Data(decoded(arguments.train, device), decoded(arguments.test, device), device)
    result: dict[str, Any] = {"device": str(device), "images": len(data.labels), "side": SIDE}
    result["load_seconds"] = time.perf_counter() - begun
    left_out = []
    with closing(parts(data, arguments, arguments.store)) as measured:
        for name, measure in measured:
            unwanted = arguments.only is not None and not name.startswith(tuple(arguments.only))
            if unwanted or time.perf_counter() - begun > arguments.seconds:
                left_out.append(name)
                continue
            try:
                result[name] = measure()
            except Exception as error:  # one part that fails must not take the others' results
                result[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
                if arguments.smoke:
                    raise
            gc.collect()
            print(time.strftime("%H:%M:%S"), name, json.dumps(result[name]), file=sys.stderr, flush=True)
            if arguments.out is not None:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(result, indent=1))
    result["left_out"] = left_out
    report("train_gpu", result, arguments)


if __name__ == "__main__":
    main()
