"""The study's tables, from its result lines into docs/study.md, between markers.

python -m benchmarks.study.tables            # write them
python -m benchmarks.study.tables --check    # exit code 1 if the document says something else
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np

from benchmarks.study.analysis import OFTEN, Interval, Line, Study, paired
from benchmarks.study.document import DOCS, write_or_check
from benchmarks.study.lines import RESULTS, read_lines
from benchmarks.study.methods import BASELINES
from benchmarks.study.settings import Setting, load_setting
from benchmarks.study.tune import best, tried
from gstds_cache.selection.advice import PARTS

DOCUMENT = DOCS / "study.md"
BEGIN, END = "<!-- study:begin (python -m benchmarks.study.tables) -->", "<!-- study:end -->"
ORDER = ("full", "random", "default", *(name for name in BASELINES if name not in {"full", "random"}))
TAUGHT = ("draw:loss-minus-reference", "draw:damped-loss", "draw:loss-squared^1")
LARGEST = ("draw:largest-damped-loss", "draw:largest-loss-minus-reference^1")
RELATIVE = ("draw:adaptive+by-class", "draw:largest-damped-loss+by-class")
DRAWN = (*LARGEST, "draw:adaptive", *RELATIVE, *TAUGHT)
WAYS = {"default": "default", **{method.removeprefix("draw:").partition("^")[0]: method for method in TAUGHT}}
"""Of ``gstds-cache advise``, and the methods that are the same: a draw has the strata that suit it."""
TAKEN = WAYS | dict.fromkeys(PARTS, "draw:adaptive")
"""Of each way the method that is advised where probes learn most from it, and that ``draw="auto"`` takes."""
WORTH = "loss-minus-reference"
SHARING = ("default", *DRAWN)
SHARES = ((1, "1"), (5, "5"), (20, "20"), (OFTEN, "the cache is there"))
"""Experiments on one cache."""
PHASES = ("images", "indices", "step")  # of training
RIVALS = (
    "random",
    "rs2",
    "k-centre",
    "infobatch",
    "seta",
    "orderdp",
    "jest",
    "rho-loss",
    "selective-backprop",
    "guided",
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def shown(interval: Interval | None) -> str:
    return "" if interval is None else str(interval)


def study_tables(study: Study, name: str) -> str:
    """All tables of one setting."""
    setting = load_setting(name)
    if name.endswith("-validation"):
        return _tuning(study, name)
    parts = [f"### {name}\n\n{setting.about}. {_settings_line(study, name)}"]
    ratios = sorted({line["ratio"] for line in study.runs if line["method"] != "full"})
    whole, study = study, of_one_processor(study)
    apart = {line["method"] for line in whole.runs} - {line["method"] for line in study.runs}
    if why_no_seconds(study):
        parts += [*(_accuracies(whole, ratio, setting.epochs) for ratio in ratios), _compute(whole)]
        return "\n\n".join(filter(None, parts))
    parts += [_main_table(study, ratio, setting.epochs) for ratio in ratios]
    ratio = 0.75
    budgets = "" if study.on_gpu else _budgets(study, ratio, setting.epochs)
    parts += [part for part in (_compute(study), budgets) if part]
    parts += [part for part in (_rivals(study, ours, ratio, setting.epochs) for ours in ("default", *DRAWN)) if part]
    if apart:
        others = [line for line in whole.lines if line["kind"] != "run" or line["method"] in {"full", "random", *apart}]
        both = (_accuracies(Study(tuple(others)), ratio, setting.epochs) for ratio in ratios)
        parts += ["Run on another processor, whose seconds are not compared:", *both]
    return "\n\n".join(parts)


def of_one_processor(study: Study) -> Study:
    """The study without methods of which every run was on another processor than those of random rows."""
    usual = {_processor(line) for line in study.runs if line["method"] == "random"}
    known = {line["method"] for line in study.runs if _processor(line) in usual or not usual}
    return Study(tuple(line for line in study.lines if line["kind"] != "run" or line["method"] in known))


def why_no_seconds(study: Study) -> str:
    """Why the seconds of a setting's runs tell nothing of one beside another; empty where they do."""
    if any("device" in line and line["jobs"] > 1 for line in study.runs):
        return "several shared a GPU"
    return "" if len(_processors(study)) == 1 else "they are of two processors"


