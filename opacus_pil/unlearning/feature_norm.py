"""The bound on features that a contraction certificate speaks of, held against every row.

Knows rows, and what a frozen part of a model makes of them; no ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..heads import FrozenFeatures
from .conditions import Condition, require_contracting

_NO_BOUND = Condition(
    False,
    "feature_norm, a public bound on the norm of every feature vector",
    "feature_norm=None",
    "Scale each record by public constants and pass the bound.",
)
FeaturesOf = Callable[[torch.Tensor], torch.Tensor]

_CHUNK = 1 << 12  # rows looked at together: bounds the memory
_COMPUTED = 256  # the same where a network computes them
# float32 features that were scaled to the bound may exceed it by a rounding
_ROUNDING = 1.0 + 1e-6


class FeatureNorms(NamedTuple):
    """Norms of feature vectors, a bias counted as a feature.

    Attributes:
        bound: On all of them, public.
        of_rows: Of the rows that were looked at; private.
    """

    bound: float
    of_rows: FloatArray


def checked_feature_norm(
    feature_norm: float | None,
    dataset: Dataset,
    *,
    rows: IntArray,
    bias: bool,
    features_of: FeaturesOf | None = None,
) -> FeatureNorms:
    """Hold every record against the bound; return it with the bias counted as a feature.

    Args:
        feature_norm: Public bound on the norm of every feature vector.
        dataset: Yields (features, target), or (input, target) with `features_of`.
        rows: That are still there, ascending; the others were looked at while they were.
        bias: Whether the model has one.
        features_of: What the frozen part makes of a batch of inputs; None: inputs are features.

    Raises:
        CertificateError: No bound, a row above it, features that are no vector, or rows that were
            erased without being forgotten.
    """
    erased = erased_rows(dataset, rows)
    if len(erased):
        require_contracting([_erased(row=int(erased[0]))])
    if feature_norm is None:
        require_contracting([_NO_BOUND])
    bound = check.real("feature_norm", feature_norm, low=0.0, open_low=True)
    start, seen = 0, [np.empty(0)]
    for inputs in _chunks(dataset, rows, size=_CHUNK if features_of is None else _COMPUTED):
        features = inputs if features_of is None else features_of(inputs)
        if features.ndim != 2:
            require_contracting([_no_vector(features, row=rows[start])])
        norms = features.detach().double().norm(dim=1)
        above = torch.nonzero(~(norms <= bound * _ROUNDING))
        if len(above):
            first = int(above[0])
            require_contracting([_too_long(float(norms[first]), bound, row=rows[start + first])])
        start += len(features)
        seen.append(norms.cpu().numpy())
    one = 1.0 if bias else 0.0
    lengths = np.sqrt(np.square(np.concatenate(seen) * _ROUNDING) + one)
    return FeatureNorms(math.sqrt((bound * _ROUNDING) ** 2 + one), lengths)


def erased_rows(dataset: Any, rows: IntArray) -> IntArray:
    """Return which of the rows are nothing but zeros now, since `FrozenFeatures.erase`."""
    if type(dataset) is FrozenFeatures:
        return rows[dataset.erased[rows]]
    if type(dataset) is Subset:
        inner = np.asarray(dataset.indices, dtype=np.int64)[rows]
        return rows[np.isin(inner, erased_rows(dataset.dataset, inner))]
    return rows[:0]


def _erased(*, row: int) -> Condition:
    return Condition(
        False,
        "every row that was not forgotten to be as it was in training",
        f"an erased one (row {row})",
        "Erase features after their rows are forgotten: training would have had others.",
    )


def _no_vector(features: torch.Tensor, *, row: int) -> Condition:
    return Condition(
        False,
        "one vector of features per instance",
        f"shape {tuple(features.shape[1:])} (row {row})",
        "Each further dimension gives an instance several outputs. Flatten the features.",
    )


def _too_long(norm: float, bound: float, *, row: int) -> Condition:
    return Condition(
        False,
        f"every feature vector within feature_norm={bound:g}",
        f"norm {norm:.8g} (row {row})",
        "Scale each record by public constants, or raise the bound.",
    )


def _of_two_shapes(one: torch.Tensor, other: torch.Tensor, *, row: int) -> Condition:
    return Condition(
        False,
        "feature vectors of one length",
        f"shapes {tuple(one.shape)} and {tuple(other.shape)} (row {row})",
        "Pad the features, or use method='dp_sgd'.",
    )


def _chunks(dataset: Any, rows: IntArray, *, size: int) -> Iterator[torch.Tensor]:
    """Yield the rows' inputs, shape (rows, ...), so many rows at a time."""
    held = _in_memory(dataset)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        if held is not None:
            yield held[torch.as_tensor(chunk)]
            continue
        found = [torch.as_tensor(dataset[int(row)][0]) for row in chunk]
        other = next((k for k, one in enumerate(found) if one.shape != found[0].shape), None)
        if other is not None:
            require_contracting([_of_two_shapes(found[0], found[other], row=chunk[other])])
        yield torch.stack(found)


def _in_memory(dataset: Any) -> torch.Tensor | None:
    """Return the features of a data set that hands out rows of tensors; None: it does not."""
    if type(dataset) is TensorDataset:
        features: torch.Tensor = dataset.tensors[0]
        return features
    if type(dataset) is FrozenFeatures:
        return dataset.features
    if type(dataset) is Subset:
        inner = _in_memory(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(np.asarray(dataset.indices))]
    return None
