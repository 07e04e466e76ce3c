"""Retrain sweeps: many independent trainings, each kept in a folder named by what it computes.

A killed sweep goes on where it was: finished trials are read, damaged ones are computed again.
Knows configurations, files and processes; not what a trial trains, and nothing about privacy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from tqdm import tqdm

from .. import __version__
from .. import _validate as check
from .._validate import IntArray
from ..errors import LedgerError
from ..files.container import load_state, save_state

Trial = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_RESULT = "result.pt"
_KIND = "trial"


@dataclass(frozen=True)
class Oracle:
    """A model retrained without a forget set.

    Attributes:
        seed: What it was trained with.
        weights: Its state_dict.
        metrics: What `measure` returned for it.
    """

    seed: int
    weights: Mapping[str, torch.Tensor]
    metrics: Mapping[str, Any]


def trial_key(config: Mapping[str, Any], *, fingerprint: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a trial computes: its settings, its data, the software.

    Args:
        config: The trial's settings: seed, forget set and all else it depends on. Plain types and
            arrays of them.
        fingerprint: What all trials of a sweep share, such as `dataset_fingerprint(dataset)`.

    Returns:
        64 hexadecimal digits; the order of keys does not matter. Versions of this package and of
        torch are part of it: another version may train to other bits.

    Raises:
        ValueError: NaN or infinite numbers, which JSON does not have.
        TypeError: A value that is not a plain type.
    """
    versions = {"opacus_pil": __version__, "torch": torch.__version__}
    return hashlib.sha256(_canonical([config, fingerprint, versions]).encode()).hexdigest()


def run_trials(
    trial: Trial,
    *,
    configs: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    fingerprint: Mapping[str, Any] | None = None,
    n_jobs: int = 1,
    progress: bool = True,
    description: str = "trials",
) -> list[dict[str, Any]]:
    """Compute each configuration once, on as many processes as asked for, and keep the results.

    Every trial starts with torch's global generator seeded from its key and with one thread, so
    that its result depends neither on the order nor on `n_jobs` nor on what ran before.

    Args:
        trial: trial(config) -> tensors and plain types in dicts, lists and tuples. With `n_jobs`
            above 1 it travels to other processes (cloudpickle: closures are allowed).
        configs: One per trial, as in `trial_key`. Equal ones share a trial.
        folder: Made if missing, mode 0700. Each trial is `folder/<key>/result.pt`, mode 0600, whole
            or absent. Two sweeps may share a folder: they repeat work at worst.
        fingerprint: As in `trial_key`. The function's code is not part of the key: put a number in
            here that changes with it.
        n_jobs: Processes, >= 1; -1 for one per core. Above 1 takes joblib. Workers of a killed
            sweep finish the trials they hold and leave when idle for some minutes.
        progress: Show a progress bar when the output is a terminal.
        description: In front of the bar.

    Returns:
        One result per configuration, in their order, as read back from the files.

    Raises:
        ValueError: `n_jobs` is 0, or a config that has no canonical form.
        ImportError: joblib is missing and `n_jobs` is not 1.
        Exception: What a trial raised, with its key as a note; finished trials stay.

    Privacy: configs name forget sets and results depend on private data.
    """
    jobs = check.integer("n_jobs", n_jobs, low=-1)
    if jobs == 0:
        raise ValueError(check.expected("n_jobs", "to be >= 1, or -1", n_jobs))
    shared = dict(fingerprint or {})
    keys = [trial_key(config, fingerprint=shared) for config in configs]
    root = Path(folder)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    open_: dict[str, Mapping[str, Any]] = {}
    for key, config in zip(keys, configs, strict=True):
        if key in results or key in open_:
            continue
        found = _finished(root / key, config)
        if found is None:
            open_[key] = config
        else:
            _sweep_leftovers(root / key)
            results[key] = found
    quiet = None if progress else True
    total, done = len(results) + len(open_), len(results)
    with tqdm(total=total, initial=done, desc=description, disable=quiet) as bar:
        for key in _computed(trial, open_, root, jobs):
            found = _finished(root / key, open_[key])
            if found is None:
                raise LedgerError(
                    f"Expected {root / key / _RESULT} to be whole just after it was written, got a "
                    "damaged file. Is another program changing the folder?"
                )
            results[key] = found
            bar.update()
    return [results[key] for key in keys]


def read_trial(folder: str | os.PathLike[str], key: str) -> dict[str, Any]:
    """Return a finished trial's result by its key, for trials that go on from one.

    Raises:
        FileNotFoundError: It has not been computed.
        LedgerError: Its file is damaged.
    """
    result: dict[str, Any] = load_state(Path(folder) / key / _RESULT, kind=_KIND)["result"]
    return result


