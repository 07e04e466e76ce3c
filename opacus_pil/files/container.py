"""Files that are whole or absent: written beside the target, synced, then renamed over it.

Knows bytes and torch's safe container; not what the bytes mean. `save_state` is for files of ours,
`save_entries` for files that Opacus reads too, `save_weights` for models that torch alone reads.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..atomic_file import atomic_file
from ..errors import LedgerError

_FORMAT = "opacus_pil"
_VERSION = 1
STATE_KEY = "pil_state_dict"  # where a checkpoint that plain Opacus reads keeps ours


def write_atomic(path: str | os.PathLike[str], data: bytes, *, private: bool = True) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Args:
        path: Target; its folder must exist.
        data: The whole content.
        private: Create with mode 0600 (per-instance values); else 0644.

    Raises:
        OSError: The folder is missing or not writable; no temporary file is left behind.
    """
    with atomic_file(path, private=private) as file:
        file.write(data)


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Any]) -> None:
    """Write what torch.load gives back as it is, a state_dict or several by name, mode 0600."""
    with atomic_file(path) as file:
        torch.save(weights, file)


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any], *, kind: str) -> None:
    """Write tensors and plain values to `path` atomically, with a version and a checksum.

    Args:
        path: Target file, created with mode 0600.
        state: Tensors, numpy arrays (stored as tensors) and plain types, in dicts, lists, tuples.
        kind: What the file is, checked when it is read.
    """
    write_atomic(path, state_bytes(state, kind=kind))


def state_bytes(state: Mapping[str, Any], *, kind: str) -> bytes:
    """Return what `save_state` writes."""
    body = io.BytesIO()
    torch.save(tensors(state), body)
    payload = body.getvalue()
    outer = io.BytesIO()
    torch.save(
        {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": kind,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "payload": torch.frombuffer(bytearray(payload), dtype=torch.uint8),
        },
        outer,
    )
    return outer.getvalue()


