"""The bound on features that a contraction certificate speaks of, held against every row.

Knows rows of features; no model and no ledger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from .. import _validate as check
from .._validate import IntArray
from ..errors import CertificateError

_CHUNK = 1 << 12  # rows looked at together: bounds the memory
# float32 features that were scaled to the bound may exceed it by a rounding
_ROUNDING = 1.0 + 1e-6


def require_contracting(holds: bool, domain: str, found: str, cure: str) -> None:
    """Raise where an assumption of contraction does not hold.

    Raises:
        CertificateError: With the four parts of its words.
    """
    if not holds:
        raise CertificateError(
            f"Expected {domain} for a contraction certificate, got {found}. {cure}"
        )


def checked_feature_norm(
    feature_norm: float | None, dataset: Dataset, *, rows: IntArray, bias: bool
) -> float:
    """Hold every record against the bound; return it with the bias counted as a feature.

    Args:
        feature_norm: Public bound on the norm of every feature vector.
        dataset: Yields (features, target).
        rows: That are still there, ascending; the others were looked at while they were.
        bias: Whether the model has one.

    Raises:
        CertificateError: No bound, a row above it, or features that are no vector.
    """
    require_contracting(
        feature_norm is not None,
        "feature_norm, a public bound on the norm of every feature vector",
        "feature_norm=None",
        "Scale each record by public constants and pass the bound.",
    )
    bound = check.real("feature_norm", feature_norm, low=0.0, open_low=True)
    start = 0
    for features in _chunks(dataset, rows):
        require_contracting(
            features.ndim == 2,
            "one vector of features per instance",
            f"shape {tuple(features.shape[1:])} (row {rows[start]})",
            "Each further dimension gives an instance several outputs. Flatten the features.",
        )
        norms = features.detach().double().norm(dim=1)
        above = torch.nonzero(~(norms <= bound * _ROUNDING))
        first = int(above[0]) if len(above) else 0
        require_contracting(
            not len(above),
            f"every feature vector within feature_norm={bound:g}",
            f"norm {float(norms[first]) if len(norms) else 0.0:.8g} (row {rows[start + first]})",
            "Scale each record by public constants, or raise the bound.",
        )
        start += len(features)
    return math.sqrt((bound * _ROUNDING) ** 2 + (1.0 if bias else 0.0))


def _chunks(dataset: Any, rows: IntArray) -> Iterator[torch.Tensor]:
    """Yield the rows' features, shape (rows, ...), some thousand rows at a time."""
    held = _in_memory(dataset)
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        if held is not None:
            yield held[torch.as_tensor(chunk)]
            continue
        found = [torch.as_tensor(dataset[int(row)][0]) for row in chunk]
        other = next((k for k, one in enumerate(found) if one.shape != found[0].shape), 0)
        require_contracting(
            not other,
            "feature vectors of one length",
            f"shapes {tuple(found[0].shape)} and {tuple(found[other].shape)} (row {chunk[other]})",
            "Pad the features, or use method='dp_sgd'.",
        )
        yield torch.stack(found)


def _in_memory(dataset: Any) -> torch.Tensor | None:
    """Return the features of a data set that hands out rows of tensors; None: it does not."""
    if type(dataset) is TensorDataset:
        features: torch.Tensor = dataset.tensors[0]
        return features
    if type(dataset) is Subset:
        inner = _in_memory(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(np.asarray(dataset.indices))]
    return None