def _processors(study: Study) -> list[str]:
    return sorted({_processor(line) for line in study.runs})


def _processor(line: Line) -> str:
    return str(line["gpu"] if "device" in line else line["cpu"])


def _settings_line(study: Study, name: str) -> str:
    setting, why = load_setting(name), why_no_seconds(of_one_processor(study))
    jobs = f"up to {max(line['jobs'] for line in study.runs)} at a time"
    if not why:
        jobs = (
            f"{study.runs[0]['jobs']} at a time, {'selecting with one thread' if study.on_gpu else 'one thread each'}"
        )
    return (
        f"`{setting.arch}`, {setting.image_size} pixels, {setting.epochs} epochs, steps of {setting.step}, "
        f"learning rate {setting.lr}{_rates(setting.lrs)}. {len(study.runs)} runs, "
        f"{' and '.join(_processors(study))}, {jobs}{f': seconds are left out, as {why}' if why else ''}."
    )


def _rates(lrs: dict[str, float]) -> str:
    return f" ({', '.join(f'{name} {rate:g}' for name, rate in lrs.items())})" if lrs else ""


def _tuning(study: Study, name: str) -> str:
    """Learning rates that were tried on validation data, for each number of epochs."""
    parts = [f"### {name}\n\n{load_setting(name).about}."]
    for epochs in sorted({line["epochs"] for line in study.runs}):
        searched = tried(study.runs, epochs)
        rates = sorted({rate for found in searched.values() for rate in found})
        rows = [
            [method, *(f"{100 * searched[method][rate]:.2f}" for rate in rates), f"{best(searched[method]):g}"]
            for method in sorted(searched)
        ]
        if rows:
            parts.append(f"Learning rates tried, {epochs} epochs, accuracy in % on validation data:")
            parts.append(table(("method", *(f"{rate:g}" for rate in rates), "taken"), rows))
    return "\n\n".join(parts)


def _compute(study: Study) -> str:
    """What reaching the accuracy of training on everything takes, for each number of epochs that it was trained for."""
    budgets = {line["epochs"] for line in study.runs if line["method"] == "full"}
    if not budgets or len({line["epochs"] for line in study.runs}) < 2:
        return ""
    counted = [(None, "gradient samples")]
    if not why_no_seconds(study):
        counted.append((OFTEN, f"{_unit(study)} seconds, the cache there"))
        counted += [] if study.on_gpu else [(5, "shared by 5"), (1, "not shared")]
    head, parts = ("method", "ratio", "seeds that got there", *(words for _, words in counted)), []
    for most in sorted(budgets):
        everything = study.of("full", 0.0, most).values()
        target = float(np.mean([line["test_accuracy"] for line in everything]))
        spent = [np.mean([_spent(study, line, shared) for line in everything]) for shared, _ in counted]
        rows = []
        for method, ratio in sorted({(line["method"], line["ratio"]) for line in study.runs} - {("full", 0.0)}):
            costs = [study.cost_to(method, ratio, target, shared) for shared, _ in counted]
            known = [cost for cost in costs if cost is not None]
            if known and known[0].seeds > 2:
                shares = [cost.as_share(float(of)) for cost, of in zip(known, spent, strict=True)]
                rows.append([method, f"{ratio:g}", f"{len(known[0].reached)} of {known[0].seeds}", *shares])
        if rows:
            text = (
                f"Compute to the accuracy of everything in {most} epochs ({100 * target:.2f} %), as a share of what "
                "that took; 95 % intervals, of the seeds that ran the method's largest budget:\n\n"
            )
            parts.append(text + table(head, rows))
    return "\n\n".join(parts)


def _unit(study: Study) -> str:
    return "GPU" if study.on_gpu else "core"


def _spent(study: Study, line: Line, experiments: float | None) -> float:
    return float(line["gradient_samples"] if experiments is None else study.clock(line, experiments))


