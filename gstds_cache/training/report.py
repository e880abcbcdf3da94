"""What a training run did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gstds_cache.training.evaluate import Accuracy
from gstds_cache.training.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What the training loop did, over all sessions of a run.

    Attributes:
        accuracy: On the evaluation set; None where there is none.
        gradient_samples: Samples whose gradient was computed.
        forward_samples: Samples that only passed forward, over all ranks, to re-estimate the running statistics of
            batch normalisation; 0 where that was not done.
        steps: Optimiser steps.
        loss: Mean training loss of the last epoch.
        seconds: Time by phase: load (decoding into memory), indices (waiting for the selection), images (waiting for
            pixels), warm-up (steps that load and compile kernels), step (the others), norms (re-estimating the
            statistics of batch normalisation, where that is done), eval, total.
        seconds_per_sample: Of a step once warm, by the sample: the median over this session's steps but those of the
            warm-up; None where no step was taken.
        samples_in: Samples of the batches before selection: the gradients that training on everything takes; None where
            the selection was not read from its start.
        joules: Joules by phase: load, train, norms, eval; None where no counter can be read.
        joules_from: The counters, or why there is none.
    """

    accuracy: Accuracy | None
    gradient_samples: int
    forward_samples: int
    steps: int
    loss: float
    seconds: dict[str, float]
    seconds_per_sample: float | None
    samples_in: int | None
    joules: dict[str, float] | None
    joules_from: str

    @property
    def waited(self) -> dict[str, float]:
        """Shares of the time of all steps that were spent waiting: for indices, for images."""
        return waiting_shares(self.seconds)


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainReport(TrainingResult):
    """What :func:`gstds_cache.train` did. ``seconds`` has ``open`` as well: opening the data, hashing its items.

    Attributes:
        run_dir: Where the run's configuration, metrics, checkpoint and ledger are.
        ledger: What embedding, selection and training cost, and what selection saved; also ``RUN_DIR/ledger.json``.
        left_over: Kept rows that no step was taken on: fewer than a re-packed batch.
        rank: This process's rank; the first writes the run's files.
        world_size: Processes that trained together.
        selection_digest: Identity of the selection.
        cache_fingerprint: Identity of the store that the selection was made from.
    """

    run_dir: Path
    ledger: Ledger
    left_over: int
    rank: int
    world_size: int
    selection_digest: str
    cache_fingerprint: str

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f"accuracy={self.accuracy.value:.4f}, "
        return (
            f"TrainReport({str(self.run_dir)!r}, {accuracy}loss={self.loss:.4f}, steps={self.steps}, "
            f"gradient_samples={self.gradient_samples})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return {
            "run_dir": str(self.run_dir),
            "test_accuracy": self.accuracy.value if self.accuracy else None,
            "test_items": self.accuracy.items if self.accuracy else 0,
            "test_undecodable": self.accuracy.undecodable if self.accuracy else 0,
            "test_unlabelled": self.accuracy.unlabelled if self.accuracy else 0,
            "gradient_samples": self.gradient_samples,
            "forward_samples": self.forward_samples,
            "steps": self.steps,
            "loss": self.loss,
            "seconds": self.seconds,
            "waited": {phase: round(share, 5) for phase, share in self.waited.items()},
            "world_size": self.world_size,
            "selection_digest": self.selection_digest,
            "cache_fingerprint": self.cache_fingerprint,
            "ledger": self.ledger.to_dict(),
        }


def waiting_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Shares of the time of all steps that were spent waiting, of the seconds by phase."""
    spent = sum(seconds.get(phase, 0.0) for phase in ("indices", "images", "warm-up", "step"))
    return {phase: seconds[phase] / max(spent, 1e-9) for phase in ("indices", "images")}
