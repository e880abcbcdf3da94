"""The stream: records a second beside bare pyarrow, readers beside a stalled one, and what is waited for.

    python benchmarks/bench_stream.py [--trials 5] [--records 100000]

A finished selection, 128 indices a record, is sent by another process (over a pipe: by ``cat``; over Flight:
by the service, from its file), and every record is taken as a ``SelectedBatch``. The peer reads the same record batches
with pyarrow alone and makes the same objects, without crc, running hash or any check; ``arrays`` makes bare tuples with
NumPy slices instead, which is the least that a consumer could do.

The other rows are in ``stream_shared.py`` (eight readers, one of which stalls) and ``stream_waits.py`` (the time to a
first record, and a trainer's wait for indices); both run the commands on the digits, which are embedded first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
from harness import parser, report, spread
from stream_shared import one_stalled
from stream_waits import COMMANDS, first_record, trainers_wait

from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.flight_client import FlightSource
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.stream.record_writer import SelectionWriter, grouped
from gstds_cache.stream.schema import Header

KEPT, ITEMS, EPOCHS = 128, 50_000, 10
SERVER = """
import sys
import pyarrow as pa, pyarrow.flight as fl
from pathlib import Path
from gstds_cache.stream.hub import Hub
folder, digest = Path(sys.argv[1]), sys.argv[2]
hub = Hub(folder)
class Service(fl.FlightServerBase):
    def do_get(self, context, ticket):
        if ticket.ticket == b"bare":  # pyarrow alone, from the same file
            return fl.RecordBatchStream(pa.ipc.open_stream(pa.memory_map(str(hub.path_of(digest)))))
        schema, batches = hub.batches(digest, None, 0, lambda: not context.is_cancelled())
        return fl.GeneratorStream(schema, batches)
service = Service("grpc://127.0.0.1:0")
print(service.port, flush=True)
sys.stdin.read()
"""
IMPORTS = """
import json, sys, time
begun = time.perf_counter()
import torch
torch_took = time.perf_counter() - begun
import gstds_cache.training.sampler, gstds_cache.training.loop
took = time.perf_counter() - begun
print(json.dumps({"seconds": took, "of_which_torch": torch_took,
                  "loaded": [name for name in ("faiss", "zarr", "ray", "timm") if name in sys.modules]}))
"""


def write(path: Path, records: int) -> str:
    per_epoch = records // EPOCHS
    header = Header("c" * 64, "d" * 64, ITEMS, "e" * 64, 0, EPOCHS, per_epoch, per_epoch * EPOCHS,
                    per_epoch * EPOCHS * KEPT, [per_epoch * KEPT] * EPOCHS, {})  # fmt: skip
    rng = np.random.default_rng(0)
    kept, score = rng.integers(0, ITEMS, (1000, KEPT)), rng.random(KEPT, np.float32)

    def selections() -> Iterator[SelectedBatch]:
        for seq in range(header.total_batches):
            epoch, batch = divmod(seq, per_epoch)
            yield SelectedBatch(seq, epoch, batch, 512, kept[seq % 1000], score, Status(0), 0.5, 1e-7)

    with path.open("wb") as file, SelectionWriter(file, header) as writer:
        for group in grouped(selections()):
            writer.write(*group)
    return header.selection_digest


def rows(batch: pa.RecordBatch) -> Iterator[tuple]:
    """A record batch's rows by pyarrow and NumPy, with the lists as slices."""
    kept, score = batch.column(5), batch.column(6)
    starts, values = kept.offsets.to_numpy().tolist(), kept.values.to_numpy()
    score_starts, scores = score.offsets.to_numpy().tolist(), score.values.to_numpy()
    plain = (batch.column(position).to_numpy().tolist() for position in (0, 1, 2, 3, 4, 7, 8, 9))
    for row, numbers in enumerate(zip(*plain, strict=True)):
        yield numbers, values[starts[row] : starts[row + 1]], scores[score_starts[row] : score_starts[row + 1]]


