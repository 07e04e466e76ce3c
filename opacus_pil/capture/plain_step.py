"""PlainStep: a look at every step of the plain optimizer, for those that nobody noised.

Knows gradients by their versions; no norm and no ledger.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .recorder import Recorder


def held(optimizer: Any) -> list[Any]:
    """Return every parameter of an optimizer, the frozen ones included."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def moves_by_gradient(parameter: torch.Tensor) -> bool:
    """Whether a plain optimizer would move a parameter by its gradient."""
    return parameter.grad is not None and bool((parameter.grad != 0).any())


class PlainStep:
    """Called before every step of the plain optimizer; reports one that no noise was added for.

    Also one whose noised gradients somebody has written to since. Where a training was made private
    again, on the same plain optimizer, a step with noise is one for all that share its ledger.

    Holds nothing alive, and a copy of the optimizer does not report to this training.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder: Any = weakref.ref(recorder)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainStep:
        """Copy without the recorder: a copy reports to nobody."""
        twin = PlainStep.__new__(PlainStep)
        twin._recorder = _nobody
        return twin

    def __reduce__(self) -> Any:
        """Pickle likewise."""
        return _inert_plain_step, ()

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Look at one step of the plain optimizer before it is made."""
        hooks: Any = optimizer._optimizer_step_pre_hooks
        watching = [h for h in hooks.values() if isinstance(h, PlainStep)]
        if watching and watching[0] is not self:
            return  # the first one looks, for all
        recorders = [r for r in (h._recorder() for h in watching or [self]) if r is not None]
        noised = [r for r in recorders if r.noised]
        for recorder in noised:
            recorder.noised = False
        for recorder in noised:
            if recorder.changed_step is not None and not recorder.untouched():
                recorder.changed_step()
        charged = {id(r.ledger): r for r in noised}
        others = {id(r.ledger): r for r in recorders if id(r.ledger) not in charged}
        if others and any(map(moves_by_gradient, held(optimizer))):
            for recorder in others.values():
                if recorder.unnoised_step is not None:
                    recorder.unnoised_step()


def _nobody() -> None:
    """Stand for a recorder that is gone."""


def _inert_plain_step() -> PlainStep:
    twin = PlainStep.__new__(PlainStep)
    twin._recorder = _nobody
    return twin
