"""What a checkpoint of plain Opacus says about instances: its history bounds the worst of them.

Knows entries that were read already; no file and no optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..accounting import PerInstanceAccountant
from ..errors import LedgerError
from ..files.container import arrays
from .charger import Charger
from .kernel import TrainingKernel


def checked_history(accountant: Any) -> dict[str, Any]:
    """Return the saved state of Opacus's accountant in plain types.

    Raises:
        LedgerError: It is none.
    """
    try:
        history = [(float(z), float(q), int(n)) for z, q, n in accountant["history"]]
        if any(steps < 0 for _, _, steps in history):
            raise ValueError("a negative number of steps")
        return {"history": history, "mechanism": str(accountant["mechanism"])}
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(
            "Expected a history of (noise_multiplier, sample_rate, steps) with its mechanism, got "
            f"{error!r}. Use an earlier copy."
        ) from error


def worst_case_ledger(
    entries: Mapping[str, Any], *, charger: Charger, kernel: TrainingKernel
) -> dict[str, Any]:
    """Return the state of `charger` after everyone was charged the worst case, and warn.

    Guarantee: nobody is charged less than by any other account of a Poisson-sampled training with
        flat or per-layer clipping and this history. Whether the history is of this data set, the
        file does not say.

    Args:
        entries: The file's entries.
        charger: Without steps; left as it is.
        kernel: The training that goes on.

    Raises:
        LedgerError: The history bounds nothing for this kind of training, or is none.
    """
    mode, scheduled = kernel.grad_sample_mode, "grad_clip_scheduler_state_dict" in entries
    if (
        kernel.clipping == "adaptive"
        or not kernel.poisson_sampling
        or (mode == "ghost" and scheduled)
    ):
        raise LedgerError(
            "Expected a checkpoint with a per-instance ledger, got one of plain Opacus, whose "
            "history does not bound what adaptive clipping, fixed batches or a clip schedule in "
            "ghost mode gave away. Train again with this engine."
        )
    worst = _charged_worst(
        entries, charger=charger, reason="steps of plain Opacus, which nobody looked at",
        label="output_specific" if charger.policy.enforced else "bound",
    )  # fmt: skip
    warnings.warn(
        "This checkpoint of plain Opacus has no per-instance ledger: every instance is charged the "
        f"worst case for its {worst.steps} steps. Nothing says whether it is of this data set.",
        stacklevel=4,
    )
    findings = {**charger.findings, "earlier_release": worst.steps}
    return {**charger.state_dict(), "ledger": worst.state_dict(), "findings": findings}


def other_data_ledger(
    entries: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    charger: Charger,
    kernel: TrainingKernel,
    why: str,
) -> dict[str, Any]:
    """Return the state of `charger` after everyone was charged the worst of another data set's run.

    Guarantee: nobody is charged less than whoever was charged most there, or than the worst case
        for the history of that run.

    Args:
        entries: The file's entries.
        state: The file's own state.
        charger: Left as it is.
        kernel: The training that goes on.
        why: How the data differ.

    Raises:
        LedgerError: The engine enforces budgets, or has made steps of its own, which would be
            forgotten.
    """
    if charger.accountant.steps:
        raise LedgerError(
            f"{why} This engine has charged {charger.accountant.steps} steps of its own data, "
            "which would be forgotten. Load it into a new engine."
        )
    reason = f"earlier steps were made on other data: {why}"
    worst = _charged_worst(entries, charger=charger, label="estimate", reason=reason)
    saved = arrays(state["ledger"])
    if _worse(saved["ledger"], worst):
        worst.lose_everything(None)
    warnings.warn(
        f"{why} Every instance is charged the worst case for its {worst.steps} steps, as an "
        "estimate; strict=True refuses such a file.",
        stacklevel=4,
    )
    findings = {**charger.findings, "other_data": worst.steps}
    return {
        **charger.state_dict(), "ledger": worst.state_dict(), "findings": findings,
        "unbounded": bool(saved.get("unbounded", False)), "update": "varied",
    }  # fmt: skip


def _worse(saved: Mapping[str, Any], worst: PerInstanceAccountant) -> bool:
    """Whether somebody in a saved ledger was charged more than the worst case of its history.

    Steps that were charged without amplification, or infinitely, are in no history.
    """
    if bool(np.any(saved["infinite"])) or bool(saved["worst_infinite"]):
        return True
    table = np.asarray(saved["base"])[-2]  # of the highest level, without steps still to be added
    if not np.array_equal(np.asarray(saved["orders"]), worst.orders):
        return bool(saved["unattributed"])
    return bool((table > worst.worst_case_rdp() * (1.0 + 1e-9)).any())


def _charged_worst(
    entries: Mapping[str, Any], *, charger: Charger, label: str, reason: str
) -> PerInstanceAccountant:
    if charger.accountant.budgeted:
        raise LedgerError(
            "Expected a checkpoint with a per-instance ledger of this data set, got a history, "
            "which kept no budget. Build the engine without budget."
        )
    worst = charger.accountant.copy()
    history = checked_history(entries["privacy_accountant_state_dict"])["history"]
    try:
        for noise, rate, steps in history:
            for _ in range(steps):
                worst.step(
                    indices=None, sensitivities=None, noise_multiplier=noise,
                    sample_rate=min(rate, 1.0), guarantee=label, reasons=(reason,),
                )  # fmt: skip
    except ValueError as error:
        raise LedgerError(f"Expected a history of steps, got one with {error}") from error
    return worst
