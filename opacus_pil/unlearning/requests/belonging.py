"""Whether a folder of requests is this engine's: of its data, and about its model.

Knows the state of a model and what the queue keeps of others; reads and writes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ...errors import LedgerError
from ..state import TrainedState
from .queue import Belonging


def untrained(state: TrainedState) -> bool:
    """Whether this is the architecture alone, which nobody deployed."""
    return state.account is not None and state.training_steps == 0


def require_ours(state: TrainedState, found: Belonging, *, folder: Path) -> None:
    """Raise if the rows in the queue are those of other data, or it is about another model.

    The architecture alone is about no model yet: it becomes what was served last. So may a model
    without a ledger, of which nobody can tell whether it was trained. An earlier release that
    served last kept no hash to compare with.

    Args:
        state: Of the engine.
        found: What the queue says.
        folder: Of the queue.

    Raises:
        LedgerError: Says whose the folder is, and the cure.
    """
    if found.data is not None:
        with folder_named(folder):
            state.data.require_state(found.data)
    unknown = untrained(state) or (
        found.served and (state.account is None or found.served_model is None)
    )
    if found.models and not unknown and state.model_hash not in found.models:
        raise _another_model(state, found, folder)


def require_served_model(state: TrainedState, found: Belonging, *, folder: Path) -> None:
    """Raise unless the model is the one to be served from: the last one, or the deployed one.

    Args:
        state, found, folder: As in `require_ours`; the state went on with what was served last.

    Raises:
        LedgerError: Another model, or an untrained one.
    """
    if not found.models and not found.served and untrained(state):
        raise LedgerError(
            f"Expected the deployed model to serve the requests in {folder} from, got one that was "
            "trained for 0 steps. Let whatever builds the engine load it: load_checkpoint."
        )
    expected = found.served_model if found.served else next(iter(found.models), None)
    if expected not in (None, state.model_hash):  # None: an earlier release kept no hash
        raise _another_model(state, found, folder)


@contextlib.contextmanager
def folder_named(folder: Path) -> Iterator[None]:
    """Say which folder it is where something in it is of others."""
    try:
        yield
    except LedgerError as error:
        raise LedgerError(f"{error} Folder of the requests: {folder}.") from error


def _another_model(state: TrainedState, found: Belonging, folder: Path) -> LedgerError:
    last = found.served_model or found.models[-1]
    return LedgerError(
        f"Expected the model that the requests in {folder} are about, got model "
        f"{state.model_hash[:12]}: the folder belongs to model {last[:12]}. A certificate would be "
        "about weights that nobody deployed. Let whatever builds the engine load the deployed "
        "model (load_checkpoint) instead of training one anew; or, if this one is deployed, submit "
        "to another folder."
    )
