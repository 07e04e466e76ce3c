"""SavedWeights: what a checkpoint of anybody's training holds, and putting it into a model.

Reads plain state dicts, Opacus's and our own checkpoints and the usual wrappings of either. Knows
files, names and shapes; no data and no privacy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _validate as check
from ..errors import LedgerError
from ..files.model_hash import model_hash

Source = str | os.PathLike[str] | Mapping[str, Any]
Run = tuple[float, float, int]

_STATE_KEYS = ("module_state_dict", "model_state_dict", "state_dict", "model")
_PREFIXES = ("_module.", "module.", "_orig_mod.")  # Opacus, DDP and torch.compile put them there
_ACCOUNTANT = "privacy_accountant_state_dict"


@dataclass(frozen=True)
class SavedWeights:
    """One checkpoint.

    Attributes:
        name: For messages: the file, or its place in the caller's list.
        state: Name -> tensor, without the prefixes of wrappers.
        history: What Opacus's accountant had counted, (noise_multiplier, sample_rate, steps); None:
            the checkpoint does not say.
        sha256: Of the weights: two checkpoints of one history are told by it.
    """

    name: str
    state: dict[str, torch.Tensor]
    history: tuple[Run, ...] | None
    sha256: str

    @property
    def steps(self) -> int | None:
        """Noisy steps made when it was saved; None: it does not say."""
        return None if self.history is None else sum(run[2] for run in self.history)


def read_weights(source: Source, *, name: str = "checkpoint") -> SavedWeights:
    """Read a checkpoint; nothing in a file is run.

    Args:
        source: A file that torch.save wrote, or what is in one.
        name: Of a source that is no file.

    Raises:
        FileNotFoundError: There is no such file.
        LedgerError: A file that only unpickling code could read, or one without weights.
        TypeError: Something else than a path or a mapping.
    """
    found: Any = source
    if isinstance(source, str | os.PathLike):
        name = str(Path(source))
        found = _loaded(source)
    if isinstance(found, nn.Module):
        found = found.state_dict()
    if not isinstance(found, Mapping):
        raise TypeError(
            check.expected(
                name, "to be a file or a state dict", type(found).__name__,
                "Pass a path, or model.state_dict().",
            )
        )  # fmt: skip
    state = _state_of(found)
    if not state:
        raise LedgerError(
            f"Expected {name} to hold a model's weights, got keys "
            f"{[str(key) for key in list(found)[:6]]} without any tensor. Save model.state_dict(), "
            "or a dict with it under 'module_state_dict' or 'state_dict'."
        )
    return SavedWeights(name, state, _history(found, name), model_hash(state))


def fit_weights(module: nn.Module, saved: SavedWeights) -> None:
    """Load weights into a plain module, or say what does not fit; then the module is as it was.

    Raises:
        ValueError: Names that do not match, another shape (another number of classes, another
            network), weights that are not finite.
    """
    own = module.state_dict()
    state = _without_prefix(saved.state, own)
    missing = [key for key in own if key not in state]
    foreign = [key for key in state if key not in own]
    if missing or foreign:
        first = f"no {missing[0]!r}" if missing else f"{foreign[0]!r}, which it does not have"
        raise ValueError(
            f"Expected {saved.name} to hold the weights of this {type(module).__name__}, got "
            f"{len(missing)} names missing and {len(foreign)} foreign ones (first: {first}). "
            "Build the model that was trained."
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"Expected {saved.name} to fit this {type(module).__name__}, got {key!r} of shape "
                f"{tuple(value.shape)} against {tuple(own[key].shape)}: another number of classes, "
                "or another network. Build the model that was trained."
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"Expected finite weights in {saved.name}, got {key!r} with "
                f"{int((~torch.isfinite(value)).sum())} of {value.numel()} not finite. That "
                "training diverged: nothing can be measured there. Use an earlier checkpoint."
            )
    module.load_state_dict(state)


def _loaded(path: str | os.PathLike[str]) -> Any:
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types on a foreign file, all with one cure
            raise LedgerError(
                f"Expected {path} to be a checkpoint of tensors and plain values, got a file that "
                f"cannot be read safely ({type(error).__name__}). If you trust whoever wrote it, "
                "load it with torch.load and save its model.state_dict()."
            ) from error


def _state_of(found: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """Return the weights, wherever in the file they are."""
    for key in _STATE_KEYS:
        inner = found.get(key)
        if isinstance(inner, nn.Module):
            inner = inner.state_dict()
        if isinstance(inner, Mapping) and any(map(torch.is_tensor, inner.values())):
            return _tensors(inner)
    return _tensors(found)


def _tensors(found: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    if not all(torch.is_tensor(value) for value in found.values()):
        return {}
    return {str(key): value.detach() for key, value in found.items()}


def _without_prefix(
    state: dict[str, torch.Tensor], own: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Take off what wrappers put before all names, as long as they do not match."""
    while state.keys() != own.keys():
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _history(found: Mapping[Any, Any], name: str) -> tuple[Run, ...] | None:
    """Return what the accountant of the file has counted."""
    accountant = found.get(_ACCOUNTANT)
    if not isinstance(accountant, Mapping) or "history" not in accountant:
        return None
    try:
        return tuple((float(z), float(q), int(n)) for z, q, n in accountant["history"])
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"Expected the accountant in {name} to hold runs of (noise_multiplier, sample_rate, "
            f"steps), got {error}. Use an earlier copy, or save the weights alone."
        ) from error
