"""A setting's data, opened once for many runs: sources, decoded images, the store of embeddings."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from benchmarks.study.settings import Setting, load_setting, resolved
from gstds_cache.api.hide import hide_rows
from gstds_cache.auditing.labels import find_doubts, predict
from gstds_cache.config import DEFAULT_MODEL, AuditConfig, EmbedConfig
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.files.derived import cache_root
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.threads import cores
from gstds_cache.selection.linear_probe import ProbeSettings
from gstds_cache.store.embed_report import EmbedReport
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.training.augment import to_input
from gstds_cache.training.images import ImageFeed

TEST_BATCH = 512


@dataclass
class StudyData:
    """What all runs of a setting share.

    Attributes:
        setting: The setting.
        folder: Where stores, scores and results are.
        device: Where a run's rows are selected, and its network is trained and tested, by a process of its own.
            Nothing else is computed there: a process that is forked from one that has used CUDA cannot use it.
    """

    setting: Setting
    folder: Path
    device: str = "cpu"

    @cached_property
    def train(self) -> ImageSource:
        return open_source(resolved(self.setting.train), hash_cache=HashCache(cache_root() / "hashes"))

    @cached_property
    def test(self) -> ImageSource:
        return open_source(resolved(self.setting.test), hash_cache=HashCache(cache_root() / "hashes"))

    @cached_property
    def train_feed(self) -> ImageFeed:
        return self._decoded(self.train)

    @cached_property
    def test_feed(self) -> ImageFeed:
        return self._decoded(self.test)

    def _decoded(self, source: ImageSource) -> ImageFeed:
        workers = 0 if self.device == "cpu" else cores()  # beside a GPU most of a visit would be decoding
        return ImageFeed(source, side=self.setting.image_size, memory_budget=4 << 30, workers=workers)

    @property
    def location(self) -> Path:
        return self.folder / "stores" / f"{self.setting.name}.store"

    @property
    def store(self) -> EmbeddingStore:
        """The store, opened anew: a process that was forked must not use its parent's."""
        return EmbeddingStore(self.location)

    def embed(self, reuse: list[Path], device: str = "cpu") -> EmbedReport:
        """Embed the training set on a device, or find it done.

        Rows are taken over from the stores of ``reuse``, and from that of the setting's sibling.
        """
        if self.setting.same_images_as:
            sibling = replace(self, setting=load_setting(self.setting.same_images_as)).location
            reuse = [*reuse, *([sibling] if sibling.exists() else [])]
        # At its own size, as all tables were made: of small images it would be left to the images.
        model = f"{DEFAULT_MODEL}?size=224" if self.setting.model == DEFAULT_MODEL else self.setting.model
        config = EmbedConfig(model=model, device=device)
        report = embed_dataset(self.train, config, where=self.location, reuse=reuse).report
        if self.setting.audited and not len(self.store.hidden):
            self._hide_doubted()
        return report

    def _hide_doubted(self) -> None:
        """Hide what ``gstds-cache audit`` doubts the labels of, as its users would."""
        store = self.store
        predictions = predict(store, ProbeSettings(), threads=1, device=torch.device("cpu"))
        doubts = find_doubts(predictions, store.labels, AuditConfig().rank)
        rows = np.sort(doubts.row[doubts.doubted])
        hide_rows(self.location, rows.tolist())
        print(f"{self.setting.name}: {len(rows):,} of {len(store):,} rows have doubtful labels, and are hidden")

    def normalized_embeddings(self) -> Float32[np.ndarray, "N D"]:
        """All embeddings as unit rows."""
        store = self.store
        rows = np.empty((len(store), store.spec.dim), store.spec.dtype)
        store.gather(np.arange(len(rows)), rows)
        return normalized_rows(torch.from_numpy(rows)[None])[0].numpy()

    def decode(self) -> float:
        """Decode all images now; returns the seconds it took for the training set."""
        begun = time.perf_counter()
        _ = self.train_feed
        seconds = time.perf_counter() - begun
        _ = self.test_feed
        return seconds

    @torch.inference_mode()
    def accuracy(self, network: nn.Module) -> float:
        """Share of the test set's decodable images classified rightly."""
        network.eval()
        rows = np.flatnonzero(self.test_feed.decodable)
        parts = [rows[start : start + TEST_BATCH] for start in range(0, len(rows), TEST_BATCH)]
        right = 0
        for part, pixels in zip(parts, self.test_feed.batches(parts), strict=True):
            predicted = network(to_input(pixels.to(self.device))).argmax(1).cpu().numpy()
            right += int((predicted == self.test.labels[part]).sum())
        return right / len(rows)

    @torch.inference_mode()
    def probabilities(self, network: nn.Module) -> Float32[np.ndarray, "N C"]:
        """Softmax of ``network`` on the training set, all of which has to be decodable: every item needs a score."""
        network.eval()
        parts = np.array_split(np.arange(len(self.train)), max(1, len(self.train) // TEST_BATCH))
        outputs = [
            network(to_input(pixels.to(self.device))).softmax(1).cpu() for pixels in self.train_feed.batches(parts)
        ]
        return torch.cat(outputs).numpy()