def _main_table(study: Study, ratio: float, epochs: int) -> str:
    found = {line["method"] for line in study.runs if line["epochs"] == epochs}
    rows = []
    for method in [*ORDER, *sorted(found - set(ORDER))]:
        runs = study.of(method, ratio, epochs)
        if not runs:
            continue
        accuracies = [100 * line["test_accuracy"] for line in runs.values()]
        spread = f" ± {np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
        equal = None if method in {"random", "full"} else study.at_equal_clock(method, "random", ratio, epochs)
        rows.append(
            [
                _named(method, runs),
                str(len(runs)),
                f"{np.mean(accuracies):.2f}{spread}",
                f"{np.mean([line['gradient_samples'] for line in runs.values()]):,.0f}",
                f"{np.mean([line['forward_samples'] + line.get('norm_samples', 0) for line in runs.values()]):,.0f}",
                f"{np.mean([study.clock(line, OFTEN) for line in runs.values()]):.1f}",
                *(
                    [f"{np.mean([study.clock(line, OFTEN) - line['seconds']['select'] for line in runs.values()]):.1f}"]
                    if study.on_gpu
                    else []
                ),
                "" if method == "full" else shown(study.difference(method, "full", ratio, epochs)),
                "" if method in {"random", "full"} else shown(study.difference(method, "random", ratio, epochs)),
                "" if equal is None else f"{equal} {_verdict(equal)}",
            ]
        )
    head = (
        *("method", "seeds", "accuracy %", "gradient samples", "forward samples", f"{_unit(study)} s, cache there"),
        *(["the selection there, too"] if study.on_gpu else []),
        *("minus full", "minus random, same epochs", "minus random, same seconds"),
    )
    return f"Filter ratio {ratio}:\n\n" + table(head, rows)


def _named(method: str, runs: dict[int, Line]) -> str:
    return f"{method} (`{next(iter(runs.values()))['rule']}`)" if method == "default" else method


def _accuracies(study: Study, ratio: float, usual: int) -> str:
    """Accuracies at every number of epochs, and no seconds."""
    rows = []
    found = {(line["method"], line["epochs"]) for line in study.runs}
    names = [*ORDER, *sorted({method for method, _ in found} - set(ORDER))]
    for method, epochs in sorted(found, key=lambda one: (names.index(one[0]), one[1])):
        runs = study.of(method, ratio, epochs)
        if not runs:
            continue
        accuracies = [100 * line["test_accuracy"] for line in runs.values()]
        spread = f" ± {np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
        full = None if method == "full" else study.difference(method, "full", ratio, epochs, b_epochs=usual)
        alike = round(epochs * (1 - ratio))  # of everything: as many gradients
        less = None if method == "full" else study.difference(method, "full", ratio, epochs, b_epochs=alike)
        random = None if method in {"random", "full"} else study.difference(method, "random", ratio, epochs)
        rows.append([
            *(_named(method, runs), str(epochs), str(len(runs)), f"{np.mean(accuracies):.2f}{spread}"),
            f"{np.mean([line['gradient_samples'] for line in runs.values()]):,.0f}",
            *(shown(full), shown(less), shown(random)),
        ])  # fmt: skip
    head = (
        *("method", "epochs", "seeds", "accuracy %", "gradient samples"),
        *(f"minus full in {usual} epochs", "minus full, as many gradients", "minus random, same epochs"),
    )
    return f"Filter ratio {ratio}:\n\n" + table(head, rows)


def _against(study: Study, other: Study, name: str) -> str:
    """Methods of a setting beside those of another one of the same images, paired by seed."""
    setting, ratio = load_setting(name), 0.75
    head = [method for method in (*ORDER, *DRAWN) if other.of(method, ratio, setting.epochs)]
    rows = []
    for method, epochs in sorted({(line["method"], line["epochs"]) for line in study.runs}):
        ours, row = study.of(method, ratio, epochs), []
        for against in head:
            theirs = other.of(against, ratio, setting.epochs)
            seeds = sorted(ours.keys() & theirs.keys())
            pairs = [ours[seed]["test_accuracy"] - theirs[seed]["test_accuracy"] for seed in seeds]
            row.append(shown(paired(pairs) if pairs else None))
        rows.append([method, str(epochs), *row])
    return f"Minus methods of *{setting.against}* in {setting.epochs} epochs:\n\n{table(('', 'epochs', *head), rows)}"


