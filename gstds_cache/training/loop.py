"""Training on a selection: the whole run, top to bottom.

SGD with Nesterov momentum and a one-cycle learning rate over the total number of steps, which a selection's header
tells before the first of them; bfloat16 autocast and channels-last on CUDA. Each data record of the stream is one
step, or, re-packed, each full batch of kept rows. A run that is killed or interrupted continues from its last
checkpoint; on a CPU with the same number of threads, with the same numbers to the bit.

Several ranks share each step's batch (``distributed.py``). Whatever their number, every kept row counts once in the
step's gradient, so it is the same but for the order of summation, except for what sees a rank's own slice alone:
batch normalisation on a CPU, and dropout.
"""

from __future__ import annotations

import math
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import nn

from gstds_cache.config import TrainConfig
from gstds_cache.costs.energy import EnergyMeter
from gstds_cache.data.label_counts import LabelCounts
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import DivergedError, IncompleteError, StreamError, UsageError
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.seeding import torch_seed_for
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.ranks import rank_positions, real_rows
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.stream.repack import PackedBatch
from gstds_cache.training.augment import augment, to_input
from gstds_cache.training.baselines.batch_method import BatchMethod, StepContext, narrow, weighted_loss
from gstds_cache.training.distributed import Ranks
from gstds_cache.training.evaluate import Accuracy, evaluate
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.network import build_network, check_network, norms_frozen
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.steps import StepReader

