"""summary.json as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..plots import rounded_up

_READING = """How to read it
  mean epsilon  how much the model gives away about a member of the set: no worst case, its own
  certified     the ε proved about the unlearned model after so many steps; "no": nothing is proved
  worst case    steps if every member were as exposed as the mechanism allows; retrain: from scratch
  reached at    step from which the set's accuracy stays within .05 of models retrained without it.
                0: it was there before the first step, since easy images are recognised by models
                that never saw them. It proves nothing: accuracy cannot see what ε bounds."""


def as_text(summary: Mapping[str, Any]) -> str:
    """Return the tables of all tasks; ε is rounded up, what is not certified says so."""
    return "\n\n".join([*(_task(task) for task in summary["tasks"]), _READING])


def _task(task: Mapping[str, Any]) -> str:
    spread = task["per_instance_epsilon"]
    quantiles = "  ".join(f"{name} {rounded_up(value)}" for name, value in spread.items())
    prv = task["worst_case_epsilon_prv"]
    tight = "" if prv is None else f" (PRV {rounded_up(prv)})"
    lines = [
        f"{task['name']} on {task['dataset']}: {task['num_instances']} training instances, "
        f"test accuracy {task['test_accuracy']:.3f}, delta {task['delta']:.2e}",
        f"  worst-case epsilon    {rounded_up(task['worst_case_epsilon'])}{tight}",
        f"  per-instance epsilon  {quantiles}  [{task['guarantee']}]",
    ]
    frame = pd.DataFrame([_row(entry) for entry in task["forget_sets"]])
    return "\n".join(lines) + "\n" + frame.to_string(index=False)


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    oracle = entry["oracle"]
    worst, reached = entry["steps_worst_case"], entry["time_to_unlearn"]
    return {
        "forget set": entry["name"],
        "size": entry["size"],
        "mean epsilon": rounded_up(entry["privacy_loss"]),
        "certified": rounded_up(entry["epsilon"]) if entry["certified"] else "no",
        "steps": entry["steps"],
        "worst case": "-" if worst is None else worst,
        "retrain": entry["steps_retrain"],
        "reached at": "never" if reached is None else reached,
        "forget acc (oracle)": f"{entry['forget_accuracy']:.2f} ({oracle['forget_accuracy']:.2f})",
        "retain acc (oracle)": f"{entry['retain_accuracy']:.3f} ({oracle['retain_accuracy']:.3f})",
        "test acc (oracle)": f"{entry['test_accuracy']:.3f} ({oracle['test_accuracy']:.3f})",
    }
