"""A file that is whole or absent: written beside the target, synced, then renamed over it.

Knows files only; not what the bytes mean.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, private: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` when the block ends well; readers never see a part of it.

    Args:
        path: Target; its folder must exist.
        private: Create with mode 0600 (per-instance values); else 0644.

    Raises:
        FileNotFoundError: The folder is missing.
        OSError: It is not writable; no temporary file is left behind.
    """
    require_folder(path)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o600 if private else 0o644)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:  # the rename itself must survive a power cut
        os.fsync(folder)
    finally:
        os.close(folder)


def require_folder(path: str | os.PathLike[str]) -> None:
    """Raise unless the folder is there that a file is to be written into.

    Raises:
        FileNotFoundError: It is not.
        NotADirectoryError: It is a file.
    """
    folder = Path(path).parent
    if not folder.exists():
        raise FileNotFoundError(f"Expected the folder {folder} to exist, got none. Make it first.")
    if not folder.is_dir():
        raise NotADirectoryError(f"Expected {folder} to be a folder, got a file. Choose another.")
