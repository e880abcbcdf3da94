"""``gstds-train``: train a network on a stream of kept indices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gstds_cache.config import TrainConfig
from gstds_cache.errors import UsageError, with_flags
from gstds_cache.runtime.openmp import wait_briefly
from gstds_cache.runtime.progress import shares_text

from .common import (
    Command,
    LocalPath,
    device_option,
    flags_of,
    json_option,
    notify,
    print_json,
    print_table,
    seconds_line,
    setting_option,
)

if TYPE_CHECKING:
    from gstds_cache.training.evaluate import Accuracy
    from gstds_cache.training.ledger import Ledger
    from gstds_cache.training.report import TrainReport

HELP = """Train a network on a selection of DATASET, each batch of kept rows one step.

\b
Examples:
  gstds-train digits --selection selection.arrow
  gstds-train 'imagefolder:photos?split=train' --selection s.arrow --eval 'imagefolder:photos?split=test'
  gstds-select photos.store --out - | gstds-train imagefolder:photos --selection -
  gstds-train digits --selection selection.arrow --out runs/a --resume
  torchrun --nproc-per-node 2 --no-python gstds-train digits --selection selection.arrow
  gstds-train digits --selection selection.arrow --log tensorboard,mlflow
  gstds-train digits --selection selection.arrow --plan

--arch takes any architecture torchvision or timm knows by that name.
"""


@click.command(cls=Command, help=HELP)
@click.argument("dataset")
@click.option("--selection", required=True, metavar="FILE|-|grpc://HOST:PORT", help="From gstds-select.")
@click.option("--cache", metavar="STORE", help="Refuse a selection that was made from another store than this.")
@click.option("--eval", "evaluation", metavar="DATASET", help="Measure accuracy on this at the end.")
@setting_option(TrainConfig, "arch", help="The network.")
@setting_option(TrainConfig, "seed")
@setting_option(TrainConfig, "lr", help="Peak learning rate.")
@setting_option(TrainConfig, "momentum")
@setting_option(TrainConfig, "weight_decay")
@setting_option(
    TrainConfig,
    "image_size",
    show_default=False,
    help="Side in pixels. [default: the images' own where they are equal squares up to 64, else 64]",
)
@setting_option(TrainConfig, "augment", help="auto mirrors where that keeps an image's label.")
@setting_option(TrainConfig, "label_smoothing", help="Share of the target that is spread over all classes.")
@device_option
@setting_option(TrainConfig, "precision", help="auto is bfloat16 (autocast) on CUDA, float32 on a CPU.")
@setting_option(
    TrainConfig,
    "compile",
    help="Compile the network with torch.compile in this mode, which needs a C compiler; reduce-overhead replays CUDA "
    "graphs, one a batch size: give --repack as well.",
)
@setting_option(
    TrainConfig,
    "cuda_graphs",
    flags=(" /--no-cuda-graphs",),
    help="Start the kernels of each training step one by one, also on a GPU that holds the images; else they are "
    "recorded in a CUDA graph, and started together.",
)
@setting_option(
    TrainConfig,
    "images",
    help="Where decoded images are held; auto is the GPU where they take half of its free memory at most.",
)
@setting_option(
    TrainConfig,
    "workers",
    help="Processes that decode images. [default: 1; beside a GPU every core]",
)
@setting_option(
    TrainConfig,
    "max_pixels",
    help="Images of more pixels (width x height) are not decoded; give what the store was made with.",
)
@click.option(
    "--memory-budget",
    type=int,
    default=TrainConfig.memory_budget >> 20,
    show_default=True,
    help="MiB of decoded images to hold in main memory.",
)
@setting_option(
    TrainConfig,
    "threads",
    show_default=False,
    help="CPU threads to use. [default: 1 where a step is a few ms, else all]",
)
@setting_option(
    TrainConfig,
    "repack",
    metavar="N",
    show_default=False,
    help="Re-pack what is kept into batches of N rows: fewer full steps. [default: each batch of the selection a step]",
)
@setting_option(
    TrainConfig,
    "accumulate",
    metavar="K",
    help="Gradient accumulation: compute each step in K pieces, in the memory of one; the update stays one.",
)
@setting_option(
    TrainConfig,
    "norm_samples",
    metavar="N",
    help="Random rows that re-estimate the statistics of batch normalisation before testing; 0 leaves those of the "
    "rows that were kept.",
)
@setting_option(
    TrainConfig,
    "draw",
    metavar="MODULE:FUNCTION",
    help="The selection's own draw function, which it names and cannot have run by itself.",
)
@setting_option(
    TrainConfig,
    "importance_weights",
    help="Weight losses by 1 / the chance of a row to be drawn, capped: only where the gradient "
    "has to be that of all rows, as networks learn less from it. For a selection made with --draw.",
)
@click.option(
    "--out",
    type=LocalPath(),
    metavar="RUN_DIR",
    help="[default: runs/ARCH-SELECTION-sSEED, and what is not the default, e.g. -lr0.3]",
)
@click.option(
    "--log",
    "--log-to",
    "log",
    metavar="TRACKER[,TRACKER...]",
    default="",
    help="Tell tensorboard, wandb or mlflow of the run; one that fails does not end it. Under torchrun write --log-to, "
    "as it may take --log for a flag of its own.",
)
@click.option("--resume", is_flag=True, help="Continue the run in RUN_DIR, if there is one.")
@click.option(
    "--plan", is_flag=True, help="Only print the ledger that the run would end with, from a few measured steps."
)
@json_option
def main(
    dataset: str,
    selection: str,
    cache: str | None,
    evaluation: str | None,
    memory_budget: int,
    out: Path | None,
    log: str,
    resume: bool,
    plan: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Parse, call :func:`gstds_cache.train`, print."""
    wait_briefly()
    from gstds_cache.api.train import estimate_training, train
    from gstds_cache.runtime.allocator import keep_freed_memory
    from gstds_cache.training.distributed import default_ranks

    keep_freed_memory()
    settings |= {"memory_budget": memory_budget << 20}
    first = default_ranks(None, None)[0] == 0  # of several ranks the first prints
    if plan and log:
        raise UsageError("--log with --plan: nothing is trained, so nothing is logged")
    if plan:
        ledger = estimate_training(dataset, selection, evaluation=evaluation, cache=cache, notify=notify, **settings)
        if first:
            _print_plan(ledger, as_json)
        return
    report = train(
        dataset,
        selection,
        evaluation=evaluation,
        cache=cache,
        out=out,
        resume=resume,
        log=log,
        notify=notify,
        **settings,
    )
    if first:
        _print(report)
        if as_json:
            print_json(report.to_dict())


