"""Where a training stands: generators, the rest of the pass, and what Opacus's optimizer holds.

Every `checked_…` compares a saved part with the training it meets, changes nothing, and returns
the function that takes the part over. Knows no ledger and no file.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer

from ..capture.indices import RecordingSampler
from ..capture.passes import Remainder
from ..capture.plain_step import held
from ..capture.shards import RecordingShardSampler
from ..errors import LedgerError

Apply = Callable[[], None]


def both(*parts: Apply) -> Apply:
    """Return a function that calls all parts."""

    def apply() -> None:
        for part in parts:
            part()

    return apply


# --- generators -----------------------------------------------------------------------------------


def global_generators() -> dict[str, Any]:
    """Return the states of the generators that every part of a process shares."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 the one that users seed
        "python": random.getstate(),
    }


def checked_global_generators(saved: Mapping[str, Any]) -> Apply:
    """Check saved states of the global generators.

    Raises:
        LedgerError: Fewer CUDA devices than states.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(saved["cuda"]) > devices:
        raise LedgerError(
            f"Expected {len(saved['cuda'])} CUDA devices, as when the file was saved, got "
            f"{devices}. The noise cannot go on there. Load without optimizer for weights and "
            "ledgers only, and seed afresh: a seed used twice is the same noise twice."
        )
    numpy_state = dict(saved["numpy"])
    numpy_state["state"] = {
        key: value.cpu().numpy() if isinstance(value, torch.Tensor) else value
        for key, value in numpy_state["state"].items()
    }

    def apply() -> None:
        torch.set_rng_state(saved["torch"].cpu())
        for device, state in enumerate(saved["cuda"]):
            torch.cuda.set_rng_state(state.cpu(), device)
        np.random.set_state(numpy_state)  # noqa: NPY002 as above
        random.setstate(saved["python"])

    return apply


def own_generators(optimizer: DPOptimizer, loader: Any, *, secure: Any) -> dict[str, Any]:
    """Return the generators this training was given, by what they are for.

    Args:
        loader: The recording loader, or None.
        secure: Opacus's secure generator, which nobody can rewind; left out.
    """
    found = {"noise": optimizer.generator}
    if loader is not None:
        batches = getattr(loader.batch_sampler, "batches", loader.batch_sampler)
        found["loader"] = loader.generator
        found["batches"] = getattr(batches, "generator", None)
        found["rows"] = getattr(getattr(batches, "sampler", None), "generator", None)
    return {use: g for use, g in found.items() if g is not None and g is not secure}


def generator_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Return each generator's state once, and which uses share it."""
    states = [generator.get_state() for generator in _distinct(generators)]
    return {"uses": _sharing(generators), "states": states}


def checked_generators(
    saved: Mapping[str, Any], generators: Mapping[str, torch.Generator]
) -> Apply:
    """Check saved states against the generators of this training.

    Raises:
        LedgerError: Other generators were given to make_private, or shared in another way.
    """
    if _sharing(generators) != saved["uses"]:
        raise LedgerError(
            f"Expected generators for {saved['uses']} (use: number of the generator), as in the "
            f"file, got {_sharing(generators)}. Pass noise_generator and the loader's generator as "
            "in the interrupted training."
        )
    distinct = _distinct(generators)
    try:
        for generator, state in zip(distinct, saved["states"], strict=True):
            torch.Generator(device=generator.device).set_state(state.cpu())
    except RuntimeError as error:
        raise LedgerError(
            f"Expected states of generators like this training's, got others ({error}). Use "
            "generators on the same kind of device."
        ) from error

    def apply() -> None:
        for generator, state in zip(distinct, saved["states"], strict=True):
            generator.set_state(state.cpu())

    return apply


def _distinct(generators: Mapping[str, torch.Generator]) -> list[torch.Generator]:
    return list({id(generator): generator for generator in generators.values()}.values())


def _sharing(generators: Mapping[str, torch.Generator]) -> dict[str, int]:
    numbers = {id(generator): n for n, generator in enumerate(_distinct(generators))}
    return {use: numbers[id(generator)] for use, generator in generators.items()}


# --- the rest of the pass -------------------------------------------------------------------------


def pass_state(loader: Any) -> dict[str, Any] | None:
    """Return what the loader draws from, and what is left of its pass; None: no loader of ours.

    Raises:
        UnsupportedError: It is not known how many batches were used.
    """
    if loader is None:
        return None
    left = loader.batch_sampler.remainder()
    state = {
        "drawn_from": _drawn_from(loader.batch_sampler),
        "left": None,
        "empty_batch": _empty_batch(loader),
    }
    if left is not None:
        state["left"] = {
            "rows": np.array([row for rows in left.waiting for row in rows], dtype=np.int64),
            "lengths": np.array([len(rows) for rows in left.waiting], dtype=np.int64),
            "draws": left.draws,
        }
    return state


