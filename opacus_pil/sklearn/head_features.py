"""HeadFeatures: from a row of X to a vector of bounded norm, by constants from public rows only.

Knows rows and a frozen network; no labels, no engine, and nothing of who is private.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import nn

from .. import _validate as check
from .._validate import FloatArray
from ..heads import BoundedFeatures

_INSIDE = 0.9  # of the public rows keep their length


class HeadFeatures(nn.Module):
    """Frozen network, centring and scaling by constants, then `BoundedFeatures` of radius 1.

    Guarantee: every output has norm at most 1, the constant of the bias included, and is a function
        of its own row and of constants alone.

    Args:
        frozen: Maps a batch of rows to (batch, width); it never saw private data. None: the rows
            themselves.
        center: Shape (width,), subtracted.
        scale: Shape (width,), > 0; divides.

    Shape: (batch, columns) to (batch, width + 1), float32.
    """

    def __init__(self, frozen: nn.Module | None, *, center: FloatArray, scale: FloatArray) -> None:
        super().__init__()
        self.frozen = nn.Identity() if frozen is None else frozen
        self.dtype = _dtype_of(frozen)
        self.register_buffer("center", torch.as_tensor(center, dtype=torch.float64))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))
        self.bounded = BoundedFeatures(len(center))

    @classmethod
    def fixed(cls, frozen: nn.Module | None, columns: FloatArray, *, scale: float) -> Self:
        """Return features that are divided by a constant of the caller's.

        Args:
            frozen: As in the class.
            columns: Shape (1, columns), any one row: says how long the vectors are.
            scale: > 0.
        """
        width = _vectors(frozen, columns[:1]).shape[1]
        return cls(frozen, center=np.zeros(width), scale=np.full(width, scale))

    @classmethod
    def from_public(cls, frozen: nn.Module | None, public: FloatArray) -> Self:
        """Return features that are centred and scaled by public rows.

        Each is standardised by the public rows' mean and deviation; then all are divided by one
        number, so that nine public rows in ten are not shortened by the bound.

        Args:
            frozen: As in the class.
            public: Shape (rows, columns).

        Raises:
            ValueError: The frozen network gives other than finite vectors.
        """
        vectors = _vectors(frozen, public)
        if not np.isfinite(vectors).all():
            raise ValueError(
                "Expected frozen to give finite vectors for the public rows, got others. Leave "
                "records with NaN or inf out."
            )
        center, spread = vectors.mean(axis=0), vectors.std(axis=0)
        spread = np.where(spread > 0, spread, 1.0)
        lengths = np.linalg.norm((vectors - center) / spread, axis=1)
        length = float(np.quantile(lengths, _INSIDE)) or 1.0
        return cls(frozen, center=center, scale=spread * length * 2**0.5)  # kept up to 1/√2

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the features of rows; see the class."""
        vectors = self.frozen(rows.to(self.dtype)).flatten(1).double()
        features: torch.Tensor = self.bounded((vectors - self.center) / self.scale).float()
        return features

    @torch.no_grad()
    def of(self, rows: FloatArray) -> FloatArray:
        """Return the features of rows of X, shape (rows, width + 1), in evaluation mode."""
        found: FloatArray = self.eval()(torch.tensor(rows)).double().numpy()
        return found


@torch.no_grad()
def _vectors(frozen: nn.Module | None, rows: FloatArray) -> FloatArray:
    """Return what the frozen network makes of rows, shape (rows, width)."""
    if frozen is None:
        return rows
    found = frozen.eval()(torch.tensor(rows, dtype=_dtype_of(frozen)))
    if not isinstance(found, torch.Tensor) or len(found) != len(rows):
        raise ValueError(
            check.expected("frozen", "to map (rows, columns) to (rows, width)", type(found))
        )
    vectors: FloatArray = found.flatten(1).double().numpy()
    return vectors


def _dtype_of(frozen: nn.Module | None) -> torch.dtype:
    """Return the type that a network computes in; that of X without one."""
    if frozen is None:
        return torch.float64
    return next((p.dtype for p in frozen.parameters()), torch.float32)
