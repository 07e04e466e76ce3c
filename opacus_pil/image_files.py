"""CIFAR-10 and SVHN as their authors publish them, read from a folder that the user names.

Knows file names and byte layouts; gives pixels and labels. Knows no tensors and no network: nothing
is downloaded. Nothing is unpickled either, which is why the "python version" of CIFAR-10 is not
read: its files are pickles, and loading a pickle runs whatever its maker wrote into it. SVHN's
MATLAB files are read by scipy, which notices one that was cut, but is not made for hostile ones.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from . import _validate as check

Pixels = npt.NDArray[np.uint8]  # (n, channels, height, width)
Labels = npt.NDArray[np.int64]  # (n,)

PARTS = ("train", "test")
_SIDE, _CHANNELS, _CLASSES = 32, 3, 10
_IMAGE_BYTES = _CHANNELS * _SIDE * _SIDE
_CIFAR_FOLDER, _CIFAR_PICKLES = "cifar-10-batches-bin", "cifar-10-batches-py"
_CIFAR_FILES = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
_CIFAR_CURE = (
    "Unpack cifar-10-binary.tar.gz, the binary version from www.cs.toronto.edu/~kriz/cifar.html, "
    f"there: it holds {_CIFAR_FOLDER}/data_batch_1.bin to data_batch_5.bin and test_batch.bin."
)
_SVHN_FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
# What scipy raises at bytes that are no MATLAB 5 file, or one that was cut; 7.3 is HDF5.
_BROKEN = (
    MatReadError, ValueError, TypeError, LookupError, NotImplementedError, EOFError, OSError,
    zlib.error,
)  # fmt: skip
_SVHN_CURE = (
    "Put train_32x32.mat and test_32x32.mat there, format 2 (cropped digits) from "
    "ufldl.stanford.edu/housenumbers."
)


def read_cifar10(folder: str | os.PathLike[str], *, part: str) -> tuple[Pixels, Labels]:
    """Return CIFAR-10's images and labels from the files of its binary version.

    Args:
        folder: Where the archive was unpacked, or the folder of the .bin files itself.
        part: "train" (data_batch_1.bin to data_batch_5.bin, in this order) or "test".

    Returns:
        Pixels (n, 3, 32, 32), red, green, blue, row by row; labels (n,), 0 to 9.

    Raises:
        FileNotFoundError: A file is missing; the message says which, and where it comes from.
        ValueError: A file that is not whole records of 1 + 3,072 bytes, or a label above 9 (names
            file and row).

    Source: Krizhevsky (2009), "Learning multiple layers of features from tiny images"; layout:
        www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    root = Path(folder)
    if (root / _CIFAR_FOLDER).is_dir():
        root = root / _CIFAR_FOLDER
    paths = [root / name for name in _CIFAR_FILES[check.choice("part", part, PARTS)]]
    cure = _CIFAR_CURE
    if (root / _CIFAR_PICKLES).is_dir() or root.name == _CIFAR_PICKLES:
        cure = f"The files of {_CIFAR_PICKLES} are pickles, which are not read. {cure}"
    records = [_records(path, cure) for path in paths]
    labels = np.concatenate([rows[:, 0] for rows in records]).astype(np.int64)
    pixels = np.concatenate([rows[:, 1:] for rows in records])
    return pixels.reshape(-1, _CHANNELS, _SIDE, _SIDE), labels


def _records(path: Path, cure: str) -> Pixels:
    """Return one file of CIFAR-10 as rows of a label and an image."""
    _exists(path, cure)
    size = path.stat().st_size
    if size == 0 or size % (1 + _IMAGE_BYTES):
        raise ValueError(
            f"Expected {path} to hold records of {1 + _IMAGE_BYTES} bytes (a label and an image), "
            f"got {size} bytes. Unpack it again."
        )
    rows = np.fromfile(path, dtype=np.uint8).reshape(-1, 1 + _IMAGE_BYTES)
    _in_range(rows[:, 0], path, low=0, high=_CLASSES - 1)
    return rows


def read_svhn(folder: str | os.PathLike[str], *, part: str) -> tuple[Pixels, Labels]:
    """Return SVHN's cropped digits (format 2) and labels from its MATLAB files.

    Args:
        folder: That of train_32x32.mat and test_32x32.mat.
        part: "train" or "test".

    Returns:
        Pixels (n, 3, 32, 32), red, green, blue, row by row; labels (n,), 0 to 9: the files call
        the digit 0 ten.

    Raises:
        FileNotFoundError: A file is missing; the message says which, and where it comes from.
        ValueError: A file that scipy cannot read, without X (32, 32, 3, n) and y (n, 1), or with a
            label outside 1 to 10 (names the row).

    Source: Netzer et al. (2011), "Reading digits in natural images with unsupervised feature
        learning"; layout: ufldl.stanford.edu/housenumbers, "Format 2".
    """
    path = Path(folder) / _SVHN_FILES[check.choice("part", part, PARTS)]
    _exists(path, _SVHN_CURE)
    found = _matlab(path)
    images, digits = (np.asarray(found.get(name, ())) for name in ("X", "y"))
    count = digits.size
    right = images.dtype == np.uint8 and images.shape == (_SIDE, _SIDE, _CHANNELS, count)
    if not right or digits.shape != (count, 1) or digits.dtype.kind not in "uif" or not count:
        raise ValueError(
            f"Expected {path} to hold X of shape (32, 32, 3, n), uint8, and y of shape (n, 1), got "
            f"X {images.shape} {images.dtype} and y {digits.shape}. {_SVHN_CURE}"
        )
    _in_range(digits[:, 0], path, low=1, high=_CLASSES)
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), digits[:, 0].astype(np.int64) % 10


def _matlab(path: Path) -> dict[str, Any]:
    """Return the two arrays of a MATLAB file; what scipy makes of a broken one is an error."""
    try:
        return dict(loadmat(path, appendmat=False, variable_names=["X", "y"]))
    except _BROKEN as error:
        raise ValueError(
            f"Expected {path} to be a MATLAB 5 file, got one that scipy cannot read: {error}. "
            f"{_SVHN_CURE}"
        ) from error


def _exists(path: Path, cure: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path} to exist, got no such file. {cure}")


def _in_range(labels: npt.NDArray[Any], path: Path, *, low: int, high: int) -> None:
    bad = (labels < low) | (labels > high) | (labels != np.floor(labels))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"Expected the labels of {path} in [{low}, {high}], got {int(bad.sum())} of "
            f"{len(labels)} outside (first: row {first}, label {labels[first]}). Is this the "
            "original file?"
        )
