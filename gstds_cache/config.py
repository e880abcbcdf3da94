"""Configurations: frozen, and checked when they are made, so that a bad value never gets further than here."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from decimal import Decimal
from numbers import Real
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, get_args, get_origin, get_type_hints

from gstds_cache.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT_MODEL = "timm:tf_efficientnet_lite0"
DEFAULT_RULE = "cells-squared"
SMALLEST_BATCH = 4
STRATA = 8
BALANCED = "class-balanced"  # the order in which every class comes as often
CLASSES = 0  # as a number of strata: the classes are the strata
BY_CLASS: Final = "by-class"  # reference losses relative to those of their class
MEMORY_BUDGET = 4 << 30
"""Bytes of embeddings that a store opened for reading may hold in memory."""
DEVICE = "auto"
ENGINE: Final = "local"
# Of the calls that take no configuration, and their commands.
CHECK_LEVEL: Final = "quick"
SAMPLE_ROWS = 64  # that a check embeds again
SAMPLE_SEED = 0
REPORT_BATCHES = 48  # that a report computes again
REPORT_FILE = "report.html"
AUDIT_FOLDER = "audit"
ADVICE_RATIOS = (0.5, 0.75, 0.9)
ADVICE_EPOCHS = 8
# Upper limits: far beyond what can be meant, and below what would take all memory, processes or time before it fails.
MOST_IMAGES = 1 << 16  # of one forward pass
MOST_ROWS = 1 << 24  # of a shard, a batch, a training step
MOST_EPOCHS = 100_000
MOST_WORKERS = 1024
MOST_THREADS = 4096
MOST_STRATA = 1 << 12
MOST_PIXELS = 1 << 30  # of an image: 3 GB once decoded
LARGEST_SIDE = 4096  # pixels
LARGEST_RATE = 1e12  # of learning, and of decay


def _require_range(what: str, got: int | None, least: int, most: int, also: str = "") -> None:
    """Refuse a whole number outside its range; None, where nothing was given, is fine.

    Raises:
        UsageError: It is outside.
    """
    if got is not None and not least <= got <= most:
        raise UsageError(f"{what}: got {got:,}, expected {least:,} to {most:,}{also}")


def _require(ok: bool, what: str, got: object, expected: str, hint: str = "") -> None:
    if not ok:
        raise UsageError(f"{what}: got {got!r}, expected {expected}", hint=hint)


_EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def as_type(name: str, value: object, kind: Any) -> Any:
    """An argument's value as the type it is declared with: NumPy's numbers become Python's, nothing else is converted.

    Args:
        name: The argument.
        value: What was given.
        kind: ``int``, ``float``, ``str``, ``bool``, one of these or None, or a Literal of texts.

    Returns:
        The value.

    Raises:
        UsageError: It is of another type; True and False are no numbers.
    """
    choices = get_args(kind)
    if value is None and NoneType in choices:
        return None
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in choices:
            return value
        raise UsageError(f"`{name}`: got {value!r:.80}, expected one of {', '.join(choices)}")
    kind = next((part for part in choices if part is not NoneType), kind)
    try:
        if isinstance(value, bool) is (kind is bool):  # bool is a kind of int
            if kind is int:
                return operator.index(value)  # type: ignore[arg-type]  # the TypeError says that it is none
            if kind is float and isinstance(value, Real | Decimal):
                return float(value)
            if isinstance(value, kind):
                return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"`{name}`: got {value!r:.80}, expected {_EXPECTED[kind]}")


def as_tuple(name: str, values: object, expected: str) -> tuple[Any, ...]:
    """The values of an argument that takes several.

    Args:
        name: The argument.
        values: What was given.
        expected: What was expected, for the error.

    Returns:
        The values, each still to be checked.

    Raises:
        UsageError: Not several values were given, but one or none.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UsageError(f"`{name}`: got {values!r:.80}, expected {expected}, in a list")
    return tuple(values)


