"""Who serves: at most one process at a time, known to be dead the moment it is dead.

The lock is the kernel's (`flock` on an open file), not a note in a table with a time to live. A
process that ends in any way, kill -9 and a crash of the interpreter included, has its files closed
by the kernel, and the lock with them: no waiting for a lease to run out, no guessing from a process
id that may have been given to somebody else, and a process that is merely slow is never robbed.
It holds on one machine, as SQLite's write-ahead log does: the folder must lie on a local disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import LedgerError
from .database import readable

_HELD: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


@contextlib.contextmanager
def serving_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of the file at `path`, which is made if there is none.

    Args:
        path: Lock file; it stays behind, empty.
        wait: Wait for whoever holds the lock; else raise.

    Raises:
        LedgerError: Somebody else holds it and `wait` is False; or no permission.
    """
    try:
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "r+b")
    except OSError as error:
        raise readable(error, path) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise LedgerError(
                f"Expected nobody else to serve the requests in {path.parent}, got a process that "
                "does. Let it finish: it also serves what is submitted meanwhile. Or pass "
                "wait=True."
            ) from error
        _HELD.add(file)
        try:
            yield
        finally:
            _HELD.discard(file)


def _release_in_child() -> None:
    """Close what a forked child (a loader's worker) got: it must not outlive the server's death."""
    for file in list(_HELD):
        _HELD.discard(file)
        file.close()


os.register_at_fork(after_in_child=_release_in_child)