def _verdict(interval: Interval) -> str:
    return {
        "ahead": "**ahead**",
        "behind": "behind random",
        "not told apart": "does not beat random",
        "too few seeds": "",
    }[interval.verdict]


def _budgets(study: Study, ratio: float, epochs: int) -> str:
    """Each method that needs the cache with its share counted, against random given the same seconds."""
    rows = []
    for method in SHARING:
        for budget in sorted({line["epochs"] for line in study.runs if line["method"] == method}):
            row = _whole_cost(study, method, ratio, budget)
            rows += [row] if any(row[4:]) else []
    text = ""
    if rows:
        seconds = ("core s, the cache there", "shared by 5")
        head = ("method", "epochs", *seconds, *(f"minus random: {words}" for _, words in SHARES))
        text = (
            "Embedding and probe counted, shared by so many experiments: points ahead of random rows in the same core "
            f"seconds:\n\n{table(head, rows)}\n\n"
        )
    return (text + _seconds_of_default(study, ratio, epochs)).strip()


def _whole_cost(study: Study, method: str, ratio: float, epochs: int) -> list[str]:
    """A row of the table above; its last cells are empty where random's smallest budget takes longer."""
    runs = study.of(method, ratio, epochs).values()
    seconds = [f"{np.mean([study.clock(line, n) for line in runs]):.1f}" for n in (OFTEN, 5)] if runs else ["", ""]
    equal = [study.at_equal_clock(method, "random", ratio, epochs, experiments) for experiments, _ in SHARES]
    return [method, str(epochs), *seconds, *("" if one is None else f"{one} {_verdict(one)}" for one in equal)]


def _seconds_of_default(study: Study, ratio: float, epochs: int) -> str:
    """What selecting by the default rule takes, and when the cache has paid for itself against everything."""
    runs, full = study.of("default", ratio, epochs), study.of("full", ratio, epochs)
    if not runs:
        return ""
    live = [line["cpu_seconds"]["select"] / line["cpu_seconds"]["train"] for line in runs.values()]
    replayed = [line["seconds"]["indices"] / sum(line["seconds"][p] for p in PHASES) for line in runs.values()]
    seconds = study.score_seconds("probe")
    probe = f"{seconds:.1f} s" if seconds >= 0.1 else "was there"
    text = (
        f"Embedding once: {study.embed_seconds:.0f} core s; the probe: {probe}. Selection takes "
        f"{100 * np.mean(live):.1f} % of training time live, {100 * np.mean(replayed):.1f} % replayed from a file."
    )
    if full:
        even = study.break_even(ratio, epochs)
        saved = study.difference("default", "full", ratio, epochs)
        if even is not None:
            text += (
                f" The cache has paid for itself after {np.ceil(even):.0f} experiments, against training on everything "
                f"(accuracy {saved} points)."
            )
    return text


def _rivals(study: Study, ours: str, ratio: float, epochs: int) -> str:
    """What ``ours`` reaches in the seconds of each rival."""
    rows = []
    for rival in RIVALS:
        there = study.at_equal_clock(rival, ours, ratio, epochs) if study.of(ours, ratio, epochs) else None
        if there is not None:
            rows.append([rival, str(-there), (-there).verdict])
    if not rows:
        return ""
    name = "The default" if ours == "default" else f"`{ours}`"
    text = f"{name} given each rival's seconds (its own several budgets, the cache there), minus the rival:\n\n"
    return text + table(("rival", f"{ours} minus rival", "verdict"), rows)