def retrained_ensemble(
    train: Callable[[IntArray, int], nn.Module],
    *,
    num_instances: int,
    forget_set: npt.ArrayLike,
    seeds: Sequence[int],
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    fingerprint: Mapping[str, Any] | None = None,
    measure: Callable[[nn.Module], Mapping[str, Any]] | None = None,
    n_jobs: int = 1,
    progress: bool = True,
) -> list[Oracle]:
    """Retrain from scratch without the forget set, once per seed; resumable, in parallel.

    Args:
        train: train(retained rows, seed) -> trained module.
        num_instances: Size of the training set.
        forget_set: Rows to leave out, shape (members,).
        seeds: One per oracle, each once; three or more say something about the spread.
        folder, n_jobs, progress: As in `run_trials`.
        config: Everything else that `train` depends on: model, epochs, step size, noise.
        fingerprint: Of the data set, as in `run_trials`.
        measure: Called on each trained module; plain types, kept with the weights.

    Returns:
        One Oracle per seed.

    Raises:
        ValueError: No seed or a repeated one, rows out of range, repeated, none or all of them.

    Privacy: oracles see all private data but the forget set; their files are private.
    """
    size = check.integer("num_instances", num_instances, low=1)
    rows = np.sort(check.index_array("forget_set", forget_set, size=size))
    retain = np.setdiff1d(np.arange(size), rows)
    numbers = [check.integer("seeds", seed, low=0) for seed in seeds]
    if not len(rows) or not len(retain) or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"Expected rows to leave out, rows to train on and seeds that differ, got {len(rows)} "
            f"to leave out of {size} and seeds {numbers}."
        )
    found = run_trials(
        partial(_retrain, train, measure),
        configs=[
            {**config, "forget_set": rows, "num_instances": size, "seed": seed} for seed in numbers
        ],
        folder=folder,
        fingerprint=fingerprint,
        n_jobs=n_jobs,
        progress=progress,
        description="retraining",
    )
    return [Oracle(s, r["weights"], r["metrics"]) for s, r in zip(numbers, found, strict=True)]


def _retrain(
    train: Callable[[IntArray, int], nn.Module],
    measure: Callable[[nn.Module], Mapping[str, Any]] | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Train one oracle; a trial."""
    retain = np.setdiff1d(np.arange(config["num_instances"]), config["forget_set"])
    module = train(retain, config["seed"])
    metrics = {} if measure is None else dict(measure(module))
    return {"weights": module.state_dict(), "metrics": metrics}


def _canonical(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, arrays as lists."""

    def plain(thing: Any) -> Any:
        if isinstance(thing, np.ndarray | np.generic):
            return thing.tolist()
        if isinstance(thing, Mapping):  # a Fingerprint
            return dict(thing)
        raise TypeError(
            f"Expected configs of plain types and arrays, got {type(thing).__name__}. "
            "Describe it by numbers and strings."
        )

    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=plain)


def _finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a trial's result, or None where it is missing, damaged or another trial's."""
    try:
        state = load_state(folder / _RESULT, kind=_KIND)
    except (FileNotFoundError, LedgerError):
        return None
    return state["result"] if state["config"] == _canonical(config) else None


def _computed(
    trial: Trial, configs: Mapping[str, Mapping[str, Any]], root: Path, jobs: int
) -> Iterator[str]:
    """Compute trials and yield the key of each one when its file is there."""
    if jobs == 1 or len(configs) <= 1:
        for key, config in configs.items():
            yield _compute(trial, key, config, root)
        return
    try:
        from joblib import Parallel, delayed
    except ImportError as error:
        raise ImportError(
            'Expected joblib for n_jobs > 1, got none. Run pip install "opacus-pil[demo]", or pass '
            "n_jobs=1."
        ) from error
    workers = Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered", batch_size=1)
    yield from workers(delayed(_compute)(trial, k, config, root) for k, config in configs.items())


def _compute(trial: Trial, key: str, config: Mapping[str, Any], root: Path) -> str:
    """Compute one trial and put its file in place; runs in a worker or here."""
    with _own_randomness(int(key[:15], 16)):
        try:
            result = trial(config)
        except Exception as error:
            error.add_note(f"in trial {key}")
            raise
    folder = root / key
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / _RESULT
    state = {"config": _canonical(config), "result": dict(result)}
    try:
        save_state(target, state, kind=_KIND)
    except FileNotFoundError:
        # Another sweep finished the same trial just now and swept our unfinished file away.
        if not target.exists():
            raise
    _sweep_leftovers(folder)
    return key


def _sweep_leftovers(folder: Path) -> None:
    """Remove the unfinished files of writers that were killed, of a trial whose result is there.

    One may be killed between its result and this: whoever finds the result sweeps once more.
    """
    for leftover in folder.glob(f".{_RESULT}.*"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """One thread and a global generator that the trial's key alone decides; both given back."""
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.random.set_rng_state(state)
