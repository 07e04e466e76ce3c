"""Which of several runs cannot be told from another of them passed again.

An expectation over runs is estimated from *independent* runs. Knows divergences as an array, not
how they came about: that two runs were trained with different coins it cannot show, only that the
numbers speak against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray, IntArray

# Relative. Norms of one model measured again, in other batches, differ by some 1e-6 in float32, and
# a divergence may grow like the tenth power of a norm. Independent runs that agree to four digits
# at every step and instance hardly differ: to count them once costs a label, not a guarantee.
_ROUNDED_APART = 1e-4
# Equal values that say "one history", not "chance": even on a grid of a hundred levels eight
# coincide with probability 1e-16.
_ENOUGH = 8


@dataclass(frozen=True)
class RepeatedRuns:
    """Which runs count, and what speaks against the others.

    Attributes:
        distinct: Rows of the runs that count, the first of each kind, ascending.
        findings: One sentence per kind of repetition, with its first example; empty if all count.
    """

    distinct: IntArray
    findings: tuple[str, ...]


def repeated_runs(rdp: FloatArray, *, worst: FloatArray | None = None) -> RepeatedRuns:
    """Find runs that repeat another, or share a stretch of steps with it.

    Three mistakes are recognised: the same run twice, bit for bit or measured again (within
    1e-4); two runs that begin with the same steps, as after one checkpoint, or one of which ended
    early and was filled up with zeros; a run that begins in the middle of another. A run cut in
    two halves looks like two runs here.

    A shared stretch must hold eight values strictly between 0 and the clipping bound (the worst
    case, else the largest divergence of the step): independent runs may well be at the bound
    together. The first step does not count, from a common start it is the same in all runs. Runs
    that are equal at *every* step count once all the same, also where they are all at the bound:
    what does not depend on the run needs no expectation, and shows no independence.

    Args:
        rdp: Shape (instances..., runs, steps), at one order.
        worst: Shape (instances..., steps).

    Cost: a hash of everything, sums over the instances compared run by run, and a closer look only
    where these agree.
    """
    runs, steps = rdp.shape[-2:]
    values = np.moveaxis(rdp.reshape(-1, runs, steps), 1, 0)  # (runs, instances, steps)
    ceiling = rdp.max(axis=-2) if worst is None else worst
    ceiling = ceiling.reshape(-1, steps)
    if worst is None:  # the largest of the step, over everybody
        ceiling = ceiling.max(axis=0, keepdims=True)
    first = np.arange(runs)
    examples: dict[str, str] = {}
    kept = _first_of_equal(values, first, examples)
    for early, late, words in _relations(values, kept, ceiling):
        _join(first, early, late)
        examples.setdefault(words, f"Runs {early} and {late} {words}.")
    return RepeatedRuns(np.unique(first), tuple(examples.values()))


_SAME = "give the same divergences at every step"
_FORKED = "begin with the same steps, as after one checkpoint"
_SHIFTED = "overlap: one begins in the middle of the other"


def _first_of_equal(values: FloatArray, first: IntArray, examples: dict[str, str]) -> IntArray:
    """Join runs that are equal bit for bit; return the first of each kind."""
    seen: dict[bytes, list[int]] = {}
    for run, own in enumerate(values):
        alike = seen.setdefault(_digest(own), [])
        twin = next((other for other in alike if np.array_equal(values[other], own)), None)
        if twin is None:
            alike.append(run)
        else:
            _join(first, twin, run)
            examples.setdefault(_SAME, f"Runs {twin} and {run} {_SAME}.")
    return np.unique(first)


def _digest(values: FloatArray) -> bytes:
    """Return some numbers that equal runs share; few others do."""
    return np.array([values[0, 0], values.sum(), values[-1, -1]]).tobytes()


def _relations(
    values: FloatArray, kept: IntArray, ceiling: FloatArray
) -> Iterator[tuple[int, int, str]]:
    """Yield pairs of the kept runs that share a history, the earlier row first, and how."""
    sums = values.sum(axis=1)  # (runs, steps)
    below = ceiling * (1.0 - _ROUNDED_APART)
    telling = np.stack([((own > 0.0) & (own < below)).sum(axis=0) for own in values])
    yield from _alike_from_the_start(values, sums, telling, kept)
    yield from _one_inside_another(values, sums, telling, kept)


def _alike_from_the_start(
    values: FloatArray, sums: FloatArray, telling: IntArray, kept: IntArray
) -> Iterator[tuple[int, int, str]]:
    steps = sums.shape[1]
    for place, run in enumerate(kept[:-1].tolist()):
        later = kept[place + 1 :]
        begin = _close(sums[run, :2], sums[later, :2], slack=2.0).all(axis=1)
        for other in later[begin].tolist():
            together = _close(values[run], values[other]).all(axis=0)
            stretch = steps if together.all() else int(together.argmin())
            if stretch == steps:
                yield run, other, _SAME
            elif telling[run, 1:stretch].sum() >= _ENOUGH:
                yield run, other, _FORKED


def _one_inside_another(
    values: FloatArray, sums: FloatArray, telling: IntArray, kept: IntArray
) -> Iterator[tuple[int, int, str]]:
    lengths = sums.shape[1] - (sums[:, ::-1] > 0.0).argmax(axis=1)  # without zeros at the end
    for run in kept[telling[kept].any(axis=1)].tolist():
        at = int((telling[run] > 0).argmax())  # a stretch that tells contains this step
        alike = _close(sums[run, at], sums[kept, at + 1 :], slack=2.0)
        for row, column in np.argwhere(alike).tolist():
            other, shift = int(kept[row]), column + 1
            stretch = int(min(lengths[other] - shift, lengths[run]))
            if other == run or telling[run, :stretch].sum() < _ENOUGH:
                continue
            mine, theirs = slice(0, stretch), slice(shift, shift + stretch)
            cheap = _close(sums[run, mine], sums[other, theirs], slack=2.0).all()
            if cheap and _close(values[run, :, mine], values[other, :, theirs]).all():
                yield min(run, other), max(run, other), _SHIFTED


def _close(a: FloatArray, b: FloatArray, slack: float = 1.0) -> npt.NDArray[np.bool_]:
    """Whether non-negative values agree but for rounding; infinities agree."""
    with np.errstate(invalid="ignore"):  # inf − inf
        near = np.abs(a - b) <= slack * _ROUNDED_APART * np.maximum(a, b)
    return np.asarray((a == b) | (near & np.isfinite(a) & np.isfinite(b)))


def _join(first: IntArray, early: int, late: int) -> None:
    """Let the kinds of two runs be one, named by the first of them all."""
    low, high = sorted((first[early], first[late]))
    first[first == high] = low
