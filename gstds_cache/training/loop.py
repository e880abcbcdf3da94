"""Training on a selection: the whole run, top to bottom.

SGD with Nesterov momentum and a one-cycle learning rate over the total number of steps, which a selection's header
tells before the first of them; channels last, and bfloat16 autocast on CUDA. Each data record of the stream is one
step, or, re-packed, each full batch of kept rows. A run that is killed or interrupted continues from its last
checkpoint; on a CPU with the same number of threads, with the same numbers to the bit. After the last step the running
statistics of batch normalisation are re-estimated from random rows (``batch_norm.py``).

On CUDA no step waits for the device: images are there (``device_images.py``), losses are read in blocks
(``step_losses.py``), and a checkpoint, for which the host has to wait, is saved at an epoch's end only if the last one
is some seconds old. Steps of a size that comes again are replayed from a CUDA graph (``step_graphs.py``).

Several ranks share each step's batch (``distributed.py``). Whatever their number, every kept row counts once in the
step's gradient, so it is the same but for the order of summation, except for what sees a rank's own slice alone:
batch normalisation on a CPU, and dropout.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from itertools import accumulate, chain

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn

from gstds_cache.config import TrainConfig
from gstds_cache.costs.energy import EnergyMeter, used_device
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import DivergedError, IncompleteError, IntegrityError, StreamError, UsageError
from gstds_cache.runtime.devices import resolve_device, to_device
from gstds_cache.runtime.progress import Progress
from gstds_cache.seeding import torch_seed_for, torch_seed_of_step
from gstds_cache.stream.ranks import real_rows
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.training.augment import Augmentation, augment, largest_shift, to_input
from gstds_cache.training.batch_norm import random_batches, random_inputs, reestimate_batch_norm, running_norms
from gstds_cache.training.batches import BatchLoader, TrainingBatch
from gstds_cache.training.checkpoint import Checkpoint
from gstds_cache.training.classes import count_classes
from gstds_cache.training.compiled import Scores, compiled, explained
from gstds_cache.training.device_images import DeviceImages, gather, held_on_device
from gstds_cache.training.distributed import Ranks
from gstds_cache.training.evaluate import Accuracy, evaluate
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.identity import resolved_precision
from gstds_cache.training.images import ImageFeed, decoding_workers
from gstds_cache.training.network import build_network, check_network, norms_frozen
from gstds_cache.training.optimizer import build_optimizer, load_optimizer, one_cycle
from gstds_cache.training.report import TrainingResult, waiting_shares
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.step_graphs import StepGraphs, recordable
from gstds_cache.training.step_losses import StepLosses
from gstds_cache.training.step_times import StepTimes
from gstds_cache.training.steps import StepReader, remainder_of
from gstds_cache.training.tracking import Tracking

CHECKPOINT_SECONDS = 10.0
"""A run on a GPU whose last checkpoint is younger saves none at an epoch's end: one takes as long as many steps."""

StopAsked = Callable[[], bool]
Interruptible = Callable[[], AbstractContextManager[StopAsked]]


def never_interrupted() -> AbstractContextManager[StopAsked]:
    """Nobody asks to stop."""
    return nullcontext(lambda: False)


