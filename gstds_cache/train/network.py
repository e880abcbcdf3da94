"""Networks to train, by name."""

from __future__ import annotations

from torch import nn

from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.seeding import torch_seed_for

SMALL_IMAGE = 64  # pixels; up to here a ResNet gets the small-image stem


def build_network(arch: str, *, classes: int, side: int, seed: int) -> nn.Module:
    """Build an untrained network.

    Args:
        arch: Any architecture torchvision or timm knows by that name; ``torchvision:NAME`` or ``timm:NAME`` says which
            of the two where both know it.
        classes: Number of classes.
        side: Side of the training images in pixels. For ``resnet*`` of torchvision and images up to 64 pixels, the
            7x7 stride-2 convolution and the max-pool become one 3x3 convolution (He et al. 2016, section 4.2).
        seed: Key of the initial weights.

    Returns:
        The network.

    Raises:
        UsageError: Neither library knows the name, or the architecture takes no images of that size.
    """  # noqa: DOC501
    import timm
    import torch
    from torchvision import models

    library, _, name = arch.rpartition(":")
    vision = models.list_models(module=models)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed_for(seed, "network"))
        if library in {"", "torchvision"} and name in vision:
            options = {"image_size": side} if name.startswith("vit_") else {}
            options |= {"aux_logits": False} if name in {"googlenet", "inception_v3"} else {}
            options |= {"init_weights": True} if options.get("aux_logits") is False else {}
            try:
                network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
            except AssertionError as error:  # torchvision's way to say that a size does not divide into patches
                raise UsageError(
                    f"--arch {arch} does not take images of {side} x {side}: {error}",
                    hint="give an --image-size that it takes, e.g. --image-size 224",
                ) from error
            if name.startswith("resnet") and side <= SMALL_IMAGE:
                network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)  # type: ignore[union-attr, arg-type]
                network.maxpool = nn.Identity()
            return network
        if library in {"", "timm"} and timm.is_model(name):
            return timm.create_model(name, pretrained=False, num_classes=classes)  # type: ignore[no-any-return]
    raise unknown_name("architecture", arch, [*vision, *(f"timm:{n}" for n in timm.list_models())])
