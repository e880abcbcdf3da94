"""Methods in the one training loop: what they cost is counted, and a resumed run is the uninterrupted one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gstds_cache.config import EmbedConfig, SelectConfig, TrainConfig
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.factory import packaged_weights
from gstds_cache.encoders.weights import read_state_dict
from gstds_cache.errors import EncoderError, UsageError
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.writer import write_file
from gstds_cache.training.baselines.batch_method import StepContext, learner_losses, narrow
from gstds_cache.training.baselines.fixed import write_fixed
from gstds_cache.training.baselines.infobatch import InfoBatch
from gstds_cache.training.baselines.rho_loss import RhoLoss
from gstds_cache.training.baselines.rs2 import rs2
from gstds_cache.training.loop import run_config, train
from gstds_cache.training.network import build_network
from gstds_cache.training.run_dir import RunDir

CONFIG = TrainConfig(arch="conv3", image_size=16, augment="crop", lr=0.02, device="cpu", workers=0)
ITEMS, BATCH, EPOCHS = 72, 24, 3


@pytest.fixture
def source(array_source):
    return array_source(ITEMS)


@pytest.fixture
def everything(source, tiny_model, tmp_path: Path) -> Path:
    embed = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=64, workers=0, device="cpu")
    store = EmbeddingStore(embed_dataset(source, embed, where=tmp_path / "store").location)
    config = SelectConfig(batch_size=BATCH, epochs=EPOCHS, schedule="constant:0", rule="random", device="cpu")
    list(write_file(BatchSelector(store, config), tmp_path / "s.arrow"))
    return tmp_path / "s.arrow"


def run(source, selection: Path, out: Path, **options):
    with open_selection(selection) as stream:
        run_dir = RunDir(out, run_config(CONFIG, stream, None), provenance={}, resume=True)
        return train(source, stream, CONFIG, run_dir, **options)


def test_a_forward_pass_for_the_choice_is_counted_apart(source, everything, tmp_path) -> None:
    report = run(source, everything, tmp_path / "run", method=RhoLoss(np.zeros(ITEMS, np.float32), 0.75))
    assert (report.forward_samples, report.gradient_samples) == (ITEMS * EPOCHS, ITEMS * EPOCHS // 4)
    assert report.seconds["choose"] > 0
    plain = run(source, everything, tmp_path / "plain")
    assert (plain.forward_samples, plain.gradient_samples) == (0, ITEMS * EPOCHS)
    assert "choose" not in plain.seconds


def test_a_method_that_keeps_everything_is_plain_training(source, everything, tmp_path) -> None:
    run(source, everything, tmp_path / "plain")
    epochs: list[int] = []
    report = run(
        source,
        everything,
        tmp_path / "all",
        method=RhoLoss(np.zeros(ITEMS, np.float32), 0.0),
        after_epoch=lambda network: epochs.append(len(list(network.parameters()))),
    )
    assert report.gradient_samples == ITEMS * EPOCHS
    assert len(epochs) == EPOCHS
    mine, theirs = (torch.load(tmp_path / name / "checkpoint.pt")["network"] for name in ("plain", "all"))
    for name, tensor in mine.items():
        assert torch.allclose(tensor.double(), theirs[name].double(), atol=1e-5), name


def test_a_method_resumes_with_what_it_learned(source, everything, tmp_path) -> None:
    run(source, everything, tmp_path / "whole", method=InfoBatch(ITEMS))
    steps = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        run(
            source,
            everything,
            tmp_path / "cut",
            method=InfoBatch(ITEMS),
            interruptible=lambda: nullcontext(lambda: next(steps) == 4),
        )
    method = InfoBatch(ITEMS)
    run(source, everything, tmp_path / "cut", method=method)
    mine, theirs = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert mine["samples"] == theirs["samples"] < ITEMS * EPOCHS
    for name, tensor in mine["network"].items():
        assert torch.equal(tensor, theirs["network"][name]), name
    assert torch.equal(mine["method"]["scores"], theirs["method"]["scores"])


def test_the_learner_is_asked_about_what_the_step_sees(source) -> None:
    network = build_network("conv3", classes=3, side=16, seed=0).train()
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(12) % 3
    losses = learner_losses(network, pixels, labels).numpy()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    chosen = narrow(
        RhoLoss(np.zeros(40, np.float32), 0.75),
        network,
        np.arange(12) + 20,
        pixels,
        labels,
        augmented=lambda p: p.clone(),
        context=StepContext(epoch=0, epochs=1, seed=0, step=0),
    )
    hardest = sorted(np.argsort(-losses, kind="stable")[:3].tolist())
    assert chosen.rows.tolist() == [20 + p for p in hardest]
    assert torch.equal(chosen.pixels, pixels[hardest])
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_rows_known_beforehand_are_a_selection_like_any_other(everything, tmp_path) -> None:
    with open_selection(everything) as stream:
        like = stream.header
    rows = rs2(ITEMS, 18, 4, seed=1)
    header = write_fixed(tmp_path / "rs2.arrow", like, rows, step=8, method="rs2", seed=1)
    with open_selection(tmp_path / "rs2.arrow") as stream:
        assert stream.header == header
        batches = list(stream)
    assert [len(b.kept) for b in batches] == [8, 10] * 4
    for epoch in range(4):
        kept = np.concatenate([b.kept for b in batches if b.epoch == epoch])
        assert sorted(kept.tolist()) == sorted(rows[epoch].tolist())
        assert kept.tolist() != sorted(kept.tolist())
    other = write_fixed(tmp_path / "b.arrow", like, rs2(ITEMS, 18, 4, seed=2), step=8, method="rs2", seed=1)
    assert other.selection_digest != header.selection_digest


def test_fine_tuning_starts_from_the_reference_weights() -> None:
    network = build_network("timm:tf_efficientnet_lite0?weights=reference", classes=5, side=64, seed=0)
    state = read_state_dict(packaged_weights("tf_efficientnet_lite0"))
    assert torch.equal(network.conv_stem.weight.detach(), next(iter(state.values())))
    assert isinstance(network.classifier, nn.Linear)
    assert network.classifier.out_features == 5
    with pytest.raises(EncoderError, match="no installed package"):
        build_network("timm:resnet18?weights=reference", classes=5, side=64, seed=0)
    with pytest.raises(UsageError, match="expected weights alone"):
        build_network("resnet18?weights=x", classes=5, side=64, seed=0)
