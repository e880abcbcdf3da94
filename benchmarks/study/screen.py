"""Variants of the draw compared on images of 8 pixels, in a bare loop: some 5 core seconds a run.

    python -m benchmarks.study.screen --seeds 0-3 --folder .study

The rows, the draws, the steps and the network are those of the setting, whose store has to be there with all references
(a run of ``variant:reference=proxy`` and of ``variant:reference=neighbours`` makes them). Strata are not made here:
every variant has one. What is found is to be checked at full resolution (``variant:...`` of the study).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import nn

from benchmarks.harness import environment, limit_threads
from benchmarks.study.data import StudyData
from benchmarks.study.lines import RESULTS, append, read_lines
from benchmarks.study.scores import Scores
from benchmarks.study.settings import load_setting
from benchmarks.study.variants import Variant, VariantFeedback, parse_variant
from gstds_cache.seeding import rng_for
from gstds_cache.selection.guidance import load_or_make_guidance
from gstds_cache.selection.guidance_spec import key_of, parse_guidance
from gstds_cache.selection.selected_batch import Candidates, SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.schema import CANDIDATES_FORMAT, Header
from gstds_cache.training.augment import augment, to_input
from gstds_cache.training.batch_norm import random_batches, reestimate_batch_norm
from gstds_cache.training.network import build_network
from gstds_cache.training.optimizer import one_cycle

SIDE, RATIO = 8, 0.75
VARIANTS = (
    *("form=uniform", "form=subtract", "form=damped", "form=loss", "power=2", "power=0.5", "c=0.5", "aged=1"),
    *("reference=neighbours", "reference=proxy", "calibrate=mean", "form=ratio", "unseen=2", "random_end=0.125"),
    *("rotate=0.5", "decay=1", "visits=2", "c=2", "calibrate=quantile", "form=damped+steep=1", "form=damped+steep=2"),
    *("guidance=none", "power=3", "form=loss+power=2", "form=damped+power=2", "form=damped+reference=neighbours"),
    *("form=damped+reference=proxy", "unseen=3"),
)


class Screen:
    """A setting's rows at 8 pixels, and what is known of them."""

    def __init__(self, data: StudyData, lr: float) -> None:
        """Decode, or read what was decoded before."""
        self.data, self.lr, self.setting = data, lr, data.setting
        path = data.folder / f"{data.setting.name}-{SIDE}.npz"
        if not path.exists():
            data.decode()
            feeds = {"train": data.train_feed, "test": data.test_feed}
            np.savez(
                path, **{name: _small(feed.pixels(np.arange(len(feed.decodable)))) for name, feed in feeds.items()}
            )
        with np.load(path) as kept:
            self.train, self.test = (torch.from_numpy(kept[name]) for name in ("train", "test"))
        self.labels, self.test_labels = (torch.from_numpy(part.labels) for part in (data.train, data.test))
        scores = Scores(data)
        self.references = {name: scores.reference(name) for name in ("probe", "neighbours", "proxy")}
        guidance = load_or_make_guidance(data.store, key_of(data.store, parse_guidance("uncertainty")))
        rows = np.arange(len(self.labels))
        hard = np.asarray(guidance.of(rows, data.train.labels, None), np.float64)
        self.priors = {"none": np.ones(len(rows)), "uncertainty": hard + 0.05 * hard.mean()}

    def accuracy(self, variant: Variant, seed: int) -> float:
        """Train by a variant's draws, and test."""
        setting, count = self.setting, len(self.labels)
        size, keep = setting.rows_before(RATIO), setting.step
        batches = count // size
        header = _header(variant, seed, setting.epochs, batches, count, keep)
        feedback = VariantFeedback(header, variant, reference=self.references[variant.reference])
        prior = self.priors["uncertainty" if variant.guidance == "auto" else variant.guidance]
        network = build_network(setting.arch, classes=int(self.labels.max()) + 1, side=SIDE, seed=seed)
        network = network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=self.lr,
            momentum=setting.momentum,
            weight_decay=setting.weight_decay,
            nesterov=True,
        )
        step, total = 0, batches * setting.epochs
        for epoch in range(setting.epochs):
            order = rng_for(seed, "order", epoch).permutation(count)[: batches * size].reshape(batches, size)
            for number, rows in enumerate(order):
                drawn = feedback.rows_of(_batch(rows, epoch, number, keep, self.references["probe"], prior))
                optimizer.param_groups[0]["lr"] = self.lr * one_cycle(step, total)
                losses = self._losses(network, drawn, seed, step)
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                step += 1
                feedback.report(step, drawn, losses)
            feedback.share(None)
            feedback.end_epoch()
        reestimate_batch_norm(network, [to_input(self.train[rows]) for rows in random_batches(count, 4096, seed)])
        network.eval()
        with torch.inference_mode():
            found = torch.cat([network(to_input(part)).argmax(1) for part in self.test.split(2048)])
        return float((found == self.test_labels).float().mean())

    def _losses(
        self, network: nn.Module, rows: Int64[np.ndarray, " m"], seed: int, step: int
    ) -> Float32[torch.Tensor, " m"]:
        index = torch.from_numpy(rows)
        pixels = augment(self.train[index], shift=SIDE // 8, mirror=True, seed=seed, step=step)
        return nn.functional.cross_entropy(network(to_input(pixels)), self.labels[index], reduction="none")


def _small(pixels: UInt8[torch.Tensor, "N 3 S S"]) -> UInt8[np.ndarray, "N 3 8 8"]:
    parts = [
        nn.functional.adaptive_avg_pool2d(part.float(), SIDE).round().to(torch.uint8) for part in pixels.split(2048)
    ]
    return torch.cat(parts).numpy()


def _header(variant: Variant, seed: int, epochs: int, batches: int, items: int, keep: int) -> Header:
    kept = [batches * keep] * epochs
    settings = {"draw": variant.draw, "strata": 1}
    root = "0" * 64
    return Header(
        *(root, root, items, root, seed, epochs, batches, batches * epochs, sum(kept), kept, settings),
        format=CANDIDATES_FORMAT,
    )


def _batch(
    rows: Int64[np.ndarray, " B"], epoch: int, number: int, keep: int, reference: np.ndarray, prior: np.ndarray
) -> SelectedBatch:
    known = prior[rows] / prior[rows].mean()
    offered = Candidates(keep, np.zeros(len(rows), np.int16), reference[rows], known.astype(np.float32))
    return SelectedBatch(
        0, epoch, number, len(rows), rows, None, Status.NOT_COMPUTED, float("nan"), float("nan"), offered
    )


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--setting", default="cifar10-validation")
    made.add_argument("--variants", default=",".join(VARIANTS), help="as after variant:, comma between")
    made.add_argument("--seeds", default="0-3", help="FIRST-LAST")
    made.add_argument("--lr", type=float, default=0.8)
    made.add_argument("--folder", type=Path, default=Path(".study"))
    made.add_argument("--results", type=Path, default=RESULTS / "variants")
    arguments = made.parse_args()
    limit_threads(1)
    torch.set_num_threads(1)
    path = arguments.results / f"{arguments.setting}-{SIDE}.jsonl"
    done = {(line["variant"], line["seed"], line["lr"]) for line in read_lines(path)}
    screen = Screen(StudyData(load_setting(arguments.setting), arguments.folder), arguments.lr)
    first, last = map(int, arguments.seeds.split("-"))
    stamp = environment()
    for seed in range(first, last + 1):
        for name in arguments.variants.split(","):
            if (name, seed, arguments.lr) in done:
                continue
            begun, cpu = time.perf_counter(), time.process_time()
            found = screen.accuracy(parse_variant(name), seed)
            line = {
                "kind": "screen",
                "setting": arguments.setting,
                "side": SIDE,
                "variant": name,
                "seed": seed,
                "lr": arguments.lr,
                "test_accuracy": round(found, 6),
                "cpu_seconds": round(time.process_time() - cpu, 2),
            }
            append(path, line | stamp)
            print(f"{name} seed {seed}: {found:.2%} in {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
