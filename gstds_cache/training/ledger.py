"""What a run cost and what selection saved: a table at the end of every run, and ``RUN_DIR/ledger.json``.

What is not known is None here, ``null`` in the file and ``unknown`` in the table; it is never a zero.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from gstds_cache.costs.records import Cost
from gstds_cache.errors import command_line


@dataclass(frozen=True)
class Ledger:
    """Costs of one experiment: embedding (once for all experiments), selection, training.

    Attributes:
        planned: Whether training is an estimate, made before it.
        embed: Cost of the store; None where no record of it was found.
        select: Cost of the selection; None where no record of it was found.
        select_seconds: Seconds that selection adds to one experiment: the record's, a probe's, or, beside training, the
            time that training waited for it.
        select_source: Where ``select_seconds`` is from, in words.
        gradient_samples: Samples whose gradient is computed.
        all_samples: What it would be without selection, in as many epochs.
        seconds: Training's seconds by phase.
        joules: Training's joules by phase; None where there is no counter.
        joules_from: Where joules come from, or why there are none.
        flops_per_sample: FLOPs of one sample's forward and backward pass.
        step_seconds_per_sample: Seconds of a step, once warm, by the sample; None where none was taken.
        forward_samples: Samples that only pass forward, for the statistics of batch normalisation.
    """

    planned: bool
    embed: Cost | None
    select: Cost | None
    select_seconds: float | None
    select_source: str
    gradient_samples: int
    all_samples: int | None
    seconds: dict[str, float]
    joules: dict[str, float] | None
    joules_from: str
    flops_per_sample: float | None
    step_seconds_per_sample: float | None
    forward_samples: int = 0

    @property
    def training_flops(self) -> float | None:
        """FLOPs of training; a forward pass alone counts as a third of a sample, as backward takes twice as many."""
        if self.flops_per_sample is None:
            return None
        return self.flops_per_sample * (self.gradient_samples + self.forward_samples / 3)

    @property
    def saved_samples(self) -> int | None:
        """Gradients that selection spared."""
        return None if self.all_samples is None else self.all_samples - self.gradient_samples

    @property
    def seconds_per_sample(self) -> float | None:
        """Seconds of training per gradient: a step once warm, and the wait for its pixels.

        What first steps take more, to load and compile kernels, training on everything would take as well.
        """
        if self.step_seconds_per_sample is None or not self.gradient_samples:
            return None
        return self.step_seconds_per_sample + self.seconds.get("images", 0.0) / self.gradient_samples

    @property
    def saved_seconds(self) -> float | None:
        """Seconds of training that selection spared, selection itself not yet taken off."""
        if self.saved_samples is None or self.seconds_per_sample is None:
            return None
        return self.saved_samples * self.seconds_per_sample

    @property
    def net_seconds(self) -> float | None:
        """Seconds that one experiment gains by selection, its own selection taken off; negative where it loses."""
        if self.saved_seconds is None or self.select_seconds is None:
            return None
        return self.saved_seconds - self.select_seconds

    @property
    def pays(self) -> bool | None:
        """Whether selection takes less time than it saves; None where that is not known."""
        return None if self.net_seconds is None else self.net_seconds > 0

    @property
    def warning(self) -> str | None:
        """That selection takes more time than it saves, and what to do; None where it does not or that is not known."""
        if self.pays is not False:
            return None
        return (
            f"selection takes {self.select_seconds:,.1f} s and saves {self.saved_seconds:,.1f} s of training: without "
            f"it ({command_line('gstds-select', 'STORE', '--rule', 'random')}) this run is over sooner"
        )

    @property
    def break_even(self) -> int | None:
        """Experiments after which embedding, paid once, and a selection for each have saved more than they took.

        None where that is not known, or never comes (:attr:`pays` tells which).
        """
        if self.embed is None or self.net_seconds is None or self.net_seconds <= 0:
            return None
        return max(1, math.ceil(self.embed.seconds / self.net_seconds))

    def to_dict(self) -> dict[str, Any]:
        """All fields and what follows from them, as JSON-able values."""
        names = ("saved_samples", "seconds_per_sample", "saved_seconds", "net_seconds", "pays", "break_even")
        return asdict(self) | {name: getattr(self, name) for name in (*names, "training_flops")}

    def rows(self) -> list[tuple[str, str]]:
        """The table, as names and values in words."""
        return [
            ("embedding", self._embedding()),
            ("selection", self._selection()),
            ("gradients", self._gradients()),
            ("training", self._training()),
            ("energy", self._energy()),
            ("FLOPs", self._flops()),
            ("break-even", self._break_even()),
        ]

    def _embedding(self) -> str:
        if self.embed is None:
            return "unknown: no record of its cost was found (name the store: `cache`)"
        cost = self.embed
        return f"{cost.samples:,} samples embedded, {cost.reused:,} reused, {cost.seconds:,.1f} s, once for all runs"

    def _selection(self) -> str:
        if self.select_seconds is None:
            return f"unknown: {self.select_source}"
        return f"{self.select_seconds:,.1f} s ({self.select_source})"

    def _gradients(self) -> str:
        spent = f"{self.gradient_samples:,} samples {'to spend' if self.planned else 'spent'}"
        forward = f"; {self.forward_samples:,} forward alone, for batch norm" if self.forward_samples else ""
        if self.all_samples is None or self.saved_samples is None:
            return f"{spent}; saved: unknown, the selection was not read from its start{forward}"
        return f"{spent}, {self.saved_samples:,} of {self.all_samples:,} saved ({self._share():.1%}){forward}"

    def _share(self) -> float:
        return (self.saved_samples or 0) / max(self.all_samples or 0, 1)

    def _training(self) -> str:
        phases = ", ".join(f"{phase} {value:,.1f} s" for phase, value in self.seconds.items() if value >= 0.05)
        about = "about " if self.planned else ""
        saved = "unknown" if self.saved_seconds is None else f"{self.saved_seconds:,.1f} s"
        return f"{about}{phases or '0.0 s'}; saved: about {saved}"

    def _energy(self) -> str:
        if self.joules is None:
            return f"not available: {self.joules_from}"
        phases = ", ".join(f"{phase} {value:,.0f} J" for phase, value in self.joules.items())
        parts = [("embedding", self.embed), ("selection", self.select)]
        others = [
            f"{name} {cost.joules:,.0f} J" if cost and cost.joules is not None else f"{name} unknown"
            for name, cost in parts
        ]
        return f"training: {phases}; {', '.join(others)} ({self.joules_from})"

    def _flops(self) -> str:
        if self.flops_per_sample is None:
            return "unknown: torch's counter cannot run this network without data"
        return f"{self.training_flops:.3g} in training ({self.flops_per_sample:.3g} a sample, forward and backward)"

    def _break_even(self) -> str:
        if self.net_seconds is None:
            return "unknown"
        if self.net_seconds <= 0:
            saved = self.saved_seconds or 0.0
            return f"never: selection takes {self.select_seconds:,.1f} s and saves {saved:,.1f} s an experiment"
        gain = f"each experiment gains {self.net_seconds:,.1f} s by a selection of its own"
        if self.embed is None:
            return f"unknown, as the cost of embedding is; {gain}"
        several = "experiment" if self.break_even == 1 else "experiments"
        return f"after {self.break_even:,} {several}: {gain}, embedding took {self.embed.seconds:,.1f} s"
