"""Which data set a ledger belongs to, as a short record that can be compared.

Knows rows held in memory, no model and no ledger.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

_HASHED_BYTES = 1 << 26  # per array; of larger ones evenly spaced rows
_ATTRIBUTES = ("data", "targets", "labels")  # where torchvision and its like keep their rows


def dataset_fingerprint(dataset: Any) -> dict[str, Any]:
    """Return length, type and a checksum of what a data set holds in memory.

    Two data sets with different fingerprints differ; equal ones may still differ in rows that are
    read from disk, in transforms, and in arrays above 64 MiB between the rows that are looked at.

    Args:
        dataset: TensorDataset, Subset and ConcatDataset are followed; of others the attributes
            data, targets and labels are read, if they are arrays. Items are never drawn: that may
            be slow or random.

    >>> rows = TensorDataset(torch.arange(4.0))
    >>> dataset_fingerprint(rows) == dataset_fingerprint(TensorDataset(torch.arange(4.0)))
    True
    >>> dataset_fingerprint(rows) == dataset_fingerprint(TensorDataset(torch.ones(4)))
    False
    """
    digest = hashlib.sha256()
    _feed(digest, dataset)
    return {"length": len(dataset), "sha256": digest.hexdigest()}


def _feed(digest: Any, dataset: Any) -> None:
    digest.update(f"{type(dataset).__name__} {len(dataset)};".encode())
    if isinstance(dataset, Subset):
        _feed_array(digest, dataset.indices)
        _feed(digest, dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            _feed(digest, part)
    else:
        arrays = [getattr(dataset, name, None) for name in _ATTRIBUTES]
        for array in dataset.tensors if isinstance(dataset, TensorDataset) else arrays:
            _feed_array(digest, array)


def _feed_array(digest: Any, value: Any) -> None:
    """Add an array, or nothing if the value is none."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.view(torch.uint8) if value.dtype is torch.bfloat16 else value
        array = value.numpy()
    elif isinstance(value, np.ndarray | range) or (
        isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    ):
        array = np.asarray(value)
    else:
        return
    if array.dtype.hasobject:
        return
    step = max(1, -(-array.nbytes // _HASHED_BYTES))
    digest.update(f"{array.dtype} {array.shape};".encode())
    digest.update(np.ascontiguousarray(array[::step] if array.ndim else array))