def require_settings(call: Callable[..., object], config: type[DataclassInstance], given: Iterable[str]) -> None:
    """Refuse keyword arguments that are no settings, under the name of the function that a user called.

    Args:
        call: The function.
        config: The configuration whose fields it takes as keyword arguments.
        given: Names of the keyword arguments that are none of its own parameters.

    Raises:
        TypeError: One of them is no field.
    """
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            own = [p.name for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD]
            near = difflib.get_close_matches(name, [*known, *own], 1)
            more = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join([*known, *own])}"
            raise TypeError(f"{call.__name__}() has no setting {name!r}; {more}")


def _as_declared(config: DataclassInstance) -> None:
    """Give each field of a frozen configuration its declared type.

    Raises:
        UsageError: A value is of another type.
    """
    for name, kind in get_type_hints(type(config)).items():
        object.__setattr__(config, name, as_type(name, getattr(config, name), kind))


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How a data set is embedded.

    Attributes:
        model: ``timm:NAME``, ``torchvision:NAME``, an alias such as ``dinov2-small``, or ``module:factory``; with
            ``?weights=FILE``, ``?size=PIXELS``. Without a size, or with ``size=auto``, a model that takes any looks at
            no more pixels than images of this size need.
        batch_size: Images per forward pass; None takes the store's own, or the device's default for a new store.
        shard_rows: Rows per shard, rounded up to a multiple of ``batch_size``; None takes the store's
            own, or about 4 MB a shard.
        workers: Processes that decode images; 0 decodes in this process, None fits the machine and the data set.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, or several GPUs, as ``cuda:0,1``.
        decoder: What decodes images: ``pillow``, in processes, or ``nvjpeg``, on the GPU, which leaves what is no usual
            JPEG to Pillow. Their pixels differ, so each has stores of its own.
        decode: How Pillow decodes large JPEGs: ``exact`` at their full size; ``scaled`` at 1/2, 1/4 or 1/8 of it, where
            that is twice as large as what the model looks at, still; ``auto`` is the store's own where there is one,
            and for a new store ``scaled`` if a sample of the images has such JPEGs.
        max_pixels: Images of more pixels (width x height) are quarantined.
        dtype: How embeddings are stored.
        allow_untrained: Accept a model without pretrained weights.
        cuda_graphs: Whether forward passes of a timm or torchvision model are recorded in a CUDA graph where nvJPEG
            decodes, and replayed, which spares the host the start of each kernel. The rows are the same: the first
            replay is compared with a pass without.
        shard: ``I/N``, I from 0: embed this part of the store's shards alone, beside other processes with the other
            parts. The last of them finishes the store. None embeds all that is missing.
    """

    model: str = DEFAULT_MODEL
    batch_size: int | None = None
    shard_rows: int | None = None
    workers: int | None = None
    device: str = DEVICE
    decoder: Literal["pillow", "nvjpeg"] = "pillow"
    decode: Literal["auto", "exact", "scaled"] = "auto"
    max_pixels: int = 64_000_000
    dtype: Literal["float16", "float32"] = "float16"
    allow_untrained: bool = False
    cuda_graphs: bool = True
    shard: str | None = None

    def __post_init__(self) -> None:
        _as_declared(self)
        _require_range("`batch_size`", self.batch_size, 1, MOST_IMAGES)
        _require_range("`shard_rows`", self.shard_rows, 1, MOST_ROWS)
        _require_range("`workers`", self.workers, 0, MOST_WORKERS, ", or None")
        _require_range("`max_pixels`", self.max_pixels, 1, MOST_PIXELS)
        hint = "leave `decode` out: what the GPU decodes is never scaled"
        _require(self.decoder == "pillow" or self.decode != "scaled", "`decode`", self.decode, "auto or exact", hint)


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """How a store's rows are selected. Every field but the last four is identity.

    Attributes:
        batch_size: Rows a batch holds before selection (B), >= 4. Where it is not given, of a store of fewer rows, a
            quarter of them.
        epochs: Passes over the data set.
        schedule: Filter ratio over time, e.g. ``constant:0.75`` or ``linear:0.25:0.75`` (selection/schedule.py).
        order: ``permutation``; ``class-balanced``, in which rows of rare classes come again, so that every class comes
            as often; or ``window:ROWS`` for stores larger than memory (selection/order.py).
        batch_assignments: Number of fixed assignments of rows to batches; epochs cycle through them, so that only the
            first so many epochs make graphs (selection/plan.py). 0 draws a new one in every epoch; None is 1 for rules
            that look at a graph, else 0, as with ``order="class-balanced"``.
        knn: Neighbours per row (K), below ``batch_size``.
        rule: Name of the rule that turns a graph's spectrum into a kept set.
        draw: Select candidates, of which the trainer draws in each epoch, by the losses that it had before: what it
            draws by (selection/draws.py). Takes the place of ``rule``. None selects kept rows; ``auto``
            is what suits the data and the run, by probes on the embeddings (selection/draw_choice.py).
        strata: Spectral strata of a batch of which the trainer draws in proportion to their size. 1 makes no graph, nor
            does 0, which takes the classes instead. None is what suits the draw: 8, or 1 for ``loss-squared`` and
            ``largest-loss-minus-reference``; 0 with ``order="class-balanced"``. Only with ``draw``.
        reference: What a draw takes for the reference losses: the probe's, ``raw``; or ``by-class``, relative to
            those of their class (selection/reference.py). Only for draws that look at them.
        guidance: Difficulty for rules that look at it: ``auto``, ``probe``, ``uncertainty``, ``disagreement``,
            ``file:SCORES.npy`` or ``none``.
        min_per_class: Rows of every class that stay in a batch, or all it has; 0 for no floor.
        seed: Seed of the batch plan and of random rules, >= 0.
        laplacian: ``combinatorial`` is D - W, ``normalized`` is I - D^-1/2 W D^-1/2.
        tolerance: Relative residual at which a Fiedler pair counts as converged.
        max_iterations: LOBPCG iterations before the dense fallback.
        device: Where neighbours are found and a probe is trained: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        knn_backend: ``auto``, ``cuda``, ``torch``, ``faiss-cpu`` or ``faiss-gpu`` (docs/spectral.md).
        solver: Where eigenvectors are computed: ``cpu``, ``cuda`` (on ``device``, which has to be one), or ``auto``:
            on ``device`` where the CUDA kernels run there, else on the CPU (docs/spectral.md).
        threads: CPU threads that selection may use, over which the batches are spread; our rules without a graph take
            one. 0 for all there are; None for all as well, but one for a stream or a service, which runs beside
            trainers. Their number changes nothing in the result.
    """

    batch_size: int = 512
    epochs: int = 8
    schedule: str = "constant:0.75"
    order: str = "permutation"
    batch_assignments: int | None = None
    knn: int = 10
    rule: str = DEFAULT_RULE
    draw: str | None = None
    strata: int | None = None
    reference: Literal["raw", "by-class"] = "raw"
    guidance: str = "auto"
    min_per_class: int = 0
    seed: int = 0
    laplacian: Literal["combinatorial", "normalized"] = "combinatorial"
    tolerance: float = 1e-6
    max_iterations: int = 500
    device: str = DEVICE
    knn_backend: Literal["auto", "cuda", "torch", "faiss-cpu", "faiss-gpu"] = "auto"
    solver: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        _as_declared(self)
        _require_range("`batch_size`", self.batch_size, SMALLEST_BATCH, MOST_ROWS)
        _require_range("`epochs`", self.epochs, 1, MOST_EPOCHS)
        _require(
            1 <= self.knn < self.batch_size,
            "`knn`",
            self.knn,
            f"from 1 to batch size - 1 = {self.batch_size - 1}",
            hint="a row has only batch size - 1 possible neighbours: lower `knn` or raise `batch_size`",
        )
        _require_range("`batch_assignments`", self.batch_assignments, 0, MOST_EPOCHS)
        _require(self.min_per_class >= 0, "`min_per_class`", self.min_per_class, "0 or more")
        _require_range("`strata`", self.strata, 0, MOST_STRATA)
        self._check_draw()
        _require(self.seed >= 0, "`seed`", self.seed, "0 or more")
        _require(0 < self.tolerance < 1, "`tolerance`", self.tolerance, "between 0 and 1, both excluded")
        _require_range("`max_iterations`", self.max_iterations, 1, 1_000_000)
        _require_range("`threads`", self.threads, 0, MOST_THREADS)

    def _check_draw(self) -> None:
        """Refuse what says nothing with, or without, ``draw``.

        Raises:
            UsageError: There is such a setting.
        """
        if self.draw is None:
            hint = "leave it out, or say by what a trainer draws: `draw='loss-minus-reference'`"
            _require(self.strata is None, "`strata`", self.strata, "no such setting without `draw`", hint)
            _require(self.reference == "raw", "`reference`", self.reference, "no such setting without `draw`", hint)
            return
        hint = "leave it out: with `draw` the trainer chooses the rows, in each epoch anew"
        _require(self.rule == DEFAULT_RULE, "`rule`", self.rule, "no rule beside `draw`", hint)
        _require(self.min_per_class == 0, "`min_per_class`", self.min_per_class, "0 with `draw`", hint)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained on a selection.

    Attributes:
        arch: ``resnet18`` or any architecture torchvision or timm knows by that name.
        seed: Seed of the initial weights and of augmentation, >= 0.
        lr: Peak learning rate of the one-cycle schedule.
        momentum: SGD momentum.
        weight_decay: SGD weight decay.
        image_size: Side of the square training image in pixels; 0 takes the images' own where they are equal squares up
            to 64, else 64.
        augment: ``none``, ``crop`` (random shifts), ``crop+flip``; ``auto`` mirrors where the data set allows it.
        label_smoothing: Share of the target that is spread over all classes, 0 to below 1 (Szegedy et al. 2016).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``float32``, or ``bfloat16`` (autocast: weights, sums and losses stay float32); ``auto`` is bfloat16
            on CUDA and float32 on a CPU.
        compile: ``default`` or ``reduce-overhead`` compiles the network with ``torch.compile`` in that mode;
            ``reduce-overhead`` also replays CUDA graphs, one for each batch size. It needs a C compiler.
        cuda_graphs: Whether steps that come again are recorded in a CUDA graph and replayed, which spares the host most
            of a small network's step: on one GPU that holds the images (``images``), ``compile`` off, without
            ``accumulate`` and ``importance_weights``. Else it changes nothing.
        images: Where decoded images are held: on the ``device``, or on the ``host`` (within ``memory_budget``, else
            decoded as they are needed). ``auto`` is a GPU where they take half of its free memory at most.
        workers: Processes that decode images; None is 1 on a CPU, and beside a GPU every core.
        max_pixels: Images of more pixels (width x height) are not decoded; as the store was made with.
        memory_budget: Bytes of decoded images that may be held in main memory.
        threads: CPU threads training may use; 0 takes one where a step is small (training/flops.py), else all.
        repack: Re-pack what a selection keeps into batches of this many rows, over all ranks together; 0 leaves each
            batch of the selection one step.
        norm_samples: Random rows of the data set, unaugmented, whose forward passes re-estimate the running statistics
            of batch normalisation after the last step: without that they describe the rows that were kept. 0 leaves
            them so. Changes nothing in networks without batch normalisation.
        draw: The selection's own draw function, ``module:function``: a selection names it, and cannot have it run. None
            for the draws that have a name.
        importance_weights: Weight each row's loss by 1 / its probability of having been drawn, capped, with mean 1 in a
            batch. Only for candidates.
        accumulate: Gradient accumulation: each rank computes a step's rows in this many pieces one after the other and
            adds their gradients up before the one update, in the memory of one piece. 1 computes them at once.
    """

    arch: str = "resnet18"
    seed: int = 0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    image_size: int = 0
    augment: Literal["auto", "none", "crop", "crop+flip"] = "auto"
    label_smoothing: float = 0.0
    device: str = DEVICE
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    cuda_graphs: bool = True
    images: Literal["auto", "device", "host"] = "auto"
    workers: int | None = None
    max_pixels: int = EmbedConfig.max_pixels
    memory_budget: int = 2 << 30
    threads: int = 0
    repack: int = 0
    norm_samples: int = 4096
    draw: str | None = None
    importance_weights: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        _as_declared(self)
        _require_range("`accumulate`", self.accumulate, 1, MOST_ROWS)
        hint = "pass `compile='default'`: a CUDA graph overwrites the gradients of the piece before"
        _require(self.accumulate == 1 or self.compile != "reduce-overhead", "`accumulate`", self.accumulate, "1", hint)
        _require(self.seed >= 0, "`seed`", self.seed, "0 or more")
        _require_range("`repack`", self.repack, 0, MOST_ROWS)
        _require_range("`norm_samples`", self.norm_samples or 2, 2, MOST_ROWS, ", or 0")
        _require(0 < self.lr <= LARGEST_RATE, "`lr`", self.lr, f"above 0, at most {LARGEST_RATE:g}")
        _require(0 <= self.momentum < 1, "`momentum`", self.momentum, "from 0 to below 1")
        _require(0 <= self.weight_decay <= LARGEST_RATE, "`weight_decay`", self.weight_decay, f"0 to {LARGEST_RATE:g}")
        _require_range("`image_size`", self.image_size or 8, 8, LARGEST_SIDE, ", or 0")
        _require(0 <= self.label_smoothing < 1, "`label_smoothing`", self.label_smoothing, "from 0 to below 1")
        _require_range("`workers`", self.workers, 0, MOST_WORKERS, ", or None")
        _require_range("`max_pixels`", self.max_pixels, 1, MOST_PIXELS)
        _require(self.memory_budget >= 0, "`memory_budget`", self.memory_budget, "0 or more")
        _require_range("`threads`", self.threads, 0, MOST_THREADS)


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What an audit looks for.

    Attributes:
        threshold: Cosine from which on two rows are near-duplicates, -1 to 1.
        knn: Nearest rows that are looked for of each row; an outlier's distance is their mean.
        folds: Parts of the labelled rows; the labels of each are judged by a probe that learnt from the others.
        rank: Labels by ``self-confidence`` (probability of the label) or ``normalized-margin`` (the same, less the
            probability of the most probable other), the lowest first.
        flipped: Share of the labels that are flipped on purpose in a second run of the probe, to measure how many of
            them are found and how many others are doubted; 0 measures nothing.
        shown: Images of each part of the page.
        exact_rows: Rows up to which every row is compared with every other; more are put into cells first.
        seed: Seed of folds, cells and flips, >= 0.
        device: Where products are computed: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads that may be used; 0 for all there are.
    """

    threshold: float = 0.92
    knn: int = 10
    folds: int = 5
    rank: Literal["self-confidence", "normalized-margin"] = "self-confidence"
    flipped: float = 0.1
    shown: int = 24
    exact_rows: int = 100_000
    seed: int = 0
    device: str = DEVICE
    threads: int = 0

    def __post_init__(self) -> None:
        _as_declared(self)
        _require(-1 <= self.threshold <= 1, "`threshold`", self.threshold, "a cosine, from -1 to 1")
        _require_range("`knn`", self.knn, 1, 1000)
        _require_range("`folds`", self.folds, 2, 100)
        _require(0 <= self.flipped <= 0.5, "`flipped`", self.flipped, "a share of the labels, from 0 to 0.5")
        _require_range("`shown`", self.shown, 1, 1000)
        _require(self.exact_rows >= 0, "`exact_rows`", self.exact_rows, "0 or more")
        _require(self.seed >= 0, "`seed`", self.seed, "0 or more")
        _require_range("`threads`", self.threads, 0, MOST_THREADS)


@dataclass(frozen=True, kw_only=True)
class OnceConfig:
    """How one set of rows is chosen for a whole training run. Every field but the last two is identity.

    Attributes:
        method: ``cells`` (a row of each of as many cells of equal size), ``facility-location`` (rows that all others
            are similar to) or ``k-centre`` (farthest points).
        balance: How many rows of each class: ``equal``, as far as a class has them; ``proportional`` to its rows; or
            ``none``, where labels are not looked at.
        batch_size: Rows of a training step.
        epochs: Passes over the chosen rows.
        seed: Seed of the choice and of the order of the epochs, >= 0.
        device: Where products are computed: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads that may be used; 0 for all there are.
    """

    method: Literal["cells", "facility-location", "k-centre"] = "cells"
    balance: Literal["equal", "proportional", "none"] = "equal"
    batch_size: int = 128
    epochs: int = 8
    seed: int = 0
    device: str = DEVICE
    threads: int = 0

    def __post_init__(self) -> None:
        _as_declared(self)
        _require_range("`batch_size`", self.batch_size, 1, MOST_ROWS)
        _require_range("`epochs`", self.epochs, 1, MOST_EPOCHS)
        _require(self.seed >= 0, "`seed`", self.seed, "0 or more")
        _require_range("`threads`", self.threads, 0, MOST_THREADS)


class EmbedSettings(TypedDict, total=False):
    """The fields of :class:`EmbedConfig` as keyword arguments."""

    model: str
    batch_size: int | None
    shard_rows: int | None
    workers: int | None
    device: str
    decoder: Literal["pillow", "nvjpeg"]
    decode: Literal["auto", "exact", "scaled"]
    max_pixels: int
    dtype: Literal["float16", "float32"]
    allow_untrained: bool
    cuda_graphs: bool
    shard: str | None


class SelectSettings(TypedDict, total=False):
    """The fields of :class:`SelectConfig` as keyword arguments."""

    batch_size: int
    epochs: int
    schedule: str
    order: str
    batch_assignments: int | None
    knn: int
    rule: str
    draw: str | None
    strata: int | None
    reference: Literal["raw", "by-class"]
    guidance: str
    min_per_class: int
    seed: int
    laplacian: Literal["combinatorial", "normalized"]
    tolerance: float
    max_iterations: int
    device: str
    knn_backend: Literal["auto", "cuda", "torch", "faiss-cpu", "faiss-gpu"]
    solver: Literal["auto", "cpu", "cuda"]
    threads: int | None


class TrainSettings(TypedDict, total=False):
    """The fields of :class:`TrainConfig` as keyword arguments."""

    arch: str
    seed: int
    lr: float
    momentum: float
    weight_decay: float
    image_size: int
    augment: Literal["auto", "none", "crop", "crop+flip"]
    label_smoothing: float
    device: str
    precision: Literal["auto", "float32", "bfloat16"]
    compile: Literal["off", "default", "reduce-overhead"]
    cuda_graphs: bool
    images: Literal["auto", "device", "host"]
    workers: int | None
    max_pixels: int
    memory_budget: int
    threads: int
    repack: int
    norm_samples: int
    draw: str | None
    importance_weights: bool
    accumulate: int


class AuditSettings(TypedDict, total=False):
    """The fields of :class:`AuditConfig` as keyword arguments."""

    threshold: float
    knn: int
    folds: int
    rank: Literal["self-confidence", "normalized-margin"]
    flipped: float
    shown: int
    exact_rows: int
    seed: int
    device: str
    threads: int


class OnceSettings(TypedDict, total=False):
    """The fields of :class:`OnceConfig` as keyword arguments."""

    method: Literal["cells", "facility-location", "k-centre"]
    balance: Literal["equal", "proportional", "none"]
    batch_size: int
    epochs: int
    seed: int
    device: str
    threads: int
