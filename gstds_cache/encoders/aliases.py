"""Models by the names people say: each an alias of a timm model, made ready and pooled as its authors do.

timm records its own evaluation of these models, which is not always the authors': DINOv2 in 518 pixels instead of 224,
CLIP and SigLIP cropped instead of whole, DINOv3 pooled by the mean of its patches instead of its class token, CLIP
without its projection once its classifier is taken off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Pooling = Literal["token", "map", "projection"]


@dataclass(frozen=True)
class Alias:
    """A timm model as its authors use it.

    Attributes:
        timm: Its name in timm, with the tag of its weights.
        pooling: ``token``: the class token behind the last norm; ``map``: the attention pooling head; ``projection``:
            the class token, projected into the space that images and texts share.
        size: Side of the square it looks at, in pixels.
        patch: Side of a patch; other sizes are multiples of it.
        dim: Length of its features.
        crop_pct: Share of the shorter side that the centre crop shows.
        crop_mode: ``center``, or ``squash``, which shows the whole image in another aspect ratio.
        options: Of ``timm.create_model``.
    """

    timm: str
    pooling: Pooling
    size: int
    patch: int
    dim: int
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash"] = "center"
    options: dict[str, Any] = field(default_factory=dict)


def _dinov2(width: str, dim: int, registers: str = "") -> Alias:
    name = f"vit_{width}_patch14_{registers}dinov2.lvd142m"
    # Position embeddings are those of 518 pixels, interpolated: with this option the model keeps, and loads, all.
    return Alias(name, "token", 224, 14, dim, 0.875, options={"dynamic_img_size": True})


def _dinov3(width: str, dim: int) -> Alias:
    return Alias(f"vit_{width}_patch16_dinov3.lvd1689m", "token", 256, 16, dim, options={"global_pool": "token"})


def _siglip(name: str, size: int, patch: int, dim: int, tag: str) -> Alias:
    return Alias(f"vit_{name}_siglip_{size}.{tag}", "map", size, patch, dim, crop_mode="squash")


def _clip(name: str, size: int, patch: int, dim: int) -> Alias:
    return Alias(f"vit_{name}_clip_quickgelu_{size}.openai", "projection", size, patch, dim)


ALIASES = {
    "dinov2-small": _dinov2("small", 384),
    "dinov2-base": _dinov2("base", 768),
    "dinov2-large": _dinov2("large", 1024),
    "dinov2-small-reg": _dinov2("small", 384, "reg4_"),
    "dinov2-base-reg": _dinov2("base", 768, "reg4_"),
    "dinov3-small": _dinov3("small", 384),
    "dinov3-base": _dinov3("base", 768),
    "dinov3-large": _dinov3("large", 1024),
    "siglip-base": _siglip("base_patch16", 224, 16, 768, "webli"),
    "siglip2-base": _siglip("base_patch16", 224, 16, 768, "v2_webli"),
    "siglip2-large": _siglip("large_patch16", 256, 16, 1024, "v2_webli"),
    "siglip2-so400m": _siglip("so400m_patch14", 224, 14, 1152, "v2_webli"),
    "clip-vit-b32": _clip("base_patch32", 224, 32, 512),
    "clip-vit-b16": _clip("base_patch16", 224, 16, 512),
    "clip-vit-l14": _clip("large_patch14", 224, 14, 768),
}
