"""The ledger of a run before it is run: from a few decoded images and a few steps, of which nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gstds_cache.config import TrainConfig
from gstds_cache.costs.energy import EnergyMeter
from gstds_cache.costs.records import Cost
from gstds_cache.data.loading import pixel_batches, worth_workers
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.threads import cores
from gstds_cache.stream.repack import packed_per_epoch
from gstds_cache.stream.schema import Header
from gstds_cache.training.augment import augment, largest_shift, to_input
from gstds_cache.training.classes import count_classes
from gstds_cache.training.device_images import held_on_device
from gstds_cache.training.flops import flops_per_sample
from gstds_cache.training.identity import resolved_precision
from gstds_cache.training.images import SquarePixels, decoding_workers
from gstds_cache.training.ledger import Ledger
from gstds_cache.training.network import build_network
from gstds_cache.training.optimizer import build_optimizer
from gstds_cache.training.steps import remainder_of

IMAGES = 64  # decoded to learn how long one takes
SECONDS = 2.0  # for which steps are repeated; at least two are taken after the first, which warms up


@dataclass(frozen=True)
class Rates:
    """Seconds per sample: decoding in one process, one training step, classifying."""

    decode: float
    step: float
    classify: float


def plan_run(
    source: ImageSource,
    evaluation: ImageSource | None,
    header: Header,
    config: TrainConfig,
    *,
    embed: Cost | None,
    select: Cost | None,
    select_seconds: float | None,
    select_source: str,
) -> Ledger:
    """Measure, and work out what the run will take.

    Args:
        source: The data set; its images are not hashed, only counted.
        evaluation: The data set accuracy will be measured on.
        header: The selection's.
        config: How to train, with nothing left to the data set.
        embed: What the store cost, where that is known.
        select: What the selection cost, where that is known.
        select_seconds: What selection takes, where that is known.
        select_source: How that is known, in words.

    Returns:
        The ledger. ``all_samples`` counts images that cannot be decoded as well; they are known once training is done.

    Raises:
        FingerprintMismatchError: The data set has another number of items than the selection was made from.
    """
    if header.items != len(source) and not getattr(source, "estimated", False):
        raise FingerprintMismatchError(
            f"the selection was made from a data set of {header.items} items, {source.uri} has {len(source)}",
            hint="name the data set that was embedded",
        )
    classes = count_classes(source, evaluation)
    gradients, per_step = header.total_kept, max(1, header.total_kept // header.total_batches)
    if config.repack:
        gradients, per_step = (
            sum(packed_per_epoch(header.kept_per_epoch, config.repack, remainder_of(header))) * config.repack,
            config.repack,
        )
    rates = measure(source, config, classes, per_step=per_step)
    forward = min(config.norm_samples, len(source))
    seconds = _phases(source, evaluation, config, rates, gradients, forward)
    return Ledger(
        planned=True,
        embed=embed,
        select=select,
        select_seconds=select_seconds,
        select_source=select_source,
        gradient_samples=gradients,
        forward_samples=forward,
        all_samples=header.items * header.epochs,
        seconds=seconds | {"total": sum(seconds.values())},
        joules=None,
        joules_from=f"measured during a run ({EnergyMeter(resolve_device(config.device)).source})",
        flops_per_sample=flops_per_sample(config.arch, classes=classes, side=config.image_size),
        step_seconds_per_sample=rates.step,
    )


def _phases(
    source: ImageSource, evaluation: ImageSource | None, config: TrainConfig, rates: Rates, gradients: int, forward: int
) -> dict[str, float]:
    """Seconds of each phase of a run that takes ``gradients`` samples, and ``forward`` ones for batch normalisation."""
    device = resolve_device(config.device)
    workers, side = decoding_workers(config.workers, device), config.image_size

    def decoding(samples: int, processes: int) -> float:
        return samples * rates.decode / max(1, min(processes, cores()))

    def whole(data: ImageSource) -> float:
        return decoding(len(data), worth_workers(data, side, workers))

    held = held_on_device(config.images, len(source), side, device)
    held = held or len(source) * 3 * side * side <= config.memory_budget
    step = gradients * rates.step
    # Workers decode ahead of the steps, which then wait for what decoding takes longer than they do.
    images = decoding(gradients, workers) - (step if workers else 0.0)
    return {
        "load": whole(source) if held else 0.0,
        "images": 0.0 if held else max(0.0, images),
        "step": step,
        "norms": forward * rates.classify + (0.0 if held else decoding(forward, workers)),
        "eval": 0.0 if evaluation is None else whole(evaluation) + len(evaluation) * rates.classify,
    }


def measure(source: ImageSource, config: TrainConfig, classes: int, *, per_step: int) -> Rates:
    """Time decoding, steps of ``per_step`` samples, and classifying as many, on a network that is thrown away.

    Args:
        source: Where the images are from.
        config: How to train, with nothing left to the data set.
        classes: Number of classes.
        per_step: Samples of a step.

    Returns:
        Seconds per sample.

    Raises:
        UsageError: None of the images that were tried can be decoded.
    """
    device, side = resolve_device(config.device), config.image_size
    rows = np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(np.int64)).tolist()
    begun = time.perf_counter()
    decoded = next(pixel_batches(source, SquarePixels(side), (3, side, side), [rows], workers=0, pin=False))
    decode = (time.perf_counter() - begun) / len(rows)
    bad = {row for row, _ in decoded.failures}
    fine = torch.tensor([row not in bad for row in rows])
    if not bool(fine.any()):
        raise UsageError(f"{source.uri}: none of {len(rows)} images can be decoded: {decoded.failures[0][1]}")
    pixels = decoded.pixels[fine]
    pixels = pixels[torch.arange(per_step) % len(pixels)]
    target = torch.arange(per_step, device=device) % classes
    network = build_network(config.arch, classes=classes, side=side, seed=config.seed)
    network = network.to(device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(network, config)
    lower = resolved_precision(config, device) == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16) if lower else nullcontext()
    shift = largest_shift(config)
    network.train(per_step > 1)  # batch statistics of one sample are undefined

    def step() -> None:
        moved = augment(pixels.to(device), shift=shift, mirror=config.augment == "crop+flip", seed=0, step=0)
        with autocast:
            scores = network(to_input(moved)).float()
            loss = nn.functional.cross_entropy(scores, target, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        float(loss.detach())

    @torch.inference_mode()
    def classify() -> None:
        network.eval()
        network(to_input(pixels.to(device))).argmax(1).cpu()

    return Rates(decode, _seconds(step) / per_step, _seconds(classify) / per_step)


def _seconds(work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes once warm: the median of what fits into ``SECONDS``, of two at least."""
    work()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < SECONDS and len(times) < 20):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return float(np.median(times))
