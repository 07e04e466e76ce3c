"""The account of what really happened: who was in what was noised, by which coins, in which noise.

Every row's gradient has a coordinate of its own, so that what a row contributed is read off the
sum. Whoever was not drawn would have contributed what the step's arithmetic says, which is held
against what the drawn rows did contribute. Knows draws, sums and noise; nothing of opacus_pil.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.user_machine.exact import joint_divergence, skipped_if_empty, told_by_size

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
_SAME = 2e-4  # float32 sums of few terms; Opacus's clip is off by 1e-6 / norm besides


class MachineError(AssertionError):
    """The account does not describe what was seen: the machine's mistake, not the package's."""


@dataclass(eq=False)
class Draw:
    """Rows drawn together, by one coin of probability `rate` each; rate 1: put there by hand."""

    rate: float
    rows: frozenset[int]
    pieces: int = 1  # physical batches that it comes in


@dataclass(eq=False)
class Part:
    """What of a draw is in one physical batch.

    `copies[i]` is how often row i is in it if it is there at all, `here` who is.
    """

    draw: Draw
    here: BoolArray
    copies: NDArray[np.int64]
    piece: int = 0


@dataclass(eq=False)
class Term:
    """One clipped backward pass. `gradients` and what `sums` returns: shape (rows, parameters)."""

    parts: list[Part]
    gradients: FloatArray
    bounds: FloatArray  # per parameter, or one for all of them
    per_layer: bool = False
    caps: FloatArray | None = None
    counted: BoolArray | None = None  # parameters in the clipped norm; None: all
    weights: FloatArray | None = None  # a mean over weights instead of rows
    turned: bool = False  # row 3 pulls the other way if row 4 is there
    column: bool = False  # ghost clipping of losses of shape (rows, 1): all pairs

    def sums(self, here: Sequence[BoolArray]) -> FloatArray:
        """What each row contributes if these rows are there, one mask per part."""
        count = np.sum([p.copies * h for p, h in zip(self.parts, here, strict=True)], axis=0)
        own = self.gradients
        if self.weights is not None and count.sum():
            own = own * (self.weights * count.sum() / (count @ self.weights))[:, None]
        if self.turned and count[4]:
            own = own * np.where(np.arange(len(own)) == 3, -1.0, 1.0)[:, None]
        factors = self._factors(own)
        if self.column:
            factors = np.full_like(factors, (count[:, None] * factors).sum())
        return count[:, None] * factors * own

    def _factors(self, own: FloatArray) -> FloatArray:
        """Opacus's documented clip: bound / (norm + 1e-6), at most 1."""
        counted = own if self.counted is None else own[:, self.counted]
        if self.per_layer:
            limits = np.full(own.shape[1], np.inf)
            limits[: len(self.bounds)] = self.bounds
            return np.minimum(limits / (np.abs(own) + 1e-6), 1.0)
        caps = np.ones(len(own)) if self.caps is None else self.caps
        norms = np.linalg.norm(counted, axis=1)
        return np.minimum(self.bounds[0] * caps / (norms + 1e-6), 1.0)[:, None]

    def total(self) -> FloatArray:
        """What each row really contributes."""
        return self.sums([part.here for part in self.parts])

    def shift(self, row: int, position: int, *, present: bool) -> FloatArray:
        """By what the sum moves if `row` leaves (or joins) this part, its coordinates included."""
        masks = [part.here for part in self.parts]
        pair = []
        for inside in (True, False):
            mask = masks[position].copy()
            mask[row] = inside
            pair.append(self.sums([*masks[:position], mask, *masks[position + 1 :]]))
        return (pair[0] - pair[1]).ravel()


