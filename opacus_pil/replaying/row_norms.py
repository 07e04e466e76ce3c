"""RowNorms: the gradient norm of every row at one checkpoint after another, kept in files.

A pass that was stopped goes on where it was. A file is believed after some of its rows were
measured again, whatever its name says: so another model, data set, loss or collate is noticed.
Knows the training's task; no accountant.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .._validate import FloatArray
from ..capture.sweep import sweep
from ..errors import LedgerError
from ..training.task import Task
from .saved_weights import SavedWeights, fit_weights

_BLOCK = 2048  # rows between two looks at the file
_PROBED = 8
_AGREE = 1e-3  # relative: other batches round otherwise


class RowNorms:
    """Measures sensitivities of all rows at given weights.

    Args:
        module: Plain; weights of checkpoints are loaded into it.
        dataset: Map-style, in the order of the accounts.
        task: What was minimised, and how items become a batch.
        max_grad_norm: Clip bound; or one per trainable parameter, where layers were clipped one by
            one.
        chunk_size: Rows per forward pass; bounds the memory.
        folder: Keeps norms, mode 0600, so that a stopped pass goes on; None: nothing is kept.
        progress: Show a bar.

    Attributes:
        deterministic: Whether no pass drew a random number.
        has_dropout: Whether the module drops at random in training.
        measured: Rows measured so far, all checkpoints together.

    Privacy: norms are private data.
    """

    def __init__(
        self,
        module: nn.Module,
        dataset: Any,
        *,
        task: Task,
        max_grad_norm: float | Sequence[float],
        chunk_size: int,
        folder: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        self._module, self._dataset, self._task = module, dataset, task
        self._chunk, self._progress = chunk_size, progress
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                "Expected a module with trainable parameters, got none. Leave requires_grad as it "
                "was in training."
            )
        self._layers: dict[str, float] | None = None
        if isinstance(max_grad_norm, Sequence):
            bounds = [float(bound) for bound in max_grad_norm]
            if len(bounds) != len(trained):
                raise ValueError(
                    f"Expected one clip bound for each of {len(trained)} trainable parameters, got "
                    f"{len(bounds)}. Pass max_grad_norm as make_private was given it."
                )
            self._layers = dict(zip(trained, bounds, strict=True))
            self.bound = math.hypot(*bounds)
        else:
            self.bound = float(max_grad_norm)
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.has_dropout = any(
            isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
            for part in module.modules()
        )
        self.deterministic = True
        self.measured = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._dataset)

    def sensitivities(self, saved: SavedWeights) -> FloatArray:
        """Return min(norm, clip bound) / clip bound of every row, rounded up, shape (rows,).

        Raises:
            ValueError: Weights that do not fit or are not finite, a norm that is not finite.
            LedgerError: Kept norms that are of another model, data set or loss.
            UnsupportedError: A model or batch without per-sample gradients.
        """
        fit_weights(self._module, saved)
        norms = self._kept(saved)
        known = np.flatnonzero(~np.isnan(norms))
        if len(known):
            self._believe(norms, known, saved)
        missing = np.flatnonzero(np.isnan(norms))
        blocks = range(0, len(missing), max(_BLOCK, self._chunk))
        shown = tqdm(
            blocks, desc=f"norms at {Path(saved.name).name}", disable=not self._progress,
            leave=False,
        )  # fmt: skip
        for start in shown:
            rows = missing[start : start + max(_BLOCK, self._chunk)]
            norms[rows] = self._measure(rows)
            if isinstance(norms, np.memmap):
                norms.flush()
        rounding = 32.0 * max(
            torch.finfo(p.dtype).eps for p in self._module.parameters() if p.is_floating_point()
        )
        return np.minimum(np.asarray(norms) * (1.0 + rounding) / self.bound, 1.0)

    def _measure(self, rows: Any) -> FloatArray:
        found = sweep(
            self._module,
            self._dataset,
            loss_of=self._task.loss_of,
            indices=rows,
            chunk_size=self._chunk,
            collate_fn=self._task.collate_fn,
            layer_bounds=self._layers,
        )
        self.deterministic &= found.deterministic
        self.measured += len(rows)
        return found.norms

    def _kept(self, saved: SavedWeights) -> FloatArray:
        """Return the norms known of these weights, NaN where none is."""
        size = len(self)
        if self._folder is None:
            return np.full(size, np.nan)
        path = self._folder / f"{saved.sha256[:24]}.norms"
        if not path.exists():
            handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(np.full(size, np.nan).tobytes())
        if path.stat().st_size != 8 * size:
            raise LedgerError(
                f"Expected {path} to hold norms of {size} rows, got {path.stat().st_size // 8}: "
                "another data set. Use another work_dir."
            )
        return np.memmap(path, dtype=np.float64, mode="r+", shape=(size,))

    def _believe(self, norms: FloatArray, known: Any, saved: SavedWeights) -> None:
        """Measure a few kept rows again."""
        rows = np.unique(known[np.linspace(0, len(known) - 1, _PROBED).astype(np.int64)])
        again = self._measure(rows)
        self.measured -= len(rows)
        kept = np.asarray(norms[rows])
        apart = np.abs(again - kept) > _AGREE * np.maximum(np.abs(again), 1e-6)
        if apart.any():
            raise LedgerError(
                f"Expected the norms kept for {saved.name} to be of this training, got others at "
                f"{int(apart.sum())} of {len(rows)} rows measured again (first: row "
                f"{int(rows[np.flatnonzero(apart)[0]])}): another data set, loss, collate or clip. "
                "Use another work_dir."
            )


def each_step(
    values: Any, name: str, steps: int, checked: Callable[[str, Any], float]
) -> FloatArray:
    """Return a number, or one per step, as an array of shape (steps,)."""
    if np.ndim(values) == 0:
        return np.full(steps, checked(name, values))
    found = np.array([checked(f"{name}[{i}]", value) for i, value in enumerate(values)])
    if len(found) != steps:
        raise ValueError(
            f"Expected {name} to be a number or one for each of {steps} steps, got {len(found)}. "
            "Pass the schedule of the whole run."
        )
    return found
