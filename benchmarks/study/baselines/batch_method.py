"""What a method that chooses while the network learns is given, and what it gives back.

A method is offered each batch before its step. It may ask for the learner's losses, which costs a forward pass over the
whole batch; that pass is counted (``forward_samples``) and its time is part of the step's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import nn

from gstds_cache.seeding import rng_for
from gstds_cache.training.augment import to_input

Augment = Callable[[UInt8[torch.Tensor, "B 3 S S"]], UInt8[torch.Tensor, "B 3 S S"]]


@dataclass(frozen=True)
class Offer:
    """A batch before its step.

    Attributes:
        rows: Rows of the data set, int64 [B].
        losses: The learner's losses on them, float32 [B]; None unless the method asked.
        epoch: Epoch, from 0.
        epochs: Epochs of the run.
        rng: Random numbers of this step alone.
    """

    rows: Int64[np.ndarray, " B"]
    losses: Float32[np.ndarray, " B"] | None
    epoch: int
    epochs: int
    rng: np.random.Generator


@dataclass(frozen=True)
class Choice:
    """What a step is taken on.

    Attributes:
        positions: int64 [M], positions in the batch, distinct.
        weights: float32 [M], factors of their losses; None for 1.
    """

    positions: Int64[np.ndarray, " M"]
    weights: Float32[np.ndarray, " M"] | None = None


class BatchMethod(ABC):
    """A way to choose from each batch.

    Attributes:
        name: What it is called.
        needs_losses: Whether :class:`Offer` has to hold the learner's losses.
        step_rows: Samples of each step: rows chosen wait until that many are together, and no step follows a batch
            where they are fewer. 0: each batch's step is taken on what was chosen from it.
    """

    name: str
    needs_losses: bool
    step_rows: int = 0

    @abstractmethod
    def choose(self, offer: Offer) -> Choice:
        """What of the batch is trained on."""

    def observe(  # noqa: B027 - most methods learn nothing from the steps
        self, rows: Int64[np.ndarray, " M"], losses: Float32[np.ndarray, " M"], correct: Bool[np.ndarray, " M"]
    ) -> None:
        """See the step's losses, unweighted, and which rows were classified rightly, before the weights moved."""


class WholeBatchMethod(BatchMethod):
    """Keeps the rows of each batch with the largest keys, which follow from the learner's losses on all of it.

    On a GPU it chooses there, in a step that is replayed (``trainer.py``); elsewhere as :meth:`choose` has it.
    """

    needs_losses = True
    ratio: float

    def prepare(self, device: torch.device) -> None:
        """Put what :meth:`keys` looks at on the device."""

    @abstractmethod
    def keys(
        self, losses: Float32[torch.Tensor, " B"], rows: Int64[torch.Tensor, " B"], gumbel: Float32[torch.Tensor, " B"]
    ) -> Float32[torch.Tensor, " B"]:
        """What rows are kept by.

        Args:
            losses: The learner's losses, on the device.
            rows: Rows of the data set, there.
            gumbel: Gumbel noise: the largest of logarithms of weights with it are a draw without replacement.
        """

    def places(self, losses: Float32[torch.Tensor, " B"], rows: Int64[torch.Tensor, " B"]) -> Int64[torch.Tensor, " M"]:
        """Positions that are trained on, ascending; nothing waits for the device."""
        gumbel = -torch.log(-torch.log(torch.rand_like(losses).clamp(1e-20, 1 - 1e-7)))
        return self.keys(losses, rows, gumbel).topk(kept_of(len(losses), self.ratio)).indices.sort().values


@dataclass(frozen=True)
class StepContext:
    """When a batch is offered.

    Attributes:
        epoch: Epoch, from 0.
        epochs: Epochs of the run.
        seed: The run's seed.
        step: The step, from 0.
    """

    epoch: int
    epochs: int
    seed: int
    step: int