def advice_table(studies: dict[str, Study]) -> str:
    """What probes foretold beside what networks reached, by setting."""
    rows, answers, whether, orders = [], [], [], []
    for name, study in studies.items():
        for line in (one for one in study.lines if one["kind"] == "advice"):
            found = {f["way"]: f for f in line["forecasts"]}
            networks = {way: study.difference(method, "random", line["ratio"], line["epochs"])
                        for way, method in WAYS.items()}  # fmt: skip
            if networks[WORTH] is None or networks[WORTH].seeds < 3:
                continue
            taken = TAKEN.get(line["advised"])
            of_taken = taken and study.difference(taken, "random", line["ratio"], line["epochs"])
            agreed = agrees(line["advised"], networks | {line["advised"]: of_taken})
            advised = line["advised"] if taken is None else taken.removeprefix("draw:").partition("^")[0]
            any_ahead = any(one is not None and one.low > 0 for one in networks.values())
            whether.append((line["advised"] is not None) == any_ahead)
            pairs = ordered_pairs(study, line)
            orders += pairs
            cells = [shown(study.difference("draw:adaptive", "random", line["ratio"], line["epochs"]))]
            cells += [f"{100 * found[way]['over_random']:+.2f} / {shown(networks[way])}" for way in WAYS]
            told = {None: "not told apart", True: "yes", False: "no"}[agreed]
            answers.append("not run" if taken is not None and of_taken is None else told)
            order = f"{sum(pairs)} of {len(pairs)}"
            rows.append([name, f"{line['ratio']:g}", *cells, order, advised or "do not select", answers[-1]])
    if not rows:
        return ""
    ways = (f"{way}: probes / networks" for way in WAYS)
    head = ("data set", "ratio", "adaptive: networks", *ways, "order", "advice", "right?")
    return (
        "`gstds-cache advise` before any network was trained, beside the networks: points ahead of random rows. "
        "The advice is right if it names a draw with which networks are ahead, or none where networks are ahead "
        f"with none of them. It names `adaptive` where probes learned most from either of the two draws that this is "
        f"made of. Of {len(answers)}: right {answers.count('yes')}, "
        f"wrong {answers.count('no')}, "
        f"a draw named and networks not told apart from random {answers.count('not told apart')}. "
        f"Whether to select at all, with any of the four, it said rightly on {sum(whether)}. *Order*: of the pairs of "
        f"these four and random rows that networks tell apart, those that probes have in the same order; "
        f"{sum(orders)} of {len(orders)} in all."
        f"\n\n{table(head, rows)}"
    )


def agrees(advised: str | None, networks: dict[str, Interval | None]) -> bool | None:
    """Whether networks say what the advice says; None where they say neither."""
    known = {way: interval for way, interval in networks.items() if interval is not None}
    if advised is None:
        return not any(interval.low > 0 for interval in known.values())
    if advised not in known:
        return None
    interval = known[advised]
    return True if interval.low > 0 else False if interval.high < 0 else None


def ordered_pairs(study: Study, line: Line) -> list[bool]:
    """Of each pair of ways that networks tell apart, whether the probes of an advice have it in the same order."""
    ahead = {forecast["way"]: forecast["over_random"] for forecast in line["forecasts"]}
    methods = {"random": "random", **WAYS}
    found = []
    for a, b in combinations(methods, 2):
        networks = study.difference(methods[a], methods[b], line["ratio"], line["epochs"])
        if networks is not None and networks.verdict in {"ahead", "behind"}:
            found.append((networks.low > 0) == (ahead[a] > ahead[b]))
    return found


Accuracies = dict[tuple[str, float, int], dict[int, float]]
"""By method, ratio and epochs, and by seed."""


def _accuracies_of(study: Study) -> Accuracies:
    runs: Accuracies = {}
    for line in study.runs:
        ratio = math.nan if line["method"] == "full" else line["ratio"]
        runs.setdefault((line["method"], ratio, line["epochs"]), {})[line["seed"]] = line["test_accuracy"]
    return runs


def intervals_across(study: Study, other: Study) -> set[Interval]:
    """Every difference of a method of one setting from one of another setting of the same images."""
    found, ours, theirs = set(), _accuracies_of(study), _accuracies_of(other)
    for a, b in product(ours.values(), theirs.values()):
        seeds = sorted(a.keys() & b.keys())
        if seeds:
            found |= {paired([a[seed] - b[seed] for seed in seeds]), paired([b[seed] - a[seed] for seed in seeds])}
    return found


