"""Methods in the library's training loop: they choose from each batch, and what they cost is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import replays
import torch
from torch import nn

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.study.baselines.batch_method import Choice, StepContext, choose_rows, learner_losses  # noqa: E402
from benchmarks.study.baselines.epoch_method import EpochMethod  # noqa: E402
from benchmarks.study.baselines.fixed import write_fixed  # noqa: E402
from benchmarks.study.baselines.infobatch import InfoBatch  # noqa: E402
from benchmarks.study.baselines.jest import Jest  # noqa: E402
from benchmarks.study.baselines.last_losses import START  # noqa: E402
from benchmarks.study.baselines.orderdp import OrderDP  # noqa: E402
from benchmarks.study.baselines.rho_loss import RhoLoss  # noqa: E402
from benchmarks.study.baselines.rs2 import rs2  # noqa: E402
from benchmarks.study.baselines.selective_backprop import SelectiveBackprop  # noqa: E402
from benchmarks.study.baselines.seta import SeTa  # noqa: E402
from benchmarks.study.trainer import OnDevice, StudyTrainer, train_once  # noqa: E402
from benchmarks.study.variants import Variant, VariantFeedback  # noqa: E402
from gstds_cache.config import EmbedConfig, SelectConfig, TrainConfig  # noqa: E402
from gstds_cache.embedding.run import embed_dataset  # noqa: E402
from gstds_cache.encoders.factory import packaged_weights  # noqa: E402
from gstds_cache.encoders.weights import read_state_dict  # noqa: E402
from gstds_cache.errors import EncoderError, UsageError  # noqa: E402
from gstds_cache.selection.run import BatchSelector  # noqa: E402
from gstds_cache.store.reader import EmbeddingStore  # noqa: E402
from gstds_cache.stream.reader import open_selection  # noqa: E402
from gstds_cache.stream.writer import write_file  # noqa: E402
from gstds_cache.training import learner, step_graphs  # noqa: E402
from gstds_cache.training.images import ImageFeed  # noqa: E402
from gstds_cache.training.loop import train  # noqa: E402
from gstds_cache.training.network import build_network  # noqa: E402
from gstds_cache.training.run_dir import RunDir  # noqa: E402

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
    feed = ImageFeed(source, side=CONFIG.image_size, memory_budget=1 << 20, workers=0)
    return train_once(source, selection, CONFIG, out, feed=feed, **options)


def network(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt")["network"]


def test_a_forward_pass_for_the_choice_is_counted_apart(source, everything, tmp_path) -> None:
    method = RhoLoss(np.zeros(ITEMS, np.float32), 0.75)
    result, forward_samples = run(source, everything, tmp_path / "run", method=method)
    assert (forward_samples, result.gradient_samples) == (ITEMS * EPOCHS, ITEMS * EPOCHS // 4)
    assert result.seconds["choose"] > 0
    assert result.seconds["step"] > 0
    plain, forward_samples = run(source, everything, tmp_path / "plain")
    assert (forward_samples, plain.gradient_samples) == (0, ITEMS * EPOCHS)
    assert "choose" not in plain.seconds


@pytest.mark.parametrize("chooses", [False, True])
def test_images_on_a_runs_device_give_the_same_run(source, everything, tmp_path, monkeypatch, chooses: bool) -> None:
    def method() -> RhoLoss | None:
        return RhoLoss(np.zeros(ITEMS, np.float32), 0.75) if chooses else None

    run(source, everything, tmp_path / "host", method=method())
    monkeypatch.setattr(StudyTrainer, "open_feed", lambda self: OnDevice(self._given_feed, self.device))
    run(source, everything, tmp_path / "device", method=method())
    theirs, ours = network(tmp_path / "host"), network(tmp_path / "device")
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are replayed on a CPU as well, which is to take them again; the sizes of those that were."""
    sizes: list[int] = []

    monkeypatch.setattr(step_graphs, "recording", replays.on_cpu(sizes.append))
    monkeypatch.setattr(learner, "recordable", lambda _device: True)
    monkeypatch.setattr(StudyTrainer, "open_feed", lambda self: OnDevice(self._given_feed, self.device))
    return sizes


REFERENCE = (np.arange(ITEMS) % 5 / 5).astype(np.float32)


