"""Which data set a ledger belongs to, as a short record that can be saved and compared.

Knows rows held in memory and the containers of torch; draws no item, for that may be slow or
random, and knows no model and no ledger. What it cannot read it names: such a data set is the
caller's word, by `given`, or an assumption.
"""

from __future__ import annotations

import functools
import hashlib
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

from .. import _validate as check
from .content_digest import ContentDigest, RowNumbers, joined, without_order

_ATTRIBUTES = ("data", "targets", "labels")  # where torchvision and its like keep their rows
_READ = (torch.Tensor, np.ndarray, list, tuple, range)
_TRANSFORMS = ("transform", "target_transform", "transforms")
_SAVED = ("length", "sha256", "whole", "how", "rows", "notes")


@dataclass(frozen=True, eq=False)
class Fingerprint(Mapping[str, Any]):
    """What a data set holds, in a few characters; `dict(fingerprint)` is its form for a file.

    Two that differ belong to data sets that differ. Two that are equal belong to equal contents
    where `whole`; otherwise the part that was not read is an assumption.

    Attributes:
        length: Number of instances.
        sha256: Of contents, types and shapes in row order, or of the caller's word.
        whole: All contents are in the hash. Not the code that makes an item of them.
        how: "contents": all was read; "parts": some of it; "given": the caller's word, or the
            data set's own `_fingerprint`; "length_only": nothing that is in the rows.
        rows: A checksum of the rows in any order; empty where they were not all read. It words a
            difference, and proves none.
        notes: What is not in the hash, a sentence each.

    Equality is "nothing is known to differ", also with a saved dict, also one of an old checkpoint
    (`length` and `sha256` alone), which is compared by the rule that made it.
    """

    length: int
    sha256: str
    whole: bool
    how: str
    rows: str = ""
    notes: tuple[str, ...] = ()
    _old_rule: Callable[[], str] | None = field(default=None, repr=False)

    def differs(self, other: Mapping[str, Any]) -> str:
        """Say what is different from another fingerprint, or from one read from a file.

        Args:
            other: A Fingerprint, or the dict that was saved of one.

        Returns:
            Empty if nothing is known to differ; else words: the lengths, the order, the contents.
        """
        if self.length != other["length"]:
            return f"{self.length} instances against {other['length']}"
        if "how" not in other:
            return self._differs_from_old(other["sha256"])
        if self.how != other["how"]:
            return f"known by {self.how!r} against {other['how']!r}"
        if self.sha256 == other["sha256"]:
            return ""
        if self.rows and self.rows == other["rows"]:
            return "the same instances in another order or container"
        return "another name for the contents" if self.how == "given" else "other contents"

    def reordered(self, other: Fingerprint) -> bool:
        """Whether the other one is of the same rows in another order.

        Of contents that are known by name any other name says so: nobody can tell otherwise.
        """
        if self.how == other.how == "given":
            return self.sha256 != other.sha256
        same = bool(self.rows) and self.rows == other.rows and self.how == other.how
        return same and self.sha256 != other.sha256

    def _differs_from_old(self, sha256: str) -> str:
        if self._old_rule is None:
            return "an old fingerprint, which only the data set itself can be compared with"
        return "" if self._old_rule() == sha256 else "other contents, or another order"

    def __eq__(self, other: object) -> bool:
        """Whether nothing is known to differ."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return {"length", "sha256"} <= set(other) and not self.differs(other)

    def __hash__(self) -> int:
        """Hash what equal fingerprints share."""
        return hash((self.length, self.how, self.sha256))

    def __getitem__(self, name: str) -> Any:
        """Return an entry of the plain form."""
        if name not in _SAVED:
            raise KeyError(name)
        return list(self.notes) if name == "notes" else getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the plain form."""
        return iter(_SAVED)

    def __len__(self) -> int:
        """Return the number of entries of the plain form, not of instances."""
        return len(_SAVED)


