"""A trained state as tensors and plain values, and back: what a new process goes on with.

Knows what the state holds; not where it is kept (`requests/serving.py`) nor how a file stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from ..errors import LedgerError
from ..files.container import arrays, tensors
from ..files.model_hash import model_hash
from .optimizer_copy import fresh_optimizer
from .phase import Phase
from .state import TrainedState
from .twin import twin_of

_KEYS = (
    "num_instances", "batch_size", "kernel", "training_steps", "ledger_steps", "requests_served",
    "phases", "forgotten", "module", "optimizer", "param_groups", "ledgers",
)  # fmt: skip


def saved(state: TrainedState) -> dict[str, Any]:
    """Return copies of weights, phases, optimizer settings and both ledgers, ready for torch.save.

    No optimizer state: it was computed with instances that are forgotten since. No generators:
    every run seeds its own.
    """
    return {
        **_frame(state),
        "training_steps": state.training_steps,
        "ledger_steps": state.ledger_steps,
        "requests_served": state.requests_served,
        "phases": [
            [p.steps, sorted(p.forgotten), p.method, p.private_length] for p in state.phases
        ],
        "forgotten": sorted(state.forgotten),
        "module": {
            name: value.detach().cpu().clone() for name, value in state.module.state_dict().items()
        },
        "param_groups": state.optimizer.state_dict()["param_groups"],
        "ledgers": None if state.account is None else tensors(state.account.state()),
        "data": state.data.state(),
        "weights_of_training": state.weights,
        "evaluated": sorted(state.evaluated),
    }


def load(state: TrainedState, kept: Mapping[str, Any]) -> None:
    """Take over what another state saved, into one that was built alike.

    Its module and optimizer become copies with the saved weights and settings; the caller's are
    left alone. The ledgers of its account become the saved ones.

    Args:
        state: Becomes the one that was saved.
        kept: From `saved`.

    Raises:
        LedgerError: Another data set, kernel, model, optimizer, training or ledger. Nothing is
            changed.
    """
    _require_alike(state, kept)
    if "data" in kept:  # earlier releases kept nothing of it
        state.data.require_state(kept["data"])
    state.data.require_same()
    module, optimizer = _loaded_model(state, kept)
    if state.account is not None:
        state.account.load_state(arrays(kept["ledgers"]))  # the last thing to fail
    state.module, state.optimizer = module, optimizer
    state.training_steps = kept["training_steps"]
    state.requests_served = kept["requests_served"]
    state.phases = [
        Phase(steps, frozenset(forgotten), method, private_length)
        for steps, forgotten, method, private_length in kept["phases"]
    ]
    state.forgotten = frozenset(kept["forgotten"])
    state.weights = kept.get("weights_of_training")
    state.evaluated = frozenset(kept.get("evaluated", state.evaluated))
    state.note(model_hash(module))


def _require_alike(state: TrainedState, kept: Mapping[str, Any]) -> None:
    missing = [key for key in _KEYS if key not in kept]
    if missing:
        raise LedgerError(
            f"Expected an engine state with the keys {list(_KEYS)}, got none for {missing}. "
            "Pass what state_dict() returned."
        )
    for name, here in _frame(state).items():
        if kept[name] != here:
            raise LedgerError(
                f"Expected the state of an engine with {name}={here!r}, got {kept[name]!r}. "
                "Build the engine as the one that saved it."
            )
    # An engine that was built on the ledger as it is after those runs has counted them as training.
    if state.training_steps not in (0, kept["training_steps"], kept["ledger_steps"]):
        raise LedgerError(
            f"Expected the state of a model trained for {state.training_steps} steps, got one "
            f"for {kept['training_steps']}: it belongs to another training. Use its own engine."
        )


def _loaded_model(
    state: TrainedState, kept: Mapping[str, Any]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    twin = twin_of(state.module)
    optimizer = fresh_optimizer(state.optimizer, module=state.module, twin=twin)
    try:
        twin.load_state_dict(kept["module"])
        optimizer.load_state_dict({"state": {}, "param_groups": kept["param_groups"]})
    except (RuntimeError, ValueError, KeyError) as error:
        raise LedgerError(
            f"Expected the state of this module and optimizer, got another: {error}"
        ) from error
    return twin, optimizer


def _frame(state: TrainedState) -> dict[str, Any]:
    """Return what must be equal on both sides."""
    private = state.privacy_engine
    return {
        "num_instances": state.data.size,
        "batch_size": state.batch_size,
        "kernel": None if private is None else private.kernel.plain(),
        "optimizer": type(state.optimizer).__name__,
    }
