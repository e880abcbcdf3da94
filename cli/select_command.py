"""``gstds-select``: select a share of every batch and stream what stays."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import click

from gstds_cache.config import DEFAULT_RULE, SelectConfig
from gstds_cache.costs.records import Cost, keep_record, selection_costs
from gstds_cache.errors import UsageError, command_line
from gstds_cache.files import mapped
from gstds_cache.files.location import local_file
from gstds_cache.selection.floors import class_name
from gstds_cache.selection.guidance import KINDS
from gstds_cache.selection.rules import RULES
from gstds_cache.spectral.status import Status, describe
from gstds_cache.store.access import KINDS as ACCESS_KINDS
from gstds_cache.store.access import Kind

from .common import (
    Command,
    LocalPath,
    Progress,
    device_option,
    json_option,
    print_json,
    print_table,
    seconds_line,
    shares_line,
)

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector
    from gstds_cache.stream.schema import ByteStream

SHOWN = 6  # classes named in the summary; --json has all

HELP = """Shuffle the rows of STORE into batches, remove a share of each by its graph's Fiedler vector, and write
the rows that stay to a file or a pipe.

\b
Examples:
  gstds-select photos.store --out selection.arrow
  gstds-select photos.store --schedule linear:0.5:0.9 --epochs 20 --seed 1
  gstds-select photos.store --out - | gstds-train imagefolder:photos --selection -
  gstds-select photos.store --serve 127.0.0.1:8815   (then: gstds-train ... --selection grpc://127.0.0.1:8815)
  gstds-select photos.store --rule random --schedule constant:0.0 --batch-size 128   (standard training)

The same command again finds the finished selection and computes nothing; after an interrupt it goes on where it
stopped.
"""


@click.command(cls=Command, help=HELP)
@click.argument("store")
@click.option("--batch-size", type=int, default=512, show_default=True, help="Rows of a batch before selection.")
@click.option("--epochs", type=int, default=8, show_default=True, help="Passes over the data set.")
@click.option(
    "--schedule",
    default="constant:0.75",
    show_default=True,
    help="Filter ratio, the fraction removed: constant:RATIO, linear:FIRST:LAST, cosine:FIRST:LAST, "
    "step:RATIO:RATIO..., file:PATH (a line for each epoch or batch), or budget:TOTAL (samples that stay in the whole "
    "run); with +full:0.125 behind it the last eighth of the epochs keeps everything.",
)
@click.option(
    "--order",
    default="permutation",
    show_default=True,
    help="Order of an epoch: permutation, or window:ROWS, which reads each shard of a store larger than memory once.",
)
@click.option(
    "--partitions",
    type=int,
    help="Ways the rows are dealt out to batches, which epochs go round: only the first so many epochs make graphs, "
    "later ones draw again from the same; 0: every epoch deals anew. [default: 1; 0 for rules that make no graph]",
)
@click.option("--knn", type=int, default=10, show_default=True, help="Neighbours of each row in the batch's graph.")
@click.option(
    "--rule",
    default=DEFAULT_RULE,
    show_default=True,
    help="How rows are chosen: " + "; ".join(f"{rule.name}: {rule.summary}" for rule in RULES.values()) + ".",
)
@click.option(
    "--guidance",
    default="auto",
    show_default=True,
    help="Difficulty, for rules that look at it: " + "; ".join(f"{kind}: {what}" for kind, what in KINDS.items()) + ". "
    "probe?cutoff=0.1 takes the hardest tenth for mislabelled. Kept in STORE.guidance/, else in $GSTDS_CACHE.",
)
@click.option(
    "--min-per-class",
    type=int,
    default=0,
    show_default=True,
    help="Rows of every class that stay in a batch, at least.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--laplacian", type=click.Choice(["combinatorial", "normalized"]), default="combinatorial")
@click.option("--tolerance", type=float, default=1e-6, show_default=True, help="Relative residual of a Fiedler pair.")
@click.option("--max-iterations", type=int, default=500, show_default=True, help="Of LOBPCG, before solving densely.")
@device_option
@click.option("--knn-backend", type=click.Choice(["auto", "torch", "faiss-cpu", "faiss-gpu"]), default="auto")
@click.option(
    "--solver",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where eigenvectors are computed. auto: on the CPU, which was quicker also beside a GPU.",
)
@click.option(
    "--memory-budget", type=click.IntRange(min=0), default=4096, show_default=True, help="MiB of embeddings to hold."
)
@click.option(
    "--access",
    type=click.Choice(ACCESS_KINDS),
    default="auto",
    show_default=True,
    help="How to get at rows: all in memory; from a mirror, a local .npy copy made once; or a window of shards. auto: "
    "memory where the rows fit --memory-budget, else a mirror where the disk has room, else a window, which is slow.",
)
@click.option("--mirror", metavar="FOLDER", help="Where a mirror lies. [default: STORE.mirror]")
@click.option(
    "--threads",
    type=int,
    help="CPU threads to use; 0 for all there are. [default: 0; with --out -, beside a trainer, 1]",
)
@click.option(
    "--out",
    metavar="FILE|-",
    help="A file, or - for stdout. [default: a name made from the settings, in STORE.selections/, else in "
    "$GSTDS_CACHE]",
)
@click.option("--force", is_flag=True, help="Replace a FILE that holds something else.")
@click.option(
    "--serve",
    metavar="HOST:PORT",
    help="Serve this and the store's other selections to any number of trainers (Arrow Flight), until SIGTERM.",
)
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="With --serve: Prometheus metrics on loopback.")
@click.option("--tls-cert", type=LocalPath(), help="With --serve: PEM certificate of the service.")
@click.option("--tls-key", type=LocalPath(), help="With --serve: its PEM private key.")
@click.option("--token-file", type=LocalPath(), help="With --serve: the token that clients must show.")
@click.option("--client-ca", type=LocalPath(), help="With --serve: PEM; clients need certificates of it.")
@json_option
def main(
    store: str,
    batch_size: int,
    epochs: int,
    schedule: str,
    order: str,
    partitions: int | None,
    knn: int,
    rule: str,
    guidance: str,
    min_per_class: int,
    seed: int,
    laplacian: Literal["combinatorial", "normalized"],
    tolerance: float,
    max_iterations: int,
    device: str,
    knn_backend: Literal["auto", "torch", "faiss-cpu", "faiss-gpu"],
    solver: Literal["auto", "cpu", "cuda"],
    memory_budget: int,
    access: Kind,
    mirror: str | None,
    threads: int | None,
    out: str | None,
    force: bool,
    serve: str | None,
    metrics_port: int | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    token_file: Path | None,
    client_ca: Path | None,
    as_json: bool,
) -> None:
    """Parse, call :mod:`gstds_cache.stream`, print."""
    piped = out == "-"
    service = {"metrics_port": metrics_port, "tls_cert": tls_cert, "tls_key": tls_key, "token_file": token_file,
               "client_ca": client_ca}  # fmt: skip
    _check_together(serve, service, out, force)
    config = SelectConfig(
        batch_size=batch_size,
        epochs=epochs,
        schedule=schedule,
        order=order,
        partitions=partitions,
        knn=knn,
        rule=rule,
        guidance=guidance,
        min_per_class=min_per_class,
        seed=seed,
        laplacian=laplacian,
        tolerance=tolerance,
        max_iterations=max_iterations,
        device=device,
        knn_backend=knn_backend,
        solver=solver,
        threads=int(piped or serve is not None) if threads is None else threads,
    )
    started = time.perf_counter()
    from gstds_cache.runtime.allocator import keep_freed_memory
    from gstds_cache.runtime.jit import why_not_kept
    from gstds_cache.runtime.threads import limit_threads
    from gstds_cache.selection.run import BatchSelector
    from gstds_cache.store.reader import EmbeddingStore
    from gstds_cache.stream.deliver import deliver_kept

    keep_freed_memory()
    limit_threads(config.threads)
    opened_store = EmbeddingStore(
        store,
        memory_budget=memory_budget << 20,
        access=access,
        mirror=None if mirror is None else local_file(mirror, "--mirror"),
    )
    selector = BatchSelector(opened_store, config)
    opened = time.perf_counter()
    plan = selector.plan
    share = plan.total_kept / plan.total_rows
    click.echo(
        f"plan: {plan.total_batches:,} batches of {config.batch_size:,} in {plan.epochs} epochs, rule {config.rule}; "
        f"keeps {plan.total_kept:,} of {plan.total_rows:,} samples ({share:.1%}), a step for each batch; saves "
        f"{plan.total_rows - plan.total_kept:,} ({1 - share:.1%})",
        err=True,
    )
    click.echo(f"rows: {selector.store.access_reason}", err=True)
    if selector.rule.vectors and (text := why_not_kept()):
        click.echo(f"note: {text}", err=True)
    if selector.slow_order:
        click.echo(f"warning: {selector.slow_order}", err=True)
    if serve is not None:
        _serve(selector, serve, service)
        return
    file = None if piped else local_file(out, "--out") if out else _default_file(selector)
    target = file or sys.stdout.buffer
    if not deliver_kept(selector, target, replace=force, say=lambda text: click.echo(f"cache hit: {text}", err=True)):
        _compute(selector, target, started)
    total = time.perf_counter() - started
    spent = {"open": opened - started, "select": selector.counts.elapsed}
    # What is left is writing; on a pipe, that is waiting for the reader.
    seconds = spent | {"write": total - sum(spent.values()), "total": total}
    _print(selector, seconds, file, as_json)


def _dropped(selector: BatchSelector) -> str:
    """Shares dropped of the classes that lost least and most, in words."""
    shares = sorted(
        (1 - kept / seen, class_name(label, selector.store.classes))
        for label, (seen, kept) in selector.counts.classes.items()
        if label >= 0
    )
    if len(shares) < 2:
        return ""
    shown = shares if len(shares) <= SHOWN else [*shares[: SHOWN // 2], *shares[-SHOWN // 2 :]]
    said = [f"{name} {share:.1%}" for share, name in shown]
    if len(shares) > SHOWN:
        said.insert(SHOWN // 2, f"... {len(shares) - SHOWN} more ...")
    return "by class: " + ", ".join(said)


def _check_together(serve: str | None, service: dict[str, Any], out: str | None, force: bool) -> None:
    """Refuse flags that say nothing, or two things, together."""
    if out == "-" and force:
        raise UsageError("--force replaces a file; with --out - there is none")
    if serve is not None and (out is not None or force):
        raise UsageError("--serve serves the store's selections; it takes no --out and no --force")
    for name, value in service.items():
        if serve is None and value is not None:
            raise UsageError(f"--{name.replace('_', '-')} says how to serve: it needs --serve HOST:PORT")


def _default_file(selector: BatchSelector) -> Path:
    """Where a selection goes that the user gave no place for.

    Raises:
        UsageError: There is no place for it.
    """
    from gstds_cache.stream.deliver import kept_place

    place = kept_place(selector)
    if place.path is None:
        raise UsageError(
            f"there is no place to keep the selection: {place.note}",
            hint="give --out FILE, or set GSTDS_CACHE to a folder that can be written",
        )
    if place.note:
        click.echo(f"note: kept in {place.path.parent}, as nothing can be written in {place.note}", err=True)
    return place.path


def _serve(selector: BatchSelector, where: str, service: dict[str, Any]) -> None:
    from gstds_cache.files.derived import first_writable
    from gstds_cache.stream.deliver import selection_folders
    from gstds_cache.stream.security import Access, parse_address
    from gstds_cache.stream.serve import log, serve

    host, port = parse_address(where, flag="--serve")
    access = Access.from_files(
        host,
        certificate=service["tls_cert"],
        key=service["tls_key"],
        token=service["token_file"],
        client_ca=service["client_ca"],
    )
    folders = selection_folders(selector)
    place = first_writable(folders)
    with ExitStack() as stack:
        folder = place.path
        if folder is None:  # readers read what is written, so there has to be a file, if for as long as they read
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="gstds-selections-", dir=mapped.folder())))
        if place.note:
            log("note", selections=folder, kept=place.path is not None, why=place.note)
        serve(
            selector.store,
            selector.config,
            host=host,
            port=port,
            folder=folder,
            also=folders,
            access=access,
            metrics_port=service["metrics_port"],
        )


def _compute(selector: BatchSelector, out: Path | ByteStream, started: float) -> None:
    """Compute and deliver, with progress; what it took is written down also where it is interrupted."""
    from gstds_cache.costs.energy import EnergyMeter
    from gstds_cache.stream.deliver import deliver_computed, kept_paths

    progress, meter = Progress("batches", "embeddings"), EnergyMeter(selector.device)
    try:
        for selection in deliver_computed(selector, out, note=lambda text: click.echo(f"note: {text}", err=True)):
            work = selector.counts.seconds
            gathered = work["gather"] / max(sum(work.values()), 1e-9)
            progress("select", selection.seq + 1, selector.plan.total_batches, gathered)
            meter.add("select")
    finally:
        progress.end()
        kept = kept_paths(selector)
        places = ([[out]] if out in kept else [[out], kept]) if isinstance(out, Path) else [kept]
        notes = [_record_cost(selector, files, time.perf_counter() - started, meter.joules) for files in places]
        for text in dict.fromkeys(filter(None, notes)):
            click.echo(f"note: {text}", err=True)


def _record_cost(selector: BatchSelector, files: list[Path], seconds: float, joules: dict[str, float] | None) -> str:
    """Write down beside the first of ``files`` that can be what it cost, for the ledgers of the runs that train on it.

    Returns:
        Why it is not written down, for the user; empty where it is.
    """
    counts, store = selector.counts, selector.store.location
    if not counts.batches:
        return ""
    where = str(store.absolute())
    spent = None if joules is None else sum(joules.values())
    cost = Cost(selector.digest, counts.rows, 0, seconds, spent, str(selector.device), where)
    # Where all batches were computed now, nothing is left of an earlier session, or of another file.
    return keep_record(
        [selection_costs(file) for file in files], cost, anew=counts.batches == selector.plan.total_batches
    )


def _print(selector: BatchSelector, seconds: dict[str, float], file: Path | None, as_json: bool) -> None:
    counts, config = selector.counts, selector.config
    rate = counts.rows / counts.elapsed if counts.elapsed else 0.0
    work = sum(counts.seconds.values())
    shares = {phase: spent / work for phase, spent in counts.seconds.items()} if work else {}
    status = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.status.items())) or "none computed"
    classes = selector.store.classes
    to_stderr = file is None
    print_table(
        [
            ("selection", f"{selector.digest[:12]} of cache {selector.store.fingerprint[:12]}"),
            (
                "this run",
                f"{counts.batches:,} batches, kept {counts.kept:,} of {counts.rows:,} ({rate:,.0f} samples/s)",
            ),
            ("Fiedler", status),
            *([("graphs", f"of {counts.reused:,} batches from earlier epochs")] if counts.reused else []),
            *([("guidance", selector.guidance.note)] if counts.batches and selector.guidance.note else []),
            *([("dropped", dropped)] if (dropped := _dropped(selector)) else []),
            *([("work", shares_line(shares) + f" (neighbours by {selector.knn_backend})")] if shares else []),
            ("time", seconds_line(seconds)),
        ],
        err=to_stderr,
    )
    for note in filter(None, (selector.graphs_note, selector.store.fell_back)):
        click.echo(f"note: {note}", err=True)
    slow = counts.status["max_iterations"]
    if slow > 0.01 * counts.batches:
        click.echo(f"warning: {slow} of {counts.batches} Fiedler vectors: {describe(Status.MAX_ITERATIONS)}", err=True)
    if file is not None:
        click.echo(f"wrote: {file}")
        dataset = selector.store.dataset_uri or "DATASET"
        click.echo(f"next: {command_line('gstds-train', dataset, '--selection', file)}")
    if as_json:
        result: dict[str, Any] = {
            "out": str(file) if file else "-",
            "selection_digest": selector.digest,
            "cache_fingerprint": selector.store.fingerprint,
            "cache_hit": counts.batches == 0,
            "batches": counts.batches,
            "total_batches": selector.plan.total_batches,
            "total_kept": selector.plan.total_kept,
            "rows": counts.rows,
            "kept": counts.kept,
            "samples_per_second": round(rate, 1),
            "total_rows": selector.plan.total_rows,
            "classes": {
                class_name(label, classes): {"seen": seen, "kept": kept}
                for label, (seen, kept) in sorted(counts.classes.items())
                if label >= 0
            },
            "status": dict(counts.status),
            "graphs_found": counts.reused,
            "rule": config.rule,
            "guidance": selector.guidance_digest,
            "knn_backend": selector.knn_backend,
            "shares": {phase: round(share, 4) for phase, share in shares.items()},
            "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        }
        print_json(result, err=to_stderr)


if __name__ == "__main__":
    main()
