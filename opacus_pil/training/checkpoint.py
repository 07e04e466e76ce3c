"""Checkpoints that a killed training goes on from, bit for bit: Opacus's own file, one entry more.

Functions of an account and its trainings. What a training's position is made of is `position.py`,
how a file stays whole is `files/container.py`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from opacus.optimizers import DPOptimizer

from .._validate import FloatArray
from ..errors import LedgerError, UnsupportedError
from ..files.container import arrays, load_entries, save_entries
from .account import Account
from .kernel import TrainingKernel
from .plain_checkpoint import checked_history, other_data_ledger, worst_case_ledger
from .position import (
    Apply,
    both,
    checked_attributes,
    checked_generators,
    checked_global_generators,
    checked_pass,
    generator_states,
    global_generators,
    own_generators,
    pass_state,
    private_attributes,
    restore,
    snapshot,
)
from .training import Training
from .trainings import Trainings

_KIND = "training checkpoint"

_SCHEDULERS = ("noise_scheduler", "grad_clip_scheduler")
Schedulers = tuple[Any, Any]  # of noise and of clip bound; None: not given


@dataclass(frozen=True)
class Kept:
    """What of an engine a checkpoint holds.

    Attributes:
        account: Both ledgers.
        trainings: What was made private.
        secure_mode: As in Opacus.
        secure_rng: Opacus's cryptographic generator, which has no state; None: there is none.
    """

    account: Account
    trainings: Trainings
    secure_mode: bool
    secure_rng: Any

    @property
    def settings(self) -> dict[str, Any]:
        """What an engine that loads the file must have in common with the one that saved it."""
        terms = self.account.terms
        return {
            "accountant": self.account.opacus.mechanism(),
            "norm_policy": terms.policy.name,
            "refresh_every": terms.policy.refresh_every,
            "secure_mode": self.secure_mode,
            "budget": terms.budget is not None,
        }

    def generators(self, training: Training) -> dict[str, torch.Generator]:
        """Return the generators of a training that are not torch's global ones, by their use."""
        loader = training.tracker.loader
        return own_generators(training.optimizer, loader, secure=self.secure_rng)


def save(
    kept: Kept,
    path: str | os.PathLike[str] | IO[bytes],
    *,
    module: Any,
    optimizer: DPOptimizer | None,
    schedulers: Schedulers,
    extra: Mapping[str, Any] | None,
    module_options: Mapping[str, Any] | None,
    options: dict[str, Any] | None,
) -> None:
    """Save; arguments and errors as in `PerInstancePrivacyEngine.save_checkpoint`."""
    entries = dict(extra or {})
    entries["module_state_dict"] = module.state_dict(**(module_options or {}))
    ledgers = kept.account.state()
    entries["privacy_accountant_state_dict"] = ledgers["opacus"]
    if optimizer is not None:
        entries["optimizer_state_dict"] = optimizer.state_dict()
    for name, scheduler in zip(_SCHEDULERS, schedulers, strict=True):
        if scheduler is not None:
            state = {k: v for k, v in scheduler.state_dict().items() if not callable(v)}
            entries[f"{name}_state_dict"] = state
    trainings = kept.trainings
    state = {
        "engine": kept.settings,
        "dataset": _data_now(trainings),
        "ledger": ledgers["per_instance"],
        "caps": kept.account.caps,
        "training": None if optimizer is None else _position(kept, optimizer),
        "left": next((t.left() for t in trainings.of_module(module)), None),
        "drawn_from": {
            "coins": kept.account.coins_seen.state(),
            "noise": kept.account.noise_seen.state(),
        },
    }
    save_entries(path, entries, state, kind=_KIND, options=options)


