"""What the page shows of training runs: accuracy against what each cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gstds_cache.errors import IntegrityError, UsageError
from gstds_cache.report import charts
from gstds_cache.report.selection_view import Panel


@dataclass(frozen=True)
class RunView:
    """One run.

    Attributes:
        number: Its mark in the charts.
        name: Its directory.
        what: Network, rule, schedule and seed in words.
        accuracy: On the evaluation set, 0 to 1; None where there was none.
        gradient_samples: Samples whose gradient was computed.
        seconds: Training in all.
        select_seconds: What its selection took; None where that is not known.
        embed_seconds: What its embeddings took, once for all runs; None where that is not known.
        saved: Share of gradients that selection spared; None where that is not known.
        break_even: Experiments until the cache has paid; in words.
    """

    number: int
    name: str
    what: str
    accuracy: float | None
    gradient_samples: int
    seconds: float
    select_seconds: float | None
    embed_seconds: float | None
    saved: float | None
    break_even: str


def read_run(path: Path, number: int) -> RunView:
    """Read a run's files.

    Args:
        path: A RUN_DIR of gstds-train.
        number: Its mark.

    Returns:
        The run.

    Raises:
        UsageError: There is no finished run at ``path``.
        IntegrityError: A file of it is damaged.
    """
    try:
        described = json.loads((path / "config.json").read_text())
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        ledger = json.loads((path / "ledger.json").read_text()) if (path / "ledger.json").exists() else {}
        final = next((line for line in reversed(lines) if line.get("final")), None)
        if final is None:
            raise UsageError(f"{path}: the run is not finished", hint="finish it: the same again with `resume=True`")
        return _view(path, number, described, final, ledger)
    except FileNotFoundError as error:
        raise UsageError(f"{path} is no run of gstds-train: {error.filename} is missing") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path}: a file of the run is damaged: {error!r}") from error


def _view(path: Path, number: int, described: dict[str, Any], final: dict[str, Any], ledger: dict[str, Any]) -> RunView:
    config, selection = described["config"], described["provenance"].get("selection", {})
    words = [config["arch"], selection.get("rule"), selection.get("schedule"), f"seed {config['seed']}"]
    all_samples, saved = ledger.get("all_samples"), ledger.get("saved_samples")
    pays, after = ledger.get("pays"), ledger.get("break_even")
    return RunView(
        number=number,
        name=str(path),
        what=", ".join(str(word) for word in words if word),
        accuracy=final["test_accuracy"],
        gradient_samples=final["gradient_samples"],
        seconds=final["seconds"]["total"],
        select_seconds=ledger.get("select_seconds"),
        embed_seconds=(ledger.get("embed") or {}).get("seconds"),
        saved=saved / all_samples if all_samples and saved is not None else None,
        break_even=f"{after:,}" if after else "never" if pays is False else "unknown",
    )


def panels_of(runs: list[RunView]) -> list[Panel]:
    """Charts of several runs side by side."""
    measured = [run for run in runs if run.accuracy is not None]
    title = "Accuracy against cost"
    if not measured:
        return [Panel(title, "", missing="No run has measured accuracy: train with an evaluation data set.")]
    labels = [str(run.number) for run in measured]
    reached = [run.accuracy or 0.0 for run in measured]
    seconds = [run.seconds + (run.select_seconds or 0.0) for run in measured]
    unknown = any(run.select_seconds is None for run in measured)
    note = " Where selection's seconds are unknown, they are not in it." if unknown else ""
    return [
        Panel(
            title,
            "Numbers are the table's. Up and to the left is better. Seconds are training and its selection; embedding "
            "is paid once, and stands in the table." + note,
            (
                charts.accuracy(
                    "runs-gradients", labels, [float(r.gradient_samples) for r in measured], reached, "gradients"
                ),
                charts.accuracy("runs-seconds", labels, seconds, reached, "seconds of training and selection"),
            ),
        )
    ]
