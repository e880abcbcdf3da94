"""Selecting on the CPU at an earlier commit and now, in turn: CPU seconds, and whether the same rows stay.

    python benchmarks/bench_commits.py STORE --old REVISION [--batch-sizes 256 512]

Each trial is a process of its own with one thread, which selects once to warm up and once more to be timed, from rows
in memory. The earlier commit is checked out into a temporary folder, and taken away again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from batches import made_up
from bench_store import Ours
from harness import git, parser, report, spread

ROOT = Path(__file__).parents[1]
# What both commits understand: names that were there at the first of the commits that are compared.
SELECT = """
import hashlib, json, sys, time
from pathlib import Path
from gstds_cache.config import SelectConfig
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore

store = EmbeddingStore(Path(sys.argv[1]), access="memory")
config = SelectConfig(batch_size=int(sys.argv[2]), epochs=int(sys.argv[3]), batch_assignments=0, guidance="none",
                      device="cpu", threads=1)
for _ in range(2):
    selector, kept, batches = BatchSelector(store, config), hashlib.sha256(), 0
    begun = time.process_time()
    for selected in selector.run():
        kept.update(selected.kept.astype("<i8").tobytes())
        batches += 1
    seconds = time.process_time() - begun
import gstds_cache
code = str(Path(gstds_cache.__file__).parents[1])
print(json.dumps({"code": code, "ms_a_batch": 1000 * seconds / batches, "batches": batches, "kept": kept.hexdigest()}))
"""


def select(code: Path, store: Path, batch_size: int, epochs: int) -> dict[str, Any]:
    """What a process that imports the package from ``code`` measures."""
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SELECT, str(store), str(batch_size), str(epochs)]
    done = subprocess.run(words, env=environment, cwd=code, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: selecting with the code in {code} failed:\n{done.stderr}")
    measured = dict(json.loads(done.stdout.splitlines()[-1]))
    if Path(measured["code"]).resolve() != code.resolve():
        raise SystemExit(f"error: got the code in {measured['code']}, expected that in {code}")
    return measured


def compared(old: Path, store: Path, batch_size: int, epochs: int, trials: int) -> dict[str, Any]:
    """Old and new in turn."""
    found: dict[str, list[dict[str, Any]]] = {"old": [], "new": []}
    for _ in range(trials):
        for name, code in (("old", old), ("new", ROOT)):
            found[name].append(select(code, store, batch_size, epochs))
    ms = {name: [trial["ms_a_batch"] for trial in ran] for name, ran in found.items()}
    return {
        "batches": found["new"][0]["batches"],
        "cpu_ms_a_batch": {name: spread(values) for name, values in ms.items()},
        "new_over_old": spread([new / old for old, new in zip(ms["old"], ms["new"], strict=True)]),
        "same_rows_kept": len({trial["kept"] for ran in found.values() for trial in ran}) == 1,
    }


def main() -> None:
    """Compare at each batch size."""
    flags = parser(__doc__)
    flags.add_argument("store", type=Path, nargs="?")
    flags.add_argument("--old", default="", help="the earlier commit")
    flags.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 512])
    flags.add_argument("--epochs", type=int, default=4)
    arguments = flags.parse_args()
    if not arguments.smoke and not (arguments.store and arguments.old):
        flags.error("give STORE and --old REVISION, or --smoke")
    with tempfile.TemporaryDirectory() as folder:
        store, old, sizes, epochs = arguments.store, ROOT, arguments.batch_sizes, arguments.epochs
        if arguments.smoke:
            store, sizes, epochs, arguments.trials = Path(folder) / "store", [32], 1, 1
            Ours().write(store, made_up(1, 300)[0].astype(np.float16))
        else:
            old = Path(folder) / "old"
            git("worktree", "add", "--detach", str(old), arguments.old)
            if not (old / "gstds_cache").is_dir():
                raise SystemExit(f"error: --old: got {arguments.old!r}, expected a commit of this repository")
        try:
            by_size = {str(b): compared(old, store.resolve(), b, epochs, arguments.trials) for b in sizes}
        finally:
            if old is not ROOT:
                git("worktree", "remove", "--force", str(old))
    report("commits", {"old": git("rev-parse", arguments.old or "HEAD"), "by_batch_size": by_size}, arguments)


if __name__ == "__main__":
    main()
