from __future__ import annotations

import io
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gstds_cache.config import EmbedConfig, SelectConfig, TrainConfig
from gstds_cache.data.decode import Decoding, decoding_as
from gstds_cache.data.loading import pixel_batches
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import (
    DivergedError,
    FingerprintMismatchError,
    IntegrityError,
    StreamError,
    TruncatedStreamError,
    UsageError,
)
from gstds_cache.seeding import torch_rng_for
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.record_writer import SelectionWriter
from gstds_cache.stream.writer import write_file
from gstds_cache.training import evaluate as evaluating
from gstds_cache.training import images, learner
from gstds_cache.training.augment import augment, to_input
from gstds_cache.training.evaluate import evaluate
from gstds_cache.training.identity import run_config
from gstds_cache.training.images import ImageFeed, default_side
from gstds_cache.training.loop import train
from gstds_cache.training.network import build_network
from gstds_cache.training.optimizer import one_cycle
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.sampler import SelectedBatchSampler

CONFIG = TrainConfig(arch="timm:test_resnet", image_size=16, augment="crop+flip", lr=0.02, device="cpu", workers=0)


@pytest.fixture
def source(array_source):
    return array_source(72)


@pytest.fixture
def selection(uneven) -> Path:
    """Three epochs of four batches."""
    return uneven[0]


