"""A batch of no rows: what a Poisson draw that takes nobody is, if it is the first one.

Opacus learns a batch's shape from the first that has rows; before, dictionaries are an error or an
empty list. Knows loaders and batches only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def know_nobody(loader: Any) -> None:
    """Let Opacus's loader know what a batch of no rows looks like, before its first draw.

    By the shapes of row 0 collated alone; nothing of what is in it is kept. Loaders of fixed
    batches, which always have rows, are left as they are.
    """
    collate = loader.collate_fn
    if getattr(collate, "first_batch", collate) is None:
        collate.first_batch = _without_rows(collate.wrapped_collator_fn([loader.dataset[0]]))


def _without_rows(batch: Any) -> Any:
    if torch.is_tensor(batch):
        return batch[:0].clone()
    if isinstance(batch, Mapping):
        return {name: _without_rows(value) for name, value in batch.items()}
    return type(batch)(map(_without_rows, batch)) if isinstance(batch, list | tuple) else batch