def load(
    kept: Kept,
    path: str | os.PathLike[str] | IO[bytes],
    *,
    module: Any,
    optimizer: DPOptimizer | None,
    schedulers: Schedulers,
    module_options: Mapping[str, Any] | None,
    options: dict[str, Any] | None,
    strict: bool,
) -> dict[str, Any]:
    """Load; arguments, errors and result as in `PerInstancePrivacyEngine.load_checkpoint`."""
    entries, state = load_entries(path, kind=_KIND, options=options)
    for name in ("module_state_dict", "privacy_accountant_state_dict"):
        if name not in entries:
            raise LedgerError(f"Expected a checkpoint with {name}, got none in {path}.")
    account, trainings = kept.account, kept.trainings
    opacus = checked_history(entries["privacy_accountant_state_dict"])
    training = None if optimizer is None else trainings.of_optimizer(optimizer)
    live = _stays_live(kept, module, training)
    taken = _taken(kept, entries, state, training=training, strict=strict)
    optimizer_state = entries.pop("optimizer_state_dict", {})
    if (optimizer is None) == bool(optimizer_state):
        _warn_one_sided("optimizer", given=optimizer is not None)
    before = account.state()
    with contextlib.ExitStack() as undo:
        if not live:
            ledgers = {"opacus": opacus, "per_instance": taken.ledger}
            account.load_state(ledgers | {"output_caps": taken.output_caps})
            undo.callback(account.load_state, before)
        undo.callback(restore, module, snapshot(module))
        try:
            module.load_state_dict(entries["module_state_dict"], **(module_options or {}))
            if optimizer is not None and optimizer_state:
                undo.callback(optimizer.load_state_dict, copy.deepcopy(optimizer.state_dict()))
                optimizer.load_state_dict(optimizer_state)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"Expected a checkpoint of this module and optimizer, got another: {error}"
            ) from error
        undo.pop_all()
    _load_schedulers(entries, schedulers)
    if live:
        warnings.warn(live, stacklevel=3)
        return entries
    account.take_caps(taken.caps)
    for mine in trainings.of_module(module):
        mine.load_left({} if state is None else state.get("left") or {})
    gone = before["per_instance"]["ledger"]["steps"] - account.per_instance.steps
    if gone > 0:
        warnings.warn(
            f"The ledgers went back by {gone} steps, with the model: they speak of the model "
            "that was loaded, and of nothing that was released of those steps.",
            stacklevel=3,
        )
    taken.position()
    # Steps in these ledgers were made with them: a seed set anew may repeat what they drew.
    used = {} if state is None else arrays(state.get("drawn_from", {}))
    account.coins_seen.recall(used.get("coins", ()))
    account.noise_seen.recall(used.get("noise", ()))
    return entries


# --- inside ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taken:
    """What is taken over from a file, checked.

    Attributes:
        ledger: State of the per-instance ledger and of what charges it.
        caps: In force from then on.
        position: Puts generators, loader and optimizer where they stood.
    """

    ledger: dict[str, Any]
    caps: FloatArray | None
    position: Apply

    @property
    def output_caps(self) -> FloatArray | None:
        """The caps, where there are several per instance."""
        return None if self.caps is None or self.caps.ndim == 1 else self.caps


def _taken(
    kept: Kept,
    entries: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    *,
    training: Training | None,
    strict: bool,
) -> _Taken:
    """Return what a file says about the ledger, after every check."""
    account, kernels = kept.account, kept.trainings.kernels
    charger = account.charger
    if state is None:
        if charger.accountant.steps or account.opacus.history:
            raise LedgerError(
                "Expected an engine without steps for a checkpoint of plain Opacus, got "
                f"{charger.accountant.steps} steps. Load it into a new engine."
            )
        ledger = worst_case_ledger(entries, charger=charger, kernel=kernels[-1])
        return _Taken(ledger, account.caps, both())
    other = _other_data(kept.trainings, state)
    _require_same_engine(kept, state)
    if other and strict:
        raise LedgerError(f"{other} A ledger belongs to one data set in one order.")
    if other:
        ledger = other_data_ledger(entries, state, charger=charger, kernel=kernels[-1], why=other)
        return _Taken(ledger, account.caps, both())
    position = both() if training is None else _checked_position(kept, state, training)
    return _Taken(arrays(state["ledger"]), arrays(state["caps"]), position)


def _data_now(trainings: Trainings) -> dict[str, Any] | None:
    found = trainings.all
    return dict(trainings.fingerprint_of(found[-1].dataset)) if found else None


def _require_same_engine(kept: Kept, state: Mapping[str, Any]) -> None:
    here = kept.settings
    for name, value in state["engine"].items():
        if here[name] != value:
            raise LedgerError(
                f"Expected a checkpoint with {name}={here[name]!r}, got {name}={value!r}. "
                "Build the engine as the one that saved it."
            )


def _other_data(trainings: Trainings, state: Mapping[str, Any]) -> str:
    """Return how the data of a checkpoint are not this engine's; "": nothing says so."""
    saved, found = state["dataset"], trainings.all
    if saved is None or not found:
        return ""
    differs = trainings.fingerprint_of(found[-1].dataset).differs(saved)
    words = f"Expected a checkpoint of this data set, got one of another: {differs}."
    return words if differs else ""


def _stays_live(kept: Kept, module: Any, training: Training | None) -> str:
    """Return why the ledgers stay with a training that goes on; "": they follow the file.

    Raises:
        ValueError: Module and optimizer of different trainings.
        LedgerError: Another training of this engine made steps, which the file's ledgers may not
            hold.
    """
    mine, steps = kept.trainings.of_module(module), kept.account.per_instance.steps
    if training is not None and training not in mine:
        raise ValueError(
            "Expected module and optimizer of one training, got a module that this optimizer "
            "does not train. Pass what make_private returned together."
        )
    moved = [t for t in kept.trainings.all if t.steps and t not in mine]
    if mine and moved:
        raise LedgerError(
            f"Expected an engine whose steps are all of this module, got {moved[0].steps} of "
            "another training, which goes on and would be forgotten. Use one engine per model."
        )
    if mine or not steps:
        return ""
    return (
        "The weights were loaded into a module that this engine does not train: its ledgers "
        f"stay with the training that goes on, after {steps} steps. To go on "
        "from the file, load it into the module of its own make_private, in a new engine."
    )


