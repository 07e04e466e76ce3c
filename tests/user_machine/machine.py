"""The property that is held after every call of a user, and how calls are made and judged.

No `bound`, no certifiable number and no `output_specific` of the package is below the account's
exact divergence; and nothing breaks. Which calls there are is `ordinary.py` and `troubles.py`.
"""

from __future__ import annotations

import math
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import opacus
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

import opacus_pil
from opacus_pil import CertificateError
from opacus_pil.errors import OpacusPilError
from tests.user_machine.account import MachineError
from tests.user_machine.player import Hand, Player, Watch
from tests.user_machine.settings import TROUBLES, settings, suited, without_trouble
from tests.user_machine.world import COUPLED, ORDERS, TURNED

STRONG = ("bound", "output_specific")
_ROUNDING = 1e-5  # float32 clips and sums: 1e-7 of a shift, more of a divergence at order 16
_TINY = 1e-11  # of the quadrature, absolute
_TROUBLED = ("none",) * 3 + ("one",) * 4 + ("all",)
_OURS = str(opacus_pil.__path__[0])
_OPACUS = str(opacus.__path__[0])


class Violation(AssertionError):
    """A number of the package is below the truth, or the package broke."""


class Found(BaseException):
    """The first finding, thrown past hypothesis, which would look for a shorter one."""


class JudgedUser(RuleBasedStateMachine):
    """One user.

    `collect` keeps findings in `found` instead of raising them, `first` stops at the first one,
    `only` is the one kind of trouble of every sequence ("none": none).
    """

    collect = False
    first = False
    only: str | None = None
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
            self.finish()
        finally:
            self.watch.close()

    def finish(self) -> None:
        """Train two more steps, so that whatever was changed last has its effect; then count."""
        for _ in range(2 if self.player is not None else 0):
            self.attempt("train", self.train_once)
            self.numbers_are_not_below_the_truth()
        if self.player is not None and not self.over:
            label = self.player.world.engine.per_instance.guarantee
            steps = self.player.account.steps
            setting = self.setting
            self.tally["end", setting.policy, setting.mode, label if steps else "no step"] += 1
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
        self.tally["seen", self.setting.policy, self.setting.mode, label in STRONG] += 1
        try:
            engine.account.require_evidence()
            certified = self.setting.policy in ("worst_case", "capped")
        except CertificateError:
            certified = False
        if label not in STRONG and not certified:
            return
        self._hold(self._fault(certified, account.divergence(ORDERS)), label, reasons)

    def _hold(self, fault: str | None, label: str, reasons: Sequence[str]) -> None:
        """A number that is below is a finding, or excused by what the package says of itself."""
        assert self.player is not None
        assumed = any(reason.startswith("assumed, not") for reason in reasons)
        if fault and self.player.account.coupled and assumed:
            self.tally["excused by a named assumption"] += 1
        elif fault and self._unseen_yet():
            self.tally["excused: nothing to be seen yet", self.setting.loss] += 1
        else:
            self.tally["claims checked"] += 1
            if fault:
                self.violate(f"{fault}; labelled {label}")

    def _fault(self, certified: bool, truth: np.ndarray) -> str | None:
        """Compare every number that has a claim with the truth; return words of one below it."""
        assert self.player is not None
        engine = self.player.world.engine
        ledger = engine.per_instance
        numbers = {"rdp": ledger.rdp()}
        if self.setting.budget is not None:
            numbers["spent_rdp"] = ledger.spent_rdp()
        for name, values in numbers.items():
            low = values * (1.0 + _ROUNDING) + _TINY < truth
            if low.any():
                row, k = (int(v) for v in np.argwhere(low)[0])
                return (
                    f"{name} of row {row} at order {ORDERS[k]} is {values[row, k]:.6g}"
                    f"{', certifiable' if certified else ''}; exact {truth[row, k]:.6g}"
                )
        if self.setting.budget is not None:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = ledger.rdp() / truth
        if np.isfinite(ratio).any():
            self.ratios.append(float(np.nanmin(ratio[np.isfinite(ratio)])))
        if self.setting.history and np.isfinite(truth).all():
            pair = ledger.group_rdp([3, 4])  # coordinates of their own: what both lose adds up
            if (pair * (1.0 + _ROUNDING) + _TINY < truth[3] + truth[4]).any():
                return f"group_rdp {pair} is below {truth[3] + truth[4]}"
        return self._epsilon_too(engine, truth)

    def _unseen_yet(self) -> bool:
        """Whether the loop does not do what it named, and nothing that could show it has run.

        A factor shows at any step with a gradient in it. Rows that change each other show where
        they meet in a step that is looked at: a documented limit, other steps are not compared.
        """
        loss, ghost = self.setting.loss, self.setting.ghost
        if loss == "scaled" and self.setting.policy != "full":
            return False  # no other label rests on what the loss is beside its sum over rows
        if not (loss in ("scaled", "weighted", TURNED) or (loss in COUPLED and ghost)):
            return False
        assert self.player is not None
        return not all(self.player.account.shown.values())

    def _epsilon_too(self, engine: Any, truth: np.ndarray) -> str | None:
        """ε is that of the curve, by the published formula."""
        delta, orders = 1e-2, np.array(ORDERS)
        exact = truth + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
        found = engine.get_per_instance_epsilon(delta).epsilon
        exact = np.where((truth == 0.0).any(axis=1), 0.0, np.maximum(exact.min(axis=1), 0.0))
        low = found * (1 + _ROUNDING) + 1e-9 < exact
        return f"epsilon {found} is below {exact}" if low.any() else None

    def violate(self, words: str) -> None:
        message = f"{words}\n  {self.player.setting if self.player else ''}\n  {self.calls}"
        self.tally["violations"] += 1
        self.found.append(message)
        self.over = True
        if self.first:
            raise Found(message)
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

    @initialize(setting=settings(), troubles=st.sampled_from(_TROUBLED),
                kind=st.sampled_from(TROUBLES), first=st.integers(0, 2))  # fmt: skip
    def begin(self, setting: Any, troubles: str, kind: str, first: int) -> None:
        if self.only is not None:
            troubles, kind = ("none" if self.only == "none" else "one"), self.only
        if troubles == "one":  # and no other
            setting = without_trouble(suited(setting, kind))
        self.setting = setting
        self.trouble = frozenset({"none": (), "one": (kind,), "all": TROUBLES}[troubles])
        self.tally["policy", setting.policy] += 1
        self.tally["sequences"] += 1
        self.calls.append(f"trouble: {troubles} {kind if troubles == 'one' else ''}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.player = Player(setting, self.watch)
        for _ in range(first):
            self.attempt("train", self.train_once)

    def may(self, trouble: str) -> bool:
        return self.player is not None and not self.over and trouble in self.trouble

    @property
    def hand(self) -> Hand | None:
        return None if self.player is None else self.player.hand

    def fresh(self) -> Hand | None:
        """The next batch of the loader, in this pass or the next one."""
        assert self.player is not None
        return self.player.fetch() or self.player.fetch()

    def train_once(self) -> None:
        hand = self.fresh()
        if hand is not None:
            self.player.train(hand)
