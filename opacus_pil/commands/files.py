"""What the commands share about files: where results may go, and whose modules may be imported.

Knows paths; what is written, and what a user's code does, is others' business.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path

from ..atomic_file import require_folder
from ..errors import OpacusPilError


def new_file(path: str | os.PathLike[str], *, force: bool) -> Path:
    """Return where a file may be written, before anything is computed for it.

    Raises:
        OpacusPilError: There is one already, and nobody said to overwrite it.
        OSError: Its folder is missing.
    """
    require_folder(path)
    target = Path(path)
    if target.is_dir():
        raise OpacusPilError(f"Expected {target} to be a file, got a folder. Name a file in it.")
    if target.exists() and not force:
        raise OpacusPilError(
            f"Expected {target} not to exist, got a file. Pass --force to overwrite it."
        )
    return target


def new_folder(path: str | os.PathLike[str]) -> Path:
    """Return where results may be put together; the folder need not be there yet.

    Raises:
        OpacusPilError: There is a file.
    """
    target = Path(path)
    there = next(one for one in (target, *target.parents) if one.exists())
    if not there.is_dir():
        raise OpacusPilError(f"Expected {there} to be a folder, got a file. Choose another.")
    return target


def beside(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Let the code of a command's ENGINE import what lies beside it, for as long as it runs."""

    @functools.wraps(run)
    def command(arguments: argparse.Namespace) -> int:
        from ..replaying.described_run import importable  # needs torch

        with importable(Path.cwd()):
            return run(arguments)

    return command
