"""Reading weights files, without running anything they contain."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gstds_cache.errors import EncoderError
from gstds_cache.files.given import reading, require_file
from gstds_cache.plugins import own_code

SAVE_AGAIN = "save it again with safetensors.torch.save_file(model.state_dict(), FILE)"
StateDict = Mapping[str, torch.Tensor]


def read_state_dict(path: Path) -> StateDict:
    """Read a ``.safetensors`` file, or any other file with ``torch.load(weights_only=True)``.

    Raises:
        EncoderError: The file is missing, not a weights file, or needs code to be run to be read.
    """
    loaded: Any
    require_file(path, "weights file", EncoderError, hint="check the part after ?weights=")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with reading(path, "a safetensors file", EncoderError, hint=SAVE_AGAIN):
            loaded = load_file(path)
    else:
        with (
            reading(path, "plain weights", EncoderError, hint=f"only tensors are read, never code; {SAVE_AGAIN}"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is an error
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    got = _unlike_state(loaded)
    if got:
        raise EncoderError(f"{path} holds no state dict: got {got}, expected names and tensors", hint=SAVE_AGAIN)
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()}


def _unlike_state(loaded: object) -> str:
    """What ``loaded`` is instead of names and tensors; '' where it is that."""
    if not isinstance(loaded, dict):
        return f"a {type(loaded).__name__}"
    if not loaded:
        return "no tensor"
    for name, value in loaded.items():
        if not isinstance(name, str):
            return f"the {type(name).__name__} {name!r:.40} as a name"
        if not isinstance(value, torch.Tensor):
            return f"a {type(value).__name__} at {name!r:.80}"
        if value.is_meta:
            return f"a tensor without values (of the meta device) at {name!r:.80}"
    return ""


def load_into(model: nn.Module, state: StateDict, *, head: str, origin: str) -> str:
    """Load ``state`` into ``model``, all but the classifier ``head``, and say how names were matched.

    Args:
        model: The whole model, with its classifier.
        state: Names and tensors.
        head: Prefix of the classifier's parameters, which may be missing from ``state`` or differ in shape.
        origin: What to call the weights in errors.

    Returns:
        ``name`` where names agree; ``order`` where no name agrees but the number and every shape do, in order (other
        ports of the same architecture).

    Raises:
        EncoderError: Neither holds, or a tensor holds NaN.
    """
    with own_code(f"{origin}: the model's own state dict", EncoderError):
        own = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    body = {name for name in own if not (head and name.startswith(head + "."))}
    if body <= state.keys():
        wrong = [name for name in sorted(body) if own[name].shape != state[name].shape]
        if not wrong:
            _load(model, {name: state[name] for name in body}, origin)
            return "name"
        name = wrong[0]
        raise EncoderError(
            f"{origin} does not fit: {name} has shape {tuple(state[name].shape)}, the model expects "
            f"{tuple(own[name].shape)} ({len(wrong)} such tensors)"
        )
    shapes_agree = [t.shape for t in own.values()] == [t.shape for t in state.values()]
    if shapes_agree and not own.keys() & state.keys():
        _load(model, dict(zip(own, state.values(), strict=True)), origin)
        return "order"
    missing = sorted(body - state.keys())
    raise EncoderError(
        f"{origin} does not fit: {len(missing)} of the model's {len(body)} tensors are not in it, first {missing[:3]}; "
        f"the file holds {len(state)} tensors, first {list(state)[:3]}",
        hint="give the weights of the same architecture",
    )


def _load(model: nn.Module, state: StateDict, origin: str) -> None:
    for name, tensor in state.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and bool(torch.isnan(tensor).any()):
            raise EncoderError(f"{origin}: {name} holds NaN", hint="take the weights of another step of its training")
    with own_code(f"{origin}: loading", EncoderError, SAVE_AGAIN):
        model.load_state_dict(state, strict=False)


def state_digest(model: nn.Module, name: str) -> str:
    """``state_dict:`` and the SHA-256 of all of a model's tensors, for models that came without a file.

    Args:
        model: The model.
        name: What to call it in errors.

    Raises:
        EncoderError: What identifies it cannot be hashed.
    """
    digest = hashlib.sha256()
    with own_code(
        f"{name}: hashing its weights", EncoderError, f"give its weights as a file: `model='{name}?weights=FILE'`"
    ):
        for key, value in sorted(model.state_dict().items()):
            if not isinstance(value, torch.Tensor) or value.is_quantized:
                saved = io.BytesIO()
                torch.save(value, saved)
                digest.update(f"{key}|saved|{len(saved.getbuffer())}|".encode() + saved.getbuffer())
                continue
            tensor = value if value.layout == torch.strided else value.to_dense()
            array = tensor.detach().cpu().contiguous()
            digest.update(f"{key}|{array.dtype}|{tuple(array.shape)}|".encode())
            digest.update(array.view(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return "state_dict:" + digest.hexdigest()