def count_bare(batches: Iterator[pa.RecordBatch], objects: bool) -> int:
    count = 0
    for batch in batches:
        for (seq, epoch, batch_id, kind, n_in, status, value, residual), kept, score in rows(batch):
            if kind == 0:
                count += 1
                if objects:
                    SelectedBatch(seq, epoch, batch_id, n_in, kept, score, Status(status), value, residual)
    return count


def over_pipe(path: Path, how: str) -> float:
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as sender:
        begun = time.perf_counter()
        if how == "gstds":
            count = sum(1 for _ in SelectionStream(sender.stdout))
        else:
            count = count_bare(pa.ipc.open_stream(sender.stdout), how == "objects")
        return count / (time.perf_counter() - begun)


def over_flight(port: int, how: str) -> float:
    where = f"grpc://127.0.0.1:{port}"
    begun = time.perf_counter()
    if how == "gstds":
        with SelectionStream(FlightSource(where)) as stream:
            count = sum(1 for _ in stream)
    else:
        with fl.FlightClient(where) as client:
            reader = client.do_get(fl.Ticket(b"bare"))
            count = count_bare((chunk.data for chunk in reader), how == "objects")
    return count / (time.perf_counter() - begun)


def rates(records: int, trials: int) -> dict[str, Any]:
    """Records/s of ours and of the peers, in turn, after one round that is not counted."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{'d' * 16}.arrow"
        words = [sys.executable, "-c", SERVER, folder, write(path, records)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            port = int(server.stdout.readline())
            for trial in range(trials + 1):
                for name in ("pipe", "flight"):
                    for how in ("gstds", "objects", "arrays"):  # next to each other: the machine's speed drifts
                        rate = over_pipe(path, how) if name == "pipe" else over_flight(port, how)
                        if trial:
                            found.setdefault(f"{name}_{how}", []).append(rate)
            server.stdin.close()
    ratios = {
        f"{name}_over_{peer}": spread(
            [a / b for a, b in zip(found[f"{name}_gstds"], found[f"{name}_{peer}"], strict=True)]
        )
        for name in ("pipe", "flight")
        for peer in ("objects", "arrays")
    }
    return {"records_per_second": {name: spread(values) for name, values in found.items()}, "ratios": ratios}


def waits(trials: int, smoke: bool) -> dict[str, Any]:
    """The rows that need a store, on the digits."""
    dataset, records = ("digits?split=test", 1_000) if smoke else ("digits", 20_000)
    embed = ["--model", "timm:test_resnet", "--allow-untrained"] if smoke else []
    select, train = (
        (["--batch-size", "64", "--epochs", "2"], ["--arch", "conv3"]) if smoke else (["--epochs", "20"], [])
    )
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "digits.store"
        words = [COMMANDS / "gstds-embed", dataset, "--cache", store, "--device", "cpu", *embed]
        subprocess.run(words, check=True, capture_output=True)
        selections = store.with_name("digits.store.selections")
        selections.mkdir()
        digest = write(selections / f"{'d' * 16}.arrow", records)
        shared = one_stalled(store, digest, trials, *select, readers=3 if smoke else 8) | {"records": records}
        first = first_record(store, trials, *select)
        wait = trainers_wait(dataset, store, min(trials, 2), select_flags=select, train_flags=train)
    return {"one_reader_stalls": shared, "seconds_to_the_first_record": first, "trainers_wait": wait}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--records", type=int, default=100_000)
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.records, arguments.trials = 2_000, 1
    measured = rates(arguments.records, arguments.trials) | waits(arguments.trials, arguments.smoke)
    imports = [
        json.loads(subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout)
        for _ in range(1 if arguments.smoke else 3)
    ]
    report(
        "stream",
        {
            "records": arguments.records,
            "kept_per_record": KEPT,
            **measured,
            "import_of_train": {
                "seconds": spread([run["seconds"] for run in imports]),
                "of_which_torch": spread([run["of_which_torch"] for run in imports]),
                "heavy_libraries_loaded": sorted({name for run in imports for name in run["loaded"]}),
            },
        },
        arguments,
    )


if __name__ == "__main__":
    main()
