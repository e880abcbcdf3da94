"""Real ranks on gloo: torchrun with two and with four processes, on a selection whose batches are uneven."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from forked import Forks
from gstds_cache.cli.train_command import main

from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.schema import Header
from gstds_cache.stream.writer import SelectionWriter
from gstds_cache.training.batch_norm import random_batches, random_inputs, reestimate_batch_norm
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.network import build_network

DRIVER = Path(__file__).parents[1] / "shared" / "ranks_driver.py"
KEPT = [[13, 7, 30], [22, 3, 17], [9, 26, 11], [21, 5, 14]]  # 3 rows are fewer than four ranks; none divides by four
# Layer norm only: batch statistics of a rank's own slice would be other numbers.
WORDS = ["digits", "--arch", "timm:test_convnext", "--image-size", "32", "--lr", "0.02", "--device", "cpu", "--json"]


def write(path: Path) -> list[list[int]]:
    manifest = build_manifest(open_source("digits"))
    kept = [sum(epoch) for epoch in KEPT]
    header = Header(
        "c" * 64, "d" * 64, len(manifest), manifest.root, 0, len(kept), 3, 3 * len(kept), sum(kept), kept, {}
    )
    rng, batches = np.random.default_rng(0), []
    with path.open("wb") as file, SelectionWriter(file, header) as writer:
        for epoch, sizes in enumerate(KEPT):
            for batch_id, size in enumerate(sizes):
                rows = rng.permutation(len(manifest))[:size]
                seq = len(batches)
                writer.write(SelectedBatch(seq, epoch, batch_id, 40, rows, None, Status.CONVERGED, 0.5, 0.0))
                batches.append(rows.tolist())
    return batches


def torchrun(forks: Forks, ranks: int, folder: Path, selection: Path, *words: str) -> subprocess.CompletedProcess[str]:
    process = forks.start(
        ["torchrun", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
         str(DRIVER), str(folder), str(folder / "s.arrow"),
         *WORDS, "--selection", str(selection), "--out", str(folder / "ranks"), *words],
        cwd=folder,
        env=os.environ | {"GSTDS_CACHE": str(folder / "stores")},
    )  # fmt: skip
    out, errors = process.communicate(280)  # a hang is a failure
    return subprocess.CompletedProcess(process.args, process.wait(), out, errors)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, forks: Forks):
    """One process alone; and two ranks on a cut selection, then four on a longer one, then two on the whole one."""
    folder = tmp_path_factory.mktemp("torchrun")
    batches = write(folder / "s.arrow")
    whole = (folder / "s.arrow").read_bytes()
    for name, tenths in (("cut.arrow", 4), ("longer.arrow", 7)):
        (folder / name).write_bytes(whole[: len(whole) * tenths // 10])
    alone = CliRunner().invoke(
        main, [*WORDS, "--selection", str(folder / "s.arrow"), "--eval", "digits", "--out", str(folder / "alone")]
    )
    assert alone.exit_code == 0, alone.output
    two = torchrun(forks, 2, folder, folder / "cut.arrow", "--eval", "digits", "--log-to", "tensorboard")
    more = ("--eval", "digits", "--resume", "--log-to", "tensorboard")
    trained = [step_of(folder / "ranks")]
    four = torchrun(forks, 4, folder, folder / "longer.arrow", *more)
    trained += [step_of(folder / "ranks")]
    last = torchrun(forks, 2, folder, folder / "s.arrow", *more)
    return folder, batches, json.loads(alone.stdout.splitlines()[-1]), ((two, four), trained), last


def step_of(run: Path) -> int:
    step: int = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    return step


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_half_a_selection_is_said_by_every_rank_and_hangs_none(ran) -> None:
    _, batches, _, (cut, trained), _ = ran
    for run in cut:
        assert run.returncode != 0
        assert "the selection is truncated" in run.stderr
    assert 0 < trained[0] < trained[1] < len(batches), "each session takes steps, and goes on with those before"


def test_ranks_miss_nothing_and_take_nothing_twice(ran) -> None:
    folder, batches, *_ = ran
    for world in (2, 4):
        ranks = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
        for step, rows in enumerate(batches):
            slices = [rank["pad"][step] for rank in ranks]
            assert len({len(part) for part in slices}) == 1
            assert list(chain(*slices)) == np.resize(rows, len(slices[0]) * world).tolist()
        packed = [list(chain(*(rank["drop"][step] for rank in ranks))) for step in range(len(ranks[0]["drop"]))]
        flat = list(chain(*batches))
        assert list(chain(*packed)) == flat[: len(flat) // 8 * 8]


def test_ranks_end_with_the_batch_norm_statistics_that_one_process_computes(forks: Forks, tmp_path: Path) -> None:
    write(tmp_path / "s.arrow")
    small = ("--arch", "conv3", "--image-size", "16", "--norm-samples", "600")  # the last one counts
    two = torchrun(forks, 2, tmp_path, tmp_path / "s.arrow", *small)
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout.splitlines()[-1])["forward_samples"] == 2 * 600  # each rank makes all the passes
    assert "statistics re-estimated by forward passes of random rows (1,200 samples)" in two.stdout
    state = torch.load(tmp_path / "ranks" / "checkpoint.pt", weights_only=True)["network"]
    source = open_source("digits")
    network = build_network("conv3", classes=10, side=16, seed=0)
    network.load_state_dict({n: v if "running_" not in n else torch.ones_like(v) for n, v in state.items()})
    feed = ImageFeed(source, side=16, memory_budget=1 << 24, workers=0)
    assert reestimate_batch_norm(network, random_inputs(feed, random_batches(len(source), 600, 0))) == 600
    for name, values in network.state_dict().items():
        torch.testing.assert_close(values, state[name])


def test_another_number_of_ranks_goes_on_to_the_same_losses(ran) -> None:
    folder, batches, alone, _, last = ran
    assert last.returncode == 0, last.stderr
    result = json.loads(last.stdout.splitlines()[-1])
    assert last.stdout.count("test accuracy") == 1  # the first rank prints, and no other
    assert result["world_size"] == 2
    for name in ("steps", "gradient_samples", "test_items"):
        assert result[name] == alone[name]
    assert result["gradient_samples"] == sum(map(len, batches))
    losses = [[line["loss"] for line in metrics(folder / run)[:-1]] for run in ("alone", "ranks")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert result["test_accuracy"] == pytest.approx(alone["test_accuracy"], abs=0.003)


def test_one_rank_tells_trackers_of_the_run(ran) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, batches, *_ = ran
    trackers = folder / "ranks" / "trackers"
    # One a session; one that torchrun ended before its tracker had begun leaves its points to the next.
    assert 1 <= len(list((trackers / "tensorboard").glob("events.*"))) <= 3
    events = EventAccumulator(str(trackers / "tensorboard")).Reload()
    epochs = [line["step"] for line in metrics(folder / "ranks") if "loss" in line]
    expected = sorted({*range(10, len(batches) + 1, 10), *epochs})
    assert [event.step for event in events.Scalars("loss")] == expected
    assert [event.step for event in events.Scalars("epoch_loss")] == epochs
