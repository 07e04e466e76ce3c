"""Where one DPOptimizer's step can be looked at: before and after clip, noise, scaling and move.

Wraps methods of the object, not of its class, and looks them up late, so that classes exchanged or
patched meanwhile are seen. Listens and changes nothing. Knows no statistics and no accountant.
"""

from __future__ import annotations

import functools
import time
import weakref
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping

_STAGES = ("pre_step", "clip_and_accumulate", "accumulate", "add_noise", "scale_grad")
# Which DPOptimizer was last built around a plain optimizer: an older one no longer moves anything.
_LATEST: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Listener:
    """What may be heard of one optimizer's steps; every method does nothing unless overridden.

    Attributes:
        failure: What went wrong in the listener, which then hears nothing more: a training goes on
            whether or not it can be looked at.
    """

    failure = ""

    def before(self, stage: str, optimizer: Any) -> None:
        """Hear that a stage begins: one of `pre_step`, `clip`, `add_noise`, `scale_grad`."""

    def after(self, stage: str, optimizer: Any, result: Any) -> None:
        """Hear that a stage is over, and what it returned."""

    def move(self, optimizer: Any) -> None:
        """Hear that the plain optimizer is about to move the weights."""

    def shadow(self, stage: str, optimizer: Any) -> None:
        """Hear that a stage of a shadow step is over."""


class Seams:
    """Calls listeners at the stages of an optimizer's steps.

    Args:
        optimizer: Opacus's; nothing but the names of its stages is put on the object.
    """

    def __init__(self, optimizer: DPOptimizer) -> None:
        self.optimizer: Any = optimizer
        self.listeners: list[Listener] = []
        self.paused = False  # a shadow step is under way
        self.seconds = 0.0  # spent by listeners
        self._mine: dict[str, Any] = {}
        for stage in _STAGES:
            if hasattr(type(optimizer), stage):
                self._mine[stage] = functools.partial(self._call, stage)
                optimizer.__dict__[stage] = self._mine[stage]
        plain = optimizer.original_optimizer
        self._handle = None
        if isinstance(plain, torch.optim.Optimizer) and not isinstance(plain, DPOptimizer):
            _LATEST[plain] = weakref.ref(self)
            self._handle = plain.register_step_pre_hook(self._moves)

    def remove(self) -> None:
        """Take everything off the optimizer again."""
        for stage, mine in self._mine.items():
            if self.optimizer.__dict__.get(stage) is mine:
                del self.optimizer.__dict__[stage]
        if self._handle is not None:
            self._handle.remove()

    def _call(self, stage: str, *args: Any, **kwargs: Any) -> Any:
        method = functools.partial(getattr(type(self.optimizer), stage), self.optimizer)
        if stage == "clip_and_accumulate" or stage == "accumulate":
            stage = "clip"
        if self.paused:
            result = method(*args, **kwargs)
            for listener in self.listeners:
                listener.shadow(stage, self.optimizer)
            return result
        self._tell("before", stage)
        result = method(*args, **kwargs)
        self._tell("after", stage, result)
        return result

    def _moves(self, plain: Any, args: Any, kwargs: Any) -> None:
        latest = _LATEST.get(plain)
        if self.paused or latest is None or latest() is not self:
            return
        self._tell("move")

    def _tell(self, what: str, *details: Any) -> None:
        """Call all listeners; one that fails does not stop the training and is not called again."""
        start = time.perf_counter()
        for listener in tuple(self.listeners):
            heard = getattr(listener, what)
            try:
                if details:
                    heard(details[0], self.optimizer, *details[1:])
                else:
                    heard(self.optimizer)
            except Exception as error:
                listener.failure = f"{type(error).__name__}: {error}"
                self.listeners.remove(listener)
        self.seconds += time.perf_counter() - start


def is_ghost(optimizer: Any) -> bool:
    """Whether per-sample gradients are never formed."""
    return isinstance(optimizer, DPOptimizerFastGradientClipping)
