"""Training on a selection: the whole run, top to bottom.

SGD with Nesterov momentum and a one-cycle learning rate over the total number of steps, which a selection's header
tells before the first of them; channels last, and bfloat16 autocast on CUDA. Each data record of the stream is one
step, or, re-packed, each full batch of kept rows. A run that is killed or interrupted continues from its last
checkpoint; on a CPU with the same number of threads, with the same numbers to the bit. After the last step the running
statistics of batch normalisation are re-estimated from random rows (``batch_norm.py``).

On CUDA no step waits for the device (``learner.py``): losses are read in blocks (``step_losses.py``), and a checkpoint,
for which the host has to wait, is saved at an epoch's end only if the last one is some seconds old.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import accumulate, chain

import torch
from torch import Tensor

from gstds_cache.config import TrainConfig
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import DivergedError, IncompleteError, IntegrityError, StreamError
from gstds_cache.runtime.devices import callers_random_numbers
from gstds_cache.runtime.progress import Progress
from gstds_cache.seeding import torch_seed_for
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.training.batch_norm import random_batches, random_inputs, reestimate_batch_norm, running_norms
from gstds_cache.training.batches import BatchLoader, TrainingBatch
from gstds_cache.training.checkpoint import Checkpoint
from gstds_cache.training.compiled import explained
from gstds_cache.training.distributed import Ranks
from gstds_cache.training.evaluate import Accuracy, evaluate
from gstds_cache.training.images import decoding_workers
from gstds_cache.training.learner import Learner
from gstds_cache.training.optimizer import load_optimizer
from gstds_cache.training.report import TrainingResult, waiting_shares
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.step_losses import StepLosses
from gstds_cache.training.step_times import StepTimes
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


class Trainer(Learner):
    """One run: its data, its network, and how far it is.

    A subclass may replace :meth:`open_feed`, :meth:`batch_loss`, :meth:`may_record` and :meth:`end_epoch`:
    ``benchmarks/study/trainer.py`` does, for methods that choose from each batch while the network learns.

    Attributes:
        times: How long steps take.
        tracking: What experiment trackers are told.
    """

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
        super().__init__(source, stream, config, evaluation=evaluation, ranks=ranks, progress=progress)
        self.run_dir = run_dir
        self._epoch_ends = frozenset(accumulate(self._steps.per_epoch))
        self.tracking = Tracking()
        self._samples, self._sha = 0, ""
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
        every = closing(loader.all_batches())
        with callers_random_numbers(self.device), interruptible() as stop_asked, self._recording(), every as batches:
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

    def _share_losses(self) -> None:
        """Let every rank know the losses of all, as the first one's checkpoint is that of all."""
        if self._steps.feedback is not None:
            self._steps.feedback.share(self.ranks.gather if self.ranks.world_size > 1 else None)

    def _end_feedback(self) -> None:
        """Draw the next epoch by the losses of this one."""
        if self._steps.feedback is not None:
            begun = time.perf_counter()
            self._share_losses()
            self._steps.feedback.end_epoch(self._steps.position.epoch)
            self.seconds["step"] += time.perf_counter() - begun  # a GPU's steps are waited for there

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
        self.prepare()
        self.run_dir.begin()
        self.run_dir.drop_metrics_from(self.step + 1)
        self.tracking.begin(self.step)

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
            with callers_random_numbers(self.device):
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
