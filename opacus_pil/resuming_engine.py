"""ResumingEngine: checkpoints that a killed training goes on from, bit for bit.

Opacus's own file with one entry more. What a training's state is made of is `training_state.py`,
how a file stays whole is `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO, Any

import torch
from opacus.optimizers import DPOptimizer

from .checkpoint import arrays, load_entries, save_entries
from .errors import LedgerError, UnsupportedError
from .plain_checkpoint import checked_history, other_data_ledger, worst_case_ledger
from .recording_engine import RecordingEngine
from .step_accounting import StepAccounting
from .training_kernel import TrainingKernel
from .training_state import (
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
)

_KIND = "training checkpoint"
_SCHEDULERS = ("noise_scheduler", "grad_clip_scheduler")


class ResumingEngine(RecordingEngine):
    """An engine whose checkpoints hold all that the rest of a training depends on.

    Args and Raises: those of PerInstancePrivacyEngine.
    """

    def save_checkpoint(
        self,
        *,
        path: str | os.PathLike[str] | IO[bytes],
        module: Any,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Save as Opacus does, and with it both ledgers and where the training stands.

        Guarantee: with `optimizer`, a process that loads the file goes on with the run that was
            saved: on CPU the weights and ledgers that follow are equal bit for bit, if items and
            the forward pass draw their randomness from torch's, numpy's or Python's global
            generator in the main process. With num_workers > 0 this holds for items without
            randomness: the workers' generators are not saved. Save after `optimizer.step()`: a
            batch that was handed out and not stepped on is not handed out again.

        Args:
            path: A path: the file is replaced as a whole, mode 0600. An open binary file is
                written as it is.
            module: As in Opacus.
            optimizer: The private optimizer. None: weights and ledgers only.
            noise_scheduler: As in Opacus; functions it holds are not saved.
            grad_clip_scheduler: Likewise.
            checkpoint_dict: More entries, of tensors and plain values; for example the epoch.
            module_state_dict_kwargs: As in Opacus.
            torch_save_kwargs: As in Opacus.

        Raises:
            ValueError: make_private was not called yet, or `optimizer` is not of this engine.
            UnsupportedError: Within a logical batch, or in a pass whose position is not known.
            TypeError: An entry that would have to be unpickled by running code.

        Privacy: the file holds per-instance losses and the states that the noise is drawn from.
            Whoever has it can undo the noise to come: never release it; release the weights.
        """
        entries = dict(checkpoint_dict or {})
        entries["module_state_dict"] = module.state_dict(**(module_state_dict_kwargs or {}))
        ledgers = self.ledger_state()
        entries["privacy_accountant_state_dict"] = ledgers["opacus"]
        if optimizer is not None:
            entries["optimizer_state_dict"] = optimizer.state_dict()
        for name, scheduler in zip(
            _SCHEDULERS, (noise_scheduler, grad_clip_scheduler), strict=True
        ):
            if scheduler is not None:
                state = {k: v for k, v in scheduler.state_dict().items() if not callable(v)}
                entries[f"{name}_state_dict"] = state
        state = {
            "engine": self._engine_settings(),
            "dataset": self._data_now(),
            "ledger": ledgers["per_instance"],
            "caps": self._caps,
            "training": None if optimizer is None else self._training_state(optimizer),
            "left": next((t.left() for t in self._trainings_of(module)), None),
            "drawn_from": {"coins": self._coins_seen.state(), "noise": self._noise_seen.state()},
        }
        save_entries(path, entries, state, kind=_KIND, options=torch_save_kwargs)

    def load_checkpoint(
        self,
        *,
        path: str | os.PathLike[str] | IO[bytes],
        module: Any,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
        strict: bool = False,
    ) -> dict[str, Any]:
        """Load what `save_checkpoint` saved, or a file of plain Opacus.

        Call it after make_private with the saved training's arguments, right before the loop. With
        `optimizer`, the next pass over the private loader hands out what was left of the pass that
        was saved (nothing, if it was saved after its last batch), the ones after it are whole, and
        all generators continue. Without, only weights and ledgers are loaded.

        A file of plain Opacus knows no instances: every instance is charged the worst case for its
        history, with a warning. So is everybody where the file's training had other data, as Opacus
        goes on there; `strict` refuses. Where `module` is a copy that this engine does not train,
        the ledgers stay with the training that goes on, with a warning.

        Args:
            path: File or open binary file; nothing in it is run.
            module: As in Opacus.
            optimizer: The private optimizer of the same training.
            noise_scheduler: As in Opacus.
            grad_clip_scheduler: As in Opacus.
            module_load_dict_kwargs: As in Opacus.
            torch_load_kwargs: As in Opacus, for example map_location.
            strict: Refuse a file of a training on other data.

        Returns:
            The other entries of the file, as in Opacus.

        Raises:
            ValueError: make_private was not called yet, or `optimizer` is not of this engine.
            FileNotFoundError: There is no such file.
            LedgerError: A damaged or edited file; or one of another training: orders, levels, norm
                policy, accountant, clipping, mode, kernel, loader, generators or model, with
                `strict` also other data; or another training of this engine would be forgotten.
                Only the noise may be another one, as in Opacus: the training
                goes on with its own, with a warning. Module, optimizer, schedulers, engine and
                generators are as they were.
        """
        entries, state = load_entries(path, kind=_KIND, options=torch_load_kwargs)
        for name in ("module_state_dict", "privacy_accountant_state_dict"):
            if name not in entries:
                raise LedgerError(f"Expected a checkpoint with {name}, got none in {path}.")
        opacus = checked_history(entries["privacy_accountant_state_dict"])
        charges = self._charges()
        training = None if optimizer is None else self._training_of(optimizer)
        kept = self._stays_live(module, training)
        apply, caps, ledger = both(), self._caps, None
        if state is None:
            if charges.accountant.steps or self.accountant.history:
                raise LedgerError(
                    "Expected an engine without steps for a checkpoint of plain Opacus, got "
                    f"{charges.accountant.steps} steps. Load it into a new engine."
                )
            ledger = worst_case_ledger(entries, charger=charges, kernel=self._kernels[-1])
        else:
            other = self._other_data(state)
            self._require_same_engine(state)
            if other and strict:
                raise LedgerError(f"{other} A ledger belongs to one data set in one order.")
            if other:
                ledger = other_data_ledger(
                    entries, state, charger=charges, kernel=self._kernels[-1], why=other
                )
            else:
                ledger = arrays(state["ledger"])
                caps = arrays(state["caps"])
                if training is not None:
                    apply = self._checked_training(state, training)
        optimizer_state = entries.pop("optimizer_state_dict", {})
        if (optimizer is None) == bool(optimizer_state):
            self._warn_one_sided("optimizer", given=optimizer is not None)
        with contextlib.ExitStack() as undo:
            before = self.ledger_state()
            if not kept:
                self.load_ledger_state({"opacus": opacus, "per_instance": ledger})
                undo.callback(self.load_ledger_state, before)
            undo.callback(_restore, module, _snapshot(module))
            try:
                module.load_state_dict(
                    entries["module_state_dict"], **(module_load_dict_kwargs or {})
                )
                if optimizer is not None and optimizer_state:
                    undo.callback(optimizer.load_state_dict, copy.deepcopy(optimizer.state_dict()))
                    optimizer.load_state_dict(optimizer_state)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise LedgerError(
                    f"Expected a checkpoint of this module and optimizer, got another: {error}"
                ) from error
            undo.pop_all()
        for name, scheduler in zip(
            _SCHEDULERS, (noise_scheduler, grad_clip_scheduler), strict=True
        ):
            saved = entries.pop(f"{name}_state_dict", {})
            if (scheduler is None) == bool(saved):
                self._warn_one_sided(name, given=scheduler is not None)
            if scheduler is not None and saved:
                scheduler.load_state_dict(saved)
        if kept:
            warnings.warn(kept, stacklevel=2)
            return entries
        self._caps = caps
        for mine in self._trainings_of(module):
            mine.load_left({} if state is None else state.get("left") or {})
        gone = before["per_instance"]["ledger"]["steps"] - charges.accountant.steps
        if gone > 0:
            warnings.warn(
                f"The ledgers went back by {gone} steps, with the model: they speak of the model "
                "that was loaded, and of nothing that was released of those steps.",
                stacklevel=2,
            )
        apply()
        # Steps in these ledgers were made with them: a seed set anew may repeat what they drew.
        used = {} if state is None else arrays(state.get("drawn_from", {}))
        self._coins_seen.recall(used.get("coins", ()))
        self._noise_seen.recall(used.get("noise", ()))
        return entries

    # --- inside -------------------------------------------------------------------------------

    def _engine_settings(self) -> dict[str, Any]:
        return {
            "accountant": self.accountant.mechanism(),
            "norm_policy": self._norm_policy,
            "refresh_every": self._refresh_every,
            "secure_mode": self.secure_mode,
            "budget": self._budget is not None,
        }

    def _data_now(self) -> dict[str, Any] | None:
        if not self._accountings:
            return None
        return dict(self.fingerprint_of(self._accountings[-1].dataset))

    def _require_same_engine(self, state: Mapping[str, Any]) -> None:
        here = self._engine_settings()
        for name, value in state["engine"].items():
            if here[name] != value:
                raise LedgerError(
                    f"Expected a checkpoint with {name}={here[name]!r}, got {name}={value!r}. "
                    "Build the engine as the one that saved it."
                )

    def _other_data(self, state: Mapping[str, Any]) -> str:
        """Return how the data of a checkpoint are not this engine's; "": nothing says so."""
        saved = state["dataset"]
        if saved is None or not self._accountings:
            return ""
        differs = self.fingerprint_of(self._accountings[-1].dataset).differs(saved)
        words = f"Expected a checkpoint of this data set, got one of another: {differs}."
        return words if differs else ""

    def _stays_live(self, module: Any, training: StepAccounting | None) -> str:
        """Return why the ledgers stay with a training that goes on; "": they follow the file.

        Raises:
            ValueError: Module and optimizer of different trainings.
            LedgerError: Another training of this engine made steps, which the file's ledgers may
                not hold.
        """
        mine = self._trainings_of(module)
        if training is not None and training not in mine:
            raise ValueError(
                "Expected module and optimizer of one training, got a module that this optimizer "
                "does not train. Pass what make_private returned together."
            )
        moved = [t for t in self._accountings if t.steps and t not in mine]
        if mine and moved:
            raise LedgerError(
                f"Expected an engine whose steps are all of this module, got {moved[0].steps} of "
                "another training, which goes on and would be forgotten. Use one engine per model."
            )
        if mine or not self.per_instance.steps:
            return ""
        return (
            "The weights were loaded into a module that this engine does not train: its ledgers "
            f"stay with the training that goes on, after {self.per_instance.steps} steps. To go on "
            "from the file, load it into the module of its own make_private, in a new engine."
        )

    def _trainings_of(self, module: Any) -> list[StepAccounting]:
        return [t for t in self._accountings if module in (t.module, t.module._module)]

    def _training_of(self, optimizer: DPOptimizer) -> StepAccounting:
        for training in self._accountings:
            if training.optimizer is optimizer:
                return training
        raise ValueError(
            f"Expected optimizer to be one that this engine made private, got "
            f"{type(optimizer).__name__} of another. Pass what make_private returned."
        )

    def _generators(self, training: StepAccounting) -> dict[str, torch.Generator]:
        return own_generators(training.optimizer, training.tracker.loader, secure=self.secure_rng)

    def _training_state(self, optimizer: DPOptimizer) -> dict[str, Any]:
        """Return where the training of `optimizer` stands, between two steps."""
        training = self._training_of(optimizer)
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
                stacklevel=3,
            )
        return {
            "kernel": asdict(training.kernel),
            "kernels": [asdict(kernel) for kernel in self._kernels],  # of earlier parts of the run
            "sample_rate": float(training.sample_rate),
            "pass": left,
            "skipped": tracker.skipped + unused,
            "optimizer": private_attributes(optimizer),
            "module_clip_bound": training.clip_bound,
            "generators": generator_states(self._generators(training)),
            "global_generators": global_generators(),
        }

    def _checked_training(self, state: Mapping[str, Any], training: StepAccounting) -> Apply:
        """Return what takes over where the saved training stands, after every check."""
        saved = state["training"]
        if saved is None:
            raise LedgerError(
                "Expected a checkpoint saved with its optimizer, got one of weights and ledgers "
                "only. Load it without optimizer."
            )
        here = {**asdict(training.kernel), "accounted sample_rate": float(training.sample_rate)}
        there = {**saved["kernel"], "accounted sample_rate": saved["sample_rate"]}
        other = [name for name, value in there.items() if here.get(name) != value]
        own_noise = other == ["noise_multiplier"]  # as in Opacus: charged for what it is
        if own_noise:
            warnings.warn(
                f"The checkpoint's training had noise_multiplier={there['noise_multiplier']!r}; "
                f"this one goes on with its own, {here['noise_multiplier']!r}, and is charged for "
                "it. It is not the rest of the saved run, and no certificate covers both.",
                stacklevel=3,
            )
        elif other:
            name = other[0]
            raise LedgerError(
                f"Expected a checkpoint of a training with {name}={here.get(name)!r}, got "
                f"{name}={there[name]!r}. Call make_private with the saved training's arguments; "
                "schedules go on by themselves."
            )
        earlier = [TrainingKernel(**kernel) for kernel in saved.get("kernels", [saved["kernel"]])]

        def constants() -> None:
            if training.kernel.grad_sample_mode == "ghost":
                training.module.max_grad_norm = saved["module_clip_bound"]
            self._kernels += [kernel for kernel in earlier if kernel not in self._kernels]
            training.tracker.resume(int(saved.get("skipped", 0)))

        kept = {"noise_multiplier"} if own_noise else set()
        return both(
            checked_attributes(saved["optimizer"], training.optimizer, kept=kept),
            constants,
            checked_pass(saved["pass"], training.tracker.loader),
            checked_generators(saved["generators"], self._generators(training)),
            checked_global_generators(saved["global_generators"]),
            training.taken_over,
        )

    @staticmethod
    def _warn_one_sided(name: str, *, given: bool) -> None:
        warnings.warn(
            f"{name} was given and the checkpoint has none."
            if given
            else f"The checkpoint has a state of {name}, which was not given and is not loaded.",
            stacklevel=3,
        )


def _snapshot(module: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def _restore(module: Any, before: Mapping[str, torch.Tensor]) -> None:
    """Copy `before` back, in place: optimizers hold the same parameters."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name in before:
                value.copy_(before[name])
