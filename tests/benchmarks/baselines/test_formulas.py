"""Each method against its formula, written out naively."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.study.baselines.batch_method import Offer, kept_of  # noqa: E402
from benchmarks.study.baselines.ccs import ccs  # noqa: E402
from benchmarks.study.baselines.el2n import el2n, hardest  # noqa: E402
from benchmarks.study.baselines.forgetting import ForgettingCounter  # noqa: E402
from benchmarks.study.baselines.infobatch import InfoBatch  # noqa: E402
from benchmarks.study.baselines.jest import Jest, draw_in_chunks  # noqa: E402
from benchmarks.study.baselines.k_centre import k_centre  # noqa: E402
from benchmarks.study.baselines.orderdp import OrderDP  # noqa: E402
from benchmarks.study.baselines.prototypicality import nearest_distance, prototypicality  # noqa: E402
from benchmarks.study.baselines.proxy_mask import ProxyMask  # noqa: E402
from benchmarks.study.baselines.rho_loss import RhoLoss  # noqa: E402
from benchmarks.study.baselines.rs2 import rs2  # noqa: E402
from benchmarks.study.baselines.selective_backprop import SelectiveBackprop, chances  # noqa: E402
from benchmarks.study.baselines.seta import SeTa, by_difficulty, random_share  # noqa: E402

RNG = np.random.default_rng(0)


def offer(rows, losses=None, epoch=0, epochs=8, seed=0) -> Offer:
    return Offer(np.asarray(rows), losses, epoch, epochs, np.random.default_rng(seed))


def test_infobatch_prunes_below_the_mean_and_weighs_up() -> None:
    method = InfoBatch(items=1000, prune=0.5)
    rows = np.arange(1000)
    first = method.choose(offer(rows))
    assert len(first.positions) == 1000
    assert set(first.weights.tolist()) == {1.0}
    losses = RNG.exponential(1.0, 1000).astype(np.float32)
    method.observe(rows, losses, np.ones(1000, bool))
    second = method.choose(offer(rows, epoch=1))
    learned = losses < losses.mean()
    kept = np.zeros(1000, bool)
    kept[second.positions] = True
    assert kept[~learned].all()
    assert abs(kept[learned].mean() - 0.5) < 4 * math.sqrt(0.25 / learned.sum())
    assert second.weights.tolist() == [2.0 if learned[p] else 1.0 for p in second.positions]
    # The weights undo the pruning in expectation: the sum of the losses over many draws is that of everything.
    sums = []
    for seed in range(200):
        drawn = method.choose(offer(rows, epoch=1, seed=seed))
        sums.append(float((losses[drawn.positions] * drawn.weights).sum()))
    assert np.mean(sums) == pytest.approx(losses.sum(), rel=0.01)


def test_infobatch_decides_by_the_mean_at_the_epochs_start_and_ends_on_everything() -> None:
    method = InfoBatch(items=4, prune=0.999999)
    method.observe(np.arange(4), np.array([1, 2, 3, 4], np.float32), np.ones(4, bool))
    assert method.choose(offer([1, 2], epoch=1)).positions.tolist() == [1]
    method.observe(np.array([2]), np.array([0.0], np.float32), np.ones(1, bool))
    assert method.choose(offer([1, 3], epoch=1)).positions.tolist() == [1]  # the mean is still 2.5, not 1.75
    assert method.choose(offer([1, 3], epoch=2)).positions.tolist() == [0, 1]  # now 1.75
    assert method.choose(offer([0, 1, 2, 3], epoch=7)).weights is None  # 7 of 8 is the last 12.5 %


def kept_in_epoch(method, items, *, batch, epochs, epoch, seed=0):
    """Rows a method chooses when it is offered all rows in batches, in an order of its own."""
    order = np.random.default_rng(99 + epoch).permutation(items)
    parts = np.array_split(order, range(batch, items, batch))
    return np.concatenate(
        [
            part[method.choose(offer(part, epoch=epoch, epochs=epochs, seed=seed + i)).positions]
            for i, part in enumerate(parts)
        ]
    )


def test_orderdp_keeps_the_top_of_a_random_share() -> None:
    method = OrderDP(items=100, ratio=0.75, step=8)
    losses = RNG.permutation(100).astype(np.float32)
    losses[:10] = 3.0  # never seen
    method.observe(np.arange(10, 100), losses[10:], np.ones(90, bool))
    shares = []
    for seed in range(50):
        kept = kept_in_epoch(method, 100, batch=30, epochs=60, epoch=seed, seed=seed)
        # Naively: the first batch's random numbers draw 80 of the 100, sorted by their losses, the first 25 stay.
        drawn = np.random.default_rng(seed).permutation(100)[:80].tolist()
        naive = sorted(drawn, key=lambda row: -losses[row])[:25]
        assert sorted(kept.tolist()) == sorted(naive)
        shares.append(int(losses.argmax()) in kept)
    assert abs(np.mean(shares) - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 50)
    assert len(kept_in_epoch(OrderDP(100, 0.1, 8), 100, batch=30, epochs=2, epoch=0)) == 90  # more than the share
    assert OrderDP(100, 0.75, 8).step_rows == 8


def test_orderdp_prunes_at_random_until_a_loss_is_known() -> None:
    first = [kept_in_epoch(OrderDP(40, 0.75, 4), 40, batch=16, epochs=8, epoch=0, seed=seed) for seed in range(400)]
    counts = np.bincount(np.concatenate(first), minlength=40)
    assert len(first[0]) == 10
    assert (np.abs(counts / 400 - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 400)).all()


def test_seta_slides_a_window_over_groups_of_like_losses() -> None:
    # Ten clear groups of ten rows: k-means can only find them, so the naive version sorts and cuts.
    level = RNG.permutation(np.repeat(np.arange(10), 10))
    losses = (level + RNG.uniform(-0.05, 0.05, 100)).astype(np.float32)
    method = SeTa(items=100, ratio=0.5, step=8)
    epochs = 16
    share = random_share(0.5, epochs)
    assert share == pytest.approx(0.5 * 16 / (1 + 2 + 13 * 0.5))  # epochs 0, 14 and 15 take the whole share
    for epoch in range(epochs):
        kept = kept_in_epoch(method, 100, batch=25, epochs=epochs, epoch=epoch, seed=1000 * epoch)
        drawn = np.random.default_rng(1000 * epoch).permutation(100)[: int(share * 100)]
        if epoch == 0 or epoch >= 14:
            naive = drawn
        else:
            start = epoch % 6  # ten groups, a window of five: six places
            naive = [row for row in drawn if start <= level[row] < start + 5]
        assert sorted(kept.tolist()) == sorted(naive)
        if epoch == 0:
            method.observe(np.arange(100), losses, np.ones(100, bool))


def test_seta_groups_are_those_of_the_least_squares() -> None:
    losses = np.array([5.0, 0.1, 0.2, 4.0, 0.15, 1.1, 1.0], np.float32)
    ordered = np.sort(losses)
    best = min(  # all ways to cut seven sorted numbers into three
        ((a, b) for a in range(1, 6) for b in range(a + 1, 7)),
        key=lambda cut: sum(((part - part.mean()) ** 2).sum() for part in np.split(ordered, cut)),
    )
    naive = [int(np.searchsorted(best, np.searchsorted(ordered, loss), side="right")) for loss in losses]
    assert by_difficulty(losses, 3).tolist() == naive == [2, 0, 0, 2, 0, 1, 1]
    assert by_difficulty(np.full(5, 3.0, np.float32), 10).tolist() == [0] * 5  # all alike: one group
    assert sorted(by_difficulty(np.array([2, 1, 2], np.float32), 10).tolist()) == [0, 1, 1]


def test_setas_share_spends_the_budget_where_groups_are_alike() -> None:
    for ratio, epochs in ((0.75, 8), (0.5, 30), (0.9, 8)):
        method, rows = SeTa(1000, ratio, 8), np.arange(1000)
        kept = 0
        for epoch in range(epochs):
            kept += len(kept_in_epoch(method, 1000, batch=500, epochs=epochs, epoch=epoch, seed=epoch))
            method.observe(rows, (rows % 10).astype(np.float32), np.ones(1000, bool))
        assert kept / (1000 * epochs) == pytest.approx(1 - ratio, rel=0.05)
    assert random_share(0.1, 8) == 1.0  # a window of half the groups cannot keep 90 %


def test_rho_loss_takes_the_largest_reducible_losses() -> None:
    losses, reference = RNG.random(40).astype(np.float32), RNG.random(100).astype(np.float32)
    rows = RNG.permutation(100)[:40]
    naive = sorted(range(40), key=lambda i: float(reference[rows[i]] - losses[i]))[:10]
    assert RhoLoss(reference, 0.75).choose(offer(rows, losses)).positions.tolist() == sorted(naive)


def test_jest_draws_by_softmax_of_learnability() -> None:
    scores = np.array([0.0, 1.0, 2.0, -1.0])
    counts = Counter(int(draw_in_chunks(scores, 1, np.random.default_rng(s), chunks=1)[0]) for s in range(4000))
    softmax = np.exp(scores) / np.exp(scores).sum()
    for position, chance in enumerate(softmax):
        assert abs(counts[position] / 4000 - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)
    pairs = Counter(tuple(draw_in_chunks(scores, 2, np.random.default_rng(s), chunks=2).tolist()) for s in range(4000))
    naive = softmax[2] * softmax[1] / (1 - softmax[2])  # first 2, then 1 of those left
    assert abs(pairs[2, 1] / 4000 - naive) < 4 * math.sqrt(naive * (1 - naive) / 4000)
    assert len(set(draw_in_chunks(RNG.random(512), 128, np.random.default_rng(0)).tolist())) == 128
    losses, reference = np.full(8, 1, np.float32), np.full(8, 1, np.float32)
    reference[5] = -99  # learnability 100: always drawn
    assert 5 in Jest(reference, 0.75).choose(offer(np.arange(8), losses)).positions


def test_selective_backprop_draws_by_rank_and_keeps_its_share() -> None:
    losses = RNG.permutation(8).astype(float)
    naive = [((sum(other <= loss for other in losses)) / 8) ** (8 / 2 - 1) for loss in losses]
    assert chances(losses, 2) == pytest.approx(np.array(naive) / sum(naive))
    u = (np.arange(100_000) + 0.5) / 100_000
    assert (u ** (1 / 0.25 - 1)).mean() == pytest.approx(0.25, rel=1e-3)  # why the exponent is 1/keep - 1
    chosen = SelectiveBackprop(0.75).choose(offer(np.arange(8), losses.astype(np.float32)))
    assert len(set(chosen.positions.tolist())) == 2


def test_el2n_is_the_mean_length_of_the_error() -> None:
    probabilities = RNG.dirichlet(np.ones(3), (2, 5)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1])
    naive = [
        np.mean([math.sqrt(sum((probabilities[r, i, c] - (c == labels[i])) ** 2 for c in range(3))) for r in range(2)])
        for i in range(5)
    ]
    assert el2n(probabilities, labels) == pytest.approx(naive, rel=1e-5)
    assert hardest(np.array([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3]


def test_forgetting_counts_changes_from_right_to_wrong() -> None:
    seen = RNG.random((20, 12)) < 0.5
    seen[:, 3] = False
    counter = ForgettingCounter(12)
    for right in seen:
        counter.observe(np.arange(12), np.zeros(12, np.float32), right)
    naive = [sum(1 for a, b in zip(seen[:, i], seen[1:, i], strict=False) if a and not b) for i in range(12)]
    naive[3] = max(naive) + 1  # never right
    assert counter.scores().tolist() == naive


def test_ccs_spends_from_the_smallest_stratum_up() -> None:
    scores = np.concatenate([np.full(50, 0.05), np.full(6, 0.55), np.full(30, 0.95), np.full(14, 5.0)])
    chosen = ccs(scores, 40, np.random.default_rng(0), beta=0.14, strata=10)
    # 14 dropped; strata of 6, 30 and 50: 40 // 3 = 13, of which 6 exist; then 34 // 2 = 17, and 17 are left.
    assert [int((scores[chosen] == s).sum()) for s in (0.05, 0.55, 0.95, 5.0)] == [17, 6, 17, 0]
    assert len(ccs(RNG.random(1000), 250, np.random.default_rng(0))) == 250
    assert ccs(np.ones(10), 10, np.random.default_rng(0), beta=0.9).tolist() == list(range(10))


def test_prototypicality_is_the_distance_to_the_nearest_centre() -> None:
    x = RNG.normal(size=(60, 5)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    centres = RNG.normal(size=(4, 5)).astype(np.float32)
    naive = [min(1 - a @ c / np.linalg.norm(c) for c in centres) for a in x]
    assert nearest_distance(x, centres) == pytest.approx(naive, abs=1e-6)
    tight = np.repeat(np.eye(3, 5, dtype=np.float32), 20, axis=0)
    assert prototypicality(np.concatenate([tight, x[:1]]), 3, seed=0).argmax() == 60


def test_k_centre_is_the_greedy_farthest_point() -> None:
    x = RNG.normal(size=(40, 3)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    naive = [7]
    while len(naive) < 12:
        naive.append(max(range(40), key=lambda i: min(float(((x[i] - x[j]) ** 2).sum()) for j in naive)))
    assert k_centre(x, 12, first=7).tolist() == sorted(naive)


def test_proxy_mask_takes_the_largest_proxy_losses_of_the_batch() -> None:
    losses = np.array([5, 1, 4, 2, 3, 0, 9, 8], np.float32)
    assert ProxyMask(losses, 0.5).choose(offer([5, 4, 3, 2])).positions.tolist() == [1, 3]


def test_rs2_uses_everything_before_anything_twice() -> None:
    epochs = rs2(100, 30, 10, seed=3)
    rows = np.concatenate(epochs)
    assert len(rows) == 300
    assert [len(e) for e in epochs] == [30] * 10
    for start in (0, 100, 200):
        assert sorted(rows[start : start + 100].tolist()) == list(range(100))


def test_budgets_are_those_of_a_plan() -> None:
    assert [kept_of(512, 0.75), kept_of(10, 0.7), kept_of(3, 0.99)] == [128, 3, 1]


@pytest.mark.parametrize("make", [RhoLoss, Jest, lambda _reference, ratio: SelectiveBackprop(ratio)])
def test_what_a_device_chooses_is_what_the_host_chooses(make) -> None:
    """As often, where it is drawn."""
    rng, size, draws = np.random.default_rng(3), 12, 4000
    losses, rows = rng.gamma(1.0, 1.5, size).astype(np.float32), rng.permutation(20)[:size]
    method = make(rng.random(20).astype(np.float32), 0.67)
    torch.manual_seed(0)
    there, here = np.zeros(size), np.zeros(size)
    for seed in range(draws):
        here[method.choose(Offer(rows, losses, 0, 1, np.random.default_rng(seed))).positions] += 1
        places = method.places(torch.from_numpy(losses), torch.from_numpy(rows))
        assert places.tolist() == sorted(set(places.tolist()))
        there[places.numpy()] += 1
    assert here.sum() == there.sum() == draws * kept_of(size, 0.67)
    assert np.abs(here - there).max() / draws < (0.035 if make is not RhoLoss else 1e-9)
    assert np.ptp(here) > 0