@pytest.mark.parametrize("make", [RhoLoss, Jest, lambda _reference, ratio: SelectiveBackprop(ratio)])
def test_what_is_chosen_from_whole_batches_is_chosen_in_replayed_steps(
    source, everything, tmp_path, replayed, make
) -> None:
    result, forward_samples = run(source, everything, tmp_path / "run", method=make(REFERENCE, 0.75))
    assert replayed == [BATCH] * (ITEMS // BATCH * EPOCHS - step_graphs.EAGER)
    assert (forward_samples, result.gradient_samples) == (ITEMS * EPOCHS, ITEMS * EPOCHS // 4)
    assert np.isfinite(result.loss)


def test_a_replayed_run_chooses_the_rows_of_the_run_without(source, everything, tmp_path, monkeypatch, request) -> None:
    run(source, everything, tmp_path / "plain", method=RhoLoss(REFERENCE, 0.75))
    assert request.getfixturevalue("replayed") == []
    run(source, everything, tmp_path / "replayed", method=RhoLoss(REFERENCE, 0.75))
    mine, theirs = network(tmp_path / "replayed"), network(tmp_path / "plain")
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [OrderDP, SeTa, lambda items, _ratio, step: InfoBatch(items, step=step)])
def test_a_replayed_run_by_last_losses_is_the_run_without(source, everything, tmp_path, request, make) -> None:
    """A batch of 24 gives a step of 24 at most, so that nothing is left waiting but for less than one."""
    plain, theirs = make(ITEMS, 0.5, BATCH), tmp_path / "plain"
    without, _ = run(source, everything, theirs, method=plain)
    replayed = request.getfixturevalue("replayed")
    method, ours = make(ITEMS, 0.5, BATCH), tmp_path / "replayed"
    result, _ = run(source, everything, ours, method=method)
    assert replayed or result.steps <= step_graphs.EAGER
    assert (result.steps, result.gradient_samples) == (without.steps, without.gradient_samples)
    np.testing.assert_allclose(method.scores, plain.scores, rtol=1e-3, atol=1e-4)
    for name, tensor in network(ours).items():
        torch.testing.assert_close(tensor, network(theirs)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [OrderDP, SeTa, lambda items, _ratio, step: InfoBatch(items, step=step)])
def test_last_losses_are_told_at_an_epochs_end_where_steps_are_replayed(
    source, everything, tmp_path, replayed, make
) -> None:
    told: list[tuple[int, int]] = []

    class Told(StudyTrainer):
        def end_epoch(self, epoch):
            before = int((self._method.scores != START).sum())
            super().end_epoch(epoch)
            told.append((before, int((self._method.scores != START).sum())))

    method = make(ITEMS, 0.5, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.study.trainer.StudyTrainer", Told)
        result, forward_samples = run(source, everything, tmp_path / "run", method=method)
    assert set(replayed) == {12}
    assert forward_samples == 0
    assert result.gradient_samples == 12 * (len(replayed) + step_graphs.EAGER) > 0
    assert told[0][0] == 0 < told[0][1]
    assert told[1][0] == told[0][1]
    again, whole = make(ITEMS, 0.5, 12), method.scores.copy()
    run(source, everything, tmp_path / "again", method=again)
    assert np.array_equal(again.scores, whole)


def test_weights_count_in_replayed_steps(source, everything, tmp_path, replayed) -> None:
    class Weighted(InfoBatch):
        factor = 1.0

        def choose(self, offer):
            rows = np.arange(len(offer.rows))
            return Choice(rows, np.full(len(rows), self.factor, np.float32))

    class Doubled(Weighted):
        factor = 2.0

    losses = [run(source, everything, tmp_path / kind.__name__, method=kind(ITEMS, step=BATCH))[0].loss
              for kind in (Weighted, Doubled)]  # fmt: skip
    assert losses[1] > 1.5 * losses[0]
    plain, _ = run(source, everything, tmp_path / "plain")
    assert losses[0] == pytest.approx(plain.loss, rel=1e-4)


def test_a_variant_that_refreshes_losses_draws_by_the_network_as_it_is(source, everything, tmp_path) -> None:
    store = EmbeddingStore(tmp_path / "store")
    config = SelectConfig(
        batch_size=BATCH, epochs=EPOCHS, schedule="constant:0.5", draw="loss", guidance="none", strata=1, device="cpu"
    )
    candidates = tmp_path / "candidates.arrow"
    list(write_file(BatchSelector(store, config), candidates))
    seen: list[np.ndarray] = []

    class Watched(VariantFeedback):
        def rows_of(self, batch):
            if batch.batch_id == 0:
                seen.append(self.losses.copy())
            return super().rows_of(batch)

    variant = Variant(form="loss", strata=1, refresh=True)
    result, forward_samples = run(
        source, candidates, tmp_path / "run", feedback=lambda header: Watched(header, variant)
    )
    assert (forward_samples, result.gradient_samples) == (ITEMS * (EPOCHS - 1), ITEMS * EPOCHS // 2)
    assert np.isnan(seen[0]).all()
    assert np.isfinite(seen[1:]).all()
    assert (seen[1] != seen[2]).all()


def test_a_method_that_keeps_everything_is_plain_training(source, everything, tmp_path) -> None:
    with open_selection(everything) as stream:
        train(source, stream, CONFIG, RunDir(tmp_path / "plain", {}, provenance={}, resume=False))
    epochs: list[int] = []
    result, _ = run(
        source,
        everything,
        tmp_path / "all",
        method=RhoLoss(np.zeros(ITEMS, np.float32), 0.0),
        after_epoch=lambda network: epochs.append(len(list(network.parameters()))),
    )
    assert result.gradient_samples == ITEMS * EPOCHS
    assert len(epochs) == EPOCHS
    mine, theirs = network(tmp_path / "plain"), network(tmp_path / "all")
    for name, tensor in mine.items():
        assert torch.allclose(tensor.double(), theirs[name].double(), atol=1e-5), name


def test_a_method_sees_the_losses_of_what_it_chose(source, everything, tmp_path) -> None:
    method = InfoBatch(ITEMS)
    result, _ = run(source, everything, tmp_path / "run", method=method)
    assert result.gradient_samples < ITEMS * EPOCHS
    assert not np.any(method.scores == START)


class Few(EpochMethod):
    """Half of the rows in epoch 0, seven rows in epoch 1, then none."""

    name = "few"
    rows = (np.arange(0, ITEMS, 2), np.arange(0, ITEMS, 11), np.arange(0))

    def __init__(self, step: int) -> None:
        super().__init__(ITEMS, step)
        self.steps: list[list[int]] = []

    def rows_of(self, epoch, epochs, rng):
        return self.rows[epoch]

    def observe(self, rows, losses, correct):
        super().observe(rows, losses, correct)
        self.steps.append(rows.tolist())


def test_rows_wait_until_a_step_is_full(source, everything, tmp_path) -> None:
    ends: list[int] = []
    method = Few(step=5)
    result, forward_samples = run(
        source, everything, tmp_path / "run", method=method, after_epoch=lambda _: ends.append(len(method.steps))
    )
    with open_selection(everything) as stream:
        offered = [(batch.epoch, list(map(int, batch.kept))) for batch in stream]
    naive, waiting = [], []
    for epoch, rows in offered:
        waiting += [row for row in rows if row in set(method.rows[epoch].tolist())]
        if len(waiting) >= 5:
            naive.append(waiting[:5])
            waiting = waiting[5:]
    assert method.steps == naive
    assert 0 < ends[0] <= ends[1] <= ends[2] == len(naive)
    assert len(naive) < len(offered)
    assert (result.gradient_samples, result.steps) == (5 * len(naive), len(naive))
    assert forward_samples == 0
    assert np.isfinite(result.loss)


def test_a_batch_without_a_step_changes_no_weight(source, everything, tmp_path) -> None:
    method, ends = Few(step=9), []
    run(
        source,
        everything,
        tmp_path / "run",
        method=method,
        after_epoch=lambda network: ends.append((len(method.steps), next(network.parameters()).detach().clone())),
    )
    assert [steps for steps, _ in ends] == [3, 4, 4]
    assert not torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[1][1], ends[2][1])  # momentum and weight decay rest too


@pytest.mark.parametrize("make", [OrderDP, SeTa])
def test_last_losses_are_those_of_training(source, everything, tmp_path, make) -> None:
    method = make(ITEMS, 0.5, 12)
    result, forward_samples = run(source, everything, tmp_path / "run", method=method)
    seen = method.scores != START
    assert forward_samples == 0
    assert ITEMS // 2 <= seen.sum() <= ITEMS
    assert np.isfinite(method.scores).all()
    assert result.gradient_samples <= 0.7 * ITEMS * EPOCHS
    again = make(ITEMS, 0.5, 12)
    run(source, everything, tmp_path / "again", method=again)
    assert np.array_equal(method.scores, again.scores)


def test_the_learner_is_asked_about_what_the_step_sees(source) -> None:
    network = build_network("conv3", classes=3, side=16, seed=0).train()
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(12) % 3
    losses = learner_losses(network, pixels, labels).numpy()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    chosen = choose_rows(
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