@dataclass
class Account:
    """What was released, row by row: shifts in units of the noise, by coin and step.

    Attributes:
        explained: Steps whose sum the account's arithmetic gives; the others are read off.
        coupled: Whether a row's loss or its place in a batch depended on other rows.
        shown: By training, whether it has shown what it does beside the loss that it named.
    """

    rows: int
    filtered: bool = False  # rows may be left out for good once their budget is spent
    steps: int = 0
    explained: int = 0
    coupled: bool = False
    infinite: BoolArray = field(init=False)
    left_in: NDArray[np.int64] = field(init=False)  # step until which a row was seen to take part
    shifts: list[dict[Draw, list[tuple[int, FloatArray]]]] = field(init=False)
    skips: list[tuple[Draw, str]] = field(default_factory=list)
    waiting: list[tuple[Draw, str]] = field(default_factory=list)  # skips that nothing shows yet
    counts: list[tuple[Draw, int]] = field(default_factory=list)  # scales of noise that tell sizes
    draws: dict[int, Draw] = field(default_factory=dict)  # by the coins that were thrown
    shown: dict[object, bool] = field(default_factory=dict)
    noises: dict[int, tuple[int, int]] = field(default_factory=dict)  # step and parameter of each

    def __post_init__(self) -> None:
        self.infinite = np.zeros(self.rows, dtype=bool)
        # Of a row that a filter may leave out only the steps until it was last seen are sure.
        last = 0 if self.filtered else np.iinfo(np.int64).max
        self.left_in = np.full(self.rows, last)
        self.shifts = [{} for _ in range(self.rows)]

    def copy(self) -> Account:
        """As it is now; draws are shared, since coins are."""
        twin = copy.copy(self)
        twin.infinite, twin.left_in = self.infinite.copy(), self.left_in.copy()
        twin.shifts = [{d: list(found) for d, found in row.items()} for row in self.shifts]
        twin.shown = dict(self.shown)
        twin.skips, twin.waiting = list(self.skips), list(self.waiting)
        twin.counts, twin.draws, twin.noises = (
            list(self.counts),
            dict(self.draws),
            dict(self.noises),
        )
        return twin

    # --- what happens -------------------------------------------------------------------------

    def by_coins(self, coins: int, draw: Draw) -> Draw:
        """Return the draw that these coins made before, if there is one: it is no new one."""
        before = self.draws.setdefault(coins, draw)
        return before if (before.rate, before.rows) == (draw.rate, draw.rows) else draw

    def skip(self, draw: Draw, rule: str) -> None:
        """A draw was left out because of who was in it."""
        self.waiting.append((draw, rule))

    def show_skips(self) -> None:
        """From here on the number of steps tells what was skipped."""
        self.skips += self.waiting
        self.waiting = []

    def release(
        self, histories: Sequence[Sequence[Term]], *, sums: FloatArray, stds: FloatArray,
        coins: Sequence[int | None] = (), by_count: bool = False, strange: bool = False,
    ) -> None:  # fmt: skip
        """A noised sum was released.

        Args:
            histories: What may have been summed, the likeliest first.
            sums: Shape (coordinates, parameters), before noise; the last coordinate is nobody's.
            stds: Shape (parameters,), of the noise that was added; 0: that parameter got none.
            coins: Shape (parameters,), that the noise was made of.
            by_count: Whether the noisy sum is divided by the number of rows, which its scale tells.
            strange: Whether the user did something whose sum need not be explained.
        """
        self.steps += 1
        self.show_skips()
        scale = 1.0 + np.abs(sums)
        for terms in histories:
            expected = np.sum([t.total() for t in terms], axis=0) if terms else 0.0 * sums[:-1]
            expected = np.vstack([expected, np.zeros(sums.shape[1])])
            close = np.abs(expected - sums) <= _SAME * scale
            close |= stds == 0.0
            out = (sums == 0.0).all(axis=1)
            if self.filtered:
                close |= out[:, None]
            if close.all():
                self.explained += 1
                if by_count and len(terms) == 1 and len(terms[0].parts) == 1:
                    # One thing that the step tells; what its sum tells besides is left out.
                    self.counts.append((terms[0].parts[0].draw, int((stds > 0.0).sum())))
                    return
                self._add(terms, stds)
                self._compare_noise(coins, stds)
                if self.filtered:
                    self._note_left_out(terms, out)
                return
        if not strange:
            raise MachineError(f"step {self.steps}: sums {sums.tolist()} are not explained")
        self._read_off(histories, sums, stds)

    def release_raw(self, terms: Sequence[Term], sums: FloatArray) -> None:
        """Sums were released without noise: whoever is in them, or could be, has lost all."""
        self.steps += 1
        self.show_skips()
        self.infinite |= (sums[:-1] != 0.0).any(axis=1)
        moved = (sums != 0.0).any(axis=0)
        for term in terms:
            for part in term.parts:
                if part.draw.rate < 1.0 and not term.column and term.weights is None:
                    could = (part.copies > 0) & (term.gradients[:, moved] != 0.0).any(axis=1)
                    self.infinite |= could

    # --- what it amounts to -------------------------------------------------------------------

    def divergence(self, orders: Sequence[float]) -> FloatArray:
        """Return each row's exact Rényi divergence, shape (rows, orders), the larger direction."""
        found = np.zeros((self.rows, len(orders), 2))
        for row in range(self.rows):
            for coins in self._components(row):
                for k, order in enumerate(orders):
                    found[row, k] += joint_divergence(coins, order)
            for draw, rule in self.skips:
                if rule == "row 0":
                    if row == 0 and draw.rate < 1.0:
                        self.infinite[row] = True
                    continue
                for k, order in enumerate(orders):
                    found[row, k] += skipped_if_empty(draw.rate, self.rows - 1, order)
            for draw, size in self.counts:
                for k, order in enumerate(orders):
                    found[row, k] += told_by_size(draw.rate, self.rows - 1, size, order)
        larger: FloatArray = found.max(axis=2)
        larger[self.infinite] = np.inf
        return larger

    # --- inside -------------------------------------------------------------------------------

    def _add(self, terms: Sequence[Term], stds: FloatArray) -> None:
        whole = _pieces_here(terms)
        for term in terms:
            noise = np.tile(stds, self.rows)
            for position, part in enumerate(term.parts):
                for row in range(self.rows):
                    here = bool(part.here[row])
                    elsewhere = row in part.draw.rows and not here
                    if elsewhere or (part.draw.rate == 1.0 and not here):
                        continue
                    if not here and (part.piece > 0 or part.draw not in whole):
                        continue
                    moved = term.shift(row, position, present=here)
                    vector = np.divide(moved, noise, out=np.zeros_like(moved), where=noise > 0)
                    if vector.any():
                        self.shifts[row].setdefault(part.draw, []).append((self.steps, vector))

    def _compare_noise(self, coins: Sequence[int | None], stds: FloatArray) -> None:
        """Noise that was there before hides nothing of the difference of the two sums."""
        for k, mark in enumerate(coins):
            if mark is None or stds[k] == 0.0:
                continue
            before = self.noises.setdefault(mark, (self.steps, k))
            if before == (self.steps, k):
                continue
            for row in range(self.rows):
                then, now = self._moves(row, *before), self._moves(row, self.steps, k)
                if then.keys() != now.keys():
                    self.infinite[row] = True
                for draw in then.keys() & now.keys():
                    self.infinite[row] |= not np.allclose(then[draw], now[draw], rtol=_SAME)
                for draw, found in self.shifts[row].items():  # the same once more tells nothing
                    self.shifts[row][draw] = [
                        (s, _without(v, k, len(stds)) if s == self.steps else v) for s, v in found
                    ]

    def _moves(self, row: int, step: int, k: int) -> dict[Draw, FloatArray]:
        """By what this row moves one parameter in one step, in units of the noise, by its coin."""
        found = {}
        for draw, entries in self.shifts[row].items():
            own = [v.reshape(self.rows, -1)[:, k] for s, v in entries if s == step]
            if own and np.any(own):
                found[draw] = np.sum(own, axis=0)
        return found

    def _note_left_out(self, terms: Sequence[Term], out: BoolArray) -> None:
        """Who contributed was not left out before; of who was not drawn nothing is known."""
        owed = np.sum([term.total() for term in terms], axis=0)
        self.left_in[owed.any(axis=1) & ~out[:-1]] = self.steps

    def _read_off(
        self, histories: Sequence[Sequence[Term]], sums: FloatArray, stds: FloatArray
    ) -> None:
        """Take what drawn rows contributed as it is, where one coin only can have brought it."""
        parts = {id(p): p for terms in histories for t in terms for p in t.parts}.values()
        for row in range(self.rows):
            draws = {part.draw for part in parts if part.here[row]}
            moved = sums[row]
            if len(draws) != 1 or (np.abs(moved) <= _SAME).all():
                continue
            vector = np.zeros((self.rows, len(stds)))
            vector[row] = np.divide(moved, stds, out=np.zeros_like(moved), where=stds > 0)
            (draw,) = draws
            self.shifts[row].setdefault(draw, []).append((self.steps, vector.ravel()))

    def _components(self, row: int) -> list[list[tuple[float, FloatArray]]]:
        """Coins whose steps meet, each with its shifts over all steps of the group."""
        entries = {
            draw: [(step, v) for step, v in found if step <= self.left_in[row]]
            for draw, found in self.shifts[row].items()
        }
        groups: list[tuple[set[int], list[Draw]]] = []
        for draw, found in entries.items():
            steps, members = {step for step, _ in found}, [draw]
            apart = []
            for others, drawn in groups:
                if others & steps:
                    steps, members = steps | others, members + drawn
                else:
                    apart.append((others, drawn))
            groups = [*apart, (steps, members)]
        result = []
        for steps, members in groups:
            order = {step: k for k, step in enumerate(sorted(steps))}
            coins = []
            for draw in members:
                if not entries[draw]:
                    continue
                size = len(entries[draw][0][1])
                shift = np.zeros(len(order) * size)
                for step, vector in entries[draw]:
                    shift[order[step] * size : (order[step] + 1) * size] += vector
                coins.append((draw.rate, shift))
            if coins:
                result.append(coins)
        return result


def _without(vector: FloatArray, k: int, parameters: int) -> FloatArray:
    kept = vector.reshape(-1, parameters).copy()
    kept[:, k] = 0.0
    return kept.ravel()


def _pieces_here(terms: Sequence[Term]) -> set[Draw]:
    """Draws of which every physical batch is in these terms."""
    seen: dict[Draw, set[int]] = {}
    for term in terms:
        for part in term.parts:
            seen.setdefault(part.draw, set()).add(part.piece)
    return {draw for draw, pieces in seen.items() if pieces == set(range(draw.pieces))}
