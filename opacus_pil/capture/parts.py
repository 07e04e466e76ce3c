"""Part: one physical batch of a step, clipped; and what the parts of a step say together.

Here is the tripwire: a sum of clipped gradients is at most as long as its rows allow. It sees where
clipping did not hold; neither rows that depend on each other nor gradients that cancel. Knows
tensors of norms and rows; no optimizer, and no label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .._validate import FloatArray, IntArray
from .collate import RowOrder
from .draws import Draw

OUT_OF_STEP = (
    "its physical batches are not the parts of one draw; a loop over Opacus's BatchMemoryManager "
    "was left early or skipped a batch, which opacus_pil.BatchMemoryManager allows"
)
# The sum of a batch in floating point against the sum of its norms: float32 sums of thousands of
# rows err by far less, and a broken clip by far more.
_TRIPWIRE_SLACK = 1e-3


@dataclass(frozen=True)
class Part:
    """One physical batch, as it was when it was clipped."""

    rows: IntArray | None  # of this physical batch; None: not published
    draw: Draw | None  # which draw it is part of; None: not known
    order: RowOrder
    norms: torch.Tensor
    max_grad_norm: float
    dropped: torch.Tensor | None  # rows with cap 0, which took no part
    mismatch: str
    rounding: float  # relative, of the coarsest number behind the norms
    unclaimed: int  # batches that loaders had given since the one before
    passes: int
    foreign: bool  # a batch that no loader had just handed out
    limits: FloatArray | None  # of each row, where caps are in force
    allowed: torch.Tensor | None  # most that each layer's sum can be; None: clipped together
    whole: torch.Tensor | None  # norms before layers were clipped one by one
    layer_factors: torch.Tensor | None  # what each layer of each row was multiplied with
    phantom: bool  # a row that Opacus put into an empty draw is in the sum


def rows_of(captures: list[Part], draws: set[Draw], size: int) -> tuple[IntArray | None, str]:
    """Return the rows of a step in the order of its norms, or None and why."""
    if not captures:
        return None, "no gradient was captured"
    if all(c.rows is not None for c in captures):
        if len(draws) > 1:
            return None, f"{len(draws)} drawn batches are in one step"
        return np.concatenate([c.rows for c in captures if c.rows is not None]), ""
    return _whole_draw(captures, size)


def _whole_draw(captures: list[Part], size: int) -> tuple[IntArray | None, str]:
    """Return the rows of a draw that Opacus split, if just its pieces were captured."""
    draw = captures[0].draw
    if any(c.mismatch for c in captures):
        return None, next(c.mismatch for c in captures if c.mismatch)
    if (
        draw is None
        or any(c.draw is not draw or c.rows is not None for c in captures)
        or len(draw.rows) != size  # each part is used once: all of them, if the length is right
    ):
        return None, OUT_OF_STEP
    return np.asarray(draw.rows, dtype=np.int64), ""


def members(captures: list[Part], draws: set[Draw]) -> IntArray | None:
    """Return who is in the step, in no certain order; None: not known."""
    parts = [c.draw.rows for c in captures[:1] if c.draw is not None]
    whole = len(draws) == 1 and all(c.draw is not None and c.passes == 1 for c in captures)
    return np.asarray(parts[0], dtype=np.int64) if whole and parts else None


def most_copies(rows: IntArray) -> int:
    """Return how often the row that is in a step most often is in it."""
    return int(np.unique(rows, return_counts=True)[1].max(initial=0))


def factors_of(captures: list[Part], norms: FloatArray) -> FloatArray | None:
    """Return what Opacus multiplied each gradient with; None: no one number per row."""
    if any(c.allowed is not None for c in captures):
        return None
    ones = [np.ones(len(c.norms)) if c.limits is None else c.limits for c in captures]
    parts = [c.max_grad_norm * caps for c, caps in zip(captures, ones, strict=True)]
    bounds = np.concatenate(parts) if parts else np.empty(0)
    return np.where(bounds > 0.0, np.minimum(bounds / (norms + 1e-6), 1.0), 0.0)


def whole_norms(captures: list[Part]) -> torch.Tensor | None:
    """Return norms before layers were clipped one by one; None: they were clipped together."""
    parts = [c.whole for c in captures if c.whole is not None]
    return torch.cat(parts) if parts and len(parts) == len(captures) else None


def layer_factors_of(captures: list[Part]) -> torch.Tensor | None:
    """Return what each layer of each row was multiplied with; None: not the same layers in all."""
    parts = [c.layer_factors for c in captures if c.layer_factors is not None]
    if not parts or len(parts) < len(captures) or len({p.shape[1] for p in parts}) > 1:
        return None
    return torch.cat(parts)


def most_draws(captures: list[Part], draws: set[Draw]) -> int:
    """Return how many draws a step may have summed."""
    unknown = sum(c.draw is None for c in captures)
    passes = sum(c.passes for c in captures if c.passes > 1)
    return max(len(draws) + unknown, passes, sum(c.unclaimed for c in captures), 1)


def joined(
    captures: list[Part], sums: torch.Tensor | None
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Return norms, layers' sums and what layers allow, in one transfer from the device."""
    parts = [c.norms for c in captures]
    layers = [c.allowed for c in captures if c.allowed is not None]
    rows = sum(map(len, parts))
    last = rows if sums is None else rows + len(sums)
    parts = [*parts, *([] if sums is None else [sums]), *layers]
    if not parts:
        return np.empty(0), np.empty(0), None
    device = parts[0].device
    if any(p.device != device for p in parts):
        parts = [p.to(device) for p in parts]
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    found: FloatArray = together.to("cpu", torch.float64).numpy()
    return found[:rows], found[rows:last], _allowed(found[last:], [len(a) for a in layers])


def _allowed(found: FloatArray, sizes: list[int]) -> FloatArray | None:
    """Return what each layer's sum may be; over all layers, if parts of the step trained others."""
    if not sizes:
        return None
    parts = np.split(found, np.cumsum(sizes)[:-1])
    if len(set(sizes)) > 1:
        return np.array([sum(math.sqrt(float(part @ part)) for part in parts)])
    together: FloatArray = np.sum(parts, axis=0)
    return together


def exceeds(
    captures: list[Part], norms: FloatArray, sums: FloatArray, layers: FloatArray | None, *,
    rounding: float,
) -> bool:  # fmt: skip
    """Whether clipped sums are larger than their rows allow, over all layers or in one of them."""
    if not len(sums):
        return False
    slack = 1.0 + _TRIPWIRE_SLACK + len(norms) * rounding
    if layers is not None and len(layers) == len(sums):
        return bool((sums > layers * slack).any())
    if layers is not None:  # one limit, or parameters frozen since
        return math.sqrt(float(sums @ sums)) > float(layers.sum()) * slack
    limit, start = 0.0, 0
    for part in captures:
        own, start = norms[start : start + len(part.norms)], start + len(part.norms)
        if part.limits is None:
            limit += float(np.minimum(own, part.max_grad_norm).sum())
        else:  # a row that caps leave out may hold NaN
            kept = part.limits > 0.0
            limit += float(np.minimum(own, part.limits * part.max_grad_norm)[kept].sum())
        if part.phantom:  # Opacus's random row is in the sum and not here
            limit += part.max_grad_norm
    return math.sqrt(float(sums @ sums)) > limit * slack
