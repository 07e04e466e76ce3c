"""Where the one large array of the accountant lives: in memory, or in a file mapped into it.

Knows arrays and folders; not what the numbers mean.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

from .._validate import FloatArray


def zeros(shape: tuple[int, int], *, folder: str | os.PathLike[str] | None) -> FloatArray:
    """Return an array of zeros, in a file without a name in `folder` unless that is None.

    The file is never visible: it is made for this user only (mode 0600), has no name, and its
    space comes back when the array or the process ends, however it ends. Its blocks are reserved
    at once, so that a full disk is an error here and not a crash in the middle of a run.

    Raises:
        OSError: The folder is missing, not writable or too full.
    """
    size = shape[0] * shape[1] * np.dtype(np.float64).itemsize
    if folder is None or size == 0:  # an empty file cannot be mapped
        return np.zeros(shape)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            os.ftruncate(file.fileno(), size)
        buffer = mmap.mmap(file.fileno(), size)  # outlives the file object
    return np.frombuffer(buffer, dtype=np.float64).reshape(shape)


def placed(values: FloatArray, *, folder: str | os.PathLike[str] | None) -> FloatArray:
    """Return `values` as they are, or copied into a file as `zeros` makes it."""
    if folder is None:
        return values
    made = zeros(values.shape, folder=folder)
    made[...] = values
    return made
