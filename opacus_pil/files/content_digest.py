"""A checksum of numbers in memory, without a copy of them, and one that forgets their order.

Knows tensors, arrays and what is nested of them and of numbers; no data sets and no files. Text is
not read: it may be the path of a file, which says nothing about what is in it.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# One number per row, by which rows are told apart whatever their order. 64 bits and not meant to
# withstand anybody: they word a difference that SHA-256 has found.
RowNumbers = npt.NDArray[np.uint64]

_BLOCK = 1 << 23  # bytes read at a time: still in the cache when they are read a second time
_NUMERIC = "biufcmM"  # numpy's kinds of numbers, dates included; neither text nor objects
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ContentDigest:
    """SHA-256 of what it is fed, with types, shapes and nesting."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def word(self, text: str) -> None:
        """Feed a name."""
        self._sha.update(f"{len(text)} {text};".encode())

    def hexdigest(self) -> str:
        """Return the checksum so far, 64 hexadecimal digits."""
        return self._sha.hexdigest()

    def feed(self, value: Any) -> tuple[bool, RowNumbers | None]:
        """Feed a tensor, an array, a number, None, or lists, tuples and dicts of such.

        Returns:
            Whether all of it was read; and one number per row (entry of the first axis, item of
            the list), or None where there are no rows.
        """
        if isinstance(value, list | tuple | range):
            numeric = _as_numbers(value)
            if numeric is None:
                return self._feed_items(value)
            value = numeric
        if isinstance(value, Mapping):
            self.word(f"dict {len(value)}")
            whole = True
            for key, item in value.items():
                self.word(str(key))
                whole &= self.feed(item)[0]
            return whole, None
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if value is None or isinstance(value, numbers.Number):
            self.word(repr(value))
            return True, None
        array = _readable(value)
        if array is None:
            self.word(f"not read: {type(value).__name__}")
            return False, None
        self.word(f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}")
        return True, self._feed_array(array)

    def _feed_items(self, values: Sequence[Any]) -> tuple[bool, RowNumbers]:
        """Feed items one by one, each by a checksum of its own."""
        self.word(f"items {len(values)}")
        rows = np.empty(len(values), dtype=np.uint64)
        whole = True
        for number, item in enumerate(values):
            own = ContentDigest()
            whole &= own.feed(item)[0]
            digest = own._sha.digest()
            self._sha.update(digest)
            rows[number] = int.from_bytes(digest[:8], "little")
        return whole, rows

    def _feed_array(self, array: npt.NDArray[Any] | torch.Tensor) -> RowNumbers | None:
        rows = []
        for block in _blocks(array):
            self._sha.update(block.data)
            rows.append(_numbers_of(block))
        if not array.ndim:
            return None
        return np.concatenate(rows) if rows else np.zeros(len(array), dtype=np.uint64)


def joined(columns: list[RowNumbers]) -> RowNumbers:
    """Return one number per row for rows with several parts."""
    result = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        result = _mixed(result * _FACTOR + column)
    return result


def without_order(rows: RowNumbers) -> str:
    """Return a checksum of the rows that does not depend on their order, 16 hex digits."""
    return f"{int(_mixed(rows).sum(dtype=np.uint64)):016x}"


def _as_numbers(values: Any) -> npt.NDArray[Any] | None:
    """Return a list of plain numbers as an array, else None."""
    if not isinstance(values, range) and not all(
        isinstance(v, int | float | np.number | np.bool_) for v in values
    ):
        return None
    array = np.asarray(values)
    return None if array.dtype.hasobject else array  # whole numbers beyond 64 bits


def _readable(value: Any) -> npt.NDArray[Any] | torch.Tensor | None:
    """Return an array whose bytes can be read, or a tensor on another device, else None."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            return None
        value = value.detach().resolve_conj().resolve_neg()
        return value if value.device.type != "cpu" else _bits(value)
    known = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
    return np.asarray(value) if known and value.dtype.kind in _NUMERIC else None


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return a tensor in memory as an array, of its bits where numpy lacks the type."""
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16 and the like
        return tensor.view(_SAME_SIZE[tensor.element_size()]).numpy()


def _blocks(array: npt.NDArray[Any] | torch.Tensor) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the bytes in row order, shape (rows, bytes per row); a copy of a block at most."""
    if not array.ndim:
        array = array.reshape(1)
    count = len(array)
    width = array.nbytes // count if count else 0
    if not width:
        return
    step = max(1, _BLOCK // max(width, 8))
    for start in range(0, count, step):
        part = array[start : start + step]
        if isinstance(part, torch.Tensor):
            part = _bits(part.cpu())
        yield np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8)


def _numbers_of(block: npt.NDArray[np.uint8]) -> RowNumbers:
    """Return one number per row: its 8-byte words times odd factors, mixed."""
    rows, width = block.shape
    words = math.ceil(width / 8)
    if width % 8:
        block = np.pad(block, ((0, 0), (0, 8 * words - width)))
    factors = _mixed(np.arange(1, words + 1, dtype=np.uint64)) | np.uint64(1)
    return _mixed(block.view(np.uint64).reshape(rows, words) @ factors)


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: RowNumbers) -> RowNumbers:
    """Mix 64-bit numbers one to one. Source: Steele, Lea, Flood (2014), SplitMix64."""
    z = values + _FACTOR
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
