"""What score-based methods have to know before a run: computed once for a setting, timed, kept.

Their training runs use seed 0 whatever the run's seed, so a score-based method's seeds share their scores; the time is
put on each experiment whole, since another network or another budget would need them again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from torch import nn

from benchmarks.study.baselines.batch_method import BatchMethod
from benchmarks.study.baselines.forgetting import ForgettingCounter
from benchmarks.study.data import StudyData
from benchmarks.study.references import neighbours_losses, proxy_losses
from benchmarks.study.trainer import train_once
from gstds_cache.config import SelectConfig
from gstds_cache.files.atomic import atomic_write
from gstds_cache.selection.guidance import load_or_make_guidance
from gstds_cache.selection.guidance_spec import key_of, parse_guidance
from gstds_cache.selection.run import BatchSelector
from gstds_cache.stream.writer import write_file

EARLY_NETWORKS, EARLY_EPOCHS = 3, 1


@dataclass
class Scores:
    """A setting's scores, read from disk.

    Attributes:
        data: The setting's data.
    """

    data: StudyData

    @property
    def folder(self) -> Path:
        return self.data.folder / "scores"

    def early(self) -> Float32[np.ndarray, "R N C"]:
        """Probabilities under three networks, each trained on everything for one epoch."""
        return np.asarray(np.load(self._path("early")))

    def forgetting(self) -> Float64[np.ndarray, " N"]:
        """Forgetting counts of one whole training run on everything."""
        return np.asarray(np.load(self._path("forgetting")))

    def reference(self, whose: str = "probe") -> Float32[np.ndarray, " N"]:
        """Held-out losses of the cross-fitted probe, or of another reference (``references.py``)."""
        return np.asarray(np.load(self._path(whose)))

    def prepare(self, need: str) -> dict[str, Any] | None:
        """Compute what is needed; returns a result line, or None where it is there."""
        path = self._path(need)
        if path.exists():
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        make: Callable[[], np.ndarray] = {
            "early": self._train_early,
            "forgetting": self._count_forgetting,
            "probe": self._fit_probe,
            "neighbours": self._ask_neighbours,
            "proxy": self._train_proxy,
        }[need]
        begun, cpu_begun = time.perf_counter(), time.process_time()
        values = make()
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu_begun
        with atomic_write(path, durable=True) as file:
            np.save(file, values)
        return {
            "kind": "scores",
            "setting": self.data.setting.name,
            "need": need,
            "seconds": round(seconds, 3),
            "cpu_seconds": round(cpu, 3),
        }

    def _path(self, need: str) -> Path:
        return self.folder / f"{self.data.setting.name}-{need}.npy"

    def _fit_probe(self) -> np.ndarray:
        columns = load_or_make_guidance(self.data.store, key_of(self.data.store, parse_guidance("probe"))).columns
        assert columns is not None
        # The default's trial of its guidance is kept beside the store too: its time belongs here.
        setting = self.data.setting
        config = SelectConfig(batch_size=setting.batch, epochs=setting.epochs, device="cpu")
        _ = BatchSelector(self.data.store, config).guidance
        return np.ascontiguousarray(columns["loss"])

    def _ask_neighbours(self) -> np.ndarray:
        return neighbours_losses(self.data.normalized_embeddings(), self.data.train.labels)

    def _train_proxy(self) -> np.ndarray:
        pixels = self.data.train_feed.pixels(np.arange(len(self.data.train)))
        return proxy_losses(pixels, self.data.train.labels, self.data.setting.arch, self.data.setting.lr)

    def _train_early(self) -> np.ndarray:
        parts = []
        for seed in range(EARLY_NETWORKS):
            self._train_on_everything(
                EARLY_EPOCHS, seed, lambda network: parts.append(self.data.probabilities(network))
            )
        return np.stack(parts)

    def _count_forgetting(self) -> np.ndarray:
        counter = ForgettingCounter(len(self.data.train))
        self._train_on_everything(self.data.setting.epochs, 0, None, counter)
        return counter.scores()

    def _train_on_everything(
        self,
        epochs: int,
        seed: int,
        after_epoch: Callable[[nn.Module], None] | None,
        method: BatchMethod | None = None,
    ) -> None:
        setting = self.data.setting
        select = SelectConfig(
            rule="random", schedule="constant:0", batch_size=setting.step, epochs=epochs, seed=1000 + seed, device="cpu"
        )
        # Scores are read after an epoch, before statistics would be re-estimated; those here are of all rows anyway.
        config = replace(
            setting.train_config(1000 + seed), lr=setting.lr_of("full"), norm_samples=0, device=self.data.device
        )
        with tempfile.TemporaryDirectory(prefix="study-") as name:
            list(write_file(BatchSelector(self.data.store, select), Path(name) / "s.arrow"))
            train_once(
                *(self.data.train, Path(name) / "s.arrow", config, Path(name) / "run"),
                feed=self.data.train_feed,
                method=method,
                after_epoch=after_epoch,
            )
