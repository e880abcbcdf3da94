"""The library's training loop with what the study adds: methods that choose from each batch, images decoded once.

Whatever the method, the statistics of batch normalisation are re-estimated before testing, as the library does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from benchmarks.study.baselines.batch_method import (
    BatchMethod,
    ChosenRows,
    StepContext,
    choose_rows,
    weighted_loss,
)
from benchmarks.study.variants import VariantFeedback
from gstds_cache.config import TrainConfig
from gstds_cache.data.source import ImageSource
from gstds_cache.stream.reader import SelectionStream, open_selection
from gstds_cache.stream.schema import Header
from gstds_cache.training.batches import TrainingBatch
from gstds_cache.training.device_images import DeviceImages, gather
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.identity import run_config
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.loop import Trainer
from gstds_cache.training.report import TrainingResult
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.steps import StepReader, remainder_of


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
        if feedback is not None:
            self._steps = StepReader(stream, remainder=remainder_of(stream.header), feedback=feedback)

    def open_feed(self) -> ImageFeed:
        return self._given_feed if self.device.type == "cpu" else OnDevice(self._given_feed, self.device)

    def may_record(self) -> bool:
        """Where a method chooses in each step, or the rest of a batch is trained on too, a step is more than that."""
        feedback = self._steps.feedback
        return self._method is None and not (isinstance(feedback, VariantFeedback) and feedback.rest_side)

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
        super().end_epoch(epoch)
        if self._after_epoch is not None:
            begun = time.perf_counter()
            self._after_epoch(self.network)
            self.network.train()
            self.seconds["eval"] += time.perf_counter() - begun


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
