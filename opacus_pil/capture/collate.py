"""Whether row k of a batch is the k-th drawn row: seen where the batch is joined, not assumed.

torch's default collation keeps the order by itself. Any other is asked for every row alone, and the
batch is compared with the answers, leaf by leaf, up to padding. Knows items and batches; no model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch.utils.data import default_collate

from .._validate import IntArray
from .randomness import untouched_generators

Collate = Callable[[list[Any]], Any]
BoolArray = npt.NDArray[np.bool_]
_OTHER_STRUCTURE = "a batch of one row has another structure than the batch"


@dataclass(frozen=True)
class RowOrder:
    """How it is known which drawn row each row of a batch is.

    Attributes:
        how: "default" (torch's collation), "compared", "given" by the caller; "": not known.
        why: Where it is not known: the reason, to complete a sentence.
        apart: Whether each drawn row is known to be one row of the batch, whichever.
    """

    how: str
    why: str = ""
    apart: bool = True

    @property
    def known(self) -> bool:
        """Whether each drawn row is one row of the batch, and which one."""
        return bool(self.how)


DEFAULT, GIVEN, COMPARED = RowOrder("default"), RowOrder("given"), RowOrder("compared")


def keeps_order(collate: Any) -> bool:
    """Whether a collate function needs no comparison; Opacus's wrapper is looked through."""
    return unwrapped(collate) is default_collate


def unwrapped(collate: Any) -> Any:
    """Return the user's collate function; Opacus wraps it again at every make_private."""
    while hasattr(collate, "wrapped_collator_fn"):
        collate = collate.wrapped_collator_fn
    return collate


class ProvingCollate:
    """A loader's collate function that says with each batch which rows are where.

    Answers (batch, how, why, order): `order[k]` is the position in `items` of the batch's k-th row;
    None: as in `items`. Plain values, which workers and pinning pass on as they are. The random
    numbers that a training draws do not change.

    Args:
        collate: The loader's own; with a `wrapped_collator_fn` (Opacus's) that is what is asked for
            single rows.
        batch_first: False where the batch is the second dimension of tensors with several.
    """

    def __init__(self, collate: Any, *, batch_first: bool = True) -> None:
        self.collate = collate
        self._single: Collate = getattr(collate, "wrapped_collator_fn", None) or collate
        self._dimension = 0 if batch_first else 1

    def __call__(self, items: list[Any]) -> tuple[Any, str, str, list[int] | None]:
        """Join the items as the loader would, then find each of them in the batch."""
        if not items or keeps_order(self.collate):
            return self.collate(items), DEFAULT.how, "", None
        kept = [copy.copy(item) for item in items]  # a collate function may take items apart
        batch = self.collate(items)
        with untouched_generators():
            try:
                alone = [self._single([item]) for item in kept]
            except Exception as error:  # a foreign function may fail in any way: not known, then
                why = f"the collate function fails on a single row ({type(error).__name__})"
                return batch, "", why, None
        order, why = order_of_rows(batch, alone, dimension=self._dimension)
        if order is None:
            return batch, "", why, None
        unchanged = bool((order == np.arange(len(order))).all())
        return batch, COMPARED.how, "", None if unchanged else order.tolist()


def order_of_rows(
    batch: Any, alone: list[Any], *, dimension: int = 0
) -> tuple[IntArray | None, str]:
    """Find in a batch the rows that were collated alone.

    Guarantee: if an order is returned, row k of every leaf of `batch` is the row of
        alone[order[k]], each used once, up to padding by one constant at either end; and nothing
        else is in the batch.

    Args:
        batch: Nested lists, tuples and mappings of tensors, arrays and plain values.
        alone: The same for each row by itself.
        dimension: Of the rows in tensors that have so many.

    Returns:
        The order, shape (rows,), and ""; or None and why there is none.
    """
    size = len(alone)
    free, why = _matches(batch, alone, dimension)  # [row of the batch, single row]: may be the same
    if free is None:
        return None, why
    if free[
        np.arange(size), np.arange(size)
    ].all():  # as drawn; equal rows may stand for each other
        return np.arange(size), ""
    order = _assignment(free)
    if order is None:
        return None, "the batch's rows are not the drawn rows, each once"
    return order, ""


def _matches(whole: Any, alone: list[Any], dimension: int) -> tuple[BoolArray | None, str]:
    """Return which row of `whole` may be which single row, shape (size, size); None: why not."""
    if torch.is_tensor(whole):
        return _tensor_matches(whole, alone, dimension)
    if isinstance(whole, np.ndarray) and whole.dtype.kind in "biufc":
        if any(not isinstance(one, np.ndarray) for one in alone):
            return None, _OTHER_STRUCTURE
        return _tensor_matches(torch.as_tensor(whole), [torch.as_tensor(a) for a in alone], 0)
    if isinstance(whole, Mapping):
        if any(not isinstance(one, Mapping) or list(one) != list(whole) for one in alone):
            return None, _OTHER_STRUCTURE
        return _joint([(whole[k], [one[k] for one in alone]) for k in whole], len(alone), dimension)
    if isinstance(whole, list | tuple | np.ndarray):
        return _list_matches(whole, alone, dimension)
    if all(_equal(one, whole) for one in alone):  # says nothing of any row
        return np.ones((len(alone), len(alone)), dtype=bool), ""
    return None, f"the batch has a {type(whole).__name__} that depends on several rows"


def _list_matches(whole: Any, alone: list[Any], dimension: int) -> tuple[BoolArray | None, str]:
    size = len(alone)
    if any(type(one) is not type(whole) for one in alone):
        return None, _OTHER_STRUCTURE
    lengths = {len(one) for one in alone}
    if lengths == {len(whole)}:
        parts = [(part, [one[k] for one in alone]) for k, part in enumerate(whole)]
        return _joint(parts, size, dimension)
    if len(whole) == size and lengths == {1}:  # one entry per row
        return np.array([[_equal(part, one[0]) for one in alone] for part in whole]), ""
    return None, f"a {type(whole).__name__} of the batch has {len(whole)} rows for {size} drawn"


def _joint(
    parts: list[tuple[Any, list[Any]]], size: int, dimension: int
) -> tuple[BoolArray | None, str]:
    free = np.ones((size, size), dtype=bool)
    for whole, alone in parts:
        same, why = _matches(whole, alone, dimension)
        if same is None:
            return None, why
        free &= same
    return free, ""


def _tensor_matches(
    whole: torch.Tensor, alone: list[Any], dimension: int
) -> tuple[BoolArray | None, str]:
    size = len(alone)
    if any(not torch.is_tensor(one) for one in alone):
        return None, _OTHER_STRUCTURE
    axis = dimension if whole.ndim > dimension else 0
    if whole.ndim == 0 or whole.shape[axis] != size:
        if all(_equal(one, whole) for one in alone):  # says nothing of any row
            return np.ones((size, size), dtype=bool), ""
        found = "one value" if whole.ndim == 0 else f"{whole.shape[axis]} rows"
        return None, f"a tensor of the batch has {found} for {size} drawn"
    rows = whole.movedim(axis, 0)
    if any(one.ndim != whole.ndim or one.shape[axis] != 1 for one in alone):
        return None, _OTHER_STRUCTURE
    singles = [one.movedim(axis, 0)[0] for one in alone]
    if all(one.shape == rows.shape[1:] for one in singles) and _equal(torch.stack(singles), rows):
        return _equal_rows(rows), ""  # nearly always: every row where it was drawn
    return np.stack([_padded_equal(rows, one) for one in singles], axis=1), ""


def _equal_rows(rows: torch.Tensor) -> BoolArray:
    """Which rows equal which, without comparing each with each where all differ."""
    flat = rows.reshape(len(rows), -1)
    _, kind = torch.unique(flat, dim=0, return_inverse=True) if flat.shape[1] else (None, None)
    codes = np.zeros(len(rows)) if kind is None else kind.cpu().numpy()
    same: BoolArray = codes[:, None] == codes[None, :]
    np.fill_diagonal(same, True)
    return same


def _padded_equal(rows: torch.Tensor, one: torch.Tensor) -> BoolArray:
    """Which rows are `one` followed, or preceded, by one constant."""
    if one.dtype != rows.dtype or any(
        a > b for a, b in zip(one.shape, rows.shape[1:], strict=True)
    ):
        return np.zeros(len(rows), dtype=bool)
    if one.shape == rows.shape[1:]:
        return _rows_all(_same_values(rows, one.expand_as(rows)))
    found = np.zeros(len(rows), dtype=bool)
    for at_end in (False, True):
        block = tuple(
            slice(b - a, b) if at_end else slice(0, a)
            for a, b in zip(one.shape, rows.shape[1:], strict=True)
        )
        inside = rows[(slice(None), *block)]
        outside = torch.ones(rows.shape[1:], dtype=torch.bool, device=rows.device)
        outside[block] = False
        rest = rows[:, outside]
        agree = _rows_all(_same_values(inside, one.expand_as(inside)))
        found |= agree & _rows_all(_same_values(rest, rest[:, :1].expand_as(rest)))
    return found


def _rows_all(agree: torch.Tensor) -> BoolArray:
    found: BoolArray = agree.reshape(len(agree), -1).all(dim=1).cpu().numpy()
    return found


def _same_values(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Equality entry by entry; NaN is equal to NaN: the same record, whatever is in it."""
    if one.is_floating_point() or one.is_complex():
        return (one == other) | (one.isnan() & other.isnan())
    return one == other


def _equal(one: Any, other: Any) -> bool:
    """Equality of nested values, types included; what cannot be compared differs."""
    if type(one) is not type(other):
        return False
    if torch.is_tensor(one):
        same = one.shape == other.shape and one.dtype == other.dtype
        return same and bool(_same_values(one, other).all())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False


def _assignment(free: BoolArray) -> IntArray | None:
    """Return for each row of the batch the single row that it is, each used once; None: none."""
    found = maximum_bipartite_matching(csr_matrix(free), perm_type="column")
    return None if (found < 0).any() else found.astype(np.int64)