def train(
    source: ImageSource,
    stream: SelectionStream,
    config: TrainConfig,
    run_dir: RunDir,
    *,
    evaluation: ImageSource | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    interruptible: Interruptible = never_interrupted,
    tracking: Tracking | None = None,
) -> TrainingResult:
    """Train a network on a selection: :meth:`Trainer.run`, the directory held.

    Args:
        source: The data set the selection was made from.
        stream: The selection.
        config: How to train; ``image_size`` and ``augment`` are resolved (not 0, not ``auto``).
        run_dir: Where metrics and checkpoints go, and come from; held until the end.
        evaluation: The data set accuracy is measured on, with the same classes.
        ranks: This process among several; None for one alone.
        progress: Called with phase, steps done, steps in all, and the shares of time spent waiting.
        interruptible: Makes a context that is held while steps are taken; the function it gives is asked after each
            step, and when it says true, a checkpoint is saved and KeyboardInterrupt raised.
        tracking: What experiment trackers are told; None where there are none.

    Returns:
        What was done.

    Raises:
        UsageError: Labels are missing, or the evaluation set has other classes.
        FingerprintMismatchError: The stream is not the one the run was begun with.
        IntegrityError: The checkpoint is damaged, or of another network.
        DivergedError: The loss is NaN or infinite.
        StreamError: The selection is damaged or truncated; what was trained so far is in the checkpoint.
        IncompleteError: Another process or thread writes ``run_dir``; or a process that decodes was killed or had no
            memory, and what was trained so far is in the checkpoint.
        KeyboardInterrupt: ``interruptible`` said so.
    """
    with run_dir:
        trainer = Trainer(source, stream, config, run_dir, evaluation=evaluation, ranks=ranks, progress=progress)
        trainer.tracking = tracking or trainer.tracking
        return trainer.run(interruptible)


