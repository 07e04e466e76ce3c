"""Options: what each method would do about a deletion, side by side, before anything runs.

Makes plans, and on request runs them on branches; the model, its ledgers and its data stay as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, NamedTuple

import torch.nn as nn

from .. import _validate as check
from ..accounting.shown import rounded_up
from ..errors import OpacusPilError
from .conditions import short_reading
from .methods import METHOD, METHODS
from .plan import CertifiedPlan, RetrainPlan, UnlearningPlan

Score = Callable[[nn.Module], float]
_WIDTHS = {
    "method": "20", "status": "17", "steps": ">7", "cost": ">9", "epsilon": ">9", "score": ">9",
    "why": "",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One method.

    Attributes:
        method: Its name.
        status: "certified", "predicted", "retrain instead", "no claim" or "not possible".
        steps: That it would take; None: there is no plan, or the caller chooses them.
        cost: Per-instance gradients as a fraction of those of retraining; None as above.
        epsilon: That is certified; None: no claim.
        score_change: Of the caller's score after against before, on a trial run; NaN: not measured.
        why: Why these steps, or why there is no claim.
    """

    method: str
    status: str
    steps: int | None
    cost: float | None
    epsilon: float | None
    score_change: float
    why: str


class Options(tuple[Option, ...]):
    """A table of methods; the certified ones first, the cheapest of them at the top."""

    def __new__(cls, options: Iterable[Option]) -> Options:
        """Return options in the order in which they are worth looking at."""
        rank = ("certified", "retrain instead", "predicted", "no claim", "not possible")
        ordered = sorted(
            options, key=lambda one: (rank.index(one.status), math.inf if one.cost is None
                                      else one.cost),
        )  # fmt: skip
        return super().__new__(cls, tuple(ordered))

    @property
    def best(self) -> Option | None:
        """The cheapest certified one; None: there is none."""
        return self[0] if self and self[0].status == "certified" else None

    def to_dataframe(self) -> Any:
        """Return one row per method, as a pandas.DataFrame."""
        import pandas as pd  # an optional extra

        names = [field.name for field in fields(Option)]
        return pd.DataFrame([astuple(one) for one in self], columns=names)

    def __str__(self) -> str:
        """Return the table as a person reads it."""
        rows = [
            {
                "method": one.method,
                "status": one.status,
                "steps": "" if one.steps is None else str(one.steps),
                "cost": "" if one.cost is None else f"{one.cost:.1%}",
                "epsilon": "" if one.epsilon is None else rounded_up(one.epsilon),
                "score": "" if math.isnan(one.score_change) else f"{one.score_change:+.3f}",
                "why": f"  {short_reading(one.why)}",
            }
            for one in self
        ]
        shown = [name for name in _WIDTHS if any(row[name] for row in rows)]
        lines = ["".join(f"{'  why' if name == 'why' else name:{_WIDTHS[name]}}" for name in shown)]
        lines += ["".join(f"{row[name] or '-':{_WIDTHS[name]}}" for name in shown) for row in rows]
        return "\n".join(lines)


class Trial(NamedTuple):
    """How methods are tried on a model.

    Attributes:
        plan: Makes the plan of a goal, given by arguments of `UnlearningEngine.plan`.
        run: Runs a plan where it changes nothing, and returns the model.
        score: Higher is better; None: nothing is run.
        before: Score of the model as it is.
    """

    plan: Callable[..., UnlearningPlan]
    run: Callable[[UnlearningPlan], nn.Module]
    score: Score | None
    before: float


def options_for(
    trial: Trial,
    *,
    epsilon: float,
    delta: float,
    methods: Sequence[str] | None,
    certificate: Any,
    max_steps: int | None,
) -> Options:
    """Return what each method would do; arguments as in `UnlearningEngine.options`."""
    chosen = METHODS if methods is None else tuple(methods)
    for name in chosen:
        check.choice("methods", name, METHODS)
    found = []
    for name in chosen:
        goal: dict[str, Any] = {"method": name}
        if METHOD[name].certifiable:
            goal |= {"epsilon": epsilon, "delta": delta, "max_steps": max_steps}
        if METHOD[name].own_constants:
            goal["certificate"] = certificate
        found.append(_option(trial, goal))
    return Options(found)


def _option(trial: Trial, goal: dict[str, Any]) -> Option:
    name = goal["method"]
    if not METHOD[name].noisy:
        why = "steps without noise have no certificate, and charge everyone who stays infinitely"
        return Option(name, "no claim", None, None, None, math.nan, why)
    if METHOD[name].own_constants and goal["certificate"] is None:
        why = "pass certificate=NoisyFineTuningCertificate(...), whose constants it follows"
        return Option(name, "not possible", None, None, None, math.nan, why)
    try:
        plan = trial.plan(**goal)
    except OpacusPilError as error:
        return Option(name, "not possible", None, None, None, math.nan, str(error))
    change = math.nan
    if trial.score is not None and isinstance(plan, CertifiedPlan):
        change = float(trial.score(trial.run(plan))) - trial.before
    reached = plan.epsilon if isinstance(plan, CertifiedPlan) else None
    if METHOD[name].retrains:
        why = "a new model, trained without these rows: what the others' cost is a fraction of"
        return Option(name, plan.status, plan.steps, plan.cost, reached, change, why)
    if isinstance(plan, RetrainPlan):
        return Option(name, "not possible", None, None, None, math.nan, _out_of_reach(plan))
    return Option(name, plan.status, plan.steps, plan.cost, reached, change, plan.reason)


def _out_of_reach(plan: RetrainPlan) -> str:
    """Say in a cell how near a target is that no steps reach."""
    if plan.best is None or math.isnan(plan.best[0]):
        return plan.reason
    epsilon, steps = plan.best
    return f"best reachable ε {rounded_up(epsilon)} in {steps} steps"
