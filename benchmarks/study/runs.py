"""One run of the study: prepare what the method needs, select, train, test; every second put to its phase."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import nn

from benchmarks.study.baselines.batch_method import BatchMethod, kept_of
from benchmarks.study.baselines.ccs import ccs
from benchmarks.study.baselines.el2n import el2n, hardest
from benchmarks.study.baselines.fixed import write_fixed
from benchmarks.study.baselines.infobatch import InfoBatch
from benchmarks.study.baselines.jest import Jest
from benchmarks.study.baselines.k_centre import k_centre
from benchmarks.study.baselines.orderdp import OrderDP
from benchmarks.study.baselines.prototypicality import prototypicality
from benchmarks.study.baselines.proxy_mask import ProxyMask
from benchmarks.study.baselines.rho_loss import RhoLoss
from benchmarks.study.baselines.rs2 import rs2
from benchmarks.study.baselines.selective_backprop import SelectiveBackprop
from benchmarks.study.baselines.seta import SeTa, random_share
from benchmarks.study.data import StudyData
from benchmarks.study.methods import INFOBATCH_KEEPS, Method, find_method
from benchmarks.study.scores import Scores
from benchmarks.study.settings import Setting
from benchmarks.study.trainer import train_once
from benchmarks.study.variants import BY_CLASS, VariantFeedback
from gstds_cache.config import STRATA, SelectConfig
from gstds_cache.seeding import rng_for
from gstds_cache.selection.order import parse_order
from gstds_cache.selection.run import BatchSelector
from gstds_cache.stream.schema import Header
from gstds_cache.stream.writer import header_of, write_file
from gstds_cache.training.feedback import Feedback

K_CENTRE_DIMS = 64


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        setting: The setting's name.
        method: The method's name.
        ratio: Share of each batch, or of the data set, that is left out.
        epochs: Epochs; more than the setting's where a method is given a larger budget.
        seed: Seed of selection, initial weights and augmentation.
        lr: Peak learning rate.
    """

    setting: str
    method: str
    ratio: float
    epochs: int
    seed: int
    lr: float


def one_run(task: Task, data: StudyData, scores: Scores) -> dict[str, Any]:
    """Run ``task`` and return its result line.

    Put apart and not counted, for any method: ``warm-up``, which is loading compiled code by selecting one batch; also
    decoding the images into memory (all runs share it), and testing. ``trial`` is apart as well: the runs share it.
    """
    method = find_method(task.method)
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="study-") as name:
        folder = Path(name)
        load = os.getloadavg()[0]
        torch.zeros(1, device=data.device)  # a GPU's start is no method's
        begun, cpu_begun = time.perf_counter(), time.process_time()
        selection = selection_of(task, method, data, scores, folder, seconds, cpu)
        seconds["select"] = time.perf_counter() - begun - sum(seconds.values())
        cpu["select"] = time.process_time() - cpu_begun - sum(cpu.values())
        chooser = _chooser(task, method, data, scores)
        config = replace(
            data.setting.train_config(task.seed),
            lr=task.lr,
            importance_weights=method.importance_weights,
            device=data.device,
        )
        last: list[nn.Module] = []

        def after_epoch(network: nn.Module) -> None:
            last[:] = [network]

        cpu_begun = time.process_time()
        report, forward_samples = train_once(
            *(data.train, selection, config, folder / "run"),
            feed=data.train_feed,
            method=chooser,
            after_epoch=after_epoch,
            feedback=_feedback(method, data, scores),
        )
        cpu["train"] = time.process_time() - cpu_begun
        phases = {k: v for k, v in report.seconds.items() if k not in {"load", "eval", "total"}}
        return {
            "kind": "run",
            "setting": task.setting,
            "method": task.method,
            "rule": f"draw {method.draw}" if method.draw else method.rule,
            "guidance": method.guidance if method.needs else "none",
            "schedule": method.schedule or f"constant:{task.ratio}",
            "ratio": task.ratio,
            "epochs": task.epochs,
            "seed": task.seed,
            "lr": task.lr,
            "test_accuracy": round(data.accuracy(last[0]), 6),
            "gradient_samples": report.gradient_samples,
            "forward_samples": forward_samples,
            "norm_samples": report.forward_samples,
            "steps": report.steps,
            "seconds": {k: round(v, 3) for k, v in (seconds | phases).items()},
            "cpu_seconds": {k: round(v, 3) for k, v in cpu.items()},
            "embeds": method.embeds,
            "needs": sorted(method.needs),
            "selected_on": data.device if method.kind == "rule" else "cpu",
            "loss": round(report.loss, 5),
            "load_average": round(load, 2),
        }