def cut_short(selection: Path, cut: Path) -> Path:
    """Three quarters of ``selection`` as a producer at work writes it: each batch by itself."""
    live = io.BytesIO()
    with open_selection(selection) as stream, SelectionWriter(live, stream.header) as writer:
        for batch in stream:
            writer.write(batch)
    cut.write_bytes(live.getvalue()[: len(live.getvalue()) * 3 // 4])
    return cut


def run(source, selection: Path, out: Path, config: TrainConfig = CONFIG, **options):
    with open_selection(selection) as stream:
        run_dir = RunDir(out, run_config(config, stream.header, None), provenance={}, resume=True)
        return train(source, stream, config, run_dir, **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["network"]


def assert_same_run(a: Path, b: Path) -> None:
    for (name, mine), theirs in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(mine, theirs), name

    def lines(path):
        return [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]

    assert lines(a) == lines(b)


def test_a_run_spends_what_the_selection_says_and_writes_it_down(source, selection, tmp_path) -> None:
    evaluation = replace(source, seed=0)
    report = run(source, selection, tmp_path / "run", evaluation=evaluation)
    with open_selection(selection) as stream:
        assert (report.steps, report.gradient_samples) == (stream.header.total_batches, stream.header.total_kept)
        digest = stream.header.selection_digest
    assert report.accuracy is not None
    assert report.accuracy.items == 72
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["selection_digest"], config["arch"]) == (digest, "timm:test_resnet")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [4, 8, 12, 12]
    assert metrics[-1]["test_accuracy"] == report.accuracy.value


def test_the_time_of_a_step_leaves_out_what_the_first_one_takes_to_warm_up(
    source, selection, tmp_path, monkeypatch
) -> None:
    to_input, calls = learner.to_input, []

    def slow_at_first(pixels):
        calls.append(len(pixels))
        if len(calls) == 1:
            time.sleep(1)
        return to_input(pixels)

    monkeypatch.setattr(learner, "to_input", slow_at_first)
    report = run(source, selection, tmp_path / "run")
    assert len(calls) == report.steps
    assert report.seconds["warm-up"] > 1 > report.seconds["step"] > 0
    assert 0 < report.seconds_per_sample * calls[0] < 0.5


def test_a_network_learns_what_can_be_learnt(array_source, tiny_model, tmp_path) -> None:
    # Labels follow from the pixels here: brightness, in three steps.
    class Grey(array_source):
        def _pixels(self, row: int) -> np.ndarray:
            return np.full((20, 20, 3), 40 + 80 * (row % 3) + row % 7, np.uint8)

    source = Grey(72)
    embed = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=64, workers=0, device="cpu")
    store = EmbeddingStore(embed_dataset(source, embed, where=tmp_path / "store").location)
    config = SelectConfig(batch_size=24, epochs=12, knn=5, schedule="constant:0.5", device="cpu")
    list(write_file(BatchSelector(store, config), tmp_path / "s.arrow"))
    report = run(source, tmp_path / "s.arrow", tmp_path / "run", replace(CONFIG, lr=0.05), evaluation=source)
    assert report.accuracy.value > 0.9


@pytest.mark.parametrize("stop_at", [1, 4, 6, 12])
def test_a_stopped_run_resumes_to_the_same_numbers(source, selection, tmp_path, stop_at) -> None:
    run(source, selection, tmp_path / "whole")
    steps = 0

    def stopping() -> bool:
        nonlocal steps
        steps += 1
        return steps == stop_at

    with pytest.raises(KeyboardInterrupt):
        run(source, selection, tmp_path / "stopped", interruptible=lambda: nullcontext(stopping))
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] == stop_at
    report = run(source, selection, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    with open_selection(selection) as stream:
        assert report.gradient_samples == stream.header.total_kept


def test_decoding_by_workers_trains_the_same_network(source, selection, tmp_path) -> None:
    run(source, selection, tmp_path / "memory")
    run(source, selection, tmp_path / "workers", replace(CONFIG, memory_budget=0, workers=2))
    assert_same_run(tmp_path / "memory", tmp_path / "workers")


def test_a_truncated_selection_saves_what_was_trained_and_says_so(source, selection, tmp_path) -> None:
    cut = cut_short(selection, tmp_path / "cut.arrow")
    with pytest.raises(TruncatedStreamError):
        run(source, cut, tmp_path / "run")
    assert 0 < torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] < 12
    run(source, selection, tmp_path / "run")
    run(source, selection, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_stream_that_ctrl_c_ended_is_an_interrupt_and_no_damage(source, selection, tmp_path) -> None:
    cut = cut_short(selection, tmp_path / "cut.arrow")
    with pytest.raises(TruncatedStreamError):
        run(source, cut, tmp_path / "a")
    steps = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["step"]
    assert steps > 0
    asked = 0

    def stopping() -> bool:  # Ctrl-C comes while the trainer waits for the batch that never comes
        nonlocal asked
        asked += 1
        return asked > steps

    with pytest.raises(KeyboardInterrupt):
        run(source, cut, tmp_path / "b", interruptible=lambda: nullcontext(stopping))
    assert torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["step"] == steps


def test_a_run_is_never_overwritten_nor_mixed(source, selection, tmp_path) -> None:
    run(source, selection, tmp_path / "run")
    with open_selection(selection) as stream:
        with pytest.raises(UsageError, match="resume=True"):
            RunDir(tmp_path / "run", run_config(CONFIG, stream.header, None), provenance={}, resume=False)
        other = run_config(replace(CONFIG, lr=0.5), stream.header, None)
    with pytest.raises(FingerprintMismatchError, match=r"lr: the run has 0\.02, now 0\.5"):
        RunDir(tmp_path / "run", other, provenance={}, resume=True)


def test_a_loss_that_is_no_number_ends_the_run(source, selection, tmp_path) -> None:
    with pytest.raises(DivergedError, match="lower `lr`"):
        run(source, selection, tmp_path / "run", replace(CONFIG, lr=1e9))


def test_labels_are_needed_and_classes_must_agree(source, selection, tmp_path, array_source) -> None:
    nameless = array_source(72)
    nameless.labels[:] = -1
    with pytest.raises(UsageError, match="no labels"):
        run(nameless, selection, tmp_path / "a")
    nameless.labels[:71] = 0
    with pytest.raises(UsageError, match=r"item/0071.*no label"):
        run(nameless, selection, tmp_path / "b")
    with pytest.raises(UsageError, match="other classes"):
        run(source, selection, tmp_path / "c", evaluation=replace(source, classes=("x", "y", "z")))


def test_undecodable_test_images_are_left_out_and_counted(source, selection, tmp_path, array_source) -> None:
    report = run(source, selection, tmp_path / "run", evaluation=array_source(30, bad=frozenset({2, 9})))
    assert (report.accuracy.items, report.accuracy.undecodable) == (28, 2)


@pytest.mark.parametrize("bad", [frozenset(), frozenset(range(15, 30))])
def test_test_images_without_a_label_are_left_out_and_counted(source, selection, tmp_path, array_source, bad) -> None:
    half = array_source(30, bad=bad)
    half.labels[:15] = -1
    same_images = array_source(30)
    accuracy = run(source, selection, tmp_path / "run", evaluation=half).accuracy
    assert (accuracy.items, accuracy.unlabelled, accuracy.undecodable) == (15 - len(bad), 15, len(bad))
    assert accuracy.value is None if bad else accuracy.value >= 0
    if not bad:
        same_images.labels[:15] = (same_images.labels[:15] + 1) % 3  # wrong labels, which count
        network = build_network(CONFIG.arch, classes=3, side=16, seed=0)
        network.load_state_dict(weights(tmp_path / "run"))
        rows = evaluate(network, same_images, torch.device("cpu"), side=16, workers=0)
        assert (rows.items, rows.unlabelled) == (30, 0)
        assert 0 <= round(rows.value * 30) - round(accuracy.value * 15) <= 15


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_nothing_is_page_locked_for_a_cpu_beside_a_gpu(source, selection, tmp_path, monkeypatch, budget) -> None:
    asked: list[bool] = []

    def spy(*arguments, pin, **options):
        asked.append(pin)
        return pixel_batches(*arguments, pin=pin, **options)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for module in (images, evaluating):
        monkeypatch.setattr(module, "pixel_batches", spy)
    run(source, selection, tmp_path / "run", replace(CONFIG, memory_budget=budget), evaluation=source)
    assert asked
    assert not any(asked)


@pytest.mark.parametrize(("arch", "side"), [("vit_b_16", 20), ("alexnet", 16)], ids=str)
def test_an_architecture_that_takes_no_such_images_writes_nothing(source, selection, tmp_path, arch, side) -> None:
    with pytest.raises(UsageError, match="`image_size`"):
        run(source, selection, tmp_path / "run", replace(CONFIG, arch=arch, image_size=side))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(source, selection, tmp_path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    with pytest.raises(UsageError, match=r"chapter\.tex"):
        run(source, selection, tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_torn_line_and_a_damaged_checkpoint(source, selection, tmp_path) -> None:
    run(source, selection, tmp_path / "whole")
    run(source, selection, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')
    run(source, selection, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    data = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match=r"checkpoint\.pt is damaged"):
        run(source, selection, tmp_path / "run")


# The parts


def test_one_cycle_rises_to_its_peak_and_falls_to_nearly_nothing() -> None:
    shares = [one_cycle(step, 100) for step in range(100)]
    assert max(shares) == shares[24] == 1.0
    assert shares[:25] == sorted(shares[:25])
    assert shares[24:] == sorted(shares[24:], reverse=True)
    assert shares[-1] < 0.001
    for total in (1, 2, 3, 4):
        assert all(0 < one_cycle(step, total) <= 1 for step in range(total))


def test_augmentation_is_the_naive_one_row_by_row() -> None:
    pixels = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    got = augment(pixels, shift=2, mirror=True, seed=3, step=5)
    padded = torch.nn.functional.pad(pixels.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    rng = torch_rng_for(3, "augment", 5)
    offsets, coins = torch.randint(0, 5, (6, 2), generator=rng), torch.rand(6, generator=rng)
    assert len({tuple(offset) for offset in offsets.tolist()}) > 3
    assert 0 < (coins < 0.5).sum() < 6
    for image, (top, left), coin, result in zip(padded, offsets.tolist(), coins, got, strict=True):
        window = image[:, top : top + 12, left : left + 12]
        assert torch.equal(result, window.flip(2) if coin < 0.5 else window)
    assert torch.equal(got, augment(pixels, shift=2, mirror=True, seed=3, step=5))
    assert not torch.equal(got, augment(pixels, shift=2, mirror=True, seed=3, step=6))
    assert torch.equal(pixels, augment(pixels, shift=0, mirror=False, seed=3, step=5))


def test_inputs_are_centred() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 2, 2)
    assert to_input(pixels).unique().tolist() == [-2.0, 2.0]
    assert pixels.unique().tolist() == [0, 255]


def test_resnets_get_a_stem_for_small_images() -> None:
    small, large = (build_network("resnet18", classes=5, side=side, seed=0) for side in (64, 65))
    assert (small.conv1.kernel_size, type(small.maxpool)) == ((3, 3), nn.Identity)
    assert (large.conv1.kernel_size, type(large.maxpool)) == ((7, 7), nn.MaxPool2d)
    assert small.fc.out_features == 5
    again = build_network("resnet18", classes=5, side=64, seed=0)
    assert torch.equal(small.conv1.weight, again.conv1.weight)
    assert not torch.equal(small.conv1.weight, build_network("resnet18", classes=5, side=64, seed=1).conv1.weight)
    with pytest.raises(UsageError, match="resnet18"):
        build_network("resnet19", classes=5, side=64, seed=0)


def test_a_feed_refuses_an_undecodable_image_by_name(array_source) -> None:
    for budget in (0, 1 << 30):
        feed = ImageFeed(array_source(10, bad=frozenset({4})), side=8, memory_budget=budget, workers=0)
        with pytest.raises(UsageError, match=r"item/0004.*made to fail"):
            list(feed.batches([np.array([1, 2]), np.array([3, 4])]))
        assert np.flatnonzero(~feed.decodable).tolist() == ([4] if budget else [])


def test_images_above_the_cap_are_trained_on_where_it_is_raised(tmp_path) -> None:
    for number, side in enumerate((20, 40, 20, 20)):
        folder = tmp_path / "photos" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (60 * number, 90, 10)).save(folder / f"{number}.png")
    source = open_source(f"imagefolder:{tmp_path / 'photos'}")
    (large,) = [row for row, name in enumerate(source.ids) if name.endswith("1.png")]
    for budget, workers in ((1 << 20, 0), (0, 1)):
        for cap, fits in ((1600, True), (1599, False)):
            with decoding_as(Decoding(max_pixels=cap)):
                feed = ImageFeed(source, side=8, memory_budget=budget, workers=workers)
            # As a loader's thread asks, whose own way of decoding is the default.
            if fits:
                assert next(iter(feed.batches([np.array([large])]))).any()
                continue
            with pytest.raises(UsageError, match=r"too many pixels: 40 x 40, at most 1599") as refused:
                list(feed.batches([np.array([large])]))
            assert "give the `max_pixels` that it was embedded with" in refused.value.hint


def test_the_default_size_is_the_images_own_where_they_agree(array_source) -> None:
    class Mixed(array_source):
        def image(self, row: int):
            return super().image(row).resize((40, 30) if row == 3 else (20, 20))

    assert default_side(array_source(10, bad=frozenset({0, 1}))) == 20
    assert default_side(Mixed(10)) == 64
    assert default_side(array_source(3, bad=frozenset({0, 1, 2}))) == 64


# The batch sampler, in a loop of one's own


def dataset() -> TensorDataset:
    return TensorDataset(torch.arange(72))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_sampler_feeds_any_loop(selection, workers) -> None:
    with open_selection(selection) as stream:
        expected = [batch.kept.tolist() for batch in stream]
    sampler = SelectedBatchSampler(selection)
    # spawn: fork in a process with threads warns from Python 3.12 on, and a DataLoader of one's own is one's own choice
    loader = DataLoader(
        dataset(),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    seen = [rows.tolist() for _epoch in range(sampler.epochs) for (rows,) in loader]
    assert seen == expected
    assert len(loader) == len(sampler) == 4
    with pytest.raises(StreamError, match="3 epochs, and all were used"):
        next(iter(sampler))


def test_an_epoch_left_in_the_middle_is_not_passed_over(selection) -> None:
    sampler = SelectedBatchSampler(selection)
    next(iter(sampler))
    with pytest.raises(StreamError, match="epoch 0 was started again at batch 1"):
        next(iter(sampler))
    sampler.close()


def test_the_sampler_never_uses_up_a_truncated_selection(selection, tmp_path) -> None:
    whole = selection.read_bytes()
    # Cut off the stream-end record: every batch is there, and still it is not whole.
    with open_selection(selection) as stream:
        total = stream.header.total_batches
    for cut in range(len(whole) - 16, 0, -16):
        (tmp_path / "cut.arrow").write_bytes(whole[:cut])
        sampler = SelectedBatchSampler(tmp_path / "cut.arrow")
        batches = []
        with pytest.raises(TruncatedStreamError):  # noqa: PT012
            for _ in range(sampler.epochs):
                batches += list(sampler)
        sampler.close()
        if len(batches) < total - 4:
            break
    else:
        pytest.fail("no cut reached the last batches")
