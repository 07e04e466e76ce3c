"""What a checkpoint of plain Opacus says about instances: its history bounds the worst of them.

Knows entries that were read already; no file and no optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from .errors import LedgerError
from .norm_policy import Charger
from .training_kernel import TrainingKernel


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
    if charger.accountant.budgeted:
        raise LedgerError(
            "Expected a checkpoint with a per-instance ledger, got one of plain Opacus, which kept "
            "no budget. Build the engine without budget."
        )
    worst = charger.accountant.copy()
    label = "output_specific" if charger.norm_policy == "capped" else "bound"
    try:
        for noise, rate, steps in checked_history(entries["privacy_accountant_state_dict"])[
            "history"
        ]:
            for _ in range(steps):
                worst.step(
                    indices=None,
                    sensitivities=None,
                    noise_multiplier=noise,
                    sample_rate=min(rate, 1.0),
                    guarantee=label,
                )
    except ValueError as error:
        raise LedgerError(f"Expected a history of steps, got one with {error}") from error
    warnings.warn(
        "This checkpoint of plain Opacus has no per-instance ledger: every instance is charged the "
        f"worst case for its {worst.steps} steps. Nothing says whether it is of this data set.",
        stacklevel=4,
    )
    return {**charger.state_dict(), "ledger": worst.state_dict()}