def tensors(value: Any) -> Any:
    """Replace what safe loading refuses by what it accepts: arrays, numpy scalars."""
    if isinstance(value, Mapping):
        plain = {key: tensors(item) for key, item in value.items()}
        if isinstance(value, OrderedDict):
            return OrderedDict(plain)
        return Counter(plain) if isinstance(value, Counter) else plain
    if isinstance(value, list | tuple):
        return type(value)(tensors(item) for item in value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.item() if isinstance(value, np.generic) else value


def arrays(value: Any) -> Any:
    """Turn the tensors of a loaded ledger back into numpy arrays."""
    if isinstance(value, Mapping):
        return {key: arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(arrays(item) for item in value)
    return value.numpy() if isinstance(value, torch.Tensor) else value


def load_state(path: str | os.PathLike[str], *, kind: str) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing is unpickled beyond tensors and plain types.

    Raises:
        FileNotFoundError: There is no such file.
        LedgerError: Truncated, edited, of another kind or of a newer version.
    """
    data = Path(path).read_bytes()
    try:
        outer = torch.load(io.BytesIO(data), weights_only=True)
        found = {key: outer[key] for key in ("format", "version", "kind", "sha256")}
        payload = outer["payload"].numpy().tobytes()
    except Exception as error:  # torch raises many types on a damaged file; all mean the same here
        raise LedgerError(
            f"Expected {path} to be a whole {kind} file, got one that cannot be read "
            f"({type(error).__name__}). Use an earlier copy."
        ) from error
    if found["format"] != _FORMAT or found["kind"] != kind or found["version"] != _VERSION:
        raise LedgerError(
            f"Expected {path} to be a {kind} file of version {_VERSION}, got "
            f"kind={found['kind']!r}, version={found['version']!r}. "
            "Pass the right file or the matching release."
        )
    if hashlib.sha256(payload).hexdigest() != found["sha256"]:
        raise LedgerError(
            f"Expected {path} to match its own checksum, got another: the file was edited or "
            "damaged. Use an earlier copy."
        )
    state: dict[str, Any] = torch.load(io.BytesIO(payload), weights_only=True)
    return state


# --- files that plain Opacus reads too ------------------------------------------------------------


def save_entries(
    file: str | os.PathLike[str] | IO[bytes],
    entries: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    kind: str,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write `entries` as torch.save would, and `state` beside them under STATE_KEY.

    The checksum covers both. It tells damage, not malice: whoever edits can compute it anew.

    Args:
        file: A path, written atomically with mode 0600; or an open binary file, written as it is.
        entries: Tensors and plain values; arrays and numpy scalars are stored as such.
        state: Likewise.
        kind: What the file is, checked when it is read.
        options: Arguments of torch.save.

    Raises:
        TypeError: A value that cannot be read back without unpickling code.
    """
    # A module's state keeps its type: its version numbers hang on the dictionary.
    stored = {k: v if _all_tensors(v) else tensors(v) for k, v in entries.items()}
    ours = tensors(state)
    stored[STATE_KEY] = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": kind,
        "sha256": _digest(stored, ours),
        "state": ours,
    }
    if isinstance(file, str | os.PathLike):
        with atomic_file(file) as whole:
            torch.save(stored, whole, **(options or {}))
    else:
        torch.save(stored, file, **(options or {}))


def load_entries(
    file: str | os.PathLike[str] | IO[bytes],
    *,
    kind: str,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read what `save_entries` or torch.save wrote; nothing is unpickled but tensors and values.

    Returns:
        The entries, and our state; None if the file has none.

    Raises:
        FileNotFoundError: There is no such file.
        LedgerError: Truncated, edited, of another kind or version, or holding objects that only
            unpickling code could bring back.
    """
    try:
        entries = torch.load(file, weights_only=True, **(options or {}))
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many types on a damaged file; all mean the same here
        raise LedgerError(
            f"Expected {file} to be a whole checkpoint of tensors and plain values, got one that "
            f"cannot be read safely ({type(error).__name__}). Use an earlier copy; if you trust "
            "whoever wrote it, load it with torch.load and save it again without its objects."
        ) from error
    if not isinstance(entries, dict):
        raise LedgerError(
            f"Expected {file} to hold a dict, got {type(entries).__name__}. Pass a checkpoint."
        )
    if STATE_KEY not in entries:
        return entries, None
    found = entries.pop(STATE_KEY)
    names = ("format", "version", "kind", "sha256", "state")
    if not isinstance(found, dict) or any(name not in found for name in names):
        raise LedgerError(f"Expected {file} to be a whole {kind}, got a part. Use an earlier copy.")
    if (found["format"], found["version"], found["kind"]) != (_FORMAT, _VERSION, kind):
        raise LedgerError(
            f"Expected {file} to be a {kind} of version {_VERSION}, got kind={found['kind']!r}, "
            f"version={found['version']!r}. Pass the right file or install the matching release."
        )
    if _digest(entries, found["state"]) != found["sha256"]:
        raise LedgerError(
            f"Expected {file} to match its own checksum, got another: the file was edited or "
            "damaged. Use an earlier copy."
        )
    return entries, found["state"]


def _all_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, torch.Tensor) for v in value.values())


def _digest(*values: Any) -> str:
    """Return a checksum of nested plain values that a saved and loaded copy shares."""
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value, "")
    return digest.hexdigest()


def _feed(digest: Any, value: Any, where: str) -> None:
    """Add a value with its type, so that no two different values look the same."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        found = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        digest.update(f"tensor {found.dtype} {tuple(found.shape)};".encode())
        if found.numel():
            digest.update(found.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _feed(digest, key, where)
            _feed(digest, item, f"{where}[{key!r}]")
        _feed(digest, getattr(value, "_metadata", None), where)
    elif isinstance(value, list | tuple):
        digest.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)};".encode())
        for position, item in enumerate(value):
            _feed(digest, item, f"{where}[{position}]")
    elif value is None or type(value) in (bool, int, float, complex, str, bytes):
        text = repr(value)
        digest.update(f"{type(value).__name__} {len(text)} {text};".encode())
    elif isinstance(value, torch.dtype | torch.device):
        digest.update(f"{value!r};".encode())
    else:
        raise TypeError(
            f"Expected checkpoint{where} to be made of tensors and plain values, got "
            f"{type(value).__name__}. A file that needs code to be unpickled is never loaded; save "
            "its state_dict() or plain values."
        )
