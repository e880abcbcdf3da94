"""Models whose rows mean nothing are refused, or told of, before a run; rows of any size have length 1."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from gstds_cache.config import EmbedConfig
from gstds_cache.embedding import determinism
from gstds_cache.embedding.check import check_sample
from gstds_cache.embedding.repair import repair
from gstds_cache.embedding.run import embed_dataset, estimate_dataset
from gstds_cache.encoders.encoder import normalized_rows
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import EncoderError
from gstds_cache.store.reader import EmbeddingStore

MODELS = """
import torch
from torch import nn
from torch.nn import functional as F
from gstds_cache.encoders.preprocessing import Preprocessing

SHAPES, BROKEN = [], False

class Net(nn.Module):
    preprocessing = Preprocessing(resize=16, crop=(16, 16))

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.what, self.calls = nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), what, 0

    def forward(self, x):
        SHAPES.append(tuple(x.shape))
        self.calls += 1
        f = F.adaptive_avg_pool2d(self.conv(x), 2).flatten(1)
        # Only a few images are as bright in one corner.
        return WHAT["noise" if BROKEN else self.what](self, x, f, x[:, 0, 0, 0, None] > 1.8)

WHAT = {
    "fine": lambda m, x, f, bright: f,
    "dropout": lambda m, x, f, bright: F.dropout(f, 0.5),
    "rare dropout": lambda m, x, f, bright: F.dropout(f, 0.02),
    "noise": lambda m, x, f, bright: f + 0.1 * torch.randn_like(f),
    "little noise": lambda m, x, f, bright: f * (1 + 0.003 * torch.randn_like(f)),
    "batch mean": lambda m, x, f, bright: f - f.mean(0),
    "batch norm": lambda m, x, f, bright: F.adaptive_avg_pool2d(m.norm.train()(m.conv(x)), 2).flatten(1),
    "calls": lambda m, x, f, bright: f + 0.1 * m.calls,
    "place": lambda m, x, f, bright: f + torch.arange(len(x))[:, None],
    "1e30": lambda m, x, f, bright: f * 1e30,
    "1e-30": lambda m, x, f, bright: f * 1e-30,
    "1e300": lambda m, x, f, bright: f.double() * 1e300,
    "overflow": lambda m, x, f, bright: f * 1e30 * 1e30,
    "zeros": lambda m, x, f, bright: f * 0,
    "nan for a few": lambda m, x, f, bright: torch.where(bright, float("nan"), f),
    "zeros for a few": lambda m, x, f, bright: torch.where(bright, 0.0, f),
    "constant": lambda m, x, f, bright: torch.ones_like(f),
    "constant in float16": lambda m, x, f, bright: f + 1e4,
}

def build(what="fine"):
    return Net(what)

class Untracked(Net):
    def __init__(self):
        super().__init__("fine")
        self.conv = nn.Sequential(self.conv, nn.BatchNorm2d(16, track_running_stats=False))

class NoEval(Net):
    def __init__(self):
        super().__init__("fine")
        self.conv = nn.Sequential(self.conv, nn.BatchNorm2d(16))
    def train(self, mode=True):
        return super().train(True)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = f"looked_at_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def config_of(models, what: str, **changes) -> EmbedConfig:
    model = f"{models.__name__}:{what if what[0].isupper() else f'build?what={what}'}"
    return EmbedConfig(model=model, **({"batch_size": 4, "shard_rows": 8, "workers": 0, "device": "cpu"} | changes))


RANDOM = ["dropout", "rare dropout", "noise", "batch mean", "batch norm", "calls", "place", "Untracked", "NoEval"]


@pytest.mark.parametrize("what", RANDOM)
def test_a_row_that_does_not_depend_on_its_image_alone_is_refused(
    array_source, models, tmp_path, monkeypatch, what: str
) -> None:
    # Eight images, however slow the machine is: of one, in batches of four, rare dropout spared all in 1 of 13 runs.
    monkeypatch.setattr(determinism, "DECODE_SECONDS", 60.0)
    config = config_of(models, what, batch_size=16)
    with pytest.raises(EncoderError, match=r"row \d+ \(item/\d+\) gave two different rows") as caught:
        embed_dataset(array_source(30), config, where=tmp_path / "s")
    assert "training=self.training" in caught.value.hint
    assert caught.value.exit_code == 2
    assert not (tmp_path / "s").exists()
    with pytest.raises(EncoderError, match="two different rows"):
        estimate_dataset(array_source(30), config, where=tmp_path / "s")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_it_is_found_with_any_batch_size(array_source, models, tmp_path, batch_size: int) -> None:
    with pytest.raises(EncoderError, match="two different rows"):
        embed_dataset(array_source(9), config_of(models, "dropout", batch_size=batch_size), where=tmp_path / "s")


