"""The machine: draws, steps, reuses, skips, changes settings, saves and loads, between any two calls.

After every call: no `bound`, no certifiable number and no `output_specific` of the package is below
the account's exact divergence. Knows rules and the property; how a call is made is `player.py`.
"""

from __future__ import annotations

import io
import math
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import opacus
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from opacus.optimizers import optimizer as opacus_optimizer

import opacus_pil
from opacus_pil import CertificateError
from opacus_pil.errors import OpacusPilError
from tests.user_machine.account import MachineError
from tests.user_machine.player import Hand, Player, Watch
from tests.user_machine.settings import TROUBLES, settings
from tests.user_machine.world import COORDINATES, COUPLED, ORDERS, ROWS, Heads

STRONG = ("bound", "output_specific")
_ROUNDING = 1e-5  # float32 clips and sums: 1e-7 of a shift, more of a divergence at order 16
_TINY = 1e-11  # of the quadrature, absolute
_OURS = str(opacus_pil.__path__[0])
_OPACUS = str(opacus.__path__[0])
CAPS = ((1.0,) * ROWS, (0.1,) * ROWS, (1.0, 0.5, 0.2, 0.0, 0.9, 0.3))
NOISE, BOUNDS = (0.7, 1.0, 2.0, 50.0), (0.1, 1.0, 3.0)


class Violation(AssertionError):
    """A number of the package is below the truth, or the package broke."""


