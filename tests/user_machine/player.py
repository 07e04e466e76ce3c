"""Plays the user: calls Opacus and the package as loops do, and keeps the true account.

What was noised and drawn is what `watch.py` saw, what moved the model is read off the plain
optimizer. Knows the calls of a training loop; no rule, and nothing of how a number is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.user_machine.account import Account, Draw, MachineError, Part, Term
from tests.user_machine.watch import Noised, Watch
from tests.user_machine.world import (
    COORDINATES,
    COUPLED,
    GRADIENTS,
    PHYSICAL,
    ROWS,
    TURNED,
    WEIGHTS,
    Setting,
    World,
    copies,
    rows_of,
    turned,
)

_CLOSE = 1e-5  # two float32 additions


@dataclass(eq=False)
class Hand:
    """A batch in the user's hands."""

    x: torch.Tensor
    y: torch.Tensor
    parts: list[Part]
    used: bool = False
    named: list[int] | None = None  # rows to say in batch(indices=...)


class Player:
    """One training, what its user holds, and the account of it."""

    def __init__(self, setting: Setting, watch: Watch, *, beside: Player | None = None) -> None:
        """Begin a training; `beside` another one, of the same engine, it has the same account."""
        self.setting, self.watch = setting, watch
        engine = None if beside is None else beside.world.engine
        self.world = World(setting, watch=self._moved, engine=engine)
        self.account = Account(ROWS, filtered=setting.budget is not None)
        if beside is not None:
            self.account = beside.account
        self.account.coupled = setting.loss in (*COUPLED, TURNED) or setting.collate in (
            "twice",
            "dropping",
        )
        self.caps = None if setting.caps is None else np.array(setting.caps)
        if setting.budget is not None and self.caps is None:
            self.caps = np.ones(ROWS)
        if beside is not None:
            self.caps = beside.caps
        self.iterator: Any = None
        self.before_pass = 0  # noisy steps when it began
        self.draw: Draw | None = None  # that the pass is handing out
        self.carried: Draw | None = None  # that a loaded file may hand out again
        self.piece = 0
        self.hand: Hand | None = None
        self.pending: list[Term] = []  # backward passes that no step has taken up
        self.summed: list[Term] = []  # clipped and summed, not stepped on
        self.left_over: list[Term] = []  # what may be in the sum after a call that failed
        self.strange = False  # the user meddled with the step under way
        self.stale = False  # and with those to come
        self.factor = 1.0  # of a step hook that scales what was noised
        self.by_count = False  # the sum is divided by how many rows the batch has
        self.moves = 0
        self.moved_and_failed = False
        self.noisy_steps = 0  # since this training was made private
        self._sent: dict[int, torch.Tensor] = {}
        self._histories: list[list[Term]] = []

    # --- batches ------------------------------------------------------------------------------

    def fetch(self) -> Hand | None:
        """Take the next batch of the private loader; None: the pass is over."""
        if self.setting.entry == "attach without loader":
            return self.own_coins()
        skipped = self.world.optimizer._is_last_step_skipped
        try:
            return self._fetch()
        finally:
            if skipped and not self.world.optimizer._is_last_step_skipped:
                # Our manager has begun another draw: the sum of the one before is dropped, what no
                # step has taken up is not.
                self.summed, self.left_over = [], []

    def _fetch(self) -> Hand | None:
        if self.iterator is None:
            self.iterator = iter(self.world.loading())
            self.draw, self.before_pass = None, self.noisy_steps
        before = len(self.watch.drawn)
        try:
            x, y = next(self.iterator)
        except StopIteration:
            self.iterator = None
            if self.noisy_steps > self.before_pass:  # else it was a look at the data
                self.account.show_skips()
            return None
        rows = rows_of(x)
        if self.setting.policy == "participation":
            self._fixed(rows)
        elif len(self.watch.drawn) > before:
            drawn = self.watch.drawn[-1]
            rate = float(self.world.loader.batch_sampler.sample_rate)
            pieces = self._pieces(len(drawn.rows))
            draw = Draw(rate, frozenset(drawn.rows), pieces)
            self.draw, self.piece = self.account.by_coins(drawn.coins, draw), 0
        elif self.draw is None:
            self.draw, self.piece = self.carried, 0
        else:
            self.piece += 1
        if self.draw is None or not set(rows) <= self.draw.rows:
            raise MachineError(f"rows {rows} are not of the draw {self.draw}")
        here = np.isin(np.arange(ROWS), rows)
        counts = copies(self.setting.collate)
        if (np.bincount(rows, minlength=ROWS) != counts * here).any():
            raise MachineError(f"rows {rows} come in other numbers")
        self.hand = Hand(x, y, [Part(self.draw, here, counts, self.piece)])
        return self.hand

    def _fixed(self, rows: list[int]) -> None:
        """A batch of fixed rows: no coin; a piece of one that a manager split is one of its own."""
        self.draw, self.piece = Draw(1.0, frozenset(rows)), 0

    def _pieces(self, size: int) -> int:
        return 1 if self.setting.manager == "none" else max(-(-size // PHYSICAL), 1)

    def own_coins(self) -> Hand:
        """Draw a batch by coins of one's own, at the accounted rate, and be ready to name it."""
        rows = torch.nonzero(torch.rand(ROWS) < self.setting.rate).flatten().tolist()
        self.hand = self._by_rows(rows, Draw(self.setting.rate, frozenset(rows)))
        self.hand.named = rows
        return self.hand

    def by_hand(self, rows: list[int]) -> Hand:
        """Take rows of the data set as one likes."""
        self.hand = self._by_rows(rows, Draw(1.0, frozenset(rows)))
        return self.hand

    def _by_rows(self, rows: list[int], draw: Draw) -> Hand:
        x, y = self.world.data.tensors
        counts = np.maximum(np.bincount(rows, minlength=ROWS), 1)
        here = np.isin(np.arange(ROWS), rows)
        return Hand(x[rows].clone(), y[rows].clone(), [Part(draw, here, counts)])

    def leave(self) -> None:
        """Break out of the pass."""
        self.iterator = None
        self.account.waiting.clear()  # left at a public number of steps, as documented

    def resume(self, carried: Draw | None) -> None:
        """A file was loaded: gradients are gone, and a draw that was not through is drawn again."""
        self.iterator = None
        self.hand = None
        self.carried = carried
        self.pending, self.summed, self.left_over = [], [], []

    # --- calls --------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        self.world.optimizer.zero_grad()
        self._cleared()

    def backward(self, hand: Hand, *, factor: float = 1.0, private: bool = True) -> None:
        """Compute the loss of a batch and its gradients."""
        world, setting = self.world, self.setting
        hand.used = True
        outputs = world.module(turned(hand.x) if setting.loss == TURNED else hand.x)
        loss = world.criterion(outputs, hand.y) if private else outputs.mean()
        if setting.loss in COUPLED and setting.ghost and private and len(hand.y):
            loss = loss * (hand.y * len(hand.y) / hand.y.sum())
        factor *= 3.0 if setting.loss == "scaled" else 1.0
        before = self._held()
        try:
            (loss * factor).backward() if factor != 1.0 else loss.backward()
        except Exception:
            if not setting.ghost and all(k > n for k, n in zip(self._held(), before, strict=True)):
                self.pending.append(self._term(hand, factor))  # refused, and kept all the same
            raise
        finally:
            if setting.ghost and private:  # Opacus clears what was summed before it clips
                self._cleared()
        term = self._term(hand, factor)
        self.pending.append(term)

    def _held(self) -> list[int]:
        """Of how many backward passes every trained parameter holds the gradients."""
        heads = (self.world.inner.first, self.world.inner.second, self.world.inner.spare)
        held = [getattr(h.weight, "grad_sample", None) for h in heads if h.weight.requires_grad]
        return [len(s) if isinstance(s, list) else int(s is not None) for s in held]

    def _term(self, hand: Hand, factor: float) -> Term:
        setting, world = self.setting, self.world
        heads = [world.inner.first, world.inner.second, world.inner.spare]
        trained = np.array([head.weight.requires_grad for head in heads])
        term = Term(
            hand.parts, GRADIENTS * trained * factor, np.array([1.0]),
            per_layer=setting.clipping == "per_layer",
            weights=WEIGHTS if setting.loss in COUPLED else None, turned=setting.loss == TURNED,
            column=setting.ghost and setting.loss == "column",
        )  # fmt: skip
        if setting.ghost:
            counted = {id(p) for p in world.module.trainable_parameters}
            term.counted = np.array([id(head.weight) in counted for head in heads])
            self._clip(term, world.module.max_grad_norm)
        return term

    def _clip(self, term: Term, bound: Any) -> None:
        term.bounds = np.atleast_1d(np.array(bound, dtype=np.float64))
        term.caps = None if self.caps is None else self.caps.copy()

    def step(self) -> None:
        """Call optimizer.step(); what it releases is seen by `_moved`."""
        optimizer, setting = self.world.optimizer, self.setting
        if not setting.ghost:
            for term in self.pending:
                bounds = getattr(optimizer, "max_grad_norms", optimizer.max_grad_norm)
                self._clip(term, bounds)
        new = self.pending
        self._histories = [self.summed + new, new, self.left_over + new, self.summed]
        self.left_over = self.summed + new
        before = self.moves
        try:
            optimizer.step()
        except Exception:
            self.moved_and_failed |= self.moves > before
            raise
        self.summed = self.summed + new if optimizer._is_last_step_skipped else []
        self.left_over = []
        if not setting.ghost:
            self.pending = []

    def train(self, hand: Hand, *, factor: float = 1.0, strange: bool = False) -> None:
        """One step as everybody writes it; `strange`: its sum need not be explained."""
        with self.named(hand):
            self.zero_grad()
            self.backward(hand, factor=factor)
            self.strange |= strange
            self.step()

    @contextlib.contextmanager
    def named(self, hand: Hand) -> Iterator[None]:
        if hand.named is None:
            yield
            return
        with self.world.engine.batch(indices=hand.named):
            yield

    def _cleared(self) -> None:
        self.pending = []
        if not self.world.optimizer._is_last_step_skipped:
            self.summed, self.left_over, self.strange = [], [], False
            self.watch.noise.clear()

    # --- what moved the model -----------------------------------------------------------------

    def _moved(self, plain: torch.optim.Optimizer) -> None:
        """The plain optimizer has stepped: hold what it stepped by against what was noised."""
        if plain is not self.world.plain:
            return  # of a training that was left behind
        self.moves += 1
        heads = [self.world.inner.first, self.world.inner.second, self.world.inner.spare]
        noised = self._noised([head.weight for head in heads])
        sums, stds = np.zeros((COORDINATES, 3)), np.zeros(3)
        coins: list[int | None] = [None] * 3
        raw = np.zeros((COORDINATES, 3))
        for k, head in enumerate(heads):
            p = head.weight
            if p.grad is None or not bool((p.grad != 0).any()):
                continue
            found = noised.get(id(p))
            if found is None:
                raw[:, k] = self._unsent(p)
            else:
                sums[:, k], stds[k] = self._summed(p, found)
                coins[k] = found.coins
                if stds[k] == 0.0:
                    raw[:, k], sums[:, k] = sums[:, k], 0.0
            self._sent[id(p)] = p.grad.detach().clone()
        new = [h for h in self._histories if h] or [self.pending]
        if (raw != 0.0).any():
            self.account.release_raw([t for h in new for t in h] + self.pending, raw)
        if noised:
            self.noisy_steps += 1
            self._look()
        if (stds > 0.0).any():
            self.account.release(
                self._histories, sums=sums, stds=stds, coins=coins, by_count=self.by_count,
                strange=self.strange or self.stale or bool((raw != 0.0).any()),
            )  # fmt: skip
        self.watch.noise.clear()

    def _look(self) -> None:
        """Whether this step shows that the loop does not do what it named.

        A factor shows wherever somebody's gradient is. Rows that change each other only in a step
        that is compared with the named loss; documented: of numbers 1, 2, 4, 8, …, a few rows each.
        """
        terms = self._histories[0] if self._histories else []
        shown = self.account.shown
        shown[self] = shown.get(self, False) or self._shows(terms)

    def _shows(self, terms: list[Term]) -> bool:
        if self.setting.loss == "scaled":
            return any(bool(term.total().any()) for term in terms)
        k = self.noisy_steps
        if k & (k - 1) or len(terms) != 1:
            return False
        here = np.any([part.here for part in terms[0].parts], axis=0)
        if self.setting.loss == TURNED:
            return bool(here[4] and terms[0].total()[3].any())
        return len(set(WEIGHTS[here])) > 1 and bool(terms[0].gradients[here].any(axis=1).all())

    def _noised(self, parameters: list[Any]) -> dict[int, Noised]:
        """Which parameter was given which noise since the step began."""
        found = {}
        for one in self.watch.noise:
            for p in parameters:
                if getattr(p, "summed_grad", None) is one.reference:
                    found[id(p)] = one
        return found

    def _unsent(self, p: Any) -> np.ndarray:
        """What is new in a gradient that nobody noised: nothing, where it was released before."""
        grad = p.grad.detach()
        before = self._sent.get(id(p))
        rest = grad
        if before is not None and bool(before[0, -1] != 0.0):  # what was released, perhaps scaled
            rest = grad - before * (grad[0, -1] / before[0, -1])
        rest = rest.double().numpy().ravel()
        limit = _CLOSE * float(grad.abs().max())
        if abs(rest[-1]) > limit:
            raise MachineError("a gradient has noise that nobody added")
        return np.where(np.abs(rest) > limit, rest, 0.0)

    def _summed(self, p: Any, found: Noised) -> tuple[np.ndarray, float]:
        """Return what was really noised, and by how much."""
        optimizer = self.world.optimizer
        divisor = 1.0
        if optimizer.loss_reduction == "mean":
            divisor = float(optimizer.expected_batch_size * optimizer.accumulated_iterations)
        grad = p.grad.detach().double() * divisor / self.factor
        sums, noise = found.sums.double(), found.noise.double()
        limit = _CLOSE * (sums.abs() + noise.abs() + 1.0)
        apart = grad - sums - noise
        if bool((apart.abs() <= limit).all()):
            return sums.numpy().ravel(), found.std
        if not self.strange and not self.stale:
            raise MachineError("the model moved by another gradient than was noised")
        if bool(grad[0, -1] == 0.0):
            return grad.numpy().ravel(), 0.0  # the noise was taken off again
        if float(apart[0, -1].abs()) > float(limit[0, -1]):
            raise MachineError("a noised gradient was changed in a way that is not known")
        changed = (grad - noise).numpy().ravel()
        return np.where(np.abs(changed) > limit.numpy().ravel(), changed, 0.0), found.std