class Trainer:
    """One run: its data, its network, and how far it is.

    A subclass may replace :meth:`open_feed`, :meth:`batch_loss`, :meth:`may_record` and :meth:`end_epoch`:
    ``benchmarks/study/trainer.py`` does, for methods that choose from each batch while the network learns.

    Attributes:
        device: Where the network is.
        network: The network; ``model`` is the same with gradients averaged over ranks.
        seconds: Seconds by phase, over all sessions of the run.
        step: Steps taken, over all sessions of the run; on a GPU, asked for.
        times: How long steps take.
        row_losses: Called in each step with its batch and the losses of its rows, float32 [m] on the device, if it was
            set before :meth:`run`.
        tracking: What experiment trackers are told.
    """

    model: nn.Module
    _scores: Scores
    _graphs: StepGraphs | None = None
    row_losses: Callable[[TrainingBatch, Float32[Tensor, " m"]], None] | None = None

    def __init__(
        self,
        source: ImageSource,
        stream: SelectionStream,
        config: TrainConfig,
        run_dir: RunDir,
        *,
        evaluation: ImageSource | None = None,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Decode what fits into memory, and build the network; arguments as for :func:`train`. Nothing is written."""
        self.source, self.stream, self.config, self.run_dir = source, stream, config, run_dir
        self.evaluation, self.ranks = evaluation, ranks or Ranks(resolve_device(config.device))
        self.device = self.ranks.device
        self._progress = progress or (lambda _phase, _done, _total, _shares: None)
        classes = count_classes(source, evaluation)
        self._meter = EnergyMeter(*self.ranks.gather(used_device(self.device)))
        begun = time.perf_counter()
        self._feed = self.open_feed()
        self.seconds = {"load": time.perf_counter() - begun}
        self.seconds |= dict.fromkeys(("indices", "images", "warm-up", "step", "eval"), 0.0)
        self._meter.add("load")
        self._labels = torch.from_numpy(source.labels)
        self._all_labelled = int(self._labels.min()) >= 0
        self._device_labels = self._labels.to(self.device) if self._feed.on_device else None
        network = build_network(config.arch, classes=classes, side=config.image_size, seed=config.seed)
        self.network = network.to(self.device).to(memory_format=torch.channels_last)
        check_network(self.network, config.arch, config.image_size, classes, self.device)
        self.optimizer = build_optimizer(self.network, config)
        lower = resolved_precision(config, self.device) == "bfloat16"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if lower else nullcontext()
        draws = partial(Feedback, draw=config.draw, importance=config.importance_weights)
        remainder = remainder_of(stream.header)
        self._steps = StepReader(stream, batch_size=config.repack or None, remainder=remainder, feedback=draws)
        if self._steps.feedback is not None:
            self.row_losses = self._report
        self._epoch_ends = frozenset(accumulate(self._steps.per_epoch))
        self.tracking = Tracking()
        self.step, self._samples, self._sha = 0, 0, ""
        self._loss_sum, self._epoch_loss, self._forward_samples = 0.0, math.nan, 0
        self._losses = StepLosses(self.ranks)
        self._known = 0  # steps whose losses are known
        self._ended: deque[tuple[int, int, int]] = deque()  # epochs whose losses are not: step, epoch, samples
        self._saved_at = -math.inf
        self.times = StepTimes(self.device, compiled=config.compile != "off")

    def run(self, interruptible: Interruptible = never_interrupted) -> TrainingResult:
        """Take every step that is left, re-estimate the statistics of batch normalisation, and measure accuracy.

        Raises:
            KeyboardInterrupt: ``interruptible`` said so. What else is raised, :func:`train` says.
        """
        self._restore()
        loader = BatchLoader(self._steps, self._feed, self.ranks, self.seconds)
        callers_random_numbers = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
        every = closing(loader.all_batches())
        with callers_random_numbers, interruptible() as stop_asked, self._recording(), every as batches:
            # 1. The next batch: its kept rows from the selection, their pixels from the feed.
            while (batch := self._next_batch(batches, stop_asked)) is not None:
                self.times.begin(len(batch.rows), records=self._records(batch))
                # 2. One step: forward, backward, the optimiser.
                self._key_random_numbers()
                with explained(self.config.compile, when=self.times.phase == "warm-up"):
                    loss, samples = self._take_step(batch)
                self._track(samples)
                # 3. Ranks agree on the loss and on stopping, or one would wait for another for ever.
                self._note(self._losses.add(self.step, loss, stop_asked()))
                self._count(batch, samples, self.times.end(max(samples, 1)))
                # 4. The epoch's end, and whoever wants to stop.
                if self.step in self._epoch_ends:
                    self._end_feedback()
                    self.end_epoch(batch.epoch)
                self._show_progress()
                if self._losses.stop:
                    self._share_losses()
                    self._save()
                    raise KeyboardInterrupt
        # 5. What tests the network: statistics of all rows, in the last checkpoint too.
        self._reestimate_norms()
        return self._finish(self._evaluate())

    # What a subclass may replace

    def open_feed(self) -> ImageFeed:
        """Where pixels come from: decoded now where they fit onto the device or into memory."""
        config, workers = self.config, decoding_workers(self.config.workers, self.device)

        def progress(done: int, total: int) -> None:
            self._progress("load", done, total, {})

        if held_on_device(config.images, len(self.source), config.image_size, self.device):
            return DeviceImages(
                self.source, side=config.image_size, workers=workers, device=self.device, progress=progress
            )
        return ImageFeed(
            self.source,
            side=config.image_size,
            memory_budget=config.memory_budget,
            workers=workers,
            pin=self.device.type == "cuda",
            progress=progress,
        )

    def batch_loss(self, batch: TrainingBatch) -> tuple[Float32[Tensor, ""], int]:
        """The loss that a step descends.

        Args:
            batch: This rank's rows of the step, or a piece of them.

        Returns:
            The mean cross-entropy of the step's rows (of several ranks, this rank's part of it, times their number, as
            gradients are averaged; of a piece, its part), float32 []; and how many rows the step counts, over all
            ranks.
        """
        pixels, target = self.inputs(batch)
        logits, smoothing = self.logits(pixels), self.config.label_smoothing
        if self.row_losses is not None:
            self.row_losses(batch, nn.functional.cross_entropy(logits.detach(), target, reduction="none"))
        if self.config.importance_weights and self._steps.feedback is not None:
            return self._weighted(self._steps.feedback, batch, logits, target), batch.size
        if self.ranks.world_size == 1 and len(batch.rows) == batch.size:
            return nn.functional.cross_entropy(logits, target, label_smoothing=smoothing), batch.size
        own = self._own(batch)
        loss = nn.functional.cross_entropy(logits[:own], target[:own], reduction="sum", label_smoothing=smoothing)
        return loss * self.ranks.world_size / batch.size, batch.size

    def may_record(self) -> bool:
        """Whether :meth:`batch_loss` does nothing but what :meth:`_recorded_step` does: a subclass's may not."""
        return type(self).batch_loss is Trainer.batch_loss

    def _report(self, batch: TrainingBatch, losses: Float32[Tensor, " m"]) -> None:
        """Report the losses of candidates; they wait on the device for the epoch's end."""
        assert self._steps.feedback is not None
        own = self._own(batch)
        self._steps.feedback.report(self.step + 1, batch.rows[:own], losses[:own])

    def end_epoch(self, epoch: int) -> None:
        """Write down the epoch's loss once it is known, and save a checkpoint; on a GPU, if the last one is old."""
        self._ended.append((self.step, epoch, self._samples))
        begun = time.perf_counter()
        self._note(self._losses.end_block())
        self.seconds["step"] += time.perf_counter() - begun
        last = self.step == self._steps.total
        if last or not self._losses.deferred or time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS:
            self._save()

    # The parts of a step

    def _take_step(self, batch: TrainingBatch) -> tuple[Float32[Tensor, ""], int]:
        """Descend the loss of a batch, piece by piece where gradients are accumulated; arguments and result as above.

        Ranks have as many pieces each, and average the gradients once, with the last one.
        """
        graphs = self._graphs
        if graphs is not None and batch.pixels is None:
            if graphs.ready(len(batch.rows)):
                return self._replay(graphs, batch), batch.size
            with graphs.eager(len(batch.rows)):
                return self._take_pieces(batch)
        return self._take_pieces(batch)

    def _take_pieces(self, batch: TrainingBatch) -> tuple[Float32[Tensor, ""], int]:
        *first, last = batch.pieces(self.config.accumulate)
        before: Tensor | float = 0.0
        for piece in first:
            with self.ranks.alone(self.model):
                loss, _ = self.batch_loss(piece)
                loss.backward()  # type: ignore[no-untyped-call]
            before = before + loss.detach()
        loss, samples = self.batch_loss(last)
        self._update(loss)
        return (loss.detach() + before if first else loss.detach()), samples

    def _records(self, batch: TrainingBatch) -> bool:
        """Whether this step is recorded before it is taken."""
        return self._graphs is not None and batch.pixels is None and self._graphs.records(len(batch.rows))

    def _replay(self, graphs: StepGraphs, batch: TrainingBatch) -> Float32[Tensor, ""]:
        """Take a step of a size that is recorded; the loss."""
        assert isinstance(self._feed, DeviceImages)
        self._require_labels(batch)
        rate = self._set_rate()
        loss, *row_losses = graphs.take(self._feed.packed(batch.rows, **self._augmentation(batch)), rate)
        if self.row_losses is not None:
            self.row_losses(batch, *row_losses)
        return loss

    def _recorded_step(self, packed: Int64[Tensor, "4 m"]) -> tuple[Tensor, ...]:
        """What :meth:`_take_pieces` does for one rank, one piece and images on the device, without the host's part."""
        assert isinstance(self._feed, DeviceImages)
        assert self._device_labels is not None
        target = self._device_labels[packed[0]]
        logits = self.logits(self._feed.gather(self._feed.images, packed, largest_shift(self.config)))
        loss = nn.functional.cross_entropy(logits, target, label_smoothing=self.config.label_smoothing)
        self._descend(loss)
        if self.row_losses is None:
            return (loss.detach(),)
        return loss.detach(), nn.functional.cross_entropy(logits.detach(), target, reduction="none")

    def _own(self, batch: TrainingBatch) -> int:
        """How many rows of a batch count; those after them were repeated to make the ranks' slices equal."""
        real = real_rows(batch.size, self.ranks.rank, self.ranks.world_size)
        return min(max(real - batch.start, 0), len(batch.rows))

    def inputs(self, batch: TrainingBatch) -> tuple[UInt8[Tensor, "m 3 S S"], Int64[Tensor, " m"]]:
        """A batch's augmented pixels and classes, on the device.

        Raises:
            UsageError: A row has no label.
        """
        if batch.pixels is not None or not isinstance(self._feed, DeviceImages) or self._device_labels is None:
            target = self.targets(batch)
            return self.augmented(self.pixels(batch), (batch.positions, batch.size)), target
        self._require_labels(batch)
        pixels, rows = self._feed.augmented(batch.rows, **self._augmentation(batch))
        return pixels, self._device_labels[rows]

    def _augmentation(self, batch: TrainingBatch) -> Augmentation:
        """How this step's images are augmented."""
        return {
            "shift": largest_shift(self.config),
            "mirror": self.config.augment == "crop+flip",
            "seed": self.config.seed,
            "step": self.step,
            "part": (batch.positions, batch.size),
        }

    def targets(self, batch: TrainingBatch) -> Int64[Tensor, " m"]:
        """Classes of a batch's rows, int64 [m] on the device.

        Raises:
            UsageError: A row has no label.
        """
        self._require_labels(batch)
        return to_device(self._labels[torch.from_numpy(batch.rows)], self.device)

    def _require_labels(self, batch: TrainingBatch) -> None:
        if self._all_labelled:
            return
        labels = self.source.labels[batch.rows]
        if int(labels.min()) < 0:
            row = int(batch.rows[int(labels.argmin())])
            raise UsageError(f"item {self.source.ids[row]!r} (row {row}) has no label; training needs one")

    def pixels(self, batch: TrainingBatch) -> UInt8[Tensor, "m 3 S S"]:
        """A batch's pixels on the device, uint8 [m, 3, S, S]."""
        return to_device(self._feed.pixels(batch.rows) if batch.pixels is None else batch.pixels, self.device)

    def augmented(
        self, pixels: UInt8[Tensor, "m 3 S S"], part: tuple[Int64[np.ndarray, " m"], int] | None = None
    ) -> UInt8[Tensor, "m 3 S S"]:
        """``pixels`` with this step's augmentation; ``part`` as for :func:`~gstds_cache.training.augment.augment`."""
        mirror, seed = self.config.augment == "crop+flip", self.config.seed
        return augment(pixels, shift=largest_shift(self.config), mirror=mirror, seed=seed, step=self.step, part=part)

    def logits(self, pixels: UInt8[Tensor, "m 3 S S"]) -> Float32[Tensor, "m C"]:
        """Scores of the classes, float32 [m, C]."""
        with self.autocast, norms_frozen(self.network, when=len(pixels) == 1):
            return self._scores(pixels)

    def _weighted(
        self, feedback: Feedback, batch: TrainingBatch, logits: Float32[Tensor, "m C"], target: Int64[Tensor, " m"]
    ) -> Float32[Tensor, ""]:
        """The loss of a step on candidates, each row weighted by 1 / its chance of having been drawn."""
        own, smoothing = self._own(batch), self.config.label_smoothing
        losses = nn.functional.cross_entropy(logits[:own], target[:own], reduction="none", label_smoothing=smoothing)
        weights = to_device(torch.from_numpy(feedback.weights_of(batch.rows[:own])), self.device)
        return (losses * weights).sum() * self.ranks.world_size / batch.size

    def _share_losses(self) -> None:
        """Let every rank know the losses of all, as the first one's checkpoint is that of all."""
        if self._steps.feedback is not None:
            self._steps.feedback.share(self.ranks.gather if self.ranks.world_size > 1 else None)

    def _end_feedback(self) -> None:
        """Draw the next epoch by the losses of this one."""
        if self._steps.feedback is not None:
            self._share_losses()
            self._steps.feedback.end_epoch(self._steps.position.epoch)

    def _next_batch(self, batches: Generator[TrainingBatch, None, None], stop_asked: StopAsked) -> TrainingBatch | None:
        try:
            batch = next(batches, None)
        except (StreamError, IncompleteError):
            # Of several ranks one may be alone here, and know no losses but its own: the last checkpoint stays.
            if self._steps.feedback is None or self.ranks.world_size == 1:
                self._save()
            if stop_asked():  # Ctrl-C ended the producer at the other end of the pipe as well
                raise KeyboardInterrupt from None
            raise
        return batch

    def _key_random_numbers(self) -> None:
        """Dropout and its like repeat on resume, and differ from rank to rank."""
        rank = [self.ranks.rank] if self.ranks.rank else []
        seed = torch_seed_of_step(self.config.seed, "step", self.step, *rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for devices of every kind: 0.2 ms
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def _update(self, loss: Float32[Tensor, ""]) -> None:
        self._set_rate()
        self._descend(loss)

    def _set_rate(self) -> float:
        rate = self.config.lr * one_cycle(self.step, self._steps.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _descend(self, loss: Float32[Tensor, ""]) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # now: gradients that a CUDA graph wrote end with its step

    def _note(self, losses: Iterable[tuple[int, float]]) -> None:
        """Take over losses that became known, and log the epochs that end with them.

        Raises:
            DivergedError: One is NaN or infinite. No checkpoint was saved since.
        """
        for step, loss in losses:
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the training loss is {loss} at step {step} of {self._steps.total}",
                    hint=f"train again with a lower `lr` (it was {self.config.lr}) into another `out`",
                )
            self._loss_sum += loss
            self._known = step + 1
            self.tracking.loss(step + 1, loss)
            self._log_ended()
        self._log_ended()

    def _log_ended(self) -> None:
        while self._ended and self._ended[0][0] == self._known:
            step, epoch, samples = self._ended.popleft()
            self._epoch_loss, self._loss_sum = self._loss_sum / self._steps.per_epoch[epoch], 0.0
            self.run_dir.log({"epoch": epoch, "step": step, "loss": self._epoch_loss, "gradient_samples": samples})
            self.tracking.epoch(step, epoch, self._epoch_loss)

    def _track(self, samples: int) -> None:
        """Tell trackers of a step that was taken, and is not counted yet."""
        step, lr = self.step + 1, self.optimizer.param_groups[0]["lr"]
        end = step in self._epoch_ends
        self.tracking.step(step, lr=lr, gradient_samples=self._samples + samples, epoch_end=end)

    def _count(self, batch: TrainingBatch, samples: int, seconds: float) -> None:
        """Count a step that was taken."""
        self.step, self._samples, self._sha = self.step + 1, self._samples + samples, batch.sha
        self.seconds[self.times.phase] += seconds
        self._meter.add("train")

    def _show_progress(self) -> None:
        shares = {f"waiting for {phase}": share for phase, share in waiting_shares(self.seconds).items()}
        self._progress("train", self.step, self._steps.total, shares)

    # Beginning and end

    def _restore(self) -> None:
        """Go on from the run's checkpoint, or begin the run.

        Raises:
            IntegrityError: The checkpoint is of another network.
        """
        checkpoint = self.run_dir.load_checkpoint()
        if checkpoint is not None:
            try:
                self.network.load_state_dict(checkpoint.network)
                load_optimizer(self.optimizer, checkpoint.optimizer)
            except (RuntimeError, ValueError, KeyError) as error:
                raise IntegrityError(
                    f"the checkpoint in {self.run_dir.path} is of another network: {str(error).partition(chr(10))[0]}",
                    hint="resume with the library versions it was trained with, or train into another `out`",
                ) from error
            self.step, self._samples, self._sha = checkpoint.step, checkpoint.samples, checkpoint.sha
            self._loss_sum, self._epoch_loss = checkpoint.loss_sum, checkpoint.loss
            self._forward_samples = checkpoint.forward_samples
            for phase, value in checkpoint.seconds.items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + value
            self._meter.resume(checkpoint.joules)
            if self._steps.feedback is not None:
                self._steps.feedback.load(checkpoint.feedback)
            self._known = self.step
            self._steps.seek(self.step, self._sha)
        self.model = model = self.ranks.wrap(self.network)

        def scores(pixels: UInt8[Tensor, "m 3 S S"]) -> Float32[Tensor, "m C"]:
            found: Tensor = model(to_input(pixels)).float()
            return found

        self._scores = compiled(scores, self.config.compile)
        if isinstance(self._feed, DeviceImages):
            # No CUDA graph, which would copy its inputs, all images among them, in every step.
            self._feed.gather = compiled(gather, "off" if self.config.compile == "off" else "default")
        self.network.train()
        self.run_dir.begin()
        self.run_dir.drop_metrics_from(self.step + 1)
        self.tracking.begin(self.step)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Steps that come again are replayed meanwhile: on one GPU that holds the images, taken at once.

        Afterwards nothing refers back to the trainer, so that its images leave the GPU's memory with it.
        """
        config = self.config
        plain = config.compile == "off" and config.accumulate == 1 and not config.importance_weights
        here = recordable(self.device) and self.ranks.world_size == 1 and isinstance(self._feed, DeviceImages)
        if config.cuda_graphs and plain and here and self.may_record():
            self._graphs = StepGraphs(self._recorded_step, self.optimizer, self.device)
        try:
            yield
        finally:
            self._graphs = None
            if self._steps.feedback is not None:
                self.row_losses = None

    def _save(self) -> None:
        begun = time.perf_counter()
        self._note(self._losses.wait())  # for steps that the GPU has still to take
        self.seconds["step"] += time.perf_counter() - begun
        self._saved_at = time.monotonic()
        self.tracking.flush()
        self.run_dir.save_checkpoint(
            Checkpoint(
                network=self.network.state_dict(),
                optimizer=self.optimizer.state_dict(),
                step=self.step,
                samples=self._samples,
                loss_sum=self._loss_sum,
                loss=self._epoch_loss,
                sha=self._sha,
                seconds=self.seconds,
                joules=self._meter.joules,
                forward_samples=self._forward_samples,
                feedback=None if self._steps.feedback is None else self._steps.feedback.state(),
            )
        )

    def _reestimate_norms(self) -> None:
        """Give batch normalisation the statistics of random rows, once.

        Every rank makes all the passes, so that neither rows nor batches depend on the number of ranks.
        """
        if self._forward_samples or not self.config.norm_samples or not running_norms(self.network):
            return
        begun = time.perf_counter()
        batches = random_batches(len(self.source), self.config.norm_samples, self.config.seed)
        with closing(random_inputs(self._feed, batches)) as inputs:
            first = next(inputs, None)
            if first is None:  # not one of the rows can be decoded
                return
            shown = self._showing("norms", chain([first], inputs), len(batches))
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(torch_seed_for(self.config.seed, "norms"))  # dropout that ``eval`` does not stop
                samples = reestimate_batch_norm(self.network, shown)
        self.ranks.same_buffers(self.network)
        self._forward_samples = samples * self.ranks.world_size
        self.seconds["norms"] = self.seconds.get("norms", 0.0) + time.perf_counter() - begun
        self._meter.add("norms")
        self._save()

    def _showing(self, phase: str, values: Iterable[Tensor], total: int) -> Iterator[Tensor]:
        for done, value in enumerate(values, 1):
            yield value
            self._progress(phase, done, total, {})

    def _evaluate(self) -> Accuracy | None:
        if self.evaluation is None:
            return None
        started = time.perf_counter()
        accuracy = evaluate(
            self.network,
            self.evaluation,
            self.device,
            side=self.config.image_size,
            workers=decoding_workers(self.config.workers, self.device),
            ranks=self.ranks,
        )
        self.seconds["eval"] += time.perf_counter() - started
        self._meter.add("eval")
        return accuracy

    def _finish(self, accuracy: Accuracy | None) -> TrainingResult:
        """Write the last line of the metrics, and sum up."""
        total = self.seconds | {"total": sum(self.seconds.values())}
        seconds = {phase: round(value, 3) for phase, value in total.items()}
        self.run_dir.drop_metrics_from(self._steps.total + 1)
        self.run_dir.log(
            {
                "step": self.step,
                "gradient_samples": self._samples,
                "seconds": seconds,
                "test_accuracy": accuracy.value if accuracy else None,
                "final": True,
            }
        )
        self.tracking.final(self.step, accuracy.value if accuracy else None)
        return TrainingResult(
            accuracy=accuracy,
            gradient_samples=self._samples,
            forward_samples=self._forward_samples,
            steps=self.step,
            loss=self._epoch_loss,
            seconds=seconds,
            seconds_per_sample=self.times.seconds_per_sample(),
            samples_in=self.stream.rows_in,
            joules=self._meter.joules,
            joules_from=self._meter.source,
        )