def _position(kept: Kept, optimizer: DPOptimizer) -> dict[str, Any]:
    """Return where the training of `optimizer` stands, between two steps."""
    training = kept.trainings.of_optimizer(optimizer)
    if training.recorder.midway or optimizer._is_last_step_skipped:
        raise UnsupportedError(
            "Expected to save between two noisy steps, got a batch whose gradients are "
            "summed and not stepped on. Save after the optimizer.step() that moves the weights."
        )
    tracker = training.tracker
    left = pass_state(tracker.loader)
    unused = tracker.handed_out if left is not None and left["left"] is not None else 0
    if unused:
        warnings.warn(
            f"{unused} of the batches handed out were not stepped on yet: a training that goes "
            "on from this checkpoint will not see them, and takes them for skipped. Save right "
            "after optimizer.step().",
            stacklevel=4,
        )
    return {
        "kernel": training.kernel.plain(),
        "kernels": [k.plain() for k in kept.trainings.kernels],  # of earlier parts of the run
        "sample_rate": float(training.sample_rate),
        "pass": left,
        "skipped": tracker.skipped + unused,
        "optimizer": private_attributes(optimizer),
        "module_clip_bound": training.clip_bound,
        "generators": generator_states(kept.generators(training)),
        "global_generators": global_generators(),
    }


def _checked_position(kept: Kept, state: Mapping[str, Any], training: Training) -> Apply:
    """Return what takes over where the saved training stands, after every check."""
    saved = state["training"]
    if saved is None:
        raise LedgerError(
            "Expected a checkpoint saved with its optimizer, got one of weights and ledgers "
            "only. Load it without optimizer."
        )
    own_noise = _other_noise_only(saved, training)
    earlier = [TrainingKernel(**kernel) for kernel in saved.get("kernels", [saved["kernel"]])]
    kernels = kept.trainings.kernels

    def constants() -> None:
        if training.kernel.grad_sample_mode == "ghost":
            training.module.max_grad_norm = saved["module_clip_bound"]
        kernels.extend(kernel for kernel in earlier if kernel not in kernels)
        training.tracker.resume(int(saved.get("skipped", 0)))

    return both(
        checked_attributes(
            saved["optimizer"],
            training.optimizer,
            kept={"noise_multiplier"} if own_noise else set(),
        ),
        constants,
        checked_pass(saved["pass"], training.tracker.loader),
        checked_generators(saved["generators"], kept.generators(training)),
        checked_global_generators(saved["global_generators"]),
        training.taken_over,
    )


def _other_noise_only(saved: Mapping[str, Any], training: Training) -> bool:
    """Whether a saved training had other noise than this one, with a warning: as in Opacus.

    Raises:
        LedgerError: It had other constants.
    """
    here = {**training.kernel.plain(), "accounted sample_rate": float(training.sample_rate)}
    there = {**TrainingKernel(**saved["kernel"]).plain(),
             "accounted sample_rate": saved["sample_rate"]}  # fmt: skip
    other = [name for name in {**there, **here} if here.get(name) != there.get(name)]
    if not other:
        return False
    if other != ["noise_multiplier"]:
        name = other[0]
        raise LedgerError(
            f"Expected a checkpoint of a training with {name}={here.get(name)!r}, got "
            f"{name}={there.get(name)!r}. Call make_private with the saved training's arguments; "
            "schedules go on by themselves."
        )
    warnings.warn(
        f"The checkpoint's training had noise_multiplier={there['noise_multiplier']!r}; "
        f"this one goes on with its own, {here['noise_multiplier']!r}, and is charged for "
        "it. It is not the rest of the saved run, and no certificate covers both.",
        stacklevel=6,
    )
    return True


def _load_schedulers(entries: dict[str, Any], schedulers: Schedulers) -> None:
    for name, scheduler in zip(_SCHEDULERS, schedulers, strict=True):
        saved = entries.pop(f"{name}_state_dict", {})
        if (scheduler is None) == bool(saved):
            _warn_one_sided(name, given=scheduler is not None)
        if scheduler is not None and saved:
            scheduler.load_state_dict(saved)


def _warn_one_sided(name: str, *, given: bool) -> None:
    warnings.warn(
        f"{name} was given and the checkpoint has none."
        if given
        else f"The checkpoint has a state of {name}, which was not given and is not loaded.",
        stacklevel=4,
    )