def _print_plan(ledger: Ledger, as_json: bool) -> None:
    _print_ledger(ledger)
    if ledger.warning:
        click.echo(f"warning: {ledger.warning}", err=True)
    click.echo("plan: nothing was trained or written; whether the files are those that were selected, a run checks")
    if as_json:
        print_json({"plan": True, "ledger": ledger.to_dict()})


def _print(report: TrainReport) -> None:
    left = f" ({report.left_over:,} kept rows left out: fewer than a batch)" if report.left_over else ""
    print_table(
        [
            ("run", str(report.run_dir)),
            ("test accuracy", _accuracy(report.accuracy)),
            ("gradients", f"{report.gradient_samples:,} samples in {report.steps:,} steps{left}"),
            ("loss", f"{report.loss:.4f} in the last epoch"),
            *([("batch norm", _batch_norm(report.forward_samples))] if report.forward_samples else []),
            ("waited", f"{shares_text(report.waited)} of the training time"),
            ("time", seconds_line(report.seconds)),
        ]
    )
    _print_ledger(report.ledger)
    click.echo("next: the same with another --seed; the embeddings and the selection are reused")


def _batch_norm(samples: int) -> str:
    return f"statistics re-estimated by forward passes of random rows ({samples:,} samples)"


def _accuracy(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not measured: give --eval DATASET"
    counts = {"undecodable": accuracy.undecodable, "without a label": accuracy.unlabelled}
    left_out = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    share = "unknown" if accuracy.value is None else f"{accuracy.value:.2%}"
    return f"{share} of {accuracy.items:,}" + (f" ({left_out} left out)" if left_out else "")


def _print_ledger(ledger: Ledger) -> None:
    flags = flags_of(click.get_current_context().command)
    rows = [(f"  {name}", with_flags(text, flags)) for name, text in ledger.rows()]
    print_table([("plan" if ledger.planned else "ledger", ""), *rows])


if __name__ == "__main__":
    main()
