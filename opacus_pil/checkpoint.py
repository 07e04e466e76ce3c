"""Files that are whole or absent: written beside the target, synced, then renamed over it.

Knows bytes and torch's safe container; not what the bytes mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import LedgerError

_FORMAT = "opacus_pil"
_VERSION = 1


def write_atomic(path: str | os.PathLike[str], data: bytes, *, private: bool = True) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Args:
        path: Target; its folder must exist.
        data: The whole content.
        private: Create with mode 0600 (per-instance values); else 0644.

    Raises:
        OSError: The folder is missing or not writable; no temporary file is left behind.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o600 if private else 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:  # the rename itself must survive a power cut
        os.fsync(folder)
    finally:
        os.close(folder)


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any], *, kind: str) -> None:
    """Write tensors and plain values to `path` atomically, with a version and a checksum.

    Args:
        path: Target file, created with mode 0600.
        state: Tensors, numpy arrays (stored as tensors) and plain types, in dicts, lists, tuples.
        kind: What the file is, checked when it is read.
    """
    body = io.BytesIO()
    torch.save(_plain(state), body)
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
    write_atomic(path, outer.getvalue())


def _plain(value: Any) -> Any:
    """Replace what safe loading refuses by what it accepts: arrays and numpy scalars."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
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
