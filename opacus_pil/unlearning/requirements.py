"""Requirements: everything that a method asks of a trained model, met or not, each with its cure.

Looks at a state and changes nothing; what raises when a plan is made is the same looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _validate as check
from .conditions import Condition, looked_at, reading
from .glm import GlmRun
from .grounds import require_still_weights, training_codes
from .methods import METHOD, METHODS, Method, of_the_kernel
from .rehearsal import Rehearsals
from .state import TrainedState
from .steps.averaged import require_all_trainable

_NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Requirement:
    """One thing that a method needs.

    Attributes:
        condition: What is needed.
        met: Whether it is there.
        found: What there is instead, where it is not met.
        cure: What to do about it.
    """

    condition: str
    met: bool
    found: str = ""
    cure: str = ""

    def __str__(self) -> str:
        """Return it as a line or two."""
        line = f"[{'x' if self.met else ' '}] {self.condition}"
        found = self.found if self.found.startswith("needs ") else f"got {self.found}"
        return line if self.met else f"{line}\n      {found} {self.cure}".rstrip()


class Requirements(tuple[Requirement, ...]):
    """Everything that a method needs of a model, in the order in which it is asked.

    What builds on something that is missing is not asked, and not in the list.
    """

    _method: str

    def __new__(cls, requirements: Iterable[Requirement], *, method: str) -> Requirements:
        """Return the requirements of a method."""
        made = super().__new__(cls, tuple(requirements))
        made._method = method
        return made

    @property
    def method(self) -> str:
        """The method's name."""
        return self._method

    @property
    def met(self) -> bool:
        """Whether all of them are."""
        return all(one.met for one in self)

    @property
    def missing(self) -> tuple[Requirement, ...]:
        """Those that are not met."""
        return tuple(one for one in self if not one.met)

    def to_dataframe(self) -> Any:
        """Return one row per requirement, as a pandas.DataFrame."""
        import pandas as pd  # an optional extra

        return pd.DataFrame(list(self), columns=["condition", "met", "found", "cure"])

    def __str__(self) -> str:
        """Return the list as a person reads it."""
        count = f"{len(self) - len(self.missing)} of {len(self)} met"
        return "\n".join([f"{self.method}: {count}", *map(str, self)])


def requirements_of(state: TrainedState, method: str) -> Requirements:
    """Return what a method needs of a model, whether or not it is there.

    Raises:
        ValueError: An unknown method.
    """
    rules = METHOD[check.choice("method", method, METHODS)]
    return Requirements(map(_listed, _asked(state, rules)), method=method)


def _asked(state: TrainedState, rules: Method) -> Iterator[Condition]:
    yield looked_at("the model and its ledger as they were", state.require_untouched)
    yield looked_at("the data set of training, unchanged", state.data.require_same)
    yield looked_at(
        "a training that can be run again as it is described",
        lambda: Rehearsals(state).without(_NO_ROWS),
    )
    if rules.retrains:
        yield Condition(
            state.make_model is not None,
            "make_model, which gives a new model and its optimizer",
            "none.",
            "Build UnlearningEngine(..., make_model=f).",
        )
        return
    yield looked_at(
        "a ledger without budgets, or steps that say who is in them",
        lambda: state.require_chargeable(rules),
    )
    if not rules.noisy:
        yield Condition(
            False,
            "noise at every step, for a certificate",
            f"{rules.name!r}, which adds none.",
            "It runs without a claim (steps alone), and charges everyone who stays infinitely.",
        )
        return
    if rules.own_constants:
        yield looked_at(
            "a model that trains everywhere, without buffers",
            lambda: require_all_trainable(state.module),
        )
        yield Condition(
            True, "a NoisyFineTuningCertificate with public constants, passed to plan", "", ""
        )
        return
    yield Condition(
        state.privacy_engine is not None and state.kernel is not None,
        "a training with PerInstancePrivacyEngine",
        "none.",
        "Train with it and pass privacy_engine=.",
    )
    if state.privacy_engine is not None and state.kernel is not None:
        yield from _of_noisy_steps(state, rules)


def _of_noisy_steps(state: TrainedState, rules: Method) -> Iterator[Condition]:
    assert state.kernel is not None
    assert state.account is not None
    yield Condition(
        state.kernel.noise_multiplier > 0.0, "noise in training", "noise_multiplier=0.", "Train "
        "with noise.",
    )  # fmt: skip
    yield Condition(
        not any(phase.private_length for phase in state.phases),
        "runs of a length fixed before them",
        "one that stopped on what the model showed, or took predicted steps.",
        "Its length depends on private data; use method='noisy_finetuning'.",
    )
    yield looked_at(
        "the weights that training left, and no buffer from the data",
        lambda: training_codes(state.account, module=state.module, weights=state.weights),
    )
    yield looked_at(
        "weights that only noisy steps move", lambda: require_still_weights(state.module)
    )
    if not rules.contracts:
        ledger = state.account.per_instance
        yield looked_at("steps that a certificate can rest on", state.account.require_evidence)
        yield Condition(
            ledger.guarantee == "bound",
            "per-instance losses with the label 'bound'",
            f"{ledger.guarantee!r} ({'; '.join(ledger.reasons) or 'by policy'}).",
            "Train with norm_policy='worst_case' or 'capped'.",
        )
        yield Condition(
            ledger.keeps_history and not ledger.budgeted,
            "a ledger with history, for sets of several instances",
            "none: one instance at a time can be certified.",
            "Build PerInstancePrivacyEngine(history=True).",
        )
        return
    others = [phase.method for phase in state.phases if not of_the_kernel(phase.method)]
    yield Condition(
        not others,
        "a model that only steps of training's kernel have moved",
        f"a run of method {others[0]!r}." if others else "",
        "Contraction does not follow it; use method='noisy_finetuning'.",
    )
    yield from GlmRun.conditions(state)


def _listed(one: Condition) -> Requirement:
    if one.holds:
        return Requirement(one.domain, met=True)
    if one.error is not None:
        return Requirement(one.domain, met=False, found=reading(str(one.error)))
    found = one.found if one.found.endswith((".", ".)")) else f"{one.found}."
    return Requirement(one.domain, met=False, found=found, cure=one.cure)
