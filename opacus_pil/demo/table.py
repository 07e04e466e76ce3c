"""summary.json as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..accounting.shown import rounded_up

_READING = """How to read it
  mean ε       how much the model gives away about a member of the set: no worst case, its own
  certified ε  proved about the unlearned model after so many steps; no: nothing is proved of it
  worst case   steps if every member were as exposed as the mechanism allows; retrain: from scratch
  on the set   accuracy on its own images: trained → unlearned (mean of models retrained without it)
  near at      first step where that is within .1 of the retrained ones for a while. start: before
               any step, as images like others are known without them. It proves nothing: accuracy
               does not see what ε bounds."""
_WIDTHS = {"set": 6, "certified ε": 11, "worst case": 10, "on the set": 18, "near at": 7}


def as_text(summary: Mapping[str, Any]) -> str:
    """Return the tables of all tasks; ε is rounded up, what is not certified says so."""
    return "\n\n".join([*(_task(task) for task in summary["tasks"]), _READING])


def _task(task: Mapping[str, Any]) -> str:
    spread = task["per_instance_epsilon"]
    quantiles = ", ".join(
        f"{words} {rounded_up(spread[name])}"
        for name, words in (("min", "least"), ("median", "median"), ("max", "most"))
    )
    prv = task["worst_case_epsilon_prv"]
    tight = "" if prv is None else f" (PRV {rounded_up(prv)})"
    worst = rounded_up(task["worst_case_epsilon"])
    lines = [
        f"{task['name']} on {task['dataset']}: {task['num_instances']} training instances, "
        f"test accuracy {task['test_accuracy']:.3f}",
        f"  ε at δ = {rounded_up(task['delta'], digits=2)}: worst case {worst}{tight}; "
        f"one instance {quantiles}  [{task['guarantee']}]",
    ]
    frame = pd.DataFrame([_row(entry) for entry in task["forget_sets"]])
    return "\n".join(lines) + "\n" + frame.to_string(index=False, col_space=_WIDTHS)


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    oracle = entry["oracle"]
    worst = entry["steps_worst_case"]
    before, after = entry["forget_accuracy_before"], entry["forget_accuracy"]
    return {
        "set": entry["name"],
        "size": entry["size"],
        "mean ε": rounded_up(entry["privacy_loss"]),
        "certified ε": rounded_up(entry["epsilon"]) if entry["certified"] else "no",
        "steps": entry["steps"],
        "worst case": "-" if worst is None else worst,
        "retrain": entry["steps_retrain"],
        "on the set": f"{before:.2f} → {after:.2f} ({oracle['forget_accuracy']:.2f})",
        "near at": _reached(entry["time_to_unlearn"]),
        "on test": f"{entry['test_accuracy']:.2f} ({oracle['test_accuracy']:.2f})",
    }


def _reached(step: int | None) -> str:
    if step is None:
        return "never"
    return "start" if step == 0 else str(step)