def selection_of(
    task: Task,
    method: Method,
    data: StudyData,
    scores: Scores,
    folder: Path,
    seconds: dict[str, float],
    cpu: dict[str, float],
) -> Path:
    """The selection that is trained on; the time of scores computed here, and of warming up, is put apart."""
    setting = data.setting
    if method.variant is not None and method.variant.step:
        setting = replace(setting, batch=4 * method.variant.step)
    path = folder / "selection.arrow"
    if method.kind == "rule":
        full = task.method == "full"
        config = SelectConfig(
            rule=method.rule,
            draw=method.draw,
            strata=_strata(method, setting),
            reference=method.reference,
            guidance=method.guidance,
            schedule=method.schedule or f"constant:{task.ratio}",
            batch_size=min(setting.step if full else setting.rows_before(task.ratio), len(data.train)),
            epochs=task.epochs,
            knn=setting.knn,
            seed=task.seed,
            order=setting.order,
            threads=1,
            device=data.device,
            batch_assignments=method.batch_assignments,
        )
        selector, begun, cpu_begun = BatchSelector(data.store, config), time.perf_counter(), time.process_time()
        _ = selector.guidance, selector.reference
        # Of the first run alone: of a trial of guidance the store keeps what came out.
        seconds["trial"], cpu["trial"] = time.perf_counter() - begun, time.process_time() - cpu_begun
        begun, cpu_begun = time.perf_counter(), time.process_time()
        next(BatchSelector(data.store, config).run())
        seconds["warm-up"], cpu["warm-up"] = time.perf_counter() - begun, time.process_time() - cpu_begun
        list(write_file(BatchSelector(data.store, config), path))
        return path
    keep = kept_of(len(data.train), task.ratio)
    if method.kind == "batch":
        # Batches of which about a step's samples are kept; of SeTa's at most, by its first epoch and its last.
        # Where steps are of one size a batch gives one at most: of InfoBatch's it may keep all.
        infobatch = INFOBATCH_KEEPS if data.device == "cpu" else 1.0
        most = {"infobatch": infobatch, "seta": random_share(task.ratio, task.epochs)}
        rows = round(setting.step / most[task.method]) if task.method in most else setting.rows_before(task.ratio)
        config = SelectConfig(
            rule="random",
            schedule="constant:0",
            batch_size=min(rows, len(data.train)),
            epochs=task.epochs,
            seed=task.seed,
            order=setting.order,
            device="cpu",
        )
        list(write_file(BatchSelector(data.store, config), path))
        return path
    like = header_of(
        BatchSelector(data.store, SelectConfig(rule="random", batch_size=min(512, len(data.train)), device="cpu"))
    )
    begun, cpu_begun = time.perf_counter(), time.process_time()
    per_epoch = (
        rs2(len(data.train), keep, task.epochs, task.seed)
        if task.method == "rs2"
        else [_subset(task, keep, data, scores)] * task.epochs
    )
    seconds["scores"], cpu["scores"] = time.perf_counter() - begun, time.process_time() - cpu_begun
    write_fixed(path, like, per_epoch, step=setting.step, method=task.method, seed=task.seed)
    return path


def _strata(method: Method, setting: Setting) -> int | None:
    """Strata of a draw: eight unless the method says how many, or the library's own where classes come by turns."""
    if method.draw is None or parse_order(setting.order).balanced:
        return method.strata
    return method.strata or STRATA


def _subset(task: Task, keep: int, data: StudyData, scores: Scores) -> np.ndarray:
    """Rows of a subset chosen once."""
    labels = data.train.labels
    if task.method == "el2n":
        return hardest(el2n(scores.early(), labels), keep)
    if task.method == "ccs":
        return ccs(el2n(scores.early(), labels), keep, rng_for(task.seed, "ccs"))
    if task.method == "forgetting":
        return hardest(scores.forgetting(), keep)
    embeddings = data.normalized_embeddings()
    if task.method == "prototypicality":
        return hardest(prototypicality(embeddings, len(data.train.classes), task.seed), keep)
    assert task.method == "k-centre", task.method
    # In 64 principal components: with all dimensions the greedy steps take longer than training on everything.
    short = PCA(min(K_CENTRE_DIMS, *embeddings.shape), svd_solver="randomized", random_state=task.seed)
    points = short.fit_transform(embeddings).astype(np.float32)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return k_centre(points, keep, first=int(rng_for(task.seed, "k-centre").integers(len(points))))


def _chooser(task: Task, method: Method, data: StudyData, scores: Scores) -> BatchMethod | None:
    if method.kind != "batch":
        return None
    if task.method == "infobatch":
        # Steps of one size are replayed on a GPU; its own code's loader makes them of one size, too.
        return InfoBatch(len(data.train), step=0 if data.device == "cpu" else data.setting.step)
    if task.method == "seta":
        return SeTa(len(data.train), task.ratio, data.setting.step)
    if task.method == "orderdp":
        return OrderDP(len(data.train), task.ratio, data.setting.step)
    if task.method == "selective-backprop":
        return SelectiveBackprop(task.ratio)
    if task.method == "proxy-mask":
        right = scores.early()[0][np.arange(len(data.train)), data.train.labels]
        return ProxyMask(-np.log(np.maximum(right, 1e-7)), task.ratio)
    reference = scores.reference()
    return RhoLoss(reference, task.ratio) if task.method == "rho-loss" else Jest(reference, task.ratio)


def _feedback(method: Method, data: StudyData, scores: Scores) -> Callable[[Header], Feedback] | None:
    """What draws a variant's rows; None for every other method."""
    variant = method.variant
    if variant is None:
        return None
    own = variant.reference != "probe" or variant.calibrate != "none"
    reference = scores.reference(variant.reference) if own else None
    embeddings = data.normalized_embeddings() if variant.graph == "dense" else None
    labels = data.train.labels if variant.graph == "label" or variant.calibrate in BY_CLASS else None
    return partial(VariantFeedback, variant=variant, reference=reference, embeddings=embeddings, labels=labels)


def line_of(result: dict[str, Any]) -> str:
    """A result as one line of JSON."""
    return json.dumps(result, sort_keys=True)