def checked_pass(saved: Mapping[str, Any] | None, loader: Any) -> Apply:
    """Check what is left of a saved pass against this training's loader.

    Raises:
        LedgerError: A loader that draws other batches.
    """
    if (saved is None) != (loader is None):
        raise LedgerError(
            "Expected a private loader in both trainings or in neither, got one. Make the training "
            "private as the interrupted one was."
        )
    if saved is None:
        return both()
    here = _drawn_from(loader.batch_sampler)
    other = [
        name
        for name, value in saved["drawn_from"].items()
        if not np.array_equal(np.asarray(value), np.asarray(here.get(name)))
    ]
    if other or set(saved["drawn_from"]) != set(here):
        raise LedgerError(
            f"Expected a loader that draws as the file's, got another "
            f"{', '.join(other) or 'sampler'}. Use the same data set and batch size; in a "
            "distributed training each rank reads the file that it wrote."
        )
    left = saved["left"]
    if left is None:
        remainder = None
    else:
        ends = np.cumsum(np.asarray(left["lengths"]))
        waiting = [rows.tolist() for rows in np.split(np.asarray(left["rows"]), ends)[:-1]]
        remainder = Remainder(waiting, int(left["draws"]))
    empty = saved.get("empty_batch")

    def apply() -> None:
        loader.batch_sampler.resume(remainder)
        if empty is not None and loader.collate_fn.first_batch is None:
            loader.collate_fn.first_batch = empty

    return apply


def _empty_batch(loader: Any) -> Any:
    """Return what Opacus's collation has learnt of the shape of a batch, without any row of it.

    An empty draw is made after it. None: nothing learnt yet, or learnt in workers, which forget.
    """
    learnt = getattr(loader.collate_fn, "first_batch", None)
    if learnt is None:
        return None
    collate = copy.copy(loader.collate_fn)
    collate.rand_on_empty = False
    return collate._make_empty_batch(learnt)


def _drawn_from(sampler: Any) -> dict[str, Any]:
    if not isinstance(sampler, RecordingSampler | RecordingShardSampler):
        return {"batches": len(sampler)}
    rows = sampler.population
    return {
        "batches": len(sampler),
        "num_samples": sampler.num_samples,
        "sample_rate": float(sampler.sample_rate),
        "population": np.empty(0, dtype=np.int64) if rows is None else rows,
    }


# --- Opacus's optimizer ---------------------------------------------------------------------------


def private_attributes(optimizer: DPOptimizer) -> dict[str, Any]:
    """Return what Opacus's state_dict leaves out: noise, clip bounds, adaptive counts."""
    return {
        name: _copied(value) for name, value in sorted(vars(optimizer).items()) if _numeric(value)
    }


def checked_attributes(
    saved: Mapping[str, Any], optimizer: DPOptimizer, *, kept: Collection[str] = ()
) -> Apply:
    """Check saved attributes against Opacus's optimizer; `kept` are not taken over.

    Raises:
        LedgerError: An optimizer of another kind.
    """
    here = {name for name, value in vars(optimizer).items() if _numeric(value)}
    if here != set(saved):
        raise LedgerError(
            f"Expected an optimizer with the numbers {sorted(saved)}, got {sorted(here)}. Make the "
            "training private with the same clipping and grad_sample_mode."
        )
    device = optimizer.params[0].device

    def apply() -> None:
        for name, value in saved.items():
            if name not in kept:
                setattr(optimizer, name, _copied(value, device=device))
        optimizer._step_skip_queue.clear()  # belonged to batches fetched ahead
        optimizer._is_last_step_skipped = False
        for p in held(optimizer):
            p.grad_sample = p.summed_grad = None

    return apply


def _numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_numeric(item) for item in value)
    return isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)


def _copied(value: Any, *, device: torch.device | None = None) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, device=device) for item in value)
    if isinstance(value, torch.Tensor):
        return value.detach().clone().to(device=device or value.device)
    return value


# --- weights --------------------------------------------------------------------------------------


def snapshot(module: Any) -> dict[str, torch.Tensor]:
    """Return copies of what a module saves."""
    return {
        name: value.detach().clone()
        for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def restore(module: Any, before: Mapping[str, torch.Tensor]) -> None:
    """Copy `before` back, in place: optimizers hold the same parameters."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name in before:
                value.copy_(before[name])
