"""An unlearning engine as tensors and plain values, and back: what a new process goes on with.

Knows what the engine holds; not where the state is kept (`serving.py`) nor how a file stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..checkpoint import arrays, tensors
from ..errors import LedgerError
from .methods import optimizer_like, plain_copy
from .phase import Phase

if TYPE_CHECKING:
    from .trained_model import TrainedModel

_KEYS = (
    "num_instances", "batch_size", "kernel", "training_steps", "ledger_steps", "requests_served",
    "phases", "forgotten", "module", "optimizer", "param_groups", "ledgers",
)  # fmt: skip


def engine_state(engine: TrainedModel) -> dict[str, Any]:
    """Return copies of weights, phases, optimizer settings and both ledgers, ready for torch.save.

    No optimizer state: it was computed with instances that are forgotten since. No generators:
    every run seeds its own.
    """
    return {
        **_frame(engine),
        "training_steps": engine._training_steps,
        "ledger_steps": engine._ledger_steps,
        "requests_served": engine._requests_served,
        "phases": [
            [p.steps, sorted(p.forgotten), p.method, p.private_length] for p in engine._phases
        ],
        "forgotten": sorted(engine._forgotten),
        "module": {
            name: value.detach().cpu().clone() for name, value in engine.module.state_dict().items()
        },
        "param_groups": engine._optimizer.state_dict()["param_groups"],
        "ledgers": None if engine._engine is None else tensors(engine._engine.ledger_state()),
        "data": engine._data.state(),
        "weights_of_training": engine._weights,
        "evaluated": sorted(engine._evaluated),
    }


def load_engine_state(engine: TrainedModel, state: Mapping[str, Any], *, own: bool = False) -> None:
    """Take over a state of an engine that was built alike.

    Its module and optimizer become copies with the state's weights and settings; the caller's are
    left alone. The ledgers of its privacy engine become the state's.

    Args:
        engine: Becomes the one that saved the state.
        state: From `engine_state`.
        own: It is a state of this very engine, which goes back to it: the data are not read again.

    Raises:
        LedgerError: Another data set, kernel, model, optimizer, training or ledger. Nothing is
            changed.
    """
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise LedgerError(
            f"Expected an engine state with the keys {list(_KEYS)}, got none for {missing}. "
            "Pass what state_dict() returned."
        )
    for name, here in _frame(engine).items():
        if state[name] != here:
            raise LedgerError(
                f"Expected the state of an engine with {name}={here!r}, got {state[name]!r}. "
                "Build the engine as the one that saved it."
            )
    # An engine that was built on the ledger as it is after those runs has counted them as training.
    if engine._training_steps not in (0, state["training_steps"], state["ledger_steps"]):
        raise LedgerError(
            f"Expected the state of a model trained for {engine._training_steps} steps, got one "
            f"for {state['training_steps']}: it belongs to another training. Use its own engine."
        )
    if not own:
        if "data" in state:  # earlier releases kept nothing of it
            engine._data.require_state(state["data"])
        engine._data.require_same()
    twin = plain_copy(engine.module)
    optimizer = optimizer_like(engine._optimizer, engine.module, twin)
    try:
        twin.load_state_dict(state["module"])
        optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})
    except (RuntimeError, ValueError, KeyError) as error:
        raise LedgerError(
            f"Expected the state of this module and optimizer, got another: {error}"
        ) from error
    if engine._engine is not None:
        engine._engine.load_ledger_state(arrays(state["ledgers"]))  # the last thing to fail
    engine._module, engine._optimizer = twin, optimizer
    engine._training_steps = state["training_steps"]
    engine._requests_served = state["requests_served"]
    engine._note_ledger()
    engine._phases = [
        Phase(steps, frozenset(forgotten), method, private_length)
        for steps, forgotten, method, private_length in state["phases"]
    ]
    engine._forgotten = frozenset(state["forgotten"])
    engine._weights = state.get("weights_of_training")
    engine._evaluated = frozenset(state.get("evaluated", engine._evaluated))


def _frame(engine: TrainedModel) -> dict[str, Any]:
    """Return what must be equal on both sides."""
    private = engine._engine
    return {
        "num_instances": engine._size,
        "batch_size": engine._batch_size,
        "kernel": None if private is None else asdict(private.kernel),
        "optimizer": type(engine._optimizer).__name__,
    }
