"""`model.pt`: the weights of the model served last, for whoever deploys it or verifies about it.

Knows a folder, weights and their hash; when they are written is `serving.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn as nn

from ...errors import LedgerError
from ...files.container import save_weights
from ...files.model_hash import model_file_hash

NAME = "model.pt"


def write_model(folder: Path, module: nn.Module, *, sha256: str) -> None:
    """Let the file hold this model (a state_dict, mode 0600); one that does is left alone.

    Args:
        folder: Of the queue.
        module: Plain.
        sha256: Its `model_hash`.

    Raises:
        OSError: The folder is not writable; the old file stays.
    """
    if _held(folder / NAME) == sha256:
        return
    weights = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    save_weights(folder / NAME, weights)


def remove_model(folder: Path) -> None:
    """Delete the file, if there is one."""
    (folder / NAME).unlink(missing_ok=True)


def _held(path: Path) -> str | None:
    """Return the hash of the model in a file; None: none, or one that cannot be read."""
    try:
        return model_file_hash(path)
    except (LedgerError, FileNotFoundError):
        return None
