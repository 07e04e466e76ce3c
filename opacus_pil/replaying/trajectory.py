"""Trajectory: the checkpoints of one run in the order of its steps, and what they say of it.

Knows where checkpoints are and how many steps came before each; holds no weights, so that a run of
any length fits into memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _validate as check
from .saved_weights import Run, SavedWeights, Source, read_weights

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Place:
    """One checkpoint of a run.

    Attributes:
        at: Noisy steps made before it was saved: the next step starts from these weights.
        source: Where it is.
        name: For messages.
        sha256: Of its weights.
    """

    at: int
    source: Source
    name: str
    sha256: str

    def read(self) -> SavedWeights:
        """Read the weights."""
        return read_weights(self.source, name=self.name)


@dataclass(frozen=True)
class Trajectory:
    """One run.

    Attributes:
        places: Ascending in `at`.
        history: What the accountant of the latest checkpoint that has one counted; None: none has.
    """

    places: tuple[Place, ...]
    history: tuple[Run, ...] | None

    def before_step(self, step: int) -> Place | None:
        """Return the checkpoint that a step (from 0) starts from, if there is one."""
        return next((place for place in self.places if place.at == step), None)


def trajectories(checkpoints: Any, *, steps: int | None) -> tuple[Trajectory, ...]:
    """Return the runs that a caller's `checkpoints` describe.

    Args:
        checkpoints: One run: a folder, a checkpoint, a list of checkpoints, or {steps made:
            checkpoint}. Several runs: a list of folders, lists or such mappings.
        steps: Noisy steps of each run; None: as the checkpoints say.

    Raises:
        ValueError: No checkpoint, one whose number of steps nobody says, two at one step, one after
            the end; or two runs that share weights: the same run twice.
    """
    if _many_runs(checkpoints):
        runs = tuple(
            _one(run, steps=steps, which=f"run {i}: ") for i, run in enumerate(checkpoints)
        )
        _require_different(runs)
        return runs
    return (_one(checkpoints, steps=steps, which=""),)


def _many_runs(checkpoints: Any) -> bool:
    if isinstance(checkpoints, Mapping) or not isinstance(checkpoints, Sequence):
        return False
    if isinstance(checkpoints, str) or not checkpoints:
        return False
    return all(_is_run(entry) for entry in checkpoints)


def _is_run(entry: Any) -> bool:
    """Whether an entry is several checkpoints: a list, {steps: checkpoint}, a folder."""
    if isinstance(entry, str | os.PathLike):
        return Path(entry).is_dir()
    if isinstance(entry, Mapping):
        return bool(entry) and all(isinstance(key, int) for key in entry)
    return isinstance(entry, list | tuple)


def _one(checkpoints: Any, *, steps: int | None, which: str) -> Trajectory:
    found: list[tuple[int | None, SavedWeights, Source]] = []
    for at, source, name in _listed(checkpoints):
        saved = read_weights(source, name=f"{which}{name}")
        found.append((at, saved, source))
    if not found:
        raise ValueError(f"Expected {which}at least one checkpoint, got none. Pass files of a run.")
    places = []
    for at, saved, source in found:
        made = _steps_made(at, saved, steps=steps, alone=len(found) == 1)
        places.append(Place(made, source, saved.name, saved.sha256))
    places.sort(key=lambda place: place.at)
    for early, late in itertools.pairwise(places):
        if early.at == late.at:
            raise ValueError(
                f"Expected one checkpoint at each step, got {early.name} and {late.name} both "
                f"after {early.at} steps. Pass each once, and of several runs a list of lists."
            )
    histories = [saved.history for _, saved, _ in found if saved.history is not None]
    history = max(histories, key=lambda runs: sum(run[2] for run in runs), default=None)
    return Trajectory(tuple(places), history)


def _listed(checkpoints: Any) -> Iterable[tuple[int | None, Source, str]]:
    """Yield (steps made or None, source, name)."""
    if isinstance(checkpoints, Mapping) and checkpoints and _is_run(checkpoints):
        for at, source in checkpoints.items():
            made = check.integer("steps of a checkpoint", at, low=0)
            yield made, source, f"the checkpoint after {made} steps"
        return
    if isinstance(checkpoints, str | os.PathLike) and Path(checkpoints).is_dir():
        folder = Path(checkpoints)
        for file in sorted(folder.iterdir()):
            if file.suffix in _SUFFIXES:
                yield None, file, str(file)
        return
    if isinstance(checkpoints, list | tuple):
        for number, source in enumerate(checkpoints):
            yield None, source, f"checkpoint {number}"
        return
    yield None, checkpoints, "the checkpoint"


def _steps_made(at: int | None, saved: SavedWeights, *, steps: int | None, alone: bool) -> int:
    """Return how many steps came before a checkpoint."""
    if at is not None and saved.steps is not None and at != saved.steps:
        raise ValueError(
            f"Expected {saved.name} to have been saved after {at} steps, got {saved.steps} by its "
            "own accountant. Pass the right number, or a list in place of a mapping."
        )
    made = at if at is not None else saved.steps
    if made is None and alone:
        made = steps  # one checkpoint alone is where training ended
    if made is None:
        raise ValueError(
            f"Expected to know after how many steps {saved.name} was saved, got a file that does "
            "not say. Pass {steps made: checkpoint}, or checkpoints that Opacus's engine saved."
        )
    if steps is not None and made > steps:
        raise ValueError(
            f"Expected {saved.name} to be of a run of {steps} steps, got {made} steps before it. "
            "Pass the steps that were made."
        )
    return made


def _require_different(runs: Sequence[Trajectory]) -> None:
    """Raise where two runs share weights that training has moved: they are one run."""
    seen: dict[str, tuple[int, Place]] = {}
    for number, run in enumerate(runs):
        for place in run.places:
            if place.at == 0:
                continue  # runs may well start from the same weights
            other, first = seen.setdefault(place.sha256, (number, place))
            if other != number:
                raise ValueError(
                    f"Expected independent runs, got the same weights in run {other} ({first.name})"
                    f" and run {number} ({place.name}): the same run twice, or one that went on "
                    "from the other. Train again with other coins."
                )
