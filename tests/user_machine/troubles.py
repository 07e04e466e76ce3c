"""What users do to a step: scale and replace what it is made of. And the machine that does all.

Knows calls; the property that is held after each is `machine.py`.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from opacus.optimizers import optimizer as opacus_optimizer

from tests.user_machine.batch_troubles import BatchTroubles
from tests.user_machine.ordinary import BOUNDS
from tests.user_machine.world import ROWS

_OFTEN = ("reuse", "skip", "caps in hand", "seed", "divisor")  # told by what comes again


class UserMachine(BatchTroubles):
    """Does everything; which kinds of trouble a sequence may hold is drawn at its beginning."""

    # --- trouble with a step -------------------------------------------------------------------

    @precondition(lambda self: self.may("scale"))
    @rule(factor=st.sampled_from((50.0, 0.01)))
    def scale_the_loss_once(self, factor: float) -> None:
        def call() -> None:
            hand = self.fresh()
            if hand is not None:  # of an empty batch nobody sees what would have been done to rows
                self.player.train(hand, factor=factor if len(hand.x) else 1.0)

        self.attempt(f"scale {factor}", call)

    @precondition(lambda self: self.may("spare"))
    @rule(on=st.booleans())
    def train_spare(self, on: bool) -> None:
        """Unfreeze a parameter that was frozen when training was made private."""

        def change() -> None:
            self.player.stale = True
            self.player.world.inner.spare.weight.requires_grad_(on)

        self.attempt(f"spare {on}", change)

    @precondition(lambda self: self.may("divisor"))
    @rule()
    def divide_by_the_size_of_the_batch(self) -> None:
        def call() -> None:
            hand, player = self.fresh(), self.player
            if hand is None:
                return
            optimizer = player.world.optimizer
            before = optimizer.expected_batch_size
            told = hand.named is None and self.setting.policy != "participation"
            optimizer.expected_batch_size = max(len(hand.x), 1)
            other = optimizer.expected_batch_size != before  # else nobody sees that it was set
            player.by_count = told and other and self.setting.reduction == "mean"
            try:
                player.train(hand)
            finally:
                optimizer.expected_batch_size, player.by_count = before, False

        self.attempt("divisor", call)

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
                    opacus_optimizer._check_processed_flag(p.summed_grad)
                    std = share * self.noise_multiplier * self.max_grad_norm
                    made = opacus_optimizer._generate_noise(std=std, reference=p.summed_grad)
                    p.grad = (p.summed_grad + made).view_as(p)
                    opacus_optimizer._mark_as_processed(p.summed_grad)

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
            self.clip_to(np.ones(ROWS))  # whoever is drawn has cap 1
            try:
                self.player.train(hand)
            finally:
                self.clip_to(np.where(here, 1.0, 0.0))

        self.attempt("caps-in-hand", call)

    def finish(self) -> None:
        """Make the sequence's one kind of trouble once more: its rule may not have been called."""
        if len(self.trouble) == 1 and self.player is not None and not self.over:
            (kind,) = self.trouble
            self._once_more(kind, number=self.setting.seed)
            self.numbers_are_not_below_the_truth()
        super().finish()

    def _once_more(self, kind: str, *, number: int) -> None:
        def one(*values: Any) -> Any:
            return values[number % len(values)]

        acts: dict[str, Callable[[], None]] = {
            "skip": lambda: self.skip(why=one("row 0", "empty", "row 0")),
            "foreign": lambda: self.train_on_rows_of_my_own(rows=one([3, 4], [2, 2], [4])),
            "coins": self.train_on_coins_of_my_own,
            "join": self.join_two_batches,
            "rows": lambda: self.change_rows(how=one("twice", "backwards", "without row 3")),
            "passes": lambda: self.two_passes_side_by_side(use=one("new", "old", "both")),
            "ahead": lambda: self.fetch_ahead(order=one("first", "second", "both")),
            "scale": lambda: self.scale_the_loss_once(factor=one(50.0, 0.01)),
            "spare": lambda: self.train_spare(on=True),
            "plain step": self.plain_step,
            "noise": lambda: self.replace_the_noise(share=one(0.5, 0.0)),
            "signal": self.signal_skip,
            "hook": lambda: self.attach_a_hook(what=one("denoise", "halve", "double noise")),
            "one bound": self._both_bounds,
            "second model": self.go_to_the_other_model,
            "seed": lambda: self.seed_as_before(what=one("pass", "draw", "noise")),
            "divisor": self._divide,
            "rate": self._rate,
        }
        if self.setting.policy == "capped":
            acts["caps in hand"] = self.set_caps_by_who_is_in_hand
        self.train(count=1)
        if self.hand is not None:
            acts["reuse"] = self.reuse
            acts["second backward"] = lambda: self._second(private=one(True, False))
            acts["clip grad"] = self._clip_in_between
        for _ in range(4 if kind in _OFTEN else 1):
            acts.get(kind, lambda: None)()

    def _second(self, *, private: bool) -> None:
        self.take()  # a batch that was used already would be another trouble
        self.backward()
        self.second_backward(private=private)
        self.step()

    def _both_bounds(self) -> None:
        self.change_one_of_two_bounds(value=0.1, where="noise")
        self.train(count=1)
        self.change_one_of_two_bounds(value=3.0, where="clip")

    def _divide(self) -> None:
        self.set_noise(value=50.0)  # which hides all but the scale
        self.divide_by_the_size_of_the_batch()

    def _rate(self) -> None:
        if self.player.setting.rate < 1.0:
            self.draw_at_another_rate(factor=2.0)
            self.player.leave()

    def _clip_in_between(self) -> None:
        self.take()
        self.backward()
        self.clip_the_whole_gradient()
        self.step()


def twin(**options: Any) -> type[UserMachine]:
    """A machine with a tally of its own."""
    fresh = {"tally": Counter(), "found": [], "ratios": [], **options}
    return type("UserMachine", (UserMachine,), fresh)
