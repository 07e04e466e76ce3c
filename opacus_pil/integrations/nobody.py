"""A batch of no rows: what a Poisson draw that takes nobody looks like before any other was seen.

Opacus hands out an empty list then, since it does not know a batch's shape yet. Knows batches only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def nobody(dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> Any:
    """Return a batch of no rows, by the shapes of one row; nothing of what is in it is kept."""
    return _without_rows(collate_fn([dataset[0]]))


def _without_rows(batch: Any) -> Any:
    if torch.is_tensor(batch):
        return batch[:0].clone()
    if isinstance(batch, Mapping):
        return {name: _without_rows(value) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_without_rows, batch))
    return type(batch)(map(_without_rows, batch)) if isinstance(batch, list | tuple) else batch