NOT_IDENTITY = frozenset({"device", "workers", "memory_budget", "threads"})
WARM_UP = 0.25  # share of the steps in which the learning rate rises
Progress = Callable[[str, int, int, float | Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainReport:
    """What a training run did, over all its sessions.

    Attributes:
        accuracy: On the evaluation set; None where there is none.
        gradient_samples: Samples whose gradient was computed.
        steps: Optimiser steps.
        loss: Mean training loss of the last epoch.
        seconds: Time by phase: load (decoding into memory), indices (waiting for the selection), images (waiting for
            pixels), step, eval, total; with a method that chooses, choose as well.
        forward_samples: Samples that had a forward pass only for a method to choose among them.
        seconds_per_sample: Of a step once warm, by the sample: the median over this session's steps but the first,
            which may load and compile kernels; None where no step was taken.
        samples_in: Samples of the batches before selection: the gradients that training on everything takes.
        joules: Joules by phase: load, train, eval; None where no counter can be read.
        joules_from: The counters, or why there is none.
    """

    accuracy: Accuracy | None
    gradient_samples: int
    steps: int
    loss: float
    seconds: dict[str, float]
    forward_samples: int = 0
    seconds_per_sample: float | None = None
    samples_in: int | None = None
    joules: dict[str, float] | None = None
    joules_from: str = ""

    @property
    def waited(self) -> dict[str, float]:
        """Shares of the time of all steps that were spent waiting: for indices, for images."""
        return _waited(self.seconds)


def run_config(config: TrainConfig, stream: SelectionStream, eval_root: str | None) -> dict[str, Any]:
    """What decides a run's outcome, as JSON-able values; kept in ``RUN_DIR/config.json``."""
    header = stream.header
    return {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY} | {
        "selection_digest": header.selection_digest,
        "cache_fingerprint": header.cache_fingerprint,
        "items_root": header.items_root,
        "eval_root": eval_root,
    }


def one_cycle(step: int, total: int) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: up in a straight line, down along a cosine to nearly 0.

    Smith & Topin 2018, "Super-convergence", with the cosine of Loshchilov & Hutter 2017 for the way down.
    """
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / (total + 1 - rise)))


def train(
    source: ImageSource,
    stream: SelectionStream,
    config: TrainConfig,
    run_dir: RunDir,
    *,
    evaluation: ImageSource | None = None,
    ranks: Ranks | None = None,
    method: BatchMethod | None = None,
    feed: ImageFeed | None = None,
    after_epoch: Callable[[nn.Module], None] | None = None,
    progress: Progress | None = None,
    interruptible: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False),
) -> TrainReport:
    """Train a network on a selection.

    Args:
        source: The data set the selection was made from.
        stream: The selection.
        config: How to train; ``image_size`` and ``augment`` are settled (not 0, not ``auto``).
        run_dir: Where metrics and checkpoints go, and come from; held until the end.
        evaluation: The data set accuracy is measured on, with the same classes.
        ranks: This process among several; None for one alone.
        method: Chooses from each batch before its step (``training/baselines/``); None trains on the batch as it is.
        feed: Pixels of ``source`` that are decoded already, for whoever trains several times; None decodes them now.
        after_epoch: Called with the network after each epoch; its time counts as ``eval``.
        progress: Called with phase, steps done, steps in all, and the shares of time spent waiting.
        interruptible: Makes a context that is held while steps are taken; the function it gives is asked after each
            step, and when it says true, a checkpoint is saved and KeyboardInterrupt raised.

    Returns:
        What was done.

    Raises:
        UsageError: Labels are missing, the evaluation set has other classes, or ``method`` was given several ranks.
        FingerprintMismatchError: The stream is not the one the run was begun with.
        DivergedError: The loss is NaN or infinite.
        StreamError: The selection is damaged or truncated; what was trained so far is in the checkpoint.
        IncompleteError: Another process or thread writes ``run_dir``; or a process that decodes was killed or had no
            memory, and what was trained so far is in the checkpoint.
        KeyboardInterrupt: ``interruptible`` said so.
    """
    with run_dir:
        return _train(
            source, stream, config, run_dir, evaluation, ranks, method, feed, after_epoch, progress, interruptible
        )


def _train(  # noqa: PLR0912, PLR0915 - one visible loop
    source: ImageSource,
    stream: SelectionStream,
    config: TrainConfig,
    run_dir: RunDir,
    evaluation: ImageSource | None,
    ranks: Ranks | None,
    method: BatchMethod | None,
    feed: ImageFeed | None,
    after_epoch: Callable[[nn.Module], None] | None,
    progress: Progress | None,
    interruptible: Callable[[], AbstractContextManager[Callable[[], bool]]],
) -> TrainReport:
    progress = progress or (lambda _phase, _done, _total, _waiting: None)
    ranks = ranks or Ranks(resolve_device(config.device))
    device = ranks.device
    if method is not None and ranks.world_size > 1:
        raise UsageError("a method that chooses by loss sees whole batches: train it in one process")
    classes = count_classes(source, evaluation)
    meter = EnergyMeter(device)
    begun = time.perf_counter()
    side = config.image_size
    feed = feed or ImageFeed(
        source,
        side=side,
        memory_budget=config.memory_budget,
        workers=config.workers,
        progress=lambda done, total: progress("load", done, total, 0.0),
    )
    seconds = {"load": time.perf_counter() - begun, "indices": 0.0, "images": 0.0, "step": 0.0, "eval": 0.0}
    meter.add("load")
    labels = torch.from_numpy(source.labels)
    network = build_network(config.arch, classes=classes, side=side, seed=config.seed)
    network = network.to(device).to(memory_format=torch.channels_last)
    check_network(network, config.arch, config.image_size, classes, device)
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
    )
    batches = _Batches(StepReader(stream, batch_size=config.repack or None), ranks)
    total, per_epoch = batches.steps.total, batches.steps.per_epoch
    epoch_ends = frozenset(accumulate(per_epoch))
    shift = 0 if config.augment == "none" else max(1, side // 8)
    mirror = config.augment == "crop+flip"
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    if method is not None:
        seconds["choose"] = 0.0

    step, samples, forward_samples, loss_sum, last_loss, sha = 0, 0, 0, 0.0, math.nan, ""
    state = run_dir.load_checkpoint()
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step, samples, loss_sum, last_loss, sha = (state[k] for k in ("step", "samples", "loss_sum", "loss", "sha"))
        seconds = {phase: value + seconds[phase] for phase, value in state["seconds"].items()}
        meter.resume(state.get("joules"))
        batches.steps.seek(step, sha)
        if method is not None:
            forward_samples = state["forward_samples"]
            method.load_state(state["method"])
    model = ranks.wrap(network)
    run_dir.begin()
    run_dir.drop_metrics_from(step + 1)

    def save() -> None:
        of_method = {} if method is None else {"method": method.state(), "forward_samples": forward_samples}
        run_dir.save_checkpoint(
            {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "samples": samples,
                "loss_sum": loss_sum,
                "loss": last_loss,
                "sha": sha,
                "seconds": seconds,
                **of_method,
                "joules": meter.joules,
            }
        )

    network.train()
    paces = array("d")  # seconds by the sample, of each step of this session
    with interruptible() as stopping, closing(feed.batches(batches.rows())) as pixel_batches:
        while True:
            # 1. The next batch: its kept rows from the stream, their pixels from the feed.
            asked, waited = time.perf_counter(), batches.waited
            try:
                pixels = next(pixel_batches, None)
            except (StreamError, IncompleteError):
                save()
                if stopping():  # Ctrl-C ended the producer at the other end of the pipe as well
                    raise KeyboardInterrupt from None
                raise
            seconds["indices"] += batches.waited - waited
            seconds["images"] += time.perf_counter() - asked - (batches.waited - waited)
            if pixels is None:
                break
            batch, sha = batches.pending.pop(0)
            # 2. One step.
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * one_cycle(step, total)
            # Dropout and its like repeat on resume, and differ from rank to rank.
            torch.manual_seed(torch_seed_for(config.seed, "step", step, *([ranks.rank] if ranks.rank else [])))
            part = batches.part(len(batch.kept))
            rows, pixels = batch.kept[part], pixels.to(device, non_blocking=True)
            augmented = partial(augment, shift=shift, mirror=mirror, seed=config.seed, step=step)
            target = labels[torch.from_numpy(rows)]
            if int(target.min()) < 0:
                row = int(rows[int(target.argmin())])
                raise UsageError(f"item {source.ids[row]!r} (row {row}) has no label; training needs one")
            target = target.to(device, non_blocking=True)
            if method is None:
                pixels = augmented(pixels, part=(part, len(batch.kept)))
            else:
                context = StepContext(batch.epoch, stream.header.epochs, config.seed, step)
                with autocast:
                    chosen = narrow(method, network, rows, pixels, target, augmented=augmented, context=context)
                pixels, target = chosen.pixels, chosen.labels
                forward_samples += chosen.forward_samples
                seconds["choose"] += time.perf_counter() - started
                started = time.perf_counter()
            with autocast, norms_frozen(network, when=len(target) == 1):
                logits = model(to_input(pixels)).float()
                if method is not None:
                    loss = weighted_loss(method, chosen, logits)
                elif ranks.world_size == 1:
                    loss = nn.functional.cross_entropy(logits, target)
                else:
                    # Gradients are averaged over ranks; rows repeated to make slices equal count for nothing.
                    own = real_rows(len(batch.kept), ranks.rank, ranks.world_size)
                    loss = nn.functional.cross_entropy(logits[:own], target[:own], reduction="sum")
                    loss = loss * ranks.world_size / len(batch.kept)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            # Ranks agree on the loss and on stopping, or one would wait for another for ever.
            value, stop = ranks.sums([float(loss.detach()) / ranks.world_size, float(stopping())])
            if not math.isfinite(value):
                raise DivergedError(
                    f"the training loss is {value} at step {step} of {total}",
                    hint=f"train again with a lower --lr (it was {config.lr}) into another --out",
                )
            taken = len(batch.kept) if method is None else len(target)
            step, samples, loss_sum = step + 1, samples + taken, loss_sum + value
            spent = time.perf_counter() - started
            seconds["step"] += spent
            paces.append(spent / taken)
            meter.add("train")
            # 3. The epoch's end, and whoever wants to stop.
            if step in epoch_ends:
                last_loss, loss_sum = loss_sum / per_epoch[batch.epoch], 0.0
                run_dir.log({"epoch": batch.epoch, "step": step, "loss": last_loss, "gradient_samples": samples})
                save()
                if after_epoch is not None:
                    started = time.perf_counter()
                    after_epoch(network)
                    network.train()
                    seconds["eval"] += time.perf_counter() - started
            progress("train", step, total, {f"waiting for {what}": share for what, share in _waited(seconds).items()})
            if stop:
                save()
                raise KeyboardInterrupt

    accuracy = None
    if evaluation is not None:
        started = time.perf_counter()
        accuracy = evaluate(network, evaluation, device, side=side, workers=config.workers, ranks=ranks)
        seconds["eval"] += time.perf_counter() - started
        meter.add("eval")
    rounded = {phase: round(value, 3) for phase, value in (seconds | {"total": sum(seconds.values())}).items()}
    pace = statistics.median(paces[1:] or paces) if paces else None
    report = TrainReport(accuracy, samples, step, last_loss, rounded, forward_samples, pace)
    report = replace(report, samples_in=stream.rows_in, joules=meter.joules, joules_from=meter.source)
    final = {"step": step, "gradient_samples": samples, "seconds": rounded}
    run_dir.drop_metrics_from(total + 1)
    run_dir.log(final | {"test_accuracy": accuracy.value if accuracy else None, "final": True})
    return report


def _waited(seconds: dict[str, float]) -> dict[str, float]:
    spent = sum(seconds.get(phase, 0.0) for phase in ("indices", "images", "choose", "step"))
    return {what: seconds[what] / max(spent, 1e-9) for what in ("indices", "images")}


class _Batches:
    """The batches of the steps on their way through the feed, kept until their pixels come back."""

    def __init__(self, steps: StepReader, ranks: Ranks) -> None:
        self.steps, self._ranks = steps, ranks
        self.waited = 0.0
        self.pending: list[tuple[SelectedBatch | PackedBatch, str]] = []

    def part(self, count: int) -> Int64[np.ndarray, " m"]:
        """Positions in a batch of ``count`` rows that this rank takes."""
        return rank_positions(count, self._ranks.rank, self._ranks.world_size, "pad")

    def rows(self) -> Iterator[Int64[np.ndarray, " m"]]:
        """Yields this rank's rows of each batch."""
        while True:
            begun = time.perf_counter()
            batch = next(self.steps, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            self.pending.append((batch, self.steps.position.sha256))
            yield batch.kept[self.part(len(batch.kept))]


def count_classes(source: ImageSource, evaluation: ImageSource | None) -> int:
    """How many outputs the network needs.

    Raises:
        UsageError: There are no labels, or labels that are no classes, or the evaluation set has other classes.
    """
    counts = LabelCounts.of(source.labels)
    if not counts.labelled:
        raise UsageError(f"{source.uri} has no labels; training needs them")
    doubt, outputs = counts.doubt(len(source.classes)), max(len(source.classes), counts.largest + 1)
    if doubt:
        raise UsageError(
            f"{source.uri} has {doubt}, and the network would need {outputs:,} outputs: they look like ids",
            hint="number the classes from 0, e.g. by np.unique(labels, return_inverse=True), or, where all of them are "
            "classes, give the data set their names in an attribute 'classes'",
        )
    if evaluation is not None and evaluation.labels.max(initial=-1) < 0:
        raise UsageError(f"--eval {evaluation.uri} has no labels; accuracy needs them")
    if evaluation is not None and evaluation.labels.max() >= outputs:
        raise UsageError(
            f"--eval {evaluation.uri} has labels up to {int(evaluation.labels.max()):,}, and the network {outputs:,} "
            f"outputs, as {source.uri} has so many classes",
            hint="number the classes of both data sets alike",
        )
    if evaluation is not None and list(evaluation.classes) != list(source.classes):
        raise UsageError(
            f"--eval {evaluation.uri} has other classes than {source.uri}: {len(evaluation.classes)} and "
            f"{len(source.classes)}, first {list(evaluation.classes)[:3]} and {list(source.classes)[:3]}",
            hint="where labels are text, give both data sets the same attribute 'classes'"
            if source.classes and evaluation.classes
            else "",
        )
    return outputs