def all_intervals(study: Study) -> set[Interval]:
    """Every difference that can be quoted: of any two methods, ratios and budgets, and of two at equal seconds."""
    runs = _accuracies_of(study)
    found = set()
    for a, b in permutations(runs, 2):
        seeds = runs[a].keys() & runs[b].keys()
        if seeds:
            found.add(paired([runs[a][seed] - runs[b][seed] for seed in sorted(seeds)]))
    timed = of_one_processor(study)
    for method, ratio, epochs in {} if why_no_seconds(timed) else runs:
        for reference in {one for one, _, _ in runs} - {method, "full"}:
            for experiments, _ in SHARES if reference == "random" and not study.on_gpu else SHARES[-1:]:
                equal = timed.at_equal_clock(method, reference, ratio, epochs, experiments)
                found |= {equal, -equal} if equal is not None else set()
    return found


def hours(results: Path, studies: Sequence[Study]) -> str:
    """Hours of compute behind the lines: those of the tables, and those of variants and pilots."""
    runs = [line for study in studies for line in study.runs]
    own = [line for study in studies for line in study.lines if line["setting"] == study.runs[0]["setting"]]
    once = sum(map(_core_seconds, (line for line in own if line["kind"] in {"embedding", "scores"})))
    on_gpu = [line for line in runs if "device" in line]
    gpu = sum(sum(line["seconds"].values()) / line["jobs"] for line in on_gpu)
    others = [line for folder in ("variants", "pilots") for path in sorted((results / folder).glob("*.jsonl"))
              for line in read_lines(path)]  # fmt: skip
    tried = [line for line in others if line.get("kind") in {"run", "screen"}]
    core = sum(_core_seconds(line) for line in runs if "device" not in line)
    return (
        f"{len(runs) - len(on_gpu)} runs on CPUs: {core / 3600:.1f} core hours of selecting and training, "
        f"{once / 3600:.1f} of embedding and scores. {len(on_gpu)} runs on a GPU: {gpu / 3600:.2f} hours of it, "
        f"several at a time. {len(tried)} runs of variants and pilots, which are in no table here: "
        f"{sum(map(_core_seconds, others)) / 3600:.1f} core hours."
    )


def _core_seconds(line: Line) -> float:
    """Of a line of any kind; the first pilots counted none."""
    seconds = line.get("cpu_seconds", 0.0)
    return float(sum(seconds.values()) if isinstance(seconds, dict) else seconds)


def _lines_of(path: Path) -> list[Line]:
    """A setting's lines; one that shares its images with another shares the cost of embedding them.

    Runs with another learning rate than the method's own are left out: they were made before it was tuned.
    """
    setting = load_setting(path.stem)
    lines = read_lines(path)
    if not path.stem.endswith("-validation"):
        lines = [one for one in lines if one["kind"] != "run" or _at_its_rate(one, setting)]
    sibling = setting.same_images_as
    shared = read_lines(path.with_stem(sibling)) if sibling else []
    return lines + [line for line in shared if line["kind"] == "embedding"]


def _at_its_rate(line: Line, setting: Setting) -> bool:
    return bool(line.get("lr", setting.lr) == setting.lr_of(line["method"]))


def studies_of(results: Path) -> dict[str, Study]:
    """All settings that have runs."""
    files = sorted(results.glob("*.jsonl"), key=lambda path: (path.stem != "glyphs", path.stem))
    studies = {path.stem: Study(tuple(_lines_of(path))) for path in files}
    return {name: study for name, study in studies.items() if study.runs}


def render(results: Path = RESULTS) -> str:
    """The whole text between the markers."""
    studies = studies_of(results)
    note = (
        "Differences are in points, paired by seed, with 95 % intervals over seeds (Student's t); a star marks "
        "comparisons in which random's (or the default's) largest budget took less time than the method, and was "
        "taken. `draw:NAME^S` has S strata, `draw:NAME` eight: the library's `loss-squared` is `draw:loss-squared^1`. "
        "`+by-class` is `--reference by-class`."
    )
    once = {name: study for name, study in studies.items() if not load_setting(name).against}
    parts = [hours(results, list(studies.values())), note, advice_table(once)]
    for name, study in studies.items():
        other = studies.get(load_setting(name).against)
        parts += [study_tables(study, name), "" if other is None else _against(study, other, name)]
    return "\n\n".join(filter(None, parts))


def main() -> int:
    return write_or_check(__doc__, DOCUMENT, render, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
