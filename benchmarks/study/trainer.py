"""The library's training loop with what the study adds: methods that choose from each batch, images decoded once.

Whatever the method, the statistics of batch normalisation are re-estimated before testing, as the library does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from benchmarks.study.baselines.batch_method import (
    BatchMethod,
    ChosenRows,
    Offer,
    StepContext,
    WholeBatchMethod,
    choose_rows,
    kept_of,
    learner_losses,
    weighted_loss,
)
from benchmarks.study.baselines.last_losses import LastLosses
from benchmarks.study.variants import VariantFeedback
from gstds_cache.config import TrainConfig
from gstds_cache.data.source import ImageSource
from gstds_cache.runtime.devices import to_device
from gstds_cache.seeding import rng_for
from gstds_cache.stream.reader import SelectionStream, open_selection
from gstds_cache.stream.schema import Header
from gstds_cache.training.augment import largest_shift
from gstds_cache.training.batches import TrainingBatch
from gstds_cache.training.device_images import DeviceImages, gather
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.identity import run_config
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.loop import Trainer
from gstds_cache.training.report import TrainingResult
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.step_graphs import StepGraphs
from gstds_cache.training.steps import StepReader, remainder_of

FORWARD_ROWS = 1024  # of a forward pass of all images


class StudyTrainer(Trainer):
    """A run in one process and one session; its directory holds no state of the method.

    Attributes:
        forward_samples: Samples that had a forward pass only for the method to choose among them.
        steps_taken: Batches after which a step was taken.
    """

    def __init__(
        self,
        source: ImageSource,
        stream: SelectionStream,
        config: TrainConfig,
        run_dir: RunDir,
        *,
        feed: ImageFeed,
        method: BatchMethod | None = None,
        after_epoch: Callable[[nn.Module], None] | None = None,
        feedback: Callable[[Header], Feedback] | None = None,
    ) -> None:
        """Prepare a run; arguments as for :func:`train_once`."""
        self._given_feed, self._method, self._after_epoch, self.forward_samples = feed, method, after_epoch, 0
        self._waiting: ChosenRows | None = None  # chosen, and not yet in a step
        self._last_loss, self.steps_taken = 0.0, 0
        super().__init__(source, stream, config, run_dir)
        # Of steps that are replayed: what waits to be in one, with its weights; the last loss; losses not told yet.
        self._packed = torch.empty((5, 0), dtype=torch.int64)
        self._last = torch.zeros((), device=self.device)
        self._seen: list[tuple[Int64[np.ndarray, " m"], Tensor]] = []
        if isinstance(method, WholeBatchMethod):
            method.prepare(self.device)
        if feedback is not None:
            self._steps = StepReader(stream, remainder=remainder_of(stream.header), feedback=feedback)

    def open_feed(self) -> ImageFeed:
        return self._given_feed if self.device.type == "cpu" else OnDevice(self._given_feed, self.device)

    def may_record(self) -> bool:
        """Not where the rest of a batch is trained on too, or a method is told of each step before the next."""
        feedback = self._steps.feedback
        if isinstance(feedback, VariantFeedback) and feedback.rest_side:
            return False
        return self._method is None or isinstance(self._method, WholeBatchMethod | LastLosses)

    # A method's steps that are replayed. What it chooses from losses of the whole batch is chosen on the device; last
    # losses, which decide about the next epoch alone, are read at the epoch's end. Elsewhere batch_loss does both.

    def _take_step(self, batch: TrainingBatch) -> tuple[Float32[Tensor, ""], int]:
        if self._method is None or self._graphs is None or batch.pixels is not None:
            return super()._take_step(batch)
        assert isinstance(self._feed, DeviceImages)
        begun, how = time.perf_counter(), self._augmentation(batch)
        if isinstance(self._method, WholeBatchMethod):
            loss, *_ = self._take(self._graphs, self._feed.packed(batch.rows, **how))
            self.forward_samples += len(batch.rows)
            return loss, kept_of(len(batch.rows), self._method.ratio)
        rng = rng_for(self.config.seed, "method", self.step)
        choice = self._method.choose(Offer(batch.rows, None, batch.epoch, self.stream.header.epochs, rng))
        weights = np.ones(len(choice.positions), np.float32) if choice.weights is None else choice.weights
        rows = batch.rows[choice.positions]
        how["part"] = (np.arange(len(rows)), len(rows))
        chosen = torch.cat([self._feed.packed(rows, **how), torch.from_numpy(bits_of(weights))])
        self._packed = torch.cat([self._packed, chosen], dim=1)
        seconds = time.perf_counter() - begun
        self.seconds["choose"] = self.seconds.get("choose", 0.0) + seconds
        self.seconds[self.times.phase] -= seconds  # the loop counts the whole step
        step = self._method.step_rows or chosen.shape[1]
        if self._packed.shape[1] < max(step, 1):
            return self._last, 0
        mine, self._packed = self._packed[:, :step].contiguous(), self._packed[:, step:]
        self._last, losses = self._take(self._graphs, mine)
        self._seen.append((mine[0].numpy(), losses))
        return self._last, step

    def _take(self, graphs: StepGraphs, packed: Int64[Tensor, "p m"]) -> tuple[Tensor, ...]:
        """A step of rows and how they are augmented, replayed or not."""
        rate = self._set_rate()
        if graphs.ready(packed.shape[1]):
            return graphs.take(packed, rate)
        with graphs.eager(packed.shape[1]):
            return self._recorded_step(to_device(packed, self.device))

    def _recorded_step(self, packed: Int64[Tensor, "p m"]) -> tuple[Tensor, ...]:
        if self._method is None:
            return super()._recorded_step(packed)
        assert isinstance(self._feed, DeviceImages)
        assert self._device_labels is not None
        target = self._device_labels[packed[0]]
        pixels = self._feed.gather(self._feed.images, packed[:4], largest_shift(self.config))
        if isinstance(self._method, WholeBatchMethod):
            with self.autocast:
                losses = learner_losses(self.network, pixels, target)
            places = self._method.places(losses, packed[0])
            loss = nn.functional.cross_entropy(self.logits(pixels[places]), target[places])
            self._descend(loss)
            return (loss.detach(),)
        losses = nn.functional.cross_entropy(self.logits(pixels), target, reduction="none")
        loss = (losses * packed[4].to(torch.int32).view(torch.float32)).mean()
        self._descend(loss)
        return loss.detach(), losses.detach()

    def _records(self, batch: TrainingBatch) -> bool:
        if self._graphs is None or not isinstance(self._method, LastLosses):
            return super()._records(batch)
        # Warm-up, as recording is, up to the first step: it loads kernels.
        return not self.steps_taken or self._graphs.records(self._method.step_rows)

    def batch_loss(self, batch: TrainingBatch) -> tuple[Float32[Tensor, ""], int]:
        """The loss on the rows that the method chooses; 0 rows where they are too few for a step."""
        if self._method is None:
            return self._with_rest(*super().batch_loss(batch))
        begun = time.perf_counter()
        context = StepContext(batch.epoch, self.stream.header.epochs, self.config.seed, self.step)
        pixels, target = self.pixels(batch), self.targets(batch)
        with self.autocast:
            chosen = choose_rows(
                self._method, self.network, batch.rows, pixels, target, augmented=self.augmented, context=context
            )
        self.forward_samples += chosen.forward_samples
        if self._waiting is not None:
            chosen = self._waiting.followed_by(chosen)
        seconds = time.perf_counter() - begun
        self.seconds["choose"] = self.seconds.get("choose", 0.0) + seconds
        self.seconds[self.times.phase] -= seconds  # the loop counts the whole step
        if self._method.step_rows:
            chosen, self._waiting = chosen.parted(self._method.step_rows)
            if len(chosen.rows) < self._method.step_rows:
                self._waiting = chosen
                return torch.tensor(self._last_loss, device=self.device), 0
        loss = weighted_loss(self._method, chosen, self.logits(chosen.pixels))
        self._last_loss = float(loss.detach())
        return loss, len(chosen.rows)

    def _with_rest(self, loss: Float32[Tensor, ""], samples: int) -> tuple[Float32[Tensor, ""], int]:
        """The mean loss of the drawn rows, and where a variant says so of the others at a lower resolution."""
        feedback = self._steps.feedback
        if not isinstance(feedback, VariantFeedback) or not feedback.rest_side:
            return loss, samples
        rows = feedback.rest
        whole = self.augmented(self._feed.pixels(rows)).float()
        small = nn.functional.adaptive_avg_pool2d(whole, feedback.rest_side).round().to(torch.uint8)
        others = nn.functional.cross_entropy(self.logits(small), self._labels[torch.from_numpy(rows)], reduction="sum")
        return (loss * samples + others) / (samples + len(rows)), samples

    def _update(self, loss: Float32[Tensor, ""]) -> None:
        if loss.requires_grad:  # else no step is taken
            super()._update(loss)

    def _count(self, batch: TrainingBatch, samples: int, seconds: float) -> None:
        # Of a batch without a step only the time counts; the learning rate's schedule goes on, batch by batch.
        super()._count(batch, samples, seconds)
        self.steps_taken += samples > 0

    def end_epoch(self, epoch: int) -> None:
        begun = time.perf_counter()
        for rows, losses in self._seen:
            assert self._method is not None
            self._method.observe(rows, losses.cpu().numpy(), np.zeros(len(rows), bool))  # last losses ask for no more
        self._seen.clear()
        self.seconds["step"] += time.perf_counter() - begun  # until the steps that were queued are done
        super().end_epoch(epoch)
        feedback = self._steps.feedback
        if isinstance(feedback, VariantFeedback) and feedback.refreshes and self.step < self._steps.total:
            begun = time.perf_counter()
            feedback.losses = self._losses_of_all()
            self.forward_samples += len(feedback.losses)
            self.seconds["choose"] = self.seconds.get("choose", 0.0) + time.perf_counter() - begun
        if self._after_epoch is not None:
            begun = time.perf_counter()
            self._after_epoch(self.network)
            self.network.train()
            self.seconds["eval"] += time.perf_counter() - begun

    def _losses_of_all(self) -> Float32[np.ndarray, " N"]:
        """Losses of the network as it is on every image, not augmented."""
        with self.autocast:
            found = [
                learner_losses(self.network, self._feed.pixels(rows.numpy()).to(self.device), labels.to(self.device))
                for rows, labels in zip(
                    torch.arange(len(self._labels)).split(FORWARD_ROWS), self._labels.split(FORWARD_ROWS), strict=True
                )
            ]
        losses: Float32[np.ndarray, " N"] = torch.cat(found).cpu().numpy()
        return losses


def bits_of(weights: Float32[np.ndarray, " m"]) -> Int64[np.ndarray, "1 m"]:
    """Weights as whole numbers, beside rows."""
    return weights.view(np.int32).astype(np.int64)[None]


class OnDevice(DeviceImages):
    """Images that were decoded once, on the device of one run."""

    def __init__(self, decoded: ImageFeed, device: torch.device) -> None:
        vars(self).update(vars(decoded))
        self.images = decoded._pixels.to(device).permute(0, 2, 3, 1).contiguous()
        self._pixels, self._pin, self.gather = self.images.permute(0, 3, 1, 2), False, gather


def train_once(
    source: ImageSource,
    selection: Path,
    config: TrainConfig,
    out: Path,
    *,
    feed: ImageFeed,
    method: BatchMethod | None = None,
    after_epoch: Callable[[nn.Module], None] | None = None,
    feedback: Callable[[Header], Feedback] | None = None,
) -> tuple[TrainingResult, int]:
    """One run.

    Args:
        source: The training set.
        selection: The selection.
        config: How to train.
        out: The run's directory, which is new.
        feed: The training set's pixels, decoded already.
        method: Chooses from each batch before its step; None trains on the batch as it is.
        after_epoch: Called with the network after each epoch; its time counts as ``eval``.
        feedback: Makes what draws the rows of candidates, instead of the library's own.

    Returns:
        What was done (``forward_samples`` are for the statistics of batch normalisation), and how many samples had a
        forward pass only for the method to choose among them.
    """
    with open_selection(selection) as stream:
        run_dir = RunDir(out, run_config(config, stream.header, None), provenance={}, resume=False)
        with run_dir:
            trainer = StudyTrainer(
                *(source, stream, config, run_dir),
                feed=feed,
                method=method,
                after_epoch=after_epoch,
                feedback=feedback,
            )
            return replace(trainer.run(), steps=trainer.steps_taken), trainer.forward_samples
