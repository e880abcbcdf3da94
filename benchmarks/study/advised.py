"""What probes on the embeddings foretell of a setting's draws, as a line beside its runs.

    python -m benchmarks.study.advised cifar10 glyphs --folder .study --ratios 0.75

Nothing is trained but the probes: this is what ``gstds-cache advise`` and ``draw="auto"`` do. ``tables.py`` shows it
beside what networks then reached. Lines that are there are not made again.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness import environment, limit_threads
from benchmarks.study.data import StudyData
from benchmarks.study.lines import RESULTS, append, read_lines
from benchmarks.study.settings import load_setting, names
from gstds_cache import advise


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("settings", nargs="+", choices=names(), metavar="SETTING")
    made.add_argument("--ratios", default="0.75", help="filter ratios, comma between")
    made.add_argument("--folder", type=Path, default=Path(".study"), help="stores")
    made.add_argument("--reuse", type=Path, action="append", default=[], help="a store to take embeddings over from")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the result lines")
    arguments = made.parse_args(argv)
    limit_threads(1)
    for name in arguments.settings:
        setting, path = load_setting(name), arguments.results / f"{name}.jsonl"
        there = {line["ratio"] for line in read_lines(path) if line["kind"] == "advice"}
        for ratio in sorted(set(map(float, arguments.ratios.split(","))) - there):
            data = StudyData(setting, arguments.folder)
            data.embed(arguments.reuse)
            begun = time.process_time()
            advice = advise(data.store, ratios=(ratio,), epochs=setting.epochs, device="cpu", threads=1, progress=False)
            line = {
                "kind": "advice",
                "setting": name,
                "ratio": ratio,
                "epochs": setting.epochs,
                "probe_accuracy": advice.probe_accuracy,
                "forecasts": [asdict(forecast) for forecast in advice.forecasts],
                "advised": None if advice.best is None else advice.best.way,
                "cpu_seconds": round(time.process_time() - begun, 3),
            }
            append(path, line | environment())
            print(f"{name}, ratio {ratio}: {advice.verdict}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
