"""``gstds-select``: select a share of every batch and stream what stays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from gstds_cache.config import MEMORY_BUDGET, OnceConfig, SelectConfig, SelectSettings
from gstds_cache.errors import UsageError, command_line
from gstds_cache.runtime.progress import shares_text
from gstds_cache.selection import catalog

from .common import (
    Command,
    F,
    LocalPath,
    engine_option,
    json_option,
    notify,
    print_json,
    print_table,
    seconds_line,
    setting_option,
)

if TYPE_CHECKING:
    from gstds_cache.api.selection import SelectionSummary

SHOWN = 6  # classes named in the summary; --json has all
SERVICE = ("metrics_port", "tls_cert", "tls_key", "token_file", "client_ca")

HELP = """Shuffle the rows of STORE into batches, remove a share of each by its graph's Fiedler vector, and write
the rows that stay to a file or a pipe.

\b
Examples:
  gstds-select photos.store --out selection.arrow
  gstds-select photos.store --schedule linear:0.5:0.9 --epochs 20 --seed 1
  gstds-select photos.store --out - | gstds-train imagefolder:photos --selection -
  gstds-select photos.store --serve 127.0.0.1:8815   (then: gstds-train ... --selection grpc://127.0.0.1:8815)
  gstds-select photos.store --draw auto   (gstds-train draws by the losses it has seen, where that pays)
  gstds-select photos.store --once 5000   (one set of rows for the whole run, and a list of ids)
  gstds-select photos.store --rule random --schedule constant:0.0 --batch-size 128   (standard training)

The same command again finds the finished selection and computes nothing; after an interrupt it goes on where it
stopped.
"""


def setting(name: str, text: str | None = None, **attributes: Any) -> Callable[[F], F]:
    """The option of a setting, by what its configuration says of it."""
    return setting_option(SelectConfig, name, help=text, **attributes)


@click.command(cls=Command, help=HELP, renamed={"--partitions": "--batch-assignments"})
@click.argument("store")
@setting("batch_size", "Rows of a batch before selection. Not given, for fewer images: a quarter of them.")
@setting("epochs", "Passes over the data set.")
@setting(
    "schedule",
    "Filter ratio, the fraction removed: constant:RATIO, linear:FIRST:LAST, cosine:FIRST:LAST, step:RATIO:RATIO..., "
    "file:PATH (a line for each epoch or batch), or budget:TOTAL (samples that stay in the whole run); with "
    "+full:0.125 behind it the last eighth of the epochs keeps everything.",
)
@click.option("--keep", type=float, metavar="SHARE", help="Share of each batch that stays, instead of --schedule.")
@setting(
    "order",
    "Order of an epoch: permutation; class-balanced, in which rare classes come as often as others, their rows again "
    "and again; or window:ROWS, which reads each shard of a store larger than memory once.",
)
@setting(
    "batch_assignments",
    "Number of fixed assignments of rows to batches; epochs cycle through them, so that only the first so many make "
    "graphs. 0: a new one in every epoch. [default: 1; 0 for rules that make no graph, and with --order "
    "class-balanced]",
)
@setting("knn", "Neighbours of each row in the batch's graph.")
@setting("rule", "How rows are chosen: " + "; ".join(f"{name}: {text}" for name, text in catalog.RULES.items()) + ".")
@setting(
    "draw",
    "Write all rows of each batch as candidates, of which the trainer draws in each epoch anew, by: "
    + "; ".join(f"{name}: {text}" for name, text in catalog.DRAWS.items())
    + "; or module:function. auto: what probes on the embeddings learn most from, adaptive, loss-squared or "
    "the default rule. Instead of --rule.",
)
@setting(
    "strata",
    "With --draw: spectral strata of a batch, drawn from in proportion to their size; 1 makes no graph, nor does 0, "
    "which takes the classes. [default: 8; 1 for loss-squared and largest-loss-minus-reference; 0 with --order "
    "class-balanced]",
)
@setting(
    "reference",
    "With a --draw that looks at reference losses: as the probe has them (raw), or relative to those of their class, "
    "so that none is left out because its rows are often labelled as another (by-class; where labels are right it can "
    "cost a point).",
)
@setting(
    "guidance",
    "Difficulty, for rules that look at it: "
    + "; ".join(f"{kind}: {text}" for kind, text in catalog.GUIDANCE.items())
    + ". probe?cutoff=0.1 takes the hardest tenth for mislabelled. Kept in STORE.guidance/, else in $GSTDS_CACHE.",
)
@setting("min_per_class", "Rows of every class that stay in a batch, at least.")
@setting("seed")
@setting("laplacian")
@setting("tolerance", "Relative residual of a Fiedler pair.")
@setting("max_iterations", "Of LOBPCG, before solving densely.")
@setting("device", "auto, cpu, cuda or cuda:N.", metavar="DEVICE")
@setting("knn_backend")
@setting("solver", "Where eigenvectors are computed. auto: on a GPU where its kernels run, else on the CPU.")
@click.option(
    "--once",
    type=int,
    metavar="N",
    help="Choose N rows over the whole data set, once, and train on them alone: a core set. Of the other options it "
    f"takes --batch-size (rows of a step; {OnceConfig.batch_size} where it is not given), --epochs, --seed, --device, "
    "--threads, --out, --force, and how to read the store.",
)
@setting_option(
    OnceConfig,
    "method",
    help="With --once: a row of each of N equal cells; rows that all others are similar to; or farthest points.",
)
@setting_option(
    OnceConfig, "balance", help="With --once: rows of each class, equal as far as there are; or labels are ignored."
)
@click.option(
    "--ids",
    type=LocalPath(dir_okay=False),
    metavar="FILE",
    help="With --once: list of ids, .txt or .csv. [default: the selection's name with .csv]",
)
@click.option(
    "--memory-budget",
    type=click.IntRange(min=0),
    default=MEMORY_BUDGET >> 20,
    show_default=True,
    help="MiB of embeddings to hold.",
)
@click.option(
    "--access",
    type=click.Choice(["auto", "device", "memory", "mirror", "window"]),
    default="auto",
    show_default=True,
    help="How to read rows: all on the GPU (device); all in memory; from a mirror, a local .npy copy made once; or a "
    "window of shards. auto: on the GPU where the CUDA kernels run and the rows fit; else in memory where they fit "
    "--memory-budget, else a mirror where the disk has room, else a window, which is slow.",
)
@click.option("--mirror", metavar="FOLDER", help="Folder of a mirror. [default: STORE.mirror]")
@engine_option
@setting(
    "threads",
    "CPU threads to use; 0 for all there are. Our rules without a graph take one. [default: 0; with --out -, beside a "
    "trainer, 1]",
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
    "address",
    metavar="HOST:PORT",
    help="Serve this and the store's other selections to any number of trainers (Arrow Flight), until SIGTERM.",
)
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="With --serve: Prometheus metrics on loopback.")
@click.option("--tls-cert", type=LocalPath(), help="With --serve: PEM certificate of the service.")
@click.option("--tls-key", type=LocalPath(), help="With --serve: its PEM private key.")
@click.option("--token-file", type=LocalPath(), help="With --serve: the token that clients must show.")
@click.option("--client-ca", type=LocalPath(), help="With --serve: PEM; clients need certificates of it.")
@json_option
@click.pass_context
def main(
    context: click.Context,
    /,
    store: str,
    keep: float | None,
    memory_budget: int,
    access: Literal["auto", "device", "memory", "mirror", "window"],
    mirror: str | None,
    engine: str,
    out: str | None,
    force: bool,
    address: str | None,
    as_json: bool,
    once: int | None,
    **options: Any,
) -> None:
    """Parse, call :func:`gstds_cache.select`, print."""
    service = {name: options.pop(name) for name in SERVICE}
    _check_together(address, service, out, force)
    given: Any = {name: value for name, value in options.items() if _is_given(context, name)}
    reading: Any = {"memory_budget": memory_budget << 20, "access": access, "mirror": mirror}
    if _is_given(context, "engine"):
        if address is not None or once is not None:
            raise UsageError(f"--engine has batches selected elsewhere: it takes no {'--once' if once else '--serve'}")
        reading["engine"] = engine
    if once is not None:
        _select_once(store, once, {**given, "keep": keep, "address": address}, out, force, reading, as_json)
        return
    for name in ("method", "balance", "ids"):
        if name in given:
            raise UsageError(f"--{name} says how rows are chosen once: it needs --once N")
        options.pop(name)
    settings: SelectSettings = given
    from gstds_cache.api.select_batches import select, stream_selection
    from gstds_cache.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    if address is not None:
        from gstds_cache.api.serve import serve

        if serve(store, address, keep=keep, notify=notify, **reading, **service, **settings):
            sys.stdout.flush()
            os._exit(0)  # readers that take nothing would hold up the end of the process
        return
    if out == "-":
        summary = stream_selection(store, sys.stdout.buffer, keep=keep, notify=notify, **reading, **settings)
    else:
        summary = select(store, keep=keep, out=out, force=force, notify=notify, **reading, **settings).summary
    _print(summary, as_json)


def _select_once(
    store: str,
    once: int,
    given: dict[str, Any],
    out: str | None,
    force: bool,
    reading: Any,
    as_json: bool,
) -> None:
    """Call :func:`gstds_cache.select_once`, print."""
    known = {field.name for field in fields(OnceConfig)} | {"ids"}
    other = [name for name, value in given.items() if name not in known and value is not None]
    if other:
        flag = "--serve" if other[0] == "address" else f"--{other[0].replace('_', '-')}"
        raise UsageError(f"{flag} says how batches are selected; --once chooses rows for the whole data set instead")
    if out == "-":
        raise UsageError("--once writes a file, and a list of ids beside it: give --out FILE, or leave it out")
    from gstds_cache.api.select_once import select_once

    ids, settings = given.pop("ids", None), {name: value for name, value in given.items() if value is not None}
    selection = select_once(store, once, out=out, ids=ids, force=force, **reading, **settings)
    _print(selection.summary, as_json, once)
    click.echo(f"ids: {ids or selection.path.with_suffix('.csv')}", err=as_json)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) not in {ParameterSource.DEFAULT, None}


def _check_together(address: str | None, service: dict[str, Any], out: str | None, force: bool) -> None:
    """Refuse flags that say nothing, or two things, together."""
    if out == "-" and force:
        raise UsageError("--force replaces a file; with --out - there is none")
    if address is not None and (out is not None or force):
        raise UsageError("--serve serves the store's selections; it takes no --out and no --force")
    for name, value in service.items():
        if address is None and value is not None:
            raise UsageError(f"--{name.replace('_', '-')} says how to serve: it needs --serve HOST:PORT")


def _dropped(summary: SelectionSummary) -> str:
    """Shares dropped of the classes that lost least and most, in words."""
    shares = sorted((1 - counts["kept"] / counts["seen"], name) for name, counts in summary.classes.items())
    if len(shares) < 2:
        return ""
    shown = shares if len(shares) <= SHOWN else [*shares[: SHOWN // 2], *shares[-SHOWN // 2 :]]
    words = [f"{name} {share:.1%}" for share, name in shown]
    if len(shares) > SHOWN:
        words.insert(SHOWN // 2, f"... {len(shares) - SHOWN} more ...")
    return "by class: " + ", ".join(words)


def _print(summary: SelectionSummary, as_json: bool, once: int | None = None) -> None:
    status = ", ".join(f"{name} {count:,}" for name, count in sorted(summary.status.items())) or "none computed"
    piped = summary.out == "-"
    chosen = "training draws" if summary.rule.startswith("draw ") else "kept"
    counted = f"{chosen} {summary.total_kept:,} of {summary.total_rows:,}"
    if once is not None:
        counted = (
            f"{once:,} of {summary.total_rows // summary.epochs:,} rows, the same in each of {summary.epochs} epochs"
        )
    rows = {
        "selection": f"{summary.selection_digest[:12]} of store {summary.cache_fingerprint[:12]}",
        "this run": f"cache hit: {summary.total_batches:,} batches, {counted}; nothing was computed"
        if summary.cache_hit
        else f"{summary.total_batches:,} batches, {counted}"
        if once is not None
        else f"{summary.batches:,} batches, {chosen} {summary.kept:,} of {summary.rows:,} "
        f"({summary.samples_per_second:,.0f} samples/s)",
        "Fiedler": status,
        "graphs": f"{summary.graphs_found:,} of {summary.batches:,} batches reused those of earlier epochs"
        if summary.graphs_found
        else "",
        "guidance": summary.guidance_note,
        "dropped": _dropped(summary),
        "work": f"{shares_text(summary.shares)} (neighbours by {summary.knn_backend})" if summary.shares else "",
        "time": seconds_line(summary.seconds),
    }
    print_table([(name, text) for name, text in rows.items() if text], err=piped)
    if not piped:
        click.echo(f"wrote: {summary.out}")
        dataset = summary.dataset_uri or "DATASET"
        words = ["gstds-train", dataset, "--selection", Path(summary.out)]
        draw = summary.rule.removeprefix("draw ")
        own = draw != summary.rule and ":" in draw  # a selection names it, and cannot have it run
        if dataset.startswith("python:"):
            click.echo(f"next, in Python, where the data set is: gstds_cache.train(dataset, {summary.out!r})")
        else:
            click.echo(f"next: {command_line(*words, *(['--draw', draw] if own else []))}")
    if as_json:
        print_json(summary.to_dict(), err=piped)


if __name__ == "__main__":
    main()
