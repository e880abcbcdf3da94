"""The study's own arithmetic, its settings, its data, and that the document says what the lines say."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from forked import Forks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import demo  # noqa: E402
from benchmarks.study import glyphs  # noqa: E402
from benchmarks.study.__main__ import parse, tasks_of  # noqa: E402
from benchmarks.study.analysis import OFTEN, Cost, Line, Study, paired  # noqa: E402
from benchmarks.study.data import StudyData  # noqa: E402
from benchmarks.study.document import placed  # noqa: E402
from benchmarks.study.lines import RESULTS, append, read_lines  # noqa: E402
from benchmarks.study.methods import BASELINES, find_method  # noqa: E402
from benchmarks.study.runs import Task, selection_of  # noqa: E402
from benchmarks.study.scores import Scores  # noqa: E402
from benchmarks.study.settings import load_setting, names, resolved  # noqa: E402
from benchmarks.study.tables import (  # noqa: E402
    BEGIN,
    DOCUMENT,
    END,
    WAYS,
    advice_table,
    agrees,
    all_intervals,
    intervals_across,
    of_one_processor,
    ordered_pairs,
    render,
    studies_of,
    why_no_seconds,
)
from benchmarks.study.tune import best, tried  # noqa: E402
from gstds_cache.auditing.labels import find_doubts, predict  # noqa: E402
from gstds_cache.config import AuditConfig  # noqa: E402
from gstds_cache.data.sources import open_source  # noqa: E402
from gstds_cache.errors import DatasetError, UsageError  # noqa: E402
from gstds_cache.selection.linear_probe import ProbeSettings  # noqa: E402
from gstds_cache.stream.reader import open_selection  # noqa: E402


def line(method: str, seed: int, accuracy: float, seconds: float, *, epochs: int = 8, **more):
    return {
        "kind": "run",
        "method": method,
        "ratio": 0.0 if method == "full" else 0.75,
        "epochs": epochs,
        "seed": seed,
        "test_accuracy": accuracy,
        "seconds": {},
        "cpu_seconds": {"train": seconds, "warm-up": 99.0},
        "embeds": False,
        "needs": [],
        "cores": 2,
        "steps": 100 * epochs,
        **more,
    }


def test_every_setting_is_one_and_steps_do_not_depend_on_the_ratio() -> None:
    for name in names():
        setting = load_setting(name)
        assert setting.train_config(0).arch == setting.arch
        for ratio in (0.5, 0.75, 0.9):
            rows = setting.rows_before(ratio)
            assert rows - int(ratio * rows + 1e-9) == setting.step
    assert {"cifar10-resnet18", "pets-resnet18", "flowers-resnet18"} <= set(names())
    assert load_setting("cifar10-resnet18").arch == "torchvision:resnet18"
    with pytest.raises(UsageError, match="there is"):
        load_setting("nothing")
    with pytest.raises(UsageError, match="NOT_SET_ANYWHERE"):
        resolved("imagefolder:$NOT_SET_ANYWHERE/x")


def test_methods_are_the_baselines_and_every_rule() -> None:
    assert len(BASELINES) == 15
    assert find_method("coverage@linear:0.5:0.9").schedule == "linear:0.5:0.9"
    assert find_method("coverage").embeds
    assert not find_method("random").embeds
    for wrong in ("nonsense", "draw:loss^", "draw:loss+more", "draw:loss+by-class"):
        with pytest.raises(UsageError, match="no method"):
            find_method(wrong)
    with pytest.raises(UsageError, match="unknown draw"):
        find_method("draw:nonsense")
    drawn = find_method("draw:damped-loss^4/none+weights@linear:0.5:0.9")
    assert (drawn.draw, drawn.strata, drawn.guidance, drawn.importance_weights) == ("damped-loss", 4, "none", True)
    assert (drawn.schedule, drawn.embeds, drawn.needs) == ("linear:0.5:0.9", True, {"probe"})
    assert not find_method("draw:uniform^1").embeds
    names = ("draw:adaptive", "draw:adaptive+by-class", "draw:loss", "variant:form=damped", "variant:form=loss")
    assert [find_method(name).reference for name in names] == ["raw", "by-class", "raw", "raw", "raw"]
    assert find_method("draw:loss-squared^1/none@constant:0.9%1").batch_assignments == 1
    assert find_method("draw:loss-squared^1/none@constant:0.9%1").schedule == "constant:0.9"


def test_tasks_are_interleaved_seed_by_seed_and_full_runs_once() -> None:
    arguments = parse(["glyphs", "--methods", "full,random,random*2", "--ratios", "0.5,0.9", "--seeds", "3-4"])
    tasks = list(tasks_of(arguments, "glyphs"))
    assert [task.seed for task in tasks] == [3] * 5 + [4] * 5
    assert tasks[:3] == [
        Task("glyphs", "full", 0.0, 8, 3, 0.8),
        Task("glyphs", "random", 0.5, 8, 3, 0.8),
        Task("glyphs", "random", 0.5, 16, 3, 0.8),
    ]


def test_intervals_are_of_paired_differences() -> None:
    interval = paired([0.01, 0.02, 0.03])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, 2.0 - 2.4841, 2.0 + 2.4841), abs=1e-4)
    verdicts = [paired(values).verdict for values in ([0.02, 0.021, 0.022], [0.01, 0.02, 0.03], [-0.01] * 5, [0.1] * 2)]
    assert verdicts == ["ahead", "not told apart", "behind", "too few seeds"]
    assert str(paired([0.01])) == "+1.00 [one seed]"
    study = Study((line("a", 0, 0.9, 1), line("a", 1, 0.8, 1), line("b", 1, 0.7, 1), line("b", 0, 0.85, 1)))
    assert study.difference("a", "b", 0.75, 8).mean == pytest.approx(7.5)
    assert study.difference("a", "full", 0.75, 8) is None


def test_equal_wall_clock_reads_the_reference_between_its_budgets() -> None:
    runs = [
        line("random", 0, 0.90, 10),
        line("random", 0, 0.94, 40, epochs=32),
        line("slow", 0, 0.93, 20),
        line("slower", 0, 0.93, 400),
        line("quick", 0, 0.93, 1),
    ]
    study = Study(tuple(runs))
    assert study.at_equal_clock("slow", "random", 0.75, 8).mean == pytest.approx(1.0)  # half way in log seconds: 0.92
    assert study.at_equal_clock("slower", "random", 0.75, 8).beyond == 1
    # A longer budget that was measured while the machine was slow counts at the pace of the shortest.
    loaded = Study((runs[0], line("random", 0, 0.94, 95, epochs=32), *runs[2:]))
    assert loaded.at_equal_clock("slow", "random", 0.75, 8) == study.at_equal_clock("slow", "random", 0.75, 8)
    assert study.at_equal_clock("quick", "random", 0.75, 8) is None


def test_all_costs_are_counted_and_the_caches_is_shared() -> None:
    embedding = {"kind": "embedding", "seconds": 150.0, "cpu_seconds": 200.0, "cores": 2}
    probe = {"kind": "scores", "need": "probe", "cpu_seconds": 10.0}
    early = {"kind": "scores", "need": "early", "cpu_seconds": 7.0}
    guided = line("default", 0, 0.9, 5, embeds=True, needs=["probe"])
    scored = line("el2n", 0, 0.9, 5, needs=["early"])
    study = Study((embedding, probe, early, guided, scored, line("full", 0, 0.9, 26)))
    assert study.clock(guided, 1) == pytest.approx(5 + 200 + 10)
    assert study.clock(guided, 20) == pytest.approx(5 + 210 / 20)
    assert study.clock(scored, 20) == pytest.approx(12)
    assert study.break_even(0.75, 8, "default") == pytest.approx(210 / 21)


def test_a_trial_of_guidance_is_shared_whichever_run_made_it() -> None:
    runs = [line(name, 0, 0.9, 5, embeds=True, guidance="auto") for name in ("default", "draw:damped-loss")]
    runs[0]["cpu_seconds"]["trial"], runs[1]["cpu_seconds"]["trial"] = 8.0, 0.1
    rival = line("jest", 0, 0.9, 5, embeds=True, guidance="auto")  # which had no trial
    study = Study((*runs, rival, line("full", 0, 0.9, 25)))
    assert [study.clock(run, OFTEN) for run in study.runs] == [5, 5, 5, 25]
    assert [study.clock(run, 4) for run in study.runs] == [7, 7, 5, 25]
    embedded = Study((*study.lines, {"kind": "embedding", "seconds": 9.0, "cpu_seconds": 12.0, "cores": 2}))
    assert embedded.break_even(0.75, 8) == (12 + 8) / 20


def test_on_a_gpu_the_wall_clock_counts_and_the_selection_may_be_there() -> None:
    def on_gpu(method: str, accuracy: float, step: float, epochs: int = 8, select: float = 1.0) -> Line:
        phases = {"images": 9.0, "warm-up": 5.0, "trial": 4.0, "select": select, "indices": 0.25, "step": step}
        more = {"device": "cuda", "gpu": "H", "jobs": 1, "seconds": phases}
        return {**line(method, 0, accuracy, 100.0, epochs=epochs), **more}

    runs = [
        on_gpu("random", 0.90, 0.75),
        on_gpu("random", 0.94, 2.75, 16),
        on_gpu("draw:damped-loss", 0.93, 1.0, select=1.578),
    ]
    study = Study(tuple(runs))
    assert [study.clock(run, OFTEN) for run in runs] == pytest.approx([2.0, 4.0, 2.828])
    assert study.clock(runs[0], 1) == 2.0
    assert study.at_equal_clock("draw:damped-loss", "random", 0.75, 8).mean == pytest.approx(1.0, abs=0.01)


def test_the_cost_of_an_accuracy_is_read_between_budgets_of_seeds_that_ran_the_largest() -> None:
    def of(seed: int, accuracy: float, seconds: float, samples: int, epochs: int = 8) -> Line:
        return line("random", seed, accuracy, seconds, epochs=epochs, gradient_samples=samples, steps=epochs)

    runs = [of(0, 0.90, 1, 100), of(0, 0.94, 4, 400, 32), of(1, 0.89, 1, 100), of(1, 0.93, 4, 400, 32)]
    study = Study((*runs, of(2, 0.91, 1, 100)))  # the third never ran the longer budget: it is no failure
    cost = study.cost_to("random", 0.75, 0.92)
    assert (cost.seeds, cost.smallest, cost.largest) == (2, 100, 400)
    assert cost.reached == pytest.approx((200, 100 * 4**0.75))  # half way and three quarters of the way, in logarithms
    low, middle, high = np.exp(np.log(4) * (0.625 + scipy.stats.t.ppf(0.975, 1) * 0.125 * np.array([-1, 0, 1])))
    assert cost.as_share(100.0) == f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    seconds = study.cost_to("random", 0.75, 0.92, OFTEN)
    assert seconds.reached == pytest.approx((2, 4**0.75))
    assert study.cost_to("random", 0.75, 0.935).as_share(100.0) == "more than 4.00"  # the median of 2
    assert study.cost_to("random", 0.75, 0.95).as_share(800.0) == "more than 0.50"
    assert study.cost_to("random", 0.75, 0.80).as_share(200.0) == "at most 0.50"
    assert study.cost_to("default", 0.75, 0.95) is None
    assert Cost((10, 10, 10), 4, 10, 40).as_share(20) == "at most 0.50, median"
    assert Cost((10, 10, 14), 3, 10, 40).as_share(20).startswith("at most 0.56 [")


def test_advice_is_graded_by_what_it_names_and_by_the_order_of_the_pairs_that_networks_tell_apart() -> None:
    accuracies = {"random": 0.60, "default": 0.50, "draw:loss-minus-reference": 0.70, "draw:damped-loss": 0.601}
    runs = [
        line(method, seed, accuracy + 0.001 * (seed - 1) * (method in {"draw:damped-loss", "draw:adaptive"}), 1)
        for method, accuracy in (accuracies | {"draw:adaptive": 0.601}).items()
        for seed in range(3)
    ]
    foretold = {"full": 0.0, "random": 0.0, "default": 0.1, "loss-minus-reference": 0.2, "damped-loss": 0.3}
    foretold["loss-squared"] = 0.4  # which networks did not try
    advice = {
        "kind": "advice", "ratio": 0.75, "epochs": 8, "advised": "damped-loss", "setting": "s",
        "forecasts": [{"way": way, "over_random": over} for way, over in foretold.items()],
    }  # fmt: skip
    study = Study((*runs, advice))
    # Told apart: default behind the other three, the difference ahead of them. Probes have default ahead of random, and
    # the difference behind the damped loss.
    assert ordered_pairs(study, advice) == [False, True, True, True, False]
    text = advice_table({"s": study})
    assert "right 0, wrong 0, a draw named and networks not told apart from random 1" in text
    assert "| adaptive | not told apart |" in text
    better = [one for one in runs if one["method"] != "draw:adaptive"]
    better += [line("draw:adaptive", seed, 0.7, 1) for seed in range(3)]
    assert "| adaptive | yes |" in advice_table({"s": Study((*better, advice))})
    squared = advice | {"advised": "loss-squared"}
    assert "| loss-squared | not run |" in advice_table({"s": Study((*runs, squared))})
    assert "said rightly on 1." in text
    assert "3 of 5 in all" in text
    networks = {way: study.difference(method, "random", 0.75, 8) for way, method in WAYS.items()}
    assert [agrees(way, networks) for way in (*WAYS, None)] == [False, True, None, None, False]


def test_a_method_that_ran_on_another_processor_alone_takes_no_seconds_from_the_others() -> None:
    here = [line(method, seed, 0.6, 1) | {"cpu": "A"} for method in ("random", "full", "default") for seed in range(3)]
    there = [line("draw:adaptive", seed, 0.7, 1) | {"cpu": "B"} for seed in range(3)]
    assert {one["method"] for one in of_one_processor(Study((*here, *there))).runs} == {"random", "full", "default"}
    assert why_no_seconds(Study((*here, *there))) == "they are of two processors"
    assert why_no_seconds(of_one_processor(Study((*here, *there)))) == ""
    mixed = [*here, *there, line("random", 3, 0.6, 1) | {"cpu": "B"}]
    assert why_no_seconds(of_one_processor(Study(tuple(mixed)))) == "they are of two processors"


def test_each_method_gets_the_best_of_the_same_learning_rates() -> None:
    runs = [
        line(method, seed, accuracy, 1, lr=lr)
        for seed in (0, 1)
        for method, lr, accuracy in (("a", 0.1, 0.5), ("a", 0.2, 0.6), ("b", 0.1, 0.7), ("b", 0.2, 0.7))
    ]
    found = tried([*runs, line("a", 0, 0.9, 1, lr=0.8, epochs=4), line("c", 0, 0.9, 1, lr=0.1)], 8)
    assert {method: best(rates) for method, rates in found.items()} == {"a": 0.2, "b": 0.1}
    with pytest.raises(UsageError, match="not the same learning rates"):
        tried(runs[:-1], 8)


def test_glyphs_come_from_whole_families_and_variants_differ_in_what_they_say() -> None:
    train, unseen = glyphs.train("built-in"), glyphs.unseen("built-in")
    families = [{name.split("/")[1] for name in part.ids} for part in (train, unseen)]
    assert not families[0] & families[1]
    assert len(train) + len(unseen) == 24 * 52
    noisy = glyphs.train("built-in", noise="0.3")
    assert np.array_equal(noisy.images, train.images)
    assert (noisy.targets != train.targets).sum() == round(0.3 * len(train))
    doubled = glyphs.train("built-in", doubled="0.5")
    assert len(doubled) == len(train) * 3 // 2
    assert len(set(doubled.ids)) == len(doubled)
    rare = np.bincount(glyphs.train("built-in", imbalance="10").targets)
    assert rare.max() / rare.min() == pytest.approx(10, rel=0.2)
    assert len(glyphs.train("built-in", items="100")) == 100
    assert np.array_equal(glyphs.train("built-in", noise="0.3").targets, noisy.targets)
    with pytest.raises(DatasetError, match="texlive-fonts-extra"):
        glyphs.train(str(ROOT / "benchmarks" / "study"))


def test_glyphs_are_a_data_set_by_name(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    source = open_source("benchmarks.study.glyphs:unseen?fonts=built-in")
    assert source.image(0).size == (28, 28)
    assert not source.mirror_safe
    assert len(source.classes) == 26


def test_a_torn_line_is_not_read(tmp_path) -> None:
    append(tmp_path / "a.jsonl", {"kind": "run"})
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"kind": "ru')
    assert read_lines(tmp_path / "a.jsonl") == [{"kind": "run"}]


def test_the_document_says_what_the_lines_say() -> None:
    text = DOCUMENT.read_text()
    assert placed(text, render(), BEGIN, END) == text, "run: python -m benchmarks.study.tables"
    assert text.count(BEGIN) == text.count(END) == 1


def test_the_study_runs_and_goes_on_where_it_stopped(tmp_path, forks: Forks) -> None:
    command = [
        *(str(ROOT / "benchmarks" / "study" / "__main__.py"), "glyphs-smoke", "--seeds", "1"),
        *("--methods", "full,random,infobatch,seta,orderdp,el2n,forgetting,selective-backprop"),
        *("--folder", str(tmp_path / "study"), "--results", str(tmp_path / "results")),
    ]
    where = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    first = forks.start(command, **where)
    _, errors = first.communicate(300)
    assert first.returncode == 0, errors
    path = tmp_path / "results" / "glyphs-smoke.jsonl"
    lines = read_lines(path)
    runs = {one["method"]: one for one in lines if one["kind"] == "run"}
    assert set(runs) == {"full", "random", "infobatch", "seta", "orderdp", "el2n", "forgetting", "selective-backprop"}
    assert [one["need"] for one in lines if one["kind"] == "scores"] == ["early", "forgetting"]
    assert runs["full"]["gradient_samples"] == 2 * 832
    assert runs["random"]["gradient_samples"] == runs["el2n"]["gradient_samples"] == 2 * 832 // 4
    assert runs["selective-backprop"]["forward_samples"] == 2 * 832
    assert {run["norm_samples"] for run in runs.values()} == {832}
    assert all(run["seconds"]["norms"] > 0 for run in runs.values())
    assert 0 < runs["infobatch"]["gradient_samples"] < 2 * 832
    for name in ("seta", "orderdp"):  # of two epochs the last and the first are at random: SeTa's budget is exact
        assert runs[name]["forward_samples"] == 0
        assert runs[name]["gradient_samples"] == 32 * runs[name]["steps"]
        assert 0 <= 2 * 832 // 4 - runs[name]["gradient_samples"] < 3 * 32  # few are left at the end
    assert all(math.isfinite(run["loss"]) and run["commit"] for run in runs.values())
    out, errors = forks.start(command, **where).communicate(300)
    assert "0 runs to do, 8 there" in out, errors
    assert read_lines(path) == lines
    text = render(tmp_path / "results")
    assert "| el2n | 1 |" in text


@pytest.fixture
def smoke(tmp_path, monkeypatch) -> StudyData:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    train = "benchmarks.study.glyphs:train?fonts=built-in&noise=0.3"
    setting = replace(load_setting("glyphs-smoke"), train=train, order="class-balanced", audited=True)
    made = StudyData(setting, tmp_path)
    made.embed([])
    return made


def test_rows_with_doubtful_labels_are_hidden_and_classes_come_by_turns(smoke, tmp_path) -> None:
    store = smoke.store
    doubts = find_doubts(predict(store, ProbeSettings(), threads=1, device=torch.device("cpu")), store.labels,
                         AuditConfig().rank)  # fmt: skip
    assert 0 < len(store.hidden) < len(store)
    smoke.embed([])  # once for all
    np.testing.assert_array_equal(smoke.store.hidden, store.hidden)
    assert not set(doubts.row.tolist()) & set(store.hidden.tolist())  # what is hidden is looked at no more
    scores = Scores(smoke)
    scores.prepare("probe")
    for method, strata in (("draw:loss", 0), ("draw:loss^4", 4), ("random", None), ("full", None), ("jest", None)):
        task = Task("glyphs-smoke", method, 0.0 if method == "full" else 0.75, 2, 0, 0.05)
        path = selection_of(task, find_method(method), smoke, scores, tmp_path, {}, {})
        with open_selection(path) as stream:
            assert stream.header.settings["order"] == "class-balanced"
            assert stream.header.settings.get("strata") == strata
            rows = np.concatenate([batch.kept for batch in stream])
        assert not set(rows.tolist()) & set(store.hidden.tolist())


def test_the_demo_says_what_to_expect_of_so_few_images(tmp_path) -> None:
    def runs(accuracy: float, seconds: float) -> list[dict]:
        return [{"test_accuracy": accuracy, "seconds": {"total": seconds, "eval": 1.0}}]

    lines = [("everything", runs(0, 9), runs(0.98, 12)), ("random", [], []), ("selected", runs(0, 2), runs(0.965, 4))]
    few = demo.what_to_expect(lines, tmp_path)
    assert "Selecting took 2.0 s, training on a quarter 3.0 s instead of 11.0 s, and accuracy is 1.50 points" in few
    for method, accuracy in (("random", 0.6), ("draw:loss-minus-reference", 0.65)):
        rate = load_setting("cifar10").lr_of(method)
        append(tmp_path / "cifar10.jsonl", line(method, 0, accuracy, 1, lr=rate))
    text = demo.what_to_expect(lines, tmp_path)
    assert text.startswith(few)
    assert "drawn by training losses reached 65.0 %, a random quarter 60.0 %" in text


def test_intervals_in_prose_are_those_of_the_lines() -> None:
    one = r"([+-]?\d+\.\d+)"

    def intervals(text: str) -> set[tuple[str, ...]]:
        found = re.finditer(rf"{one}\s+\[{one},\s+{one}\]", text)
        return {tuple(part.lstrip("+") for part in match.groups()) for match in found}

    quoted = {
        (document, *interval)
        for document in ("README.md", "docs/method.md", "docs/results.md")
        for interval in intervals((ROOT / document).read_text().split(BEGIN)[0])
    }
    assert len(quoted) > 30
    studies = studies_of(RESULTS)
    every = {interval for study in studies.values() for interval in all_intervals(study)}
    for name, study in studies.items():
        against = load_setting(name).against
        every |= intervals_across(study, studies[against]) if against else set()
    known = {
        tuple(f"{end:.{digits}f}" for end in (interval.mean, interval.low, interval.high))
        for interval in every
        for digits in (1, 2)
    }
    known |= intervals(render())  # shares of what everything took are in the tables alone
    assert {one for one in quoted if one[1:] not in known} == set()
