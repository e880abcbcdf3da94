"""``sampler.report``: what is drawn depends on the losses of the epochs before, and on nothing else."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import offered
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from gstds_cache.errors import FingerprintMismatchError, IntegrityError, StreamError, TruncatedStreamError, UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.draws import DRAWS, draw_rows
from gstds_cache.stream.reader import open_selection
from gstds_cache.training import reports
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.sampler import SelectedBatchSampler
from gstds_cache.training.selected_dataset import SelectedDataset


class Rows(Dataset):
    """Item i is i."""

    def __len__(self) -> int:
        return offered.ITEMS

    def __getitem__(self, index: int) -> int:
        return index


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return offered.write(tmp_path / "s.arrow")


def loss_of(rows, step: int) -> torch.Tensor:
    """The losses of a run that forgets nothing and learns a little with each step."""
    return torch.as_tensor([1 + (row * 7919 % 101) / 20 - step / 50 for row in rows], dtype=torch.float32)


def train(sampler: SelectedBatchSampler, *, steps: int = 10**9, start: int = 0) -> list[list[int]]:
    """The batches of up to so many steps, all reported."""
    batches: list[list[int]] = []
    for _ in range(sampler.epoch, sampler.epochs):
        for rows in sampler:
            sampler.report(loss_of(rows, start + len(batches)))
            batches.append(rows)
            if len(batches) == steps:
                return batches
    return batches


def naive(
    draw: str = "loss-minus-reference", chance: float | None = offered.CHANCE, *, since: int = 0
) -> list[list[int]]:
    """The same by the definition: a table, changed when an epoch ends, of the losses after ``since`` steps."""
    table, later, batches = np.full(offered.ITEMS, np.nan), {}, []
    for seq in range(offered.EPOCHS * offered.BATCHES):
        batch = offered.batch(seq)
        if batch.batch_id == 0:
            for row, loss in later.items():
                table[row] = loss
            later = {}
        scores = DRAWS[draw].scores(batch.candidates, table[batch.kept], chance)
        numbers, largest = rng_for(0, "draw", batch.epoch, batch.batch_id), draw.startswith("largest")
        rows = batch.kept[draw_rows(batch.candidates, scores, numbers, largest=largest)].tolist()
        if seq >= since:
            later.update(zip(rows, loss_of(rows, seq).tolist(), strict=True))
        batches.append(rows)
    return batches


def test_rows_are_drawn_by_the_losses_at_the_end_of_the_epoch_before(path) -> None:
    sampler = SelectedBatchSampler(path, dataset=Rows())
    assert torch.isnan(sampler.losses).all()
    batches = train(sampler)
    assert batches == naive()
    assert [len(rows) for rows in batches] == [*offered.KEEP] * 3
    known = ~torch.isnan(sampler.losses)
    assert set(torch.nonzero(known).flatten().tolist()) == {row for rows in batches for row in rows}


@pytest.mark.parametrize("draw", ["largest-damped-loss", "largest-loss-minus-reference"])
def test_draws_of_the_largest_scores_take_them_and_have_no_importance_weights(tmp_path, draw) -> None:
    path = offered.write(tmp_path / "s.arrow", draw)
    sampler = SelectedBatchSampler(path, dataset=Rows())
    assert train(sampler) == naive(draw)
    with pytest.raises(UsageError, match=f"{draw} takes the rows of the largest scores") as caught:
        SelectedBatchSampler(path, importance_weights=True)
    assert "damped-loss" in caught.value.hint


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_reads_ahead_draws_the_same_rows(path, workers) -> None:
    sampler = SelectedBatchSampler(path)
    loader = DataLoader(Rows(), batch_sampler=sampler, num_workers=workers, prefetch_factor=3 if workers else None)
    batches: list[list[int]] = []
    for _ in range(sampler.epochs):
        for rows in loader:
            sampler.report(loss_of(rows.tolist(), len(batches)), step=len(batches) + 1)
            batches.append(rows.tolist())
    assert batches == naive()


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 11, 12])
def test_a_state_from_any_step_goes_on_to_the_same_rows(path, stop) -> None:
    first = SelectedBatchSampler(path)
    batches = train(first, steps=stop)
    text = json.dumps(first.state_dict(step=stop))
    again = SelectedBatchSampler(path)
    again.load_state_dict(json.loads(text))
    assert batches + train(again, start=stop) == naive()
    assert json.dumps(again.state_dict(step=12)) == json.dumps(_finished(path))


def _finished(path: Path) -> dict[str, object]:
    sampler = SelectedBatchSampler(path)
    train(sampler)
    return sampler.state_dict()


def test_a_state_of_fewer_steps_than_were_reported_holds_no_later_losses(path) -> None:
    sampler = SelectedBatchSampler(path)
    batches = train(sampler, steps=7)
    again = SelectedBatchSampler(path)
    again.load_state_dict(sampler.state_dict(step=6))
    assert batches[:6] + train(again, start=6) == naive()
    with pytest.raises(UsageError, match="epoch 1 began after step 4, and earlier losses are gone"):
        sampler.state_dict(step=3)


def test_a_torchdata_loader_resumes_where_the_samplers_state_is_saved_with_it(path) -> None:
    sampler = SelectedBatchSampler(path)
    loader = StatefulDataLoader(Rows(), batch_sampler=sampler)
    batches: list[list[int]] = []
    for rows in loader:
        sampler.report(loss_of(rows.tolist(), len(batches)))
        batches.append(rows.tolist())
        if len(batches) == 2:
            break
    state = sampler.state_dict(step=2)
    again = SelectedBatchSampler(path)
    again.load_state_dict(state)
    assert batches + train(again, start=2) == naive()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 3, 4, 6, 8])
def test_the_state_of_a_torchdata_loader_never_takes_losses_away(path, workers, stop, caplog) -> None:
    def made() -> tuple[SelectedBatchSampler, StatefulDataLoader]:
        sampler = SelectedBatchSampler(path)
        return sampler, StatefulDataLoader(Rows(), batch_sampler=sampler, num_workers=workers)

    sampler, loader = made()
    batches: list[list[int]] = []

    def rest(sampler, loader, until: int = 12) -> None:
        while len(batches) < until:
            for rows in loader:
                sampler.report(loss_of(rows.tolist(), len(batches)), step=len(batches) + 1)
                batches.append(rows.tolist())
                if len(batches) == until:
                    break

    rest(sampler, loader, stop)
    states = pickle.loads(pickle.dumps((sampler.state_dict(step=stop), loader.state_dict())))
    for order in ("sampler", "sampler, loader", "loader, sampler"):
        sampler, loader = made()
        for which in order.split(", "):
            (sampler if which == "sampler" else loader).load_state_dict(states[which == "loader"])
        del batches[stop:]
        rest(sampler, loader)
        assert batches == naive()
    sampler, loader = made()
    loader.load_state_dict(states[1])
    del batches[stop:]
    assert not caplog.records
    if workers and stop != 4:
        with pytest.raises(UsageError, match=r"before it (was|were) not reported yet when it was taken"):
            rest(sampler, loader)
        return
    rest(sampler, loader)
    if workers:  # at an epoch's end a note says that nothing was reported
        assert [record.message for record in caplog.records] == [
            "note: no losses were reported before epoch 1: its rows are drawn as if all had the same loss"
        ]
        assert batches == naive(since=stop) != naive()
    else:
        assert batches == naive()
        assert not caplog.records


def test_a_state_after_batches_that_were_read_ahead_says_so_once(path, monkeypatch, caplog) -> None:
    monkeypatch.delitem(sys.modules, "torchdata.stateful_dataloader")  # which takes its states so, and means it
    sampler = SelectedBatchSampler(path)
    ahead = iter(sampler)
    rows = [next(ahead) for _ in range(3)]
    sampler.state_dict()  # nobody reports: what was yielded is all that is known
    assert not caplog.records
    sampler.report(loss_of(rows[0], 0))
    states = [sampler.state_dict(), sampler.state_dict()]
    assert [state["step"] for state in states] == [3, 3]
    assert [record.message for record in caplog.records] == [
        "warning: state_dict() is after step 3, and the losses of steps 2 to 3 are not reported: it will be refused "
        "when it is loaded. Call sampler.report(losses) before state_dict(); where a DataLoader's workers read ahead, "
        "say how many steps were trained: state_dict(step=1)"
    ]
    again = SelectedBatchSampler(path)
    with pytest.raises(UsageError, match="2 batches before it were not reported yet when it was taken"):
        again.load_state_dict(states[0])
    again.load_state_dict(sampler.state_dict(step=1))
    assert [rows[0], *train(again, start=1)] == naive()


@pytest.mark.parametrize("trained", [1, 4])  # in the middle of an epoch, and at the first batch of one
def test_a_state_before_the_report_of_its_step_says_so_once(path, monkeypatch, caplog, trained) -> None:
    monkeypatch.delitem(sys.modules, "torchdata.stateful_dataloader")
    sampler = SelectedBatchSampler(path)
    batches = train(sampler, steps=trained)
    assert sampler.state_dict()["step"] == trained
    if trained % offered.BATCHES:
        sampler.seek(0, trained)  # the iterator before was left
    rows = next(iter(sampler))
    assert not caplog.records
    states = [sampler.state_dict(), sampler.state_dict()]
    assert [record.message for record in caplog.records] == [
        f"warning: state_dict() is after step {trained + 1}, and the losses of step {trained + 1} are not reported: it "
        "will be refused when it is loaded. Call sampler.report(losses) before state_dict(); where a DataLoader's "
        f"workers read ahead, say how many steps were trained: state_dict(step={trained})"
    ]
    again = SelectedBatchSampler(path)
    with pytest.raises(UsageError, match="1 batch before it was not reported yet") as caught:
        again.load_state_dict(states[0])
    for words in ("sampler.report(losses), then", "where workers read ahead", "the state of a loader"):
        assert words in caught.value.hint
    again.load_state_dict(sampler.state_dict(step=trained))
    assert batches + train(again, start=trained) == naive()
    sampler.report(loss_of(rows, trained))
    again.load_state_dict(sampler.state_dict())
    assert [*batches, rows, *train(again, start=trained + 1)] == naive()


def test_states_of_runs_that_do_not_report_say_nothing_of_it(path, monkeypatch, caplog) -> None:
    monkeypatch.delitem(sys.modules, "torchdata.stateful_dataloader")
    sampler = SelectedBatchSampler(path)
    next(iter(sampler))
    sampler.state_dict()  # it may never report
    sampler.seek(0)
    assert not caplog.records
    train(sampler, steps=4)
    list(sampler)
    next(iter(sampler))
    sampler.state_dict()
    assert [record.message[:43] for record in caplog.records] == ["note: no losses were reported in epoch 1: e"]


def test_seeking_back_in_an_epoch_draws_it_again_and_to_the_beginning_starts_over(path) -> None:
    sampler = SelectedBatchSampler(path)
    train(sampler, steps=6)
    sampler.seek(1)
    again = train(sampler, start=4)
    assert again == naive()[4:]
    with pytest.raises(UsageError, match="epoch 1 cannot be drawn again"):
        sampler.seek(1)
    sampler.seek(0)
    assert torch.isnan(sampler.losses).all()
    assert train(sampler) == naive()


def test_a_stream_that_is_open_and_a_pickled_sampler_draw_the_same(path) -> None:
    with open_selection(path) as stream:
        assert train(SelectedBatchSampler(stream)) == naive()
    sampler = SelectedBatchSampler(path)
    batches = train(sampler, steps=5)
    copy = pickle.loads(pickle.dumps(sampler))
    copy.seek(1, 1)
    assert batches + train(copy, start=5) == naive()


def test_repacked_batches_are_full_and_drop_the_rest_of_each_epoch(path) -> None:
    sampler = SelectedBatchSampler(path, batch_size=10, remainder="drop")
    batches = train(sampler)
    assert [len(rows) for rows in batches] == [10] * 6
    first = [row for rows in naive()[:4] for row in rows]
    assert batches[0] + batches[1] == first[:20]
    stopped = SelectedBatchSampler(path, batch_size=10, remainder="drop")
    begun = train(stopped, steps=3)
    again = SelectedBatchSampler(path, batch_size=10, remainder="drop")
    again.load_state_dict(stopped.state_dict(step=3))
    assert begun + train(again, start=3) == batches
    with pytest.raises(UsageError, match="drawn epoch by epoch"):
        SelectedBatchSampler(path, batch_size=10)


# Reports that are not what they should be


def unreported(draw: str) -> list[list[int]]:
    """The batches of a run in which no loss becomes known, by the definition."""
    batches = [offered.batch(seq) for seq in range(offered.EPOCHS * offered.BATCHES)]
    unknown = np.full(offered.SIZE, np.nan)
    scores = [DRAWS[draw].scores(batch.candidates, unknown, offered.CHANCE) for batch in batches]
    numbers = [rng_for(0, "draw", batch.epoch, batch.batch_id) for batch in batches]
    return [
        batch.kept[draw_rows(batch.candidates, of_rows, rng)].tolist()
        for batch, of_rows, rng in zip(batches, scores, numbers, strict=True)
    ]


def test_never_reporting_draws_as_if_all_had_one_loss_and_says_so_once(path, caplog) -> None:
    sampler = SelectedBatchSampler(path)
    with caplog.at_level(logging.WARNING, "gstds_cache"):
        batches = [rows for _ in range(3) for rows in sampler]
    assert [record.message for record in caplog.records] == [
        "note: no losses were reported before epoch 1: its rows are drawn as if all had the same loss"
    ]
    assert batches == unreported("loss-minus-reference") != unreported("prior")
    plain = offered.write(path.with_name("prior.arrow"), "prior")
    caplog.clear()
    other = SelectedBatchSampler(plain)
    assert unreported("prior") == [rows for _ in range(3) for rows in other]
    assert not caplog.records  # a draw that looks at no losses misses none


def test_an_epoch_without_reports_after_one_with_them_draws_by_the_earlier_ones(path, caplog) -> None:
    sampler = SelectedBatchSampler(path)
    train(sampler, steps=4)
    before = sampler.losses
    with caplog.at_level(logging.WARNING, "gstds_cache"):
        for _ in range(2):
            list(sampler)
    assert "no losses were reported in epoch 1: epoch 2 is drawn by earlier ones" in caplog.text
    torch.testing.assert_close(sampler.losses, before, equal_nan=True)


def test_reporting_a_part_of_an_epoch_is_an_error_when_the_next_begins(path) -> None:
    sampler = SelectedBatchSampler(path)
    for number, rows in enumerate(sampler):
        if number != 2:
            sampler.report(loss_of(rows, 0)[: len(rows)]) if number < 2 else None
    with pytest.raises(UsageError, match="2 of 4 batches of epoch 0 were not reported"):
        next(iter(sampler))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_early_is_drawn_by_as_soon_as_its_end_is_named(path, workers, caplog) -> None:
    sampler = SelectedBatchSampler(path)
    loader = DataLoader(Rows(), batch_sampler=sampler, num_workers=workers)
    for step, rows in enumerate(loader, start=1):
        sampler.report(loss_of(rows.tolist(), step - 1), step=step)
        if step == 2:
            break
    if workers:  # which had read to the epoch's end
        hint = r"if the epoch was left early: sampler.seek\(0, K\), K being .* and then sampler.seek\(1\)"
        for go_on in (lambda: sampler.seek(1), lambda: next(iter(loader))):
            with pytest.raises(UsageError, match=rf"2 of 4 batches of epoch 0 were not reported(.|\n)*{hint}"):
                go_on()
        sampler.seek(0, 2)
    sampler.seek(1)
    first = naive()[0] + naive()[1]
    known = sampler.losses
    assert set(torch.nonzero(~torch.isnan(known)).flatten().tolist()) == set(first)
    whole = SelectedBatchSampler(path)
    train(whole, steps=2)
    whole.seek(1)
    assert [rows.tolist() for rows in loader] == list(whole)
    assert not caplog.records  # there were losses


def test_a_report_too_many_or_of_another_size_or_step_is_refused_and_changes_nothing(path, no_type_checks) -> None:
    sampler = SelectedBatchSampler(path)
    with pytest.raises(UsageError, match="every batch that was yielded is reported already"):
        sampler.report([1.0])
    rows = next(iter(sampler))
    for wrong, words in (
        (torch.ones(len(rows) + 1), rf"got \[{len(rows) + 1}\], expected \[{len(rows)}\]"),
        (torch.tensor(1.5), r"got \[\], expected"),
        (torch.ones(len(rows), 1), rf"got \[{len(rows)}, 1\]"),
        ("much", "got 'much'"),
    ):
        with pytest.raises(UsageError, match=words):
            sampler.report(wrong)
    with pytest.raises(UsageError, match="got the losses of step 2, expected those of step 1"):
        sampler.report(loss_of(rows, 0), step=2)
    sampler.report(loss_of(rows, 0).numpy(), step=1)
    with pytest.raises(UsageError, match="is reported already"):
        sampler.report(loss_of(rows, 0))


def test_losses_that_are_no_numbers_leave_rows_what_they_had(path, caplog) -> None:
    sampler = SelectedBatchSampler(path)
    batches = train(sampler, steps=4)
    before = sampler.losses
    drawn = []
    with caplog.at_level(logging.WARNING, "gstds_cache"):
        for rows in sampler:
            losses = loss_of(rows, 0)
            losses[0], losses[1] = float("nan"), float("inf")
            sampler.report(losses)
            drawn.append(rows)
    assert "8 of 24 losses reported in epoch 1 are NaN or infinite" in caplog.text
    for rows in drawn:
        torch.testing.assert_close(sampler.losses[rows[:2]], before[rows[:2]], equal_nan=True)
        torch.testing.assert_close(sampler.losses[rows[2:]], loss_of(rows[2:], 0))
    assert batches


def test_a_state_asks_for_the_report_of_its_last_step(path) -> None:
    sampler = SelectedBatchSampler(path)
    batches = iter(sampler)
    sampler.report(loss_of(next(batches), 0))
    next(batches)
    with pytest.raises(UsageError, match="the losses of step 2 are not reported yet"):
        sampler.state_dict(step=2)


def test_a_state_asks_for_the_report_of_an_epochs_first_step_too(path) -> None:
    sampler = SelectedBatchSampler(path)
    next(iter(sampler))
    sampler.state_dict(step=1)  # in the first epoch nobody knows whether losses will ever be reported
    sampler.seek(0)
    train(sampler, steps=4)
    batches = iter(sampler)
    rows = next(batches)
    for of in (sampler, None):
        if of is None:  # nor after a state was loaded
            state = sampler.state_dict(step=4)
            sampler = SelectedBatchSampler(path)
            sampler.load_state_dict(state)
            assert next(iter(sampler)) == rows
        with pytest.raises(UsageError, match="the losses of step 5 are not reported yet"):
            sampler.state_dict(step=5)
    sampler.report(loss_of(rows, 4))
    assert sampler.state_dict(step=5)["step"] == 5


def test_a_state_that_lacks_no_losses_has_the_keys_it_always_had(path) -> None:
    sampler = SelectedBatchSampler(path)
    keys = {"epoch", "losses", "sha256", "steps", "rows", "reported", "rank"}
    assert sampler.state_dict()["feedback"].keys() == keys
    batches = iter(sampler)
    sampler.report(loss_of(next(batches), 0))
    assert sampler.state_dict()["feedback"].keys() == keys
    next(batches)
    assert sampler.state_dict(step=1)["feedback"].keys() == keys
    assert sampler.state_dict()["feedback"].keys() == keys | {"unreported"}


def test_a_run_that_reports_no_more_can_save_its_states(path) -> None:
    sampler = SelectedBatchSampler(path)
    train(sampler, steps=4)
    list(sampler)
    batches = iter(sampler)
    next(batches)
    state = sampler.state_dict(step=9)
    assert state["step"] == 9
    rest = list(batches)
    for number, given in enumerate(({"step": 10}, {})):  # nor does it report after it was resumed, once and again
        sampler = SelectedBatchSampler(path)
        sampler.load_state_dict(json.loads(json.dumps(state)))
        batches = iter(sampler)
        assert next(batches) == rest[number]
        state = sampler.state_dict(**given)
        assert state["step"] == 10 + number
    sampler = SelectedBatchSampler(path)
    sampler.load_state_dict(state)
    assert list(sampler) == rest[2:]


def test_a_run_that_reports_again_after_it_was_resumed_is_asked_for_its_reports(path) -> None:
    sampler = SelectedBatchSampler(path)
    train(sampler, steps=4)
    list(sampler)
    sampler.seek(2)
    state = sampler.state_dict()
    assert state["feedback"]["silent"]
    sampler = SelectedBatchSampler(path)
    sampler.load_state_dict(state)
    batches = iter(sampler)
    sampler.report(loss_of(next(batches), 8))
    assert "silent" not in sampler.state_dict()["feedback"]
    next(batches)
    with pytest.raises(UsageError, match="the losses of step 10 are not reported yet"):
        sampler.state_dict(step=10)
    with pytest.raises(UsageError, match="for its losses"):
        sampler.load_state_dict(state | {"feedback": state["feedback"] | {"silent": "yes"}})


def test_states_that_are_damaged_or_of_something_else_are_refused(path, tmp_path) -> None:
    sampler = SelectedBatchSampler(path)
    train(sampler, steps=5)
    state = sampler.state_dict(step=5)

    def load(**changes) -> None:
        SelectedBatchSampler(path).load_state_dict(state | {"feedback": state["feedback"] | changes})

    load()
    for changes in ({"sha256": "0" * 64}, {"steps": [[5, 3]]}, {"rows": "!"}, {"steps": 3}):
        with pytest.raises(IntegrityError, match="losses in it are damaged"):
            load(**changes)
    with pytest.raises(UsageError, match="got the losses of 0 rows"):
        load(losses="")
    with pytest.raises(UsageError, match="for its losses"):
        SelectedBatchSampler(path).load_state_dict({k: v for k, v in state.items() if k != "feedback"})
    other = offered.write(tmp_path / "other.arrow", selection_digest="e" * 64)
    with pytest.raises(FingerprintMismatchError, match="selection_digest"):
        SelectedBatchSampler(other).load_state_dict(state)


@pytest.mark.parametrize("begun", [0, 2, 4, 6, 9])
def test_a_state_that_is_refused_leaves_the_losses_as_they_were(path, begun) -> None:
    other = SelectedBatchSampler(path)
    train(other, steps=7)
    state = other.state_dict(step=7) | {"sha256": "0" * 64}
    sampler = SelectedBatchSampler(path, importance_weights=True)
    batches = train(sampler, steps=begun) if begun else []
    with pytest.raises(FingerprintMismatchError, match="first 7 batches are not those"):
        sampler.load_state_dict(state)
    assert sampler.step == begun
    if begun % offered.BATCHES:
        sampler.seek(*divmod(begun, offered.BATCHES))
    assert batches + train(sampler, start=begun) == naive()


def test_going_to_an_epoch_that_cannot_be_read_does_not_end_the_one_before(path) -> None:
    sampler = SelectedBatchSampler(path)
    batches = train(sampler, steps=2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    sampler.close()
    with pytest.raises(TruncatedStreamError):
        sampler.seek(2)
    path.write_bytes(whole)
    sampler.seek(0, 2)
    assert batches + train(sampler, start=2) == naive()


@pytest.mark.parametrize("failing", [1, 5])
def test_after_an_error_while_rows_are_drawn_the_run_goes_on(path, monkeypatch, failing) -> None:
    rows_of, drawn = Feedback.rows_of, []

    def interrupted(self, batch):
        drawn.append(batch.seq)
        if len(drawn) == failing + 1:
            raise KeyboardInterrupt
        return rows_of(self, batch)

    monkeypatch.setattr(Feedback, "rows_of", interrupted)
    sampler = SelectedBatchSampler(path)
    with pytest.raises(KeyboardInterrupt):
        train(sampler)
    assert sampler.step == failing
    sampler.seek(*divmod(failing, offered.BATCHES))
    assert train(sampler, start=failing) == naive()[failing:]


# Weights, own functions, other readers


def test_weights_are_of_the_batch_that_is_reported_next(path) -> None:
    sampler = SelectedBatchSampler(path, importance_weights=True)
    for _ in range(2):
        for rows in sampler:
            weights = sampler.weights()
            assert len(weights) == len(rows)
            assert weights.mean() == pytest.approx(1, abs=1e-5)
            assert weights.dtype == torch.float32
            sampler.report(loss_of(rows, 0))
    assert weights.std() > 0
    with pytest.raises(UsageError, match="no batch waits"):
        sampler.weights()
    plain = SelectedBatchSampler(path)
    next(iter(plain))
    with pytest.raises(UsageError, match="importance_weights"):
        plain.weights()


def test_weights_without_a_report_are_not_given_to_the_next_steps_rows(path) -> None:
    sampler = SelectedBatchSampler(path, importance_weights=True)
    batches = iter(sampler)
    next(batches)
    first = sampler.weights()
    next(batches)
    with pytest.raises(UsageError, match="those of step 1 were given already, and its losses are not reported"):
        sampler.weights()
    sampler.seek(0)
    next(iter(sampler))
    assert torch.equal(sampler.weights(), first)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
def test_losses_are_real_numbers_in_a_dense_tensor(path, no_type_checks) -> None:
    sampler = SelectedBatchSampler(path)
    rows = next(iter(sampler))
    losses = torch.ones(len(rows))
    quantized = torch.quantize_per_tensor(losses, 0.1, 0, torch.quint8)
    nested = [torch.nested.nested_tensor([losses], layout=layout) for layout in (torch.strided, torch.jagged)]
    for wrong in (losses.to(torch.complex64), losses.to_sparse(), losses.to("meta"), quantized, *nested):
        with pytest.raises(UsageError, match="expected a dense tensor, one real number for each row"):
            sampler.report(wrong)
    with pytest.raises(UsageError, match="`step`: got '1', expected a whole number"):
        sampler.report(losses, step="1")
    fixed = losses.numpy()
    fixed.setflags(write=False)
    sampler.report(fixed)  # without torch's warning


def test_losses_come_as_arrays_that_run_backwards_and_as_lists_of_scalars_with_their_graph(path) -> None:
    known = []
    for kind in (
        lambda losses: losses,
        lambda losses: losses.numpy()[::-1].copy()[::-1],
        lambda losses: list(losses.clone().requires_grad_() * 1),  # without torch's warning
        lambda losses: tuple(losses.tolist()),
    ):
        sampler = SelectedBatchSampler(path)
        for rows in sampler:
            sampler.report(kind(loss_of(rows, 0)))
        known.append(sampler.losses)
    for losses in known[1:]:
        torch.testing.assert_close(losses, known[0], equal_nan=True)


def test_what_cannot_be_meant_is_refused_when_the_sampler_is_made(path, no_type_checks) -> None:
    for argument, words in (
        ({"remainder": "keep"}, "`remainder`: got 'keep', expected one of carry, drop"),
        ({"draw": max}, "`draw`: got <built-in function max>, expected text"),
    ):
        with pytest.raises(UsageError, match=words):
            SelectedBatchSampler(path, **argument)


def test_a_state_with_losses_of_a_later_epoch_is_refused(path) -> None:
    state = SelectedBatchSampler(path).state_dict()
    state["feedback"]["epoch"] = 1
    with pytest.raises(IntegrityError, match="it goes on in epoch 0, and holds the losses that epoch 1 is drawn by"):
        SelectedBatchSampler(path).load_state_dict(state)


def test_a_selection_never_has_code_of_its_naming_run(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_score.py").write_text("def score(last, reference, prior):\n    return last * 0 + 1\n")
    monkeypatch.chdir(tmp_path)
    path = offered.write(tmp_path / "s.arrow", "own_score:score")
    with pytest.raises(UsageError, match="a function of your own, which a selection cannot have run by itself"):
        SelectedBatchSampler(path)
    with pytest.raises(FingerprintMismatchError, match="its file was changed"):  # this selection records no file
        SelectedBatchSampler(path, draw="own_score:score")
    with pytest.raises(FingerprintMismatchError, match="the selection was made for 'own_score:score'"):
        SelectedBatchSampler(path, draw="loss")
    named = offered.write(tmp_path / "n.arrow", "no-such-draw")
    with pytest.raises(UsageError, match="unknown draw"):
        SelectedBatchSampler(named)
    for settings in ({}, {"draw": 3}):
        broken = offered.write(tmp_path / "b.arrow", settings=settings)
        with pytest.raises(StreamError, match="says not how to draw them"):
            SelectedBatchSampler(broken)
    for chance in (0.0, -1.0, "2.3", True):
        broken = offered.write(tmp_path / "c.arrow", settings={"draw": "loss", "chance": chance})
        with pytest.raises(StreamError, match="its loss of a network that knows nothing is"):
            SelectedBatchSampler(broken)


def test_what_cannot_report_refuses_candidates_and_kept_rows_need_no_reports(path, uneven) -> None:
    with pytest.raises(UsageError, match="use SelectedBatchSampler"):
        SelectedDataset(Rows(), path)
    kept = SelectedBatchSampler(uneven[0])
    next(iter(kept))
    kept.report([1.0])  # a loop may report whatever it is given; nothing is done with it
    for call in (kept.weights, kept.share_losses, lambda: kept.losses):
        with pytest.raises(UsageError, match="the selection keeps rows"):
            call()
    for argument in ({"draw": "loss"}, {"importance_weights": True}):
        with pytest.raises(UsageError, match="the selection keeps rows"):
            SelectedBatchSampler(uneven[0], **argument)


# Ranks: one process that stands for each in turn; tests/e2e/test_feedback_ranks.py has real ones


def test_a_rank_alone_saves_a_state_that_no_other_takes(path, monkeypatch) -> None:
    monkeypatch.setattr(reports, "_joined", lambda: True)
    sampler = SelectedBatchSampler(path, rank=0, world_size=2)
    rows = next(iter(sampler))
    sampler.report(loss_of(rows, 0))
    state = sampler.state_dict(step=1)
    SelectedBatchSampler(path, rank=0, world_size=2).load_state_dict(state)
    with pytest.raises(UsageError, match=r"holds the losses of rank \[0, 2\] alone"):
        SelectedBatchSampler(path, rank=1, world_size=2).load_state_dict(state)


def test_ranks_without_a_process_group_cannot_report(path) -> None:
    sampler = SelectedBatchSampler(path, rank=0, world_size=2)
    rows = next(iter(sampler))
    with pytest.raises(UsageError, match="cannot share losses without a process group"):
        sampler.report(loss_of(rows, 0))


def test_a_slice_padded_from_other_ranks_reports_its_own_rows_alone(path, monkeypatch) -> None:
    monkeypatch.setattr(reports, "_joined", lambda: True)
    sampler = SelectedBatchSampler(path, rank=3, world_size=4, tail="pad")  # 6 rows: 2, 2, 2, and none of its own
    rows = next(iter(sampler))
    assert len(rows) == 2
    sampler.report(loss_of(rows, 0))
    assert json.loads(json.dumps(sampler.state_dict(step=1)))["feedback"]["steps"] == [[1, 0]]


def test_the_settings_of_a_header_decide_the_draw(path, tmp_path) -> None:
    damped = offered.write(tmp_path / "damped.arrow", "damped-loss")
    assert train(SelectedBatchSampler(damped)) == naive("damped-loss") != naive()
    assert replace(offered.header(), seed=1).candidates
    # One of before rows without a loss were told apart is drawn from as it was.
    before = offered.write(tmp_path / "before.arrow", settings={"draw": "loss-minus-reference", "strata": 3})
    assert train(SelectedBatchSampler(before)) == naive(chance=None) != naive()