@dataclass(frozen=True)
class ChosenRows:
    """A batch as the step sees it.

    Attributes:
        rows: int64 [M].
        pixels: uint8 [M, 3, S, S], augmented, on the device.
        labels: int64 [M] on the device.
        weights: float32 [M] on the device, or None.
        forward_samples: Samples that had a forward pass only for the choice.
    """

    rows: Int64[np.ndarray, " M"]
    pixels: UInt8[torch.Tensor, "M 3 S S"]
    labels: Int64[torch.Tensor, " M"]
    weights: Float32[torch.Tensor, " M"] | None
    forward_samples: int

    def parted(self, count: int) -> tuple[ChosenRows, ChosenRows]:
        """The first ``count`` rows, and the others."""
        first, others = (
            replace(
                self,
                rows=self.rows[part],
                pixels=self.pixels[part],
                labels=self.labels[part],
                weights=None if self.weights is None else self.weights[part],
            )
            for part in (slice(count), slice(count, None))
        )
        return first, others

    def followed_by(self, other: ChosenRows) -> ChosenRows:
        """The rows of both. Either both have weights or neither."""
        weights = None
        if self.weights is not None and other.weights is not None:
            weights = torch.cat([self.weights, other.weights])
        return ChosenRows(
            rows=np.concatenate([self.rows, other.rows]),
            pixels=torch.cat([self.pixels, other.pixels]),
            labels=torch.cat([self.labels, other.labels]),
            weights=weights,
            forward_samples=self.forward_samples + other.forward_samples,
        )


def choose_rows(
    method: BatchMethod,
    network: nn.Module,
    rows: Int64[np.ndarray, " B"],
    pixels: UInt8[torch.Tensor, "B 3 S S"],
    labels: Int64[torch.Tensor, " B"],
    *,
    augmented: Augment,
    context: StepContext,
) -> ChosenRows:
    """Let ``method`` choose from a batch.

    The forward pass sees the pixels that the step will see, augmented; it uses running batch statistics, since it would
    otherwise update them on samples that are not trained on.

    Args:
        method: Who chooses.
        network: The learner; in training mode, and left so.
        rows: Rows of the data set, int64 [B].
        pixels: uint8 [B, 3, S, S] on the device, not augmented.
        labels: int64 [B], on the device.
        augmented: Augments pixels.
        context: When this is.

    Returns:
        What the step is taken on.
    """
    losses = None
    if method.needs_losses:
        pixels = augmented(pixels)
        losses = learner_losses(network, pixels, labels).cpu().numpy()
    rng = rng_for(context.seed, "method", context.step)
    choice = method.choose(Offer(rows, losses, context.epoch, context.epochs, rng))
    places = torch.from_numpy(choice.positions).to(pixels.device)
    return ChosenRows(
        rows=rows[choice.positions],
        pixels=pixels[places] if method.needs_losses else augmented(pixels[places]),
        labels=labels[places],
        weights=None if choice.weights is None else torch.from_numpy(choice.weights).to(pixels.device),
        forward_samples=len(rows) if method.needs_losses else 0,
    )


def weighted_loss(method: BatchMethod, chosen: ChosenRows, logits: Float32[torch.Tensor, "M C"]) -> torch.Tensor:
    """Mean of the weighted losses of a step; ``method`` sees them unweighted."""
    losses = nn.functional.cross_entropy(logits, chosen.labels, reduction="none")
    correct = logits.detach().argmax(1) == chosen.labels
    method.observe(chosen.rows, losses.detach().cpu().numpy(), correct.cpu().numpy())
    return losses.mean() if chosen.weights is None else (losses * chosen.weights).mean()


@torch.no_grad()
def learner_losses(
    network: nn.Module, pixels: UInt8[torch.Tensor, "B 3 S S"], labels: Int64[torch.Tensor, " B"]
) -> Float32[torch.Tensor, " B"]:
    """Cross-entropy of each sample, with running batch statistics and without dropout."""
    network.eval()
    losses = nn.functional.cross_entropy(network(to_input(pixels)).float(), labels, reduction="none")
    network.train()
    return losses


def kept_of(batch: int, ratio: float) -> int:
    """Samples that stay of ``batch`` when the share ``ratio`` is removed; at least one. As a selection plan counts."""
    return max(1, batch - int(ratio * batch + 1e-9))
