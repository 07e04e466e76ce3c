"""SHA-256 of a model's state: the same on every device, in every file, for every order of names.

Knows tensors only; what the model computes, or is worth, it does not know.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from ..errors import LedgerError

_WRAPPED = "_module."  # Opacus's wrapper puts it before every name
_STATE_KEYS = ("module_state_dict", "state_dict")  # where checkpoints keep the module's state


def model_hash(state: Mapping[str, Any] | nn.Module) -> str:
    """Return the SHA-256 of a state_dict: sorted names, and each one's dtype, shape and bytes.

    One flipped bit of one weight changes it; device, memory layout, order of names and Opacus's
    wrapper do not.

    Args:
        state: A state_dict of dense tensors, or the module itself.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: Something that is not a dense tensor with values.

    >>> layer = nn.Linear(1, 1)
    >>> model_hash(layer) == model_hash(dict(reversed(layer.state_dict().items())))
    True
    """
    found = state.state_dict() if isinstance(state, nn.Module) else state
    names = [name for name in found if isinstance(name, str)]
    if len(names) != len(found):
        raise TypeError("Expected state to have names as keys, got others. Pass a state_dict().")
    cut = len(_WRAPPED) if names and all(n.startswith(_WRAPPED) for n in names) else 0
    digest = hashlib.sha256(b"opacus_pil model 1;")
    for name in sorted(names):
        value = found[name]
        dense = isinstance(value, torch.Tensor) and value.layout is torch.strided
        if not dense or value.is_meta or value.is_quantized:
            raise TypeError(
                f"Expected {name!r} to be a dense tensor with values, got "
                f"{type(value).__name__}. Pass the state_dict() of a plain module."
            )
        label = name[cut:].encode()
        digest.update(f"{len(label)} ".encode() + label)
        digest.update(f" {value.dtype} {tuple(value.shape)};".encode())
        digest.update(_little_endian(value))
    return digest.hexdigest()


def model_file_hash(path: str | os.PathLike[str]) -> str:
    """Return `model_hash` of a file that torch.save wrote: a state_dict, or a checkpoint with one.

    Args:
        path: Read with weights_only=True: no code in it is run.

    Raises:
        LedgerError: Not such a file, or one that only unpickling code could read.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types on a foreign file, all with one cure
            raise LedgerError(
                f"Expected {path} to be a state_dict written by torch.save, got a file that cannot "
                f"be read safely ({type(error).__name__}). Save model.state_dict(), not the model."
            ) from error
    for name in _STATE_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not found:
        raise LedgerError(
            f"Expected {path} to hold a state_dict, got {type(found).__name__} without tensors. "
            "Save model.state_dict()."
        )
    if isinstance(found.get("format"), str):  # a container of this package
        raise LedgerError(
            f"Expected {path} to hold a model's weights, got a file that holds more than one. Pass "
            "model.pt of its folder, or save model.state_dict()."
        )
    try:
        return model_hash(found)
    except TypeError as error:
        raise LedgerError(f"{error} File: {path}.") from error


def _little_endian(value: torch.Tensor) -> bytes:
    """The values in row-major order, least significant byte first."""
    plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw = plain.view(torch.uint8)
    if sys.byteorder == "big":
        width = value.element_size() // (2 if value.is_complex() else 1)
        raw = raw.reshape(-1, width).flip(1).reshape(-1)
    return raw.numpy().tobytes()
