"""FrozenFeatures: what a frozen network makes of every row, computed once and kept.

A data set of (features, target) to train a head on: a full-batch step is then a matrix product,
however large the network is. Knows a module and rows; no engine and no ledger.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .. import _validate as check
from ..capture.randomness import untouched_generators
from ..errors import LedgerError, UnsupportedError
from ..files.container import load_state, save_state
from ..files.fingerprint import Fingerprint, dataset_fingerprint
from ..files.model_hash import model_hash

_KIND = "frozen features"
_SAME = 1e-3  # of features of another machine, in float32


class FrozenFeatures(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Features of every row of a data set by a fixed network, as a data set of their own.

    Guarantee: row i is (frozen(x_i), y_i), with the network in evaluation mode; the same bits for
        the same network, data and machine. Named assumption of every certificate on it: the network
        never saw the private data.

    Args:
        dataset: Map-style, of pairs (input, target).
        frozen: Maps a batch of inputs to (batch, features); copied, put into evaluation mode.
            `nn.Sequential(backbone, BoundedFeatures(d))` gives features of bounded norm.
        folder: Existing folder to keep the features in, mode 0600, under a name made of the
            network's weights and the data set's contents: the next process reads them. None: in
            memory only.
        batch_size: Rows computed together.
        progress: Show a progress bar when the output is a terminal.

    Attributes:
        features: Shape (rows, width), on the CPU.
        targets: Shape (rows, ...).
        key: 64 hexadecimal digits of the network and the data set.
        erased: Shape (rows,), True where `erase` was called.

    Raises:
        UnsupportedError: The network gives other features when it is asked again; or `folder`, and
            a data set that cannot be told from others.
        ValueError: Its output has no rows, or is not (batch, features).
        NotADirectoryError: `folder` is no folder.
        LedgerError: A damaged file, or one of another network with the same weights.

    Privacy: features depend on private data, each row on its own record alone.
    """

    def __init__(
        self,
        dataset: Any,
        frozen: nn.Module,
        *,
        folder: str | os.PathLike[str] | None = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise NotADirectoryError(f"Expected folder to be an existing folder, got {folder}.")
        size = check.integer("batch_size", batch_size, low=1)
        check.integer("len(dataset)", len(dataset), low=1)
        network = copy.deepcopy(frozen).eval().requires_grad_(requires_grad=False)
        found = dataset_fingerprint(dataset)
        if folder is not None and found.how not in ("contents", "given"):
            raise UnsupportedError(
                f"Expected a data set whose contents are known where features are kept in a "
                f"folder, got {type(dataset).__name__}: others of its length would be given its "
                "features. Leave folder out, or let its attribute _fingerprint name what it holds."
            )
        self.key = _key(found, network)
        self._path = None if folder is None else Path(folder) / f"{self.key}.pt"
        if self._path is not None and self._path.exists():
            self._take(load_state(self._path, kind=_KIND))
            self._require_own(dataset, network, rows=size)
        else:
            pairs = _computed(dataset, network, batch_size=size, progress=progress)
            self.features, self.targets = pairs
            self.erased = np.zeros(len(dataset), dtype=np.bool_)
            self._sums = _row_sums(self.features, self.targets)
            self._save()

    def __len__(self) -> int:
        """Return the number of rows, erased ones included: rows keep their places."""
        return len(self.features)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features and the target of a row."""
        return self.features[row], self.targets[row]

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the pairs of several rows in their order: what torch's loaders ask for batches."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return list(zip(self.features[index].unbind(), self.targets[index].unbind(), strict=True))

    @property
    def width(self) -> int:
        """Number of features."""
        return int(self.features.shape[1])

    @property
    def _fingerprint(self) -> str:
        """What a ledger knows these rows by: the same before and after some of them are erased."""
        kept = ~self.erased
        same = (_row_sums(self.features, self.targets)[kept] == self._sums[kept]).all()
        same &= not bool(self.features[torch.as_tensor(self.erased)].any())
        name = hashlib.sha256(self._sums.tobytes()).hexdigest()
        return f"{self.key} {name}" if same else f"{self.key} written to"

    def erase(self, rows: npt.ArrayLike) -> None:
        """Overwrite what is kept of some rows with zeros, in memory and in the file.

        An unlearning engine calls it for the instances that it has forgotten. Copies of the file
        elsewhere, and the original data, are the caller's.

        Args:
            rows: Rows of the data set, each once.

        Raises:
            TypeError, ValueError: Rows that are not there. Nothing is changed.
        """
        gone = check.index_array("rows", rows, size=len(self))
        if not len(gone):
            return
        kept = self.erased
        if self._path is not None and self._path.exists():  # another process may have erased some
            kept = load_state(self._path, kind=_KIND)["erased"].numpy()
            gone = np.union1d(gone, np.flatnonzero(kept))
        if bool(kept[gone].all()) and bool(self.erased[gone].all()):
            return
        self.features[torch.as_tensor(gone)] = 0
        self.targets[torch.as_tensor(gone)] = 0
        self.erased[gone] = True
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        kept = {
            "features": self.features, "targets": self.targets, "key": self.key,
            "erased": torch.as_tensor(self.erased),
            "sums": torch.as_tensor(self._sums.view(np.int64)),
        }  # fmt: skip
        save_state(self._path, kept, kind=_KIND)

    def _take(self, kept: dict[str, Any]) -> None:
        if kept.get("key") != self.key:
            raise LedgerError(
                f"Expected {self._path} to hold the features of this network and data set, got "
                "those of others. It was renamed; remove it."
            )
        self.features, self.targets = kept["features"], kept["targets"]
        self.erased = kept["erased"].numpy()
        self._sums = kept["sums"].numpy().view(np.uint64)

    def _require_own(self, dataset: Any, network: nn.Module, *, rows: int) -> None:
        """Raise if what was read is not what the network makes of the first rows now.

        A setting that is neither a weight nor printed is not in the key.
        """
        first = np.flatnonzero(~self.erased)[:rows]
        if not len(first):
            return
        found, _ = _computed(
            Subset(dataset, first.tolist()), network, batch_size=rows, progress=False
        )
        kept = self.features[torch.as_tensor(first)]
        if kept.shape != found.shape or not torch.allclose(kept, found, rtol=_SAME, atol=_SAME):
            raise LedgerError(
                f"Expected {self._path} to hold the features that this network gives, got others. "
                "It was computed by other settings of the same layers; remove it."
            )


def _key(found: Fingerprint, network: nn.Module) -> str:
    text = f"{model_hash(network)} {network!r} {found.sha256} {found.how} {found.length}"
    return hashlib.sha256(text.encode()).hexdigest()


def _computed(
    dataset: Any, network: nn.Module, *, batch_size: int, progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size)
    features, targets = [], []
    with untouched_generators(device), torch.no_grad():
        for inputs, target in tqdm(loader, desc="features", disable=None if progress else True):
            features.append(_rows_of(network(inputs.to(device)), rows=len(inputs)))
            targets.append(target)
        _require_fixed(dataset, network, features[0], device=device, rows=batch_size)
    return torch.cat(features), torch.cat(targets)


def _rows_of(found: torch.Tensor, *, rows: int) -> torch.Tensor:
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != rows:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(
            f"Expected features of shape (batch, features) for {rows} rows, got {shape}. Let the "
            "frozen part end with Flatten, or with BoundedFeatures."
        )
    return found.detach().cpu().contiguous()


def _require_fixed(
    dataset: Any, network: nn.Module, first: torch.Tensor, *, device: torch.device, rows: int
) -> None:
    """Raise where the same rows have other features when they are asked for again."""
    again: Iterator[Any] = iter(
        DataLoader(Subset(dataset, range(min(rows, len(dataset)))), batch_size=rows)
    )
    inputs, _ = next(again)
    if not torch.equal(network(inputs.to(device)).detach().cpu(), first):
        raise UnsupportedError(
            "Expected a frozen part that gives the same features again, got others: it, or the "
            "data set, is random. Leave augmentation out; features are a fixed function of a row."
        )


def _row_sums(features: torch.Tensor, targets: torch.Tensor) -> npt.NDArray[np.uint64]:
    """Return a number per row that tells whether somebody wrote to it."""
    together = np.concatenate([_bytes(features), _bytes(targets)], axis=1)
    weights = np.random.default_rng(1).integers(1, 2**63, together.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):
        return (together.astype(np.uint64) * (weights | 1)).sum(axis=1, dtype=np.uint64)


def _bytes(values: torch.Tensor) -> npt.NDArray[np.uint8]:
    rows = np.ascontiguousarray(values.detach().cpu().numpy()).reshape(len(values), -1)
    return rows.view(np.uint8).reshape(len(rows), -1)
