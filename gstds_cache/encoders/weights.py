"""Reading weights files, without running anything they contain."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gstds_cache.errors import EncoderError

StateDict = Mapping[str, torch.Tensor]


def read_state_dict(path: Path) -> StateDict:
    """Read a ``.safetensors`` file, or any other file with ``torch.load(weights_only=True)``.

    Raises:
        EncoderError: The file is missing, not a weights file, or needs code to be run to be read.
    """
    if not path.is_file():
        raise EncoderError(f"weights file not found: {path}", hint="check the part after ?weights=")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, ValueError) as error:
            raise EncoderError(f"{path} is not a safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is an error below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise EncoderError(
            f"{path} cannot be read as plain weights: {str(error).splitlines()[0]}",
            hint="only tensors are read, never code; save it again with safetensors.torch.save_file(state_dict)",
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise EncoderError(f"{path} holds no state dict: got {type(loaded).__name__}, expected names and tensors")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


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
        EncoderError: Neither holds.
    """
    own = model.state_dict()
    body = {name for name in own if not (head and name.startswith(head + "."))}
    if body <= state.keys():
        wrong = [name for name in sorted(body) if own[name].shape != state[name].shape]
        if not wrong:
            model.load_state_dict({name: state[name] for name in body}, strict=False)
            return "name"
        name = wrong[0]
        raise EncoderError(
            f"{origin} does not fit: {name} has shape {tuple(state[name].shape)}, the model expects "
            f"{tuple(own[name].shape)} ({len(wrong)} such tensors)"
        )
    shapes_agree = [t.shape for t in own.values()] == [t.shape for t in state.values()]
    if shapes_agree and not own.keys() & state.keys():
        model.load_state_dict(dict(zip(own, state.values(), strict=True)))
        return "order"
    missing = sorted(body - state.keys())
    raise EncoderError(
        f"{origin} does not fit: {len(missing)} of the model's {len(body)} tensors are not in it, first {missing[:3]}; "
        f"the file holds {len(state)} tensors, first {list(state)[:3]}",
        hint="give the weights of the same architecture",
    )


def state_digest(model: nn.Module) -> str:
    """``state_dict:`` and the SHA-256 of all of a model's tensors, for models that came without a file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        digest.update(array.view(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return "state_dict:" + digest.hexdigest()
