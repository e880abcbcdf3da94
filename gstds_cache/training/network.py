"""Networks to train, by name, and what training has to know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gstds_cache.encoders.factory import packaged_weights
from gstds_cache.encoders.weights import load_into, read_state_dict
from gstds_cache.errors import EncoderError, UsageError, unknown_name
from gstds_cache.files.location import expanded
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.seeding import torch_seed_for
from gstds_cache.uris import split_query

SMALL_IMAGE = 64  # pixels; up to here a ResNet gets the small-image stem


def build_network(arch: str, *, classes: int, side: int, seed: int) -> nn.Module:
    """Build an untrained network.

    Args:
        arch: Any architecture torchvision or timm knows by that name; ``torchvision:NAME`` or ``timm:NAME`` says which
            of the two where both know it. ``timm:NAME?weights=FILE`` starts from trained weights (all but the
            classifier), and ``?weights=reference`` from those of the default reference model. ``conv3`` and
            ``conv7`` are small networks for small images (:func:`conv3`, :func:`conv7`).
        classes: Number of classes.
        side: Side of the training images in pixels. For ``resnet*`` of torchvision and images up to 64 pixels, the
            7x7 stride-2 convolution and the max-pool become one 3x3 convolution (He et al. 2016, section 4.2).
        seed: Key of the initial weights.

    Returns:
        The network.

    Raises:
        UsageError: Neither library knows the name, or the architecture takes no images of that size.
        EncoderError: The weights are missing or do not fit.
    """  # noqa: DOC501
    import timm
    import torch
    from torchvision import models

    arch, params = split_query("architecture", arch)
    library, _, name = arch.rpartition(":")
    network: nn.Module
    vision = models.list_models(module=models)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed_for(seed, "network"))
        if params and (library != "timm" or params.keys() != {"weights"}):
            raise UsageError(
                f"`arch`: {arch}?... has {sorted(params)}, expected weights alone, for timm:NAME",
                hint="e.g. `arch='timm:tf_efficientnet_lite0?weights=reference'`",
            )
        if arch in OWN:
            return OWN[arch](classes)
        if library in {"", "torchvision"} and name in vision:
            options = {"image_size": side} if name.startswith("vit_") else {}
            options |= {"aux_logits": False} if name in {"googlenet", "inception_v3"} else {}
            options |= {"init_weights": True} if options.get("aux_logits") is False else {}
            try:
                network = models.get_model(name, weights=None, num_classes=classes, **options)
            except AssertionError as error:  # torchvision's way to say that a size does not divide into patches
                raise UsageError(
                    f"`arch`: {arch} does not take images of {side} x {side}: {error}",
                    hint="pass an `image_size` that it takes, e.g. `image_size=224`",
                ) from error
            if name.startswith("resnet") and side <= SMALL_IMAGE:
                network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)  # type: ignore[union-attr, arg-type]
                network.maxpool = nn.Identity()
            return network
        if library in {"", "timm"} and timm.is_model(name):
            network = timm.create_model(name, pretrained=False, num_classes=classes)
            if params:
                _start_from(network, name, params["weights"])
            return network
    raise unknown_name("architecture", arch, [*OWN, *vision, *(f"timm:{n}" for n in timm.list_models())])


def conv3(classes: int, width: int = 16) -> nn.Sequential:
    """Three 3x3 convolutions of ``width``, 2 and 4 times as many channels (25,000 parameters at 16).

    For studies of many runs on small images: thousands of gradient samples of 28 x 28 a second on one core.
    """
    layers: list[nn.Module] = []
    for before, after, stride in ((3, width, 2), (width, 2 * width, 1), (2 * width, 4 * width, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if stride == 1 and after < 4 * width else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def conv7(classes: int) -> nn.Sequential:
    """Seven convolutions of 64, 256 and 256 channels (2 million parameters), for images of about 32 pixels.

    The network of the CIFAR-10 speed runs (Jordan 2024, arXiv:2404.00498): in each of three groups a convolution, a
    max-pool, and a second convolution, with batch normalisation and GELU; a max-pool over what is left of the image;
    a linear layer whose scores are divided by 9. Each convolution begins as the identity as far as its channels go.
    Unlike there, the first convolution is 3x3 and learnt, where theirs whitens patches of the data set; biases have the
    common learning rate; there is no average of weights.
    """
    stem = 24
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.GELU()]
    before = stem
    for width in (64, 256, 256):
        layers += [
            nn.Conv2d(before, width, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(width),
            nn.GELU(),
        ]
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
        before = width
    network = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), _Divided(before, classes))
    for layer in network:
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
            nn.init.dirac_(layer.weight.data[: layer.in_channels])
    return network


class _Divided(nn.Linear):
    """A linear layer without bias whose outputs are divided by 9, so that a network begins unsure of everything."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values) / 9


OWN: dict[str, Callable[[int], nn.Module]] = {"conv3": conv3, "conv7": conv7}
"""Networks that neither library has, made for a number of classes."""


def _start_from(network: nn.Module, timm_name: str, weights: str) -> None:
    """Load trained weights into ``network``, all but its classifier.

    Raises:
        EncoderError: There are none, or they do not fit.
    """
    path = packaged_weights(timm_name) if weights == "reference" else expanded(weights, "weights")
    if path is None:
        raise EncoderError(
            f"`arch`: timm:{timm_name}?weights=reference: no installed package brings weights for it",
            hint="give a file: ?weights=FILE",
        )
    head = str(network.pretrained_cfg.get("classifier") or "")  # type: ignore[union-attr, operator]
    state = dict(read_state_dict(path))
    own = network.state_dict()
    if not own.keys() & state.keys() and len(own) == len(state):  # another port: other names, the same order
        state = dict(zip(own, state.values(), strict=True))
    body = {name: value for name, value in state.items() if not name.startswith(head + ".")}
    load_into(network, body, head=head, origin=f"{path} (for timm:{timm_name})")


@torch.no_grad()
def check_network(network: nn.Module, arch: str, side: int, classes: int, device: torch.device) -> None:
    """One forward pass before anything is written: some architectures take one image size alone.

    Args:
        network: The network, on ``device``; left in eval mode.
        arch: Its name.
        side: Side of the square images in pixels.
        classes: Outputs it should have.
        device: Where it is.

    Raises:
        UsageError: The network does not take such images, or does not return one row of logits per image.
    """  # noqa: DOC501 - what says that memory ran out is passed on
    network.eval()
    try:
        logits = network(torch.zeros(2, 3, side, side, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        if out_of_memory(error):
            raise
        raise UsageError(
            f"`arch`: {arch} does not take images of {side} x {side}: {str(error).partition(chr(10))[0]}",
            hint="pass an `image_size` that it takes, e.g. `image_size=224`",
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(f"`arch`: {arch} returned {got} for two images, expected logits (2, {classes})")


@contextmanager
def norms_frozen(network: nn.Module, *, when: bool) -> Iterator[None]:
    """Batch statistics of a single sample are all zero or undefined: such a step uses the running ones.

    Yields:
        Once, with the norms frozen ``when`` so.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if when else []
    for norm in norms:
        norm.eval()
    yield
    for norm in norms:
        norm.train()
