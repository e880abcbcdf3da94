"""Losses over real ranks on gloo: merged at an epoch's end, saved in the middle of one, gone on with by one process."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import offered
import pytest
from click.testing import CliRunner
from feedback_driver import STOP, loss_of
from forked import Forks
from gstds_cache.cli.train_command import main

from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.seeding import rng_for
from gstds_cache.selection.draws import DRAWS, draw_rows
from gstds_cache.training.sampler import SelectedBatchSampler

DRIVER = Path(__file__).parents[1] / "shared" / "feedback_driver.py"
# Layer norm only: batch statistics of a rank's own slice would be other numbers.
WORDS = ["digits", "--arch", "timm:test_convnext", "--image-size", "32", "--lr", "0.02", "--device", "cpu", "--json",
         "--importance-weights"]  # fmt: skip


def naive() -> list[list[int]]:
    """Rows by step where each row's loss depends on row and step alone."""
    table, later, batches = np.full(offered.ITEMS, np.nan), {}, []
    for seq in range(offered.EPOCHS * offered.BATCHES):
        batch = offered.batch(seq)
        if batch.batch_id == 0:
            for row, loss in later.items():
                table[row] = loss
        scores = DRAWS["loss-minus-reference"].scores(batch.candidates, table[batch.kept], offered.CHANCE)
        rows = batch.kept[draw_rows(batch.candidates, scores, rng_for(0, "draw", batch.epoch, batch.batch_id))]
        later.update(zip(rows.tolist(), loss_of(rows.tolist(), seq).tolist(), strict=True))
        batches.append(rows.tolist())
    return batches


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> tuple[Path, list[dict]]:
    """Two ranks, in one folder: what the driver did on each, and a run of gstds-train."""
    folder = tmp_path_factory.mktemp("feedback")
    offered.write(folder / "s.arrow")
    manifest = build_manifest(open_source("digits"))
    offered.write(folder / "digits.arrow", items=len(manifest), items_root=manifest.root)
    process = forks.start(
        ["torchrun", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
         str(DRIVER), str(folder), str(folder / "s.arrow"),
         *WORDS, "--selection", str(folder / "digits.arrow"), "--out", str(folder / "two")],
        cwd=folder,
        env=os.environ | {"GSTDS_CACHE": str(folder / "stores")},
    )  # fmt: skip
    out, errors = process.communicate(280)  # a hang is a failure
    assert process.wait() == 0, out + errors
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_draw_by_the_losses_of_all_and_one_process_goes_on_in_the_middle_of_an_epoch(ran) -> None:
    folder, ranks = ran
    expected = naive()
    steps = zip(*(rank["stop"] for rank in ranks), strict=True)
    for parts, rows in zip(steps, expected[:STOP], strict=True):
        assert list(chain(*parts)) == np.resize(rows, 2 * len(parts[0])).tolist()
    alone = SelectedBatchSampler(folder / "s.arrow", rank=0, world_size=1)
    alone.load_state_dict(json.loads((folder / "state.json").read_text()))
    batches = []
    for _ in range(alone.epoch, alone.epochs):
        for rows in alone:
            alone.report(loss_of(rows, STOP + len(batches)))
            batches.append(rows)
    assert batches == expected[STOP:]


@pytest.mark.parametrize(("mode", "numbers"), [("last one missing", "[3, 4]"), ("none at all", "[0, 4]")])
def test_ranks_that_report_differently_both_end_with_an_error(ran, mode, numbers) -> None:
    for rank in ran[1]:
        assert f"the ranks reported the losses of {numbers} batches in epoch 0" in rank[mode]


def test_gstds_train_draws_the_same_on_two_ranks_as_alone(ran) -> None:
    folder, _ = ran
    words = [*WORDS, "--selection", str(folder / "digits.arrow"), "--out", str(folder / "alone")]
    alone = CliRunner().invoke(main, words)
    assert alone.exit_code == 0, alone.output
    losses = [
        [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()[:-1]]
        for name in ("alone", "two")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
