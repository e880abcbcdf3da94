"""Embed a setting's training set on a GPU, before the study selects from it: the study itself embeds on the CPU.

    python -m benchmarks.study.embed cifar10-conv7-noise30 --folder .data/study --device cuda

In a process of its own: one that has used a GPU cannot be forked, and the study forks its runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.study.data import StudyData
from benchmarks.study.settings import load_setting, names


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("setting", choices=names(), metavar="SETTING")
    made.add_argument("--folder", type=Path, default=Path(".study"), help="stores")
    made.add_argument("--device", default="cuda")
    arguments = made.parse_args(argv)
    (arguments.folder / "stores").mkdir(parents=True, exist_ok=True)
    report = StudyData(load_setting(arguments.setting), arguments.folder).embed([], arguments.device)
    print(f"{arguments.setting}: {report.embedded:,} images in {report.seconds['total']:.1f} s on {arguments.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
