"""How one step of training is taken: pixels, forward, backward, the optimiser.

On CUDA no step waits for the device: images are there (``device_images.py``), and steps of a size that comes again are
replayed from a CUDA graph (``step_graphs.py``).

Several ranks share each step's batch (``distributed.py``). Whatever their number, every kept row counts once in the
step's gradient, so it is the same but for the order of summation, except for what sees a rank's own slice alone:
batch normalisation on a CPU, and dropout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn

from gstds_cache.config import TrainConfig
from gstds_cache.costs.energy import EnergyMeter, used_device
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import UsageError
from gstds_cache.runtime.devices import resolve_device, to_device
from gstds_cache.runtime.progress import Progress
from gstds_cache.runtime.recording import recordable
from gstds_cache.seeding import torch_seed_of_step
from gstds_cache.stream.ranks import real_rows
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.training.augment import Augmentation, augment, largest_shift, to_input
from gstds_cache.training.batches import TrainingBatch
from gstds_cache.training.classes import count_classes
from gstds_cache.training.compiled import Scores, compiled
from gstds_cache.training.device_images import DeviceImages, gather, held_on_device
from gstds_cache.training.distributed import Ranks
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.identity import resolved_precision
from gstds_cache.training.images import ImageFeed, decoding_workers
from gstds_cache.training.network import build_network, check_network, norms_frozen
from gstds_cache.training.optimizer import build_optimizer, one_cycle
from gstds_cache.training.step_graphs import StepGraphs
from gstds_cache.training.steps import StepReader, remainder_of


class Learner:
    """A network, its optimiser and its data, and what a step does with them.

    A subclass may replace :meth:`open_feed`, :meth:`batch_loss` and :meth:`may_record`.

    Attributes:
        device: Where the network is.
        network: The network; ``model`` is the same with gradients averaged over ranks.
        seconds: Seconds by phase, over all sessions of the run.
        step: Steps taken, over all sessions of the run; on a GPU, asked for.
        row_losses: Called in each step with its batch and the losses of its rows, float32 [m] on the device, if it was
            set before the first step.
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
        *,
        evaluation: ImageSource | None,
        ranks: Ranks | None,
        progress: Progress | None,
    ) -> None:
        """Decode what fits into memory, and build the network; arguments as for :func:`.loop.train`."""
        self.source, self.stream, self.config, self.step = source, stream, config, 0
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

    def prepare(self) -> None:
        """Get the network ready for steps, once its parameters are those to begin with."""
        self.model = model = self.ranks.wrap(self.network)

        def scores(pixels: UInt8[Tensor, "m 3 S S"]) -> Float32[Tensor, "m C"]:
            found: Tensor = model(to_input(pixels)).float()
            return found

        self._scores = compiled(scores, self.config.compile)
        if isinstance(self._feed, DeviceImages):
            # No CUDA graph, which would copy its inputs, all images among them, in every step.
            self._feed.gather = compiled(gather, "off" if self.config.compile == "off" else "default")
        self.network.train()

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
        return type(self).batch_loss is Learner.batch_loss

    # A step

    def _key_random_numbers(self) -> None:
        """Dropout and its like repeat on resume, and differ from rank to rank."""
        rank = [self.ranks.rank] if self.ranks.rank else []
        seed = torch_seed_of_step(self.config.seed, "step", self.step, *rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for devices of every kind: 0.2 ms
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

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

    # Steps that are recorded

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

    # What a step is computed from

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

    def _own(self, batch: TrainingBatch) -> int:
        """How many rows of a batch count; those after them were repeated to make the ranks' slices equal."""
        real = real_rows(batch.size, self.ranks.rank, self.ranks.world_size)
        return min(max(real - batch.start, 0), len(batch.rows))

    def _weighted(
        self, feedback: Feedback, batch: TrainingBatch, logits: Float32[Tensor, "m C"], target: Int64[Tensor, " m"]
    ) -> Float32[Tensor, ""]:
        """The loss of a step on candidates, each row weighted by 1 / its chance of having been drawn."""
        own, smoothing = self._own(batch), self.config.label_smoothing
        losses = nn.functional.cross_entropy(logits[:own], target[:own], reduction="none", label_smoothing=smoothing)
        weights = to_device(torch.from_numpy(feedback.weights_of(batch.rows[:own])), self.device)
        return (losses * weights).sum() * self.ranks.world_size / batch.size

    def _report(self, batch: TrainingBatch, losses: Float32[Tensor, " m"]) -> None:
        """Report the losses of candidates; they wait on the device for the epoch's end."""
        assert self._steps.feedback is not None
        own = self._own(batch)
        self._steps.feedback.report(self.step + 1, batch.rows[:own], losses[:own])