class UserMachine(RuleBasedStateMachine):
    """One user. `collect` keeps findings in `tally` and `found` instead of raising them."""

    collect = False
    tally: Counter[Any] = Counter()  # noqa: RUF012 shared by all sequences, on purpose
    found: list[str] = []  # noqa: RUF012 likewise
    ratios: list[float] = []  # noqa: RUF012 number / exact divergence where a claim is made

    def __init__(self) -> None:
        super().__init__()
        self.watch = Watch()
        self.watch.open()
        self.player: Player | None = None
        self.over = False
        self.trouble: frozenset[str] = frozenset()
        self.saved: tuple[bytes, Any] | None = None
        self.calls: list[str] = []
        self.unseen = True  # something happened since the property was checked
        self.other: Player | None = None  # a second training of the same engine

    def teardown(self) -> None:
        try:
            self._finish()
        finally:
            self.watch.close()

    def _finish(self) -> None:
        """Train two more steps, so that whatever was changed last has its effect; then count."""
        for _ in range(2 if self.player is not None else 0):
            self.attempt("train", self._train)
            self.numbers_are_not_below_the_truth()
        if self.player is not None and not self.over:
            label = self.player.world.engine.per_instance.guarantee
            steps = self.player.account.steps
            self.tally["end", self.setting.policy, label if steps else "no step"] += 1
            self.tally["steps"] += steps
            self.tally["explained"] += self.player.account.explained

    # --- the property -------------------------------------------------------------------------

    @invariant()
    def numbers_are_not_below_the_truth(self) -> None:
        if self.player is None or self.over or not self.unseen:
            return
        self.unseen = False
        engine, account = self.player.world.engine, self.player.account
        ledger = engine.per_instance
        label, reasons = ledger.guarantee, ledger.reasons
        self.tally["label", label] += 1
        if not account.steps:
            return
        try:
            engine.require_evidence()
            certified = self.setting.policy in ("worst_case", "capped")
        except CertificateError:
            certified = False
        if label not in STRONG and not certified:
            return
        truth = account.divergence(ORDERS)
        assumed = [reason for reason in reasons if reason.startswith("assumed, not")]
        if account.coupled and assumed:
            self.tally["excused by a named assumption"] += 1
            return
        loss, ghost = self.setting.loss, self.setting.ghost
        hidden = loss == "weighted" or (loss in COUPLED and ghost)
        players = [p for p in (self.player, self.other) if p is not None]
        hidden = hidden and not all(p.coupling_shown for p in players if p.noisy_steps)
        if hidden:  # a loss that is not the named one is found at steps that are looked at
            self.tally["excused: nothing to be seen yet"] += 1
            return
        numbers = {"rdp": ledger.rdp()}
        if self.setting.budget is not None:
            numbers["spent_rdp"] = ledger.spent_rdp()
        self.tally["claims checked"] += 1
        for name, values in numbers.items():
            low = values * (1.0 + _ROUNDING) + _TINY < truth
            if low.any():
                row, k = (int(v) for v in np.argwhere(low)[0])
                self.violate(
                    f"{name} of row {row} at order {ORDERS[k]} is {values[row, k]:.6g}, labelled "
                    f"{label}{' and certifiable' if certified else ''}; exact {truth[row, k]:.6g}"
                )
                return
        if self.setting.budget is None:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = ledger.rdp() / truth
            if np.isfinite(ratio).any():
                self.ratios.append(float(np.nanmin(ratio[np.isfinite(ratio)])))
        self._epsilon_too(engine, truth)
        if self.setting.history and self.setting.budget is None and np.isfinite(truth).all():
            pair = ledger.group_rdp([3, 4])  # coordinates of their own: what both lose adds up
            if (pair * (1.0 + _ROUNDING) + _TINY < truth[3] + truth[4]).any():
                self.violate(f"group_rdp {pair} is below {truth[3] + truth[4]}")

    def _epsilon_too(self, engine: Any, truth: np.ndarray) -> None:
        """ε is that of the curve, by the published formula."""
        delta, orders = 1e-2, np.array(ORDERS)
        exact = truth + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
        found = engine.get_per_instance_epsilon(delta).epsilon
        exact = np.where((truth == 0.0).any(axis=1), 0.0, np.maximum(exact.min(axis=1), 0.0))
        low = found * (1 + _ROUNDING) + 1e-9 < exact
        if low.any() and self.setting.budget is None:
            self.violate(f"epsilon {found} is below {exact}")

    def violate(self, words: str) -> None:
        message = f"{words}\n  {self.player.setting if self.player else ''}\n  {self.calls}"
        self.tally["violations"] += 1
        self.found.append(message)
        self.over = True
        if not self.collect:
            raise Violation(message)

    def attempt(self, name: str, call: Callable[[], Any]) -> bool:
        """Make one call as a user does, who goes on after an error; return whether it succeeded.

        An error is the package's word or Opacus's; anything else that comes from the package's code
        is a finding, and so is a model that moved although caps made the step fail.
        """
        if self.over:
            return False
        assert self.player is not None
        self.calls.append(name)
        self.tally["rule", name.split(" ")[0]] += 1
        self.unseen = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except MachineError as error:
            self.violate(f"the machine lost count: {error}")
            return False
        except Exception as error:
            self.calls.append(f"({type(error).__name__})")
            self._judge(error)
            if self.player.moved_and_failed and self.setting.policy == "capped":
                self.violate(f"the model moved in a call that failed under caps: {error}")
            return False
        return True

    def _judge(self, error: Exception) -> None:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        own = [f for f in files if f.startswith((_OURS, _OPACUS + "/")) or "user_machine" in f]
        last = own[-1] if own else ""
        ours = last.startswith(_OURS)
        if ours and not isinstance(error, OpacusPilError) and not str(error).startswith("Expected"):
            self.violate("crash: " + "".join(traceback.format_exception(error))[-900:])
        elif "user_machine" in last:
            raise error
        kind = "refused" if ours else "Opacus"
        self.tally[kind, type(error).__name__, str(error)[:60]] += 1

    # --- set up -------------------------------------------------------------------------------

    @initialize(setting=settings(), troubles=st.sampled_from(("none", "one", "none", "all")),
                kind=st.sampled_from(TROUBLES), first=st.integers(0, 2))  # fmt: skip
    def begin(self, setting: Any, troubles: str, kind: str, first: int) -> None:
        self.setting = setting
        self.trouble = frozenset({"none": (), "one": (kind,), "all": TROUBLES}[troubles])
        self.tally["policy", setting.policy] += 1
        self.tally["sequences"] += 1
        self.calls.append(f"trouble: {troubles} {kind if troubles == 'one' else ''}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.player = Player(setting, self.watch)
        for _ in range(first):
            self.attempt("train", self._train)

    def may(self, trouble: str) -> bool:
        return self.player is not None and not self.over and trouble in self.trouble

    @property
    def hand(self) -> Hand | None:
        return None if self.player is None else self.player.hand

    def fresh(self) -> Hand | None:
        """The next batch of the loader, in this pass or the next one."""
        assert self.player is not None
        return self.player.fetch() or self.player.fetch()

    # --- training as everybody does ------------------------------------------------------------

    @precondition(lambda self: self.player is not None)
    @rule(count=st.integers(1, 3))
    def train(self, count: int) -> None:
        for _ in range(count):
            self.attempt("train", self._train)

    @precondition(lambda self: self.player is not None)
    @rule(count=st.integers(1, 4))
    def train_on(self, count: int) -> None:
        for _ in range(count):
            self.attempt("train", self._train)

    def _train(self, factor: float = 1.0) -> None:
        hand = self.fresh()
        if hand is not None:
            self.player.train(hand, factor=factor)

    @precondition(lambda self: self.player is not None)
    @rule()
    def train_to_the_end_of_the_pass(self) -> None:
        def rest() -> None:
            for _ in range(12):
                hand = self.player.fetch()
                if hand is None or self.player.setting.entry == "attach without loader":
                    return
                self.player.train(hand)

        self.attempt("rest", rest)

    @precondition(lambda self: self.player is not None and (self.hand is None or self.hand.used))
    @rule()
    def take(self) -> None:
        self.attempt("take", self.fresh)

    @precondition(lambda self: self.hand is not None and not self.hand.used)
    @rule()
    def backward(self) -> None:
        def both() -> None:
            self.player.zero_grad()
            self.player.backward(self.hand)

        self.attempt("backward", both)

    @precondition(lambda self: self.player is not None and self.player.pending)
    @rule()
    def step(self) -> None:
        self.attempt("step", self.player.step)

    @precondition(lambda self: self.player is not None)
    @rule(modes=st.booleans())
    def evaluate(self, modes: bool) -> None:
        def look() -> None:
            module = self.player.world.module
            if modes:
                module.eval()
            with torch.no_grad():
                for x, _ in self.player.world.loader:
                    module(x)
            module.train()
            self.player.iterator = None

        self.attempt("evaluate", look)

    # --- settings, between any two calls -------------------------------------------------------

    @precondition(lambda self: self.player is not None)
    @rule(value=st.sampled_from(NOISE))
    def set_noise(self, value: float) -> None:
        optimizer = self.player.world.optimizer
        self.attempt(f"noise {value}", lambda: setattr(optimizer, "noise_multiplier", value))

    @precondition(lambda self: self.player is not None)
    @rule(value=st.sampled_from(BOUNDS))
    def set_bound(self, value: float) -> None:
        """Change the clip bound everywhere it stands."""

        def change() -> None:
            world = self.player.world
            world.optimizer.max_grad_norm = value
            if self.setting.clipping == "per_layer":
                world.optimizer.max_grad_norms = [value, value]
                world.optimizer.max_grad_norm = math.hypot(value, value)
            if self.setting.ghost:
                world.module.max_grad_norm = value

        self.attempt(f"bound {value}", change)

    @precondition(lambda self: self.player is not None)
    @rule(on=st.booleans())
    def train_second(self, on: bool) -> None:
        """Freeze a parameter, or unfreeze it again."""

        def change() -> None:
            self.player.strange |= bool(self.player.pending) or self.setting.ghost
            self.player.stale |= self.setting.ghost
            self.player.world.inner.second.weight.requires_grad_(on)

        self.attempt(f"second {on}", change)

    @precondition(lambda self: self.player is not None and self.setting.policy == "capped")
    @rule(caps=st.sampled_from(CAPS))
    def set_caps(self, caps: tuple[float, ...]) -> None:
        def change() -> None:
            self.player.world.engine.set_caps(list(caps))
            self._clip_to(np.array(caps))

        self.attempt(f"caps {caps}", change)

    def _clip_to(self, caps: np.ndarray) -> None:
        for player in (self.player, self.other):
            if player is not None:
                player.caps = caps

    @precondition(lambda self: self.player is not None)
    @rule(what=st.sampled_from(("leave", "lr", "refresh", "epsilon", "worst")))
    def look(self, what: str) -> None:
        def call() -> None:
            engine = self.player.world.engine
            if what == "leave":
                self.player.leave()
            elif what == "lr":
                self.player.world.plain.param_groups[0]["lr"] *= 0.5
            elif what == "refresh":
                engine.refresh_norms()
            elif what == "epsilon":
                engine.get_per_instance_epsilon(1e-5)
            else:
                engine.get_epsilon(1e-5)

        self.attempt(what, call)

    # --- files --------------------------------------------------------------------------------

    @precondition(lambda self: self.player is not None)
    @rule()
    def save(self) -> None:
        def call() -> None:
            file, world = io.BytesIO(), self.player.world
            world.engine.save_checkpoint(path=file, module=world.module, optimizer=world.optimizer)
            state = (self.player.account.copy(), self.player.caps, self.player.steady())
            self.saved = (file.getvalue(), state)

        self.attempt("save", call)

    @precondition(lambda self: self.player is not None and self.saved is not None)
    @rule(where=st.sampled_from(("same", "weights", "copy", "other engine")))
    def load(self, where: str) -> None:
        def call() -> None:
            data, state = self.saved
            player = self.player
            if where == "copy":
                twin = opacus.GradSampleModule(Heads())
                player.world.engine.load_checkpoint(path=io.BytesIO(data), module=twin)
                return
            if where == "other engine":
                player = Player(self.setting, self.watch)
            world = player.world
            optimizer = None if where == "weights" else world.optimizer
            world.engine.load_checkpoint(
                path=io.BytesIO(data), module=world.module, optimizer=optimizer
            )
            player.account, player.caps = state[0].copy(), state[1]
            player.resume(state[2] if optimizer is not None else None)
            if where == "other engine":
                self.other = None
            elif self.other is not None:
                self.other.account, self.other.caps = player.account, player.caps
            self.player = player

        self.attempt(f"load {where}", call)

    @precondition(lambda self: self.may("second model"))
    @rule()
    def go_to_the_other_model(self) -> None:
        """Train another model with the same engine, in turns."""

        def call() -> None:
            if self.other is None:
                self.other = Player(self.setting, self.watch, beside=self.player)
            self.player, self.other = self.other, self.player

        self.attempt("other-model", call)

    # --- trouble with batches ------------------------------------------------------------------

    @precondition(lambda self: self.may("reuse") and self.hand is not None)
    @rule()
    def reuse(self) -> None:
        def call() -> None:
            self.hand.named = None  # who says rows again vouches for other coins
            self.player.train(self.hand)

        self.attempt("reuse", call)

    @precondition(lambda self: self.may("skip"))
    @rule(why=st.sampled_from(("always", "empty", "row 0")))
    def skip(self, why: str) -> None:
        def call() -> None:
            hand = self.fresh()
            if hand is None:
                return
            rows = hand.parts[0].draw.rows
            fires = {"always": True, "empty": not rows, "row 0": 0 in rows}[why]
            if not fires:
                self.player.train(hand)
            elif why != "always":
                self.calls.append("(fires)")
                if hand.named is None and self.setting.policy != "participation":
                    self.player.account.skip(hand.parts[0].draw, why)

        self.attempt(f"skip {why}", call)

    @precondition(lambda self: self.may("foreign"))
    @rule(rows=st.lists(st.integers(0, ROWS - 1), max_size=4))
    def train_on_rows_of_my_own(self, rows: list[int]) -> None:
        self.attempt(f"foreign {rows}", lambda: self.player.train(self.player.by_hand(rows)))

    @precondition(lambda self: self.may("coins"))
    @rule()
    def train_on_coins_of_my_own(self) -> None:
        self.attempt("coins", lambda: self.player.train(self.player.own_coins()))

    @precondition(lambda self: self.may("join"))
    @rule()
    def join_two_batches(self) -> None:
        def call() -> None:
            one, two = self.fresh(), self.fresh()
            if one is None or two is None:
                return
            both = Hand(torch.cat([one.x, two.x]), torch.cat([one.y, two.y]),
                        [*one.parts, *two.parts])  # fmt: skip
            self.player.train(both, strange=self.setting.policy == "capped")

        self.attempt("join", call)

    @precondition(lambda self: self.may("rows"))
    @rule(how=st.sampled_from(("twice", "without row 3", "backwards")))
    def change_rows(self, how: str) -> None:
        def call() -> None:
            hand = self.fresh()
            if hand is None:
                return
            part = hand.parts[0]
            if how == "twice":
                hand.x, hand.y = torch.cat([hand.x, hand.x]), torch.cat([hand.y, hand.y])
                part.copies = part.copies * 2
            elif how == "backwards":
                hand.x, hand.y = hand.x.flip(0), hand.y.flip(0)
            else:
                kept = hand.x[:, 2 * COORDINATES + 3] == 0
                hand.x, hand.y = hand.x[kept], hand.y[kept]
                part.copies = part.copies.copy()
                part.copies[3] = 0
            self.player.account.coupled = True
            self.player.train(hand, strange=self.setting.policy == "capped")

        self.attempt(f"rows {how}", call)

    @precondition(lambda self: self.may("passes"))
    @rule(use=st.sampled_from(("new", "old", "both")))
    def two_passes_side_by_side(self, use: str) -> None:
        def call() -> None:
            player = self.player
            first = player.iterator, player.draw, player.piece
            player.iterator = None
            new = player.fetch()
            second = player.iterator, player.draw, player.piece
            player.iterator, player.draw, player.piece = first
            if use == "new":
                player.iterator, player.draw, player.piece = second
                if new is not None:
                    player.train(new)
                return
            old = player.fetch()
            if old is not None:
                player.train(old)
            if use == "both" and new is not None:
                player.train(new)

        self.attempt(f"passes {use}", call)

    @precondition(lambda self: self.may("ahead"))
    @rule(order=st.sampled_from(("first", "second", "both")))
    def fetch_ahead(self, order: str) -> None:
        def call() -> None:
            one, two = self.fresh(), self.fresh()
            for hand, name in ((one, "first"), (two, "second")):
                if hand is not None and order in (name, "both"):
                    self.player.train(hand)

        self.attempt(f"ahead {order}", call)

    # --- trouble with a step -------------------------------------------------------------------

    @precondition(lambda self: self.may("scale"))
    @rule(factor=st.sampled_from((50.0, 0.01)))
    def scale_the_loss_once(self, factor: float) -> None:
        self.attempt(f"scale {factor}", lambda: self._train(factor))

    @precondition(lambda self: self.may("spare"))
    @rule(on=st.booleans())
    def train_spare(self, on: bool) -> None:
        """Unfreeze a parameter that was frozen when training was made private."""

        def change() -> None:
            self.player.stale = True
            self.player.world.inner.spare.weight.requires_grad_(on)

        self.attempt(f"spare {on}", change)

    @precondition(lambda self: self.may("plain step"))
    @rule()
    def plain_step(self) -> None:
        def call() -> None:
            self.player.strange = True
            self.player.world.plain.step()

        self.attempt("plain", call)

    @precondition(lambda self: self.may("noise"))
    @rule(share=st.sampled_from((0.0, 0.5, None)))
    def replace_the_noise(self, share: float | None) -> None:
        """Put a method of one's own in the place of add_noise; None: take it away again."""

        def change() -> None:
            optimizer = self.player.world.optimizer
            if share is None:
                vars(optimizer).pop("add_noise", None)
                return

            def add_noise(self: Any) -> None:
                for p in self.params:
                    std = share * self.noise_multiplier * self.max_grad_norm
                    made = opacus_optimizer._generate_noise(std=std, reference=p.summed_grad)
                    p.grad = (p.summed_grad + made).view_as(p)

            optimizer.add_noise = types.MethodType(add_noise, optimizer)

        self.attempt(f"noise-replaced {share}", change)

    @precondition(lambda self: self.may("second backward") and self.hand is not None)
    @rule(private=st.booleans())
    def second_backward(self, private: bool) -> None:
        def call() -> None:
            self.player.strange |= not private
            self.player.backward(self.hand, private=private)
            self.player.strange |= not private

        self.attempt(f"second-backward {private}", call)

    @precondition(lambda self: self.may("signal"))
    @rule()
    def signal_skip(self) -> None:
        self.attempt("signal", self.player.world.optimizer.signal_skip_step)

    @precondition(lambda self: self.may("hook"))
    @rule(what=st.sampled_from(("halve", "denoise", "double noise")))
    def attach_a_hook(self, what: str) -> None:
        def halve(optimizer: Any) -> None:
            for p in optimizer.params:
                p.grad.mul_(0.5)

        def denoise(optimizer: Any) -> None:
            for p in optimizer.params:
                p.grad.copy_(p.summed_grad.view_as(p.grad))

        def double(optimizer: Any) -> None:
            optimizer.noise_multiplier *= 2.0

        def change() -> None:
            hook = {"halve": halve, "denoise": denoise, "double noise": double}[what]
            if what == "halve":
                self.player.factor *= 0.5
            self.player.stale |= what == "denoise"
            self.player.world.optimizer.attach_step_hook(hook)

        self.attempt(f"hook {what}", change)

    @precondition(lambda self: self.may("clip grad") and self.player.pending)
    @rule()
    def clip_the_whole_gradient(self) -> None:
        def call() -> None:
            self.player.strange |= self.setting.ghost
            torch.nn.utils.clip_grad_norm_(self.player.world.inner.parameters(), 0.5)

        self.attempt("clip-grad", call)

    @precondition(lambda self: self.may("one bound"))
    @rule(value=st.sampled_from(BOUNDS), where=st.sampled_from(("noise", "clip")))
    def change_one_of_two_bounds(self, value: float, where: str) -> None:
        """Only what the noise follows, as Opacus's schedulers do, or only what clips."""

        def change() -> None:
            world = self.player.world
            if where == "noise":
                world.optimizer.max_grad_norm = value
            elif self.setting.clipping == "per_layer":
                world.optimizer.max_grad_norms = [value, 1.0]
            elif self.setting.ghost:
                world.module.max_grad_norm = value

        self.attempt(f"one-bound {where} {value}", change)

    @precondition(lambda self: self.may("caps in hand") and self.setting.policy == "capped")
    @rule()
    def set_caps_by_who_is_in_hand(self) -> None:
        def call() -> None:
            hand = self.fresh()
            if hand is None or hand.named is not None:  # nobody sees coins of one's own
                return
            here = hand.parts[0].here
            self.player.world.engine.set_caps(np.where(here, 1.0, 0.0))
            self._clip_to(np.ones(ROWS))  # whoever is drawn has cap 1
            try:
                self.player.train(hand)
            finally:
                self._clip_to(np.where(here, 1.0, 0.0))

        self.attempt("caps-in-hand", call)


def twin(**options: Any) -> type[UserMachine]:
    """A machine with a tally of its own."""
    fresh = {"tally": Counter(), "found": [], "ratios": [], **options}
    return type("UserMachine", (UserMachine,), fresh)


__all__ = ["STRONG", "UserMachine", "Violation", "replace", "twin"]
