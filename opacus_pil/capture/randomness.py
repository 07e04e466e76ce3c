"""Who drew random numbers: torch's, numpy's and Python's global generators, watched and put back.

Knows the global generators of this process; nothing of a generator that somebody keeps himself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

_CPU = torch.device("cpu")


def generator_states(device: torch.device = _CPU) -> tuple[Any, ...]:
    """Return the states of all global generators; of CUDA's that of `device`."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0)
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def same_states(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether nobody drew between two calls of `generator_states`."""
    same_torch = torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    same_numpy = all(np.array_equal(a, b) for a, b in zip(one[3], other[3], strict=True))
    return same_torch and bool(one[2] == other[2]) and same_numpy


@contextmanager
def untouched_generators(device: torch.device = _CPU) -> Iterator[Callable[[], bool]]:
    """Restore every global generator on exit; yields a question: has any moved meanwhile?"""
    before = generator_states(device)
    try:
        yield lambda: not same_states(before, generator_states(device))
    finally:
        torch.set_rng_state(before[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(before[1], device)
        random.setstate(before[2])
        np.random.set_state(before[3])  # noqa: NPY002


class Notes(Protocol):
    """Whoever keeps facts about the step under way."""

    def note(self, code: str, detail: str = "") -> None:
        """Keep a fact."""


def watch_forward(module: nn.Module, notes: Notes) -> None:
    """Note "random_gradient" whenever a forward pass of the module draws a random number."""
    watch = _Watch(notes)
    module.register_forward_pre_hook(watch.before)
    module.register_forward_hook(watch.after)


class _Watch:
    """Compares the generators before and after a forward pass; a copied model is not watched."""

    def __init__(self, notes: Notes | None) -> None:
        self._notes = notes
        self._states: tuple[Any, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return _Watch(None)

    def __reduce__(self) -> Any:
        return _Watch, (None,)

    def before(self, module: nn.Module, inputs: Any) -> None:
        """Remember the generators."""
        if self._notes is not None and module.training and torch.is_grad_enabled():
            self._states = generator_states(next(module.parameters()).device)

    def after(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Compare."""
        states, self._states = self._states, None
        if states is None or self._notes is None:
            return
        if not same_states(states, generator_states(next(module.parameters()).device)):
            self._notes.note("random_gradient")
