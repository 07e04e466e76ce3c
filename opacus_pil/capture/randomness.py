"""Who drew random numbers: torch's, numpy's and Python's global generators, watched and put back.

Knows the global generators of this process; nothing of a generator that somebody keeps himself.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
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


def set_generator_states(states: tuple[Any, ...], device: torch.device = _CPU) -> None:
    """Put every global generator where it was when `generator_states` was called."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    random.setstate(states[2])
    np.random.set_state(states[3])  # noqa: NPY002


@contextmanager
def untouched_generators(device: torch.device = _CPU) -> Iterator[Callable[[], bool]]:
    """Restore every global generator on exit; yields a question: has any moved meanwhile?"""
    before = generator_states(device)
    try:
        yield lambda: not same_states(before, generator_states(device))
    finally:
        set_generator_states(before, device)


class Notes(Protocol):
    """Whoever keeps facts about the step under way."""

    def note(self, code: str, detail: str = "", *, lasting: bool = False) -> None:
        """Keep a fact."""


def watch_forward(module: nn.Module, notes: Notes) -> None:
    """Note "random_gradient", for good, once a forward pass of the module draws a random number."""
    watch = _Watch(notes)
    module.register_forward_pre_hook(watch.before)
    module.register_forward_hook(watch.after)


class Seen:
    """Remembers where a generator stood when somebody drew from it: no draw may be repeated."""

    def __init__(self) -> None:
        self._marks: set[int] = set()

    def again(self, mark: int | None) -> bool:
        """Whether somebody drew from here before; None, a generator without a state, never."""
        known = mark in self._marks
        if mark is not None:
            self._marks.add(mark)
        return known

    def forget(self) -> None:
        """Start anew: a training was put back to an earlier state, with its ledgers."""
        self._marks.clear()

    def copied(self) -> Seen:
        """Return one that remembers the same, for a fork of the ledgers."""
        twin = Seen()
        twin.join(self)
        return twin

    def join(self, other: Seen) -> None:
        """Remember what another one does, too."""
        self._marks |= other._marks

    def state(self) -> npt.NDArray[np.int64]:
        """Return what is remembered, for a file, shape (marks,)."""
        return np.array(sorted(self._marks), dtype=np.int64)

    def recall(self, state: npt.ArrayLike) -> None:
        """Remember what `state` returned in an earlier process, too."""
        self._marks |= set(np.asarray(state, dtype=np.int64).tolist())


def one_stream(loader: Any, optimizer: Any) -> bool:
    """Whether coins and noise of a training come from two generators that were seeded alike.

    Args:
        loader: A recording loader; None: its coins are not known.
        optimizer: Opacus's.
    """
    noise = optimizer.generator
    coins = None if loader is None else loader.batch_sampler.generator
    device = optimizer.params[0].device if optimizer.params else None
    if loader is None or coins is noise or optimizer.secure_mode or device is None:
        return False
    where = device.type if noise is None else noise.device.type
    if (where, "cpu" if coins is None else coins.device.type) != ("cpu", "cpu"):
        return False
    seeds = [torch.initial_seed() if g is None else g.initial_seed() for g in (noise, coins)]
    return seeds[0] == seeds[1]


def generator_mark(generator: Any = None, device: torch.device = _CPU) -> int | None:
    """Return a mark of where a generator stands; None: it does not say.

    Args:
        generator: None: torch's global one of `device`.
        device: Whose global generator.
    """
    try:
        if generator is not None:
            state = generator.get_state()
        elif device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
        else:
            state = torch.get_rng_state()
    except RuntimeError:  # cryptographic generators have no state to be put back to
        return None
    digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)  # the same in every process: it is saved


class ForwardStates:
    """Keeps where the generators stood when a module's training forward passes began.

    With them a pass can be run again with the same dropout masks. A copied model keeps nothing.

    Args:
        module: To watch; None: nothing is seen.
        device: Whose global generator, beside the processor's.

    Attributes:
        wanted: Whether the states of coming passes are kept.
        passes: Number of passes since `take`.
    """

    _MOST = 64  # passes between two steps; more are not told apart

    def __init__(self, module: nn.Module | None = None, *, device: torch.device = _CPU) -> None:
        self.wanted = False
        self.passes = 0
        self._device = device
        self._states: list[tuple[Any, ...]] = []
        if module is not None:
            module.register_forward_pre_hook(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardStates:
        """Copy without what was kept: a copy is asked for nothing."""
        return ForwardStates()

    def __reduce__(self) -> Any:
        """Pickle likewise."""
        return ForwardStates, ()

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Look at one forward pass before it is made."""
        if not (module.training and torch.is_grad_enabled()):
            return
        self.passes += 1
        if self.wanted and self.passes <= self._MOST:
            self._states.append(generator_states(self._device))

    def take(self) -> list[tuple[Any, ...]]:
        """Return the states that were kept since the last call."""
        states, self._states, self.passes = self._states, [], 0
        return states


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
            self._notes.note("random_gradient", lasting=True)
