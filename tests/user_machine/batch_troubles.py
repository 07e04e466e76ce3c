"""What users do to batches: use them twice, skip, join and change them, draw their own, seed again.

Knows calls; the property that is held after each is `machine.py`.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.user_machine.ordinary import OrdinaryUser
from tests.user_machine.player import Hand, Player
from tests.user_machine.world import COORDINATES, ROWS


class BatchTroubles(OrdinaryUser):
    """Trains on what no private loader has just handed out, or not as it was drawn."""

    seeds = 0

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
            if not len(hand.x):  # nobody sees what would have been done to rows
                self.player.train(hand)
                return
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

    @precondition(lambda self: self.may("rate") and self.player.setting.rate < 1.0)
    @rule(factor=st.sampled_from((2.0, 0.5)))
    def draw_at_another_rate(self, factor: float) -> None:
        def change() -> None:
            sampler = self.player.world.loader.batch_sampler
            sampler.sample_rate = min(factor * self.player.setting.rate, 1.0)

        self.attempt(f"rate {factor}", change)

    @precondition(lambda self: self.may("seed"))
    @rule(what=st.sampled_from(("pass", "draw", "noise")))
    def seed_as_before(self, what: str) -> None:
        """Seed torch with the same number at each time: for all that follows, or for one thing."""

        def call() -> None:
            if what != "noise":
                self.player.leave()
                torch.manual_seed(1)
            hand = self.fresh()
            if what == "draw":
                self._seed_anew()
            if hand is None:
                return
            with self.player.named(hand):
                self.player.zero_grad()
                self.player.backward(hand)
                if what == "noise":
                    torch.manual_seed(2)
                self.player.step()
            if what == "noise":
                self._seed_anew()

        self.attempt(f"seed {what}", call)

    def _seed_anew(self) -> None:
        self.seeds += 1
        torch.manual_seed(1_000_000 + self.seeds)