def test_two_passes_are_all_it_takes_and_a_hit_takes_none(array_source, models, tmp_path) -> None:
    embed_dataset(array_source(16), config_of(models, "fine"), where=tmp_path / "s")
    assert [shape[0] for shape in models.SHAPES] == [2, 4, 4, *[4] * 4]  # the factory's, the two of the check, the run
    models.SHAPES.clear()
    assert embed_dataset(array_source(16), config_of(models, "fine"), where=tmp_path / "s").report.cache_hit
    assert [shape[0] for shape in models.SHAPES] == [2]


def test_a_model_that_changed_meanwhile_is_found_when_a_store_is_gone_on_with(array_source, models, tmp_path) -> None:
    def stop(phase, done, _total, _shares):
        if phase == "embed" and done >= 20:
            raise KeyboardInterrupt

    source, config, where = array_source(40), config_of(models, "fine"), tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(source, config, where=where, progress=stop)
    models.BROKEN = True
    for call in (embed_dataset, estimate_dataset):
        with pytest.raises(EncoderError, match="two different rows"):
            call(source, config, where=where)
    models.BROKEN = False
    assert embed_dataset(source, config, where=where).report.committed_before == 16
    models.BROKEN = True
    # Else the store would be blamed for it.
    with pytest.raises(EncoderError, match="two different rows"):
        check_sample(EmbeddingStore(where), source, open_encoder(config.model), device="cpu")
    with pytest.raises(EncoderError, match="two different rows"):
        repair(where, source, open_encoder(config.model), shards=[0], device="cpu", workers=0)


def test_a_model_that_is_odd_is_told_of_and_run(array_source, models, tmp_path) -> None:
    for what, words in (
        ("little noise", "differ by 1 - cosine"),
        ("constant", "the same row for different images"),
        ("constant in float16", "the same row for different images"),
    ):
        said: list[str] = []
        embed_dataset(array_source(30), config_of(models, what), where=tmp_path / what, notify=said.append)
        assert [words in line for line in said] == [True], said


@pytest.mark.parametrize("what", ["1e30", "1e-30", "1e300"])
def test_features_of_any_size_are_rows_of_length_one(array_source, models, tmp_path, what: str) -> None:
    rows = []
    for name in ("fine", what):
        embed_dataset(array_source(30), config_of(models, name, dtype="float32"), where=tmp_path / name)
        rows.append(EmbeddingStore(tmp_path / name).gather(np.arange(30)))
    np.testing.assert_allclose(*rows, atol=1e-6)


def test_ordinary_rows_are_normalised_as_ever() -> None:
    features = torch.randn((64, 1280), generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 15, 64)[:, None]
    assert torch.equal(normalized_rows(features), torch.nn.functional.normalize(features, dim=1))
    odd = torch.tensor([[0.0, 0.0], [3e38, 3e38], [1e-44, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])
    lengths = torch.linalg.vector_norm(normalized_rows(odd), dim=1)
    torch.testing.assert_close(lengths[:3], torch.tensor([0.0, 1.0, 1.0]))
    assert not torch.isfinite(lengths[3:]).any()


@pytest.mark.parametrize(("what", "words"), [("overflow", "returned NaN or Inf for row"), ("zeros", "zeros alone")])
def test_features_that_overflow_or_vanish_are_refused(array_source, models, tmp_path, what: str, words: str) -> None:
    with pytest.raises(EncoderError, match=words):
        embed_dataset(array_source(30), config_of(models, what), where=tmp_path / "s")
    assert not (tmp_path / "s").exists()


class Few:
    """Makes a data set whose items 41 and 43, which the check does not see, are bright, and item 42 does not decode."""

    def __new__(cls, array_source):
        class Source(array_source):
            def _pixels(self, row):
                return np.full((20, 20, 3), 255, np.uint8) if row in {41, 43} else super()._pixels(row) // 2

        return Source(60, bad=frozenset({42}))


def test_a_row_that_is_no_number_ends_the_run_with_its_name(array_source, models, tmp_path) -> None:
    source = Few(array_source)
    with pytest.raises(EncoderError, match=r"returned NaN or Inf for row 41 \(item/0041\)"):
        embed_dataset(source, config_of(models, "nan for a few", batch_size=8), where=tmp_path / "s")


def test_an_image_without_features_is_quarantined(array_source, models, tmp_path) -> None:
    source = Few(array_source)
    config = config_of(models, "zeros for a few", batch_size=8)
    report = embed_dataset(source, config, where=tmp_path / "s").report
    assert [(item.row, item.reason.partition(":")[0]) for item in report.quarantined] == [
        (41, "no features"),
        (42, "made to fail"),
        (43, "no features"),
    ]
    store = EmbeddingStore(tmp_path / "s")
    assert store.valid[[40, 41, 42, 43, 44]].tolist() == [1, 2, 2, 2, 1]
    assert not check_sample(store, source, open_encoder(config.model), rows=60, device="cpu").problems