def dataset_fingerprint(dataset: Any, *, given: str | None = None) -> Fingerprint:
    """Return what tells a data set from another: its length and a checksum of its contents.

    Tensors, arrays and lists of numbers are read whole, at every call: whoever writes into an array
    that shares a tensor's memory leaves no trace that a stored checksum could be checked by.

    Args:
        dataset: Tensors, arrays and (nested) lists of them and of numbers; TensorDataset, Subset,
            ConcatDataset and StackDataset of such. Of other classes the attributes data, targets
            and labels are read, and the `dataset` that one wraps; of Hugging Face's the
            `_fingerprint`. Items are never drawn. Transforms are named in `notes`: what they draw
            at random, and what they do, is not in the fingerprint.
        given: Your own name for the contents, such as a version or a file's checksum: taken at its
            word, and nothing is read.

    Raises:
        TypeError: A data set without a length, or `given` that is not text.
        ValueError: `given` is empty.

    Privacy: a checksum of private data: whoever has a candidate for all of it can compare.

    >>> rows = TensorDataset(torch.arange(4.0))
    >>> found = dataset_fingerprint(rows)
    >>> found.whole, found == dataset_fingerprint(TensorDataset(torch.arange(4.0)))
    (True, True)
    >>> found.differs(dataset_fingerprint(TensorDataset(torch.arange(4.0).flip(0))))
    'the same instances in another order or container'
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"Expected a data set with a length, got {type(dataset).__name__}. An account needs to "
            "know how many instances there are."
        )
    digest, length = ContentDigest(), len(dataset)
    if given is not None:
        if not isinstance(given, str):
            raise TypeError(check.expected("given", "to be text", given))
        if not given:
            raise ValueError(check.expected("given", "not to be empty", given))
        digest.word("given")
        digest.word(given)
        notes = ("The contents were not read: they are known by the name that was given.",)
        return Fingerprint(length, digest.hexdigest(), False, "given", notes=notes)
    reading = _Reading(digest)
    rows = reading.read(dataset)
    return Fingerprint(
        length,
        digest.hexdigest(),
        reading.how == "contents",
        reading.how,
        rows="" if rows is None or len(rows) != length else without_order(rows),
        notes=tuple(dict.fromkeys(reading.notes)),
        _old_rule=functools.partial(_sampled_sha256, dataset),
    )


def quick_mark(dataset: Any) -> tuple[Any, ...]:
    """Return what changes when somebody replaces, or writes to, what a data set holds in memory.

    Where the tensors are and how often they were written to; nothing of what is in them. A sample
    of a Subset's indices. Costs microseconds; equal marks prove nothing.
    """
    if isinstance(dataset, Subset):
        some = [int(i) for i in dataset.indices[:_SAMPLED_INDICES]]
        return (len(dataset.indices), *some, *quick_mark(dataset.dataset))
    held = [getattr(dataset, name, None) for name in (*_ATTRIBUTES, "features")]
    if isinstance(dataset, TensorDataset):
        held = list(dataset.tensors)
    return tuple(
        (value.data_ptr(), value._version) if torch.is_tensor(value) else id(value)
        for value in held
        if value is not None
    )


class _Reading:
    """Feeds a data set's parts to a digest and remembers what of it was read."""

    def __init__(self, digest: ContentDigest) -> None:
        self._digest = digest
        self._kinds: set[str] = set()  # "read", "unread", "named"
        self.notes: list[str] = []

    @property
    def how(self) -> str:
        """Code of what was read."""
        if len(self._kinds) > 1:
            return "parts"
        return {"read": "contents", "named": "given"}.get(next(iter(self._kinds)), "length_only")

    def read(self, node: Any) -> RowNumbers | None:
        """Feed a data set; return one number per row where all of a row was read."""
        kind = type(node).__name__
        if isinstance(node, _READ):
            return self._feed(node)
        self._digest.word(f"{kind} {len(node)}")
        self._name_transforms(node)
        if isinstance(node, Subset):
            indices = np.asarray(node.indices)
            self._digest.feed(indices)
            rows = self.read(node.dataset)
            return None if rows is None else rows[indices]
        if isinstance(node, ConcatDataset):
            parts = [self.read(part) for part in node.datasets]
            known = [part for part in parts if part is not None]
            return np.concatenate(known) if len(known) == len(parts) else None
        if isinstance(node, StackDataset):
            inner = node.datasets
            return self._columns(inner if isinstance(inner, dict) else dict(enumerate(inner)))
        if isinstance(node, TensorDataset):
            return self._columns(dict(enumerate(node.tensors)))
        return self._read_attributes(node)

    def _feed(self, value: Any) -> RowNumbers | None:
        whole, rows = self._digest.feed(value)
        self._kinds.add("read")
        if not whole:
            self._unread("Parts of the items that are neither numbers nor arrays")
        return rows if whole else None

    def _columns(self, parts: Mapping[Any, Any]) -> RowNumbers | None:
        """Read what is indexed together: every row has a part in each."""
        columns = []
        for name, part in parts.items():
            self._digest.word(str(name))
            columns.append(self.read(part))
        known = [column for column in columns if column is not None]
        aligned = len(known) == len(columns) and len({len(column) for column in known}) == 1
        return joined(known) if aligned else None

    def _read_attributes(self, node: Any) -> RowNumbers | None:
        """Read a class that is not known by name, as far as its attributes tell."""
        kind = type(node).__name__
        own = getattr(node, "_fingerprint", None)
        if isinstance(own, str) and own:
            self._digest.word(own)
            self._kinds.add("named")
            self.notes.append(f"{kind}: known by its own fingerprint, its rows were not read.")
            return None
        found = {
            name: value
            for name in _ATTRIBUTES
            if isinstance(value := getattr(node, name, None), _READ) and not _is_text(value)
        }
        rows = self._columns(found)
        own_attributes = getattr(node, "__dict__", {})
        inner = own_attributes.get("dataset")
        if hasattr(inner, "__len__"):
            self.read(inner)
        others = {k: v for k, v in own_attributes.items() if k not in (*found, *_TRANSFORMS)}
        if "data" not in found or not all(map(_says_nothing, others.values())):
            self._unread(f"{kind}: what its items are made of beside what is in memory")
            return None
        return rows

    def _unread(self, what: str) -> None:
        self._kinds.add("unread")
        self.notes.append(f"{what}: not in the fingerprint.")

    def _name_transforms(self, node: Any) -> None:
        for name in _TRANSFORMS:
            if getattr(node, name, None) is not None:
                self.notes.append(
                    f"{type(node).__name__}.{name}: random augmentation is not in the fingerprint."
                )


def _is_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)


def _says_nothing(value: Any) -> bool:
    """Whether an attribute holds no rows: a setting, a name, or names of classes."""
    if isinstance(value, Mapping):
        return all(isinstance(v, str | numbers.Number) for v in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(isinstance(v, str) for v in value)
    return value is None or isinstance(value, str | bytes | numbers.Number | PurePath)


_SAMPLED_INDICES = 8


# --- the rule of old checkpoints ------------------------------------------------------------------

_SAMPLED_BYTES = 1 << 26


def _sampled_sha256(dataset: Any) -> str:
    """Return the checksum that checkpoints were saved with before contents were read whole.

    Kept so that they can still be loaded. Of arrays above 64 MiB it reads evenly spaced rows, and
    of unknown classes the length: new fingerprints are not made by it.
    """
    digest = hashlib.sha256()
    _feed_sampled(digest, dataset)
    return digest.hexdigest()


def _feed_sampled(digest: Any, dataset: Any) -> None:
    digest.update(f"{type(dataset).__name__} {len(dataset)};".encode())
    if isinstance(dataset, Subset):
        _feed_sampled_array(digest, dataset.indices)
        _feed_sampled(digest, dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            _feed_sampled(digest, part)
    else:
        arrays = [getattr(dataset, name, None) for name in _ATTRIBUTES]
        for array in dataset.tensors if isinstance(dataset, TensorDataset) else arrays:
            _feed_sampled_array(digest, array)


def _feed_sampled_array(digest: Any, value: Any) -> None:
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
    step = max(1, -(-array.nbytes // _SAMPLED_BYTES))
    digest.update(f"{array.dtype} {array.shape};".encode())
    digest.update(np.ascontiguousarray(array[::step] if array.ndim else array))
