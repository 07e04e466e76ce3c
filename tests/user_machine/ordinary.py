"""What every user may do: train, set, evaluate, save and load, between any two calls.

Knows calls; the property that is held after each is `machine.py`.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import opacus
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.user_machine.machine import JudgedUser
from tests.user_machine.player import Player
from tests.user_machine.world import ORDERS, ROWS, Heads

CAPS = ((1.0,) * ROWS, (0.1,) * ROWS, (1.0, 0.5, 0.2, 0.0, 0.9, 0.3))
NOISE, BOUNDS = (0.7, 1.0, 2.0, 50.0), (0.1, 1.0, 3.0)


class OrdinaryUser(JudgedUser):
    """Trains as loops do, and changes settings where nothing forbids it."""

    # --- training as everybody does ------------------------------------------------------------

    @precondition(lambda self: self.player is not None)
    @rule(count=st.integers(1, 3))
    def train(self, count: int) -> None:
        for _ in range(count):
            self.attempt("train", self.train_once)

    @precondition(lambda self: self.player is not None)
    @rule(count=st.integers(1, 4))
    def train_on(self, count: int) -> None:
        """The same once more, so that it is chosen more often: every rule is as likely."""
        for _ in range(count):
            self.attempt("train", self.train_once)

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
            with self.player.named(self.hand):
                self.player.zero_grad()
                self.player.backward(self.hand)

        self.attempt("backward", both)

    @precondition(lambda self: self.player is not None and self.player.pending)
    @rule()
    def step(self) -> None:
        def call() -> None:
            with self.player.named(self.hand):
                self.player.step()

        self.attempt("step", call)

    @precondition(lambda self: self.player is not None and self.setting.accumulation)
    @rule(count=st.integers(2, 3))
    def accumulate(self, count: int) -> None:
        """One step on the gradients of several batches, each drawn by itself."""

        def call() -> None:
            self.player.zero_grad()
            for _ in range(count):
                hand = self.fresh()
                if hand is not None:
                    self.player.backward(hand)
            self.player.step()

        self.attempt("accumulate", call)

    @precondition(lambda self: self.player is not None)
    @rule(modes=st.booleans(), left=st.booleans())
    def evaluate(self, modes: bool, left: bool) -> None:
        """Look at the data, in the middle of a pass or after leaving it."""

        def look() -> None:
            module = self.player.world.module
            if modes:
                module.eval()
            with torch.no_grad():
                for x, _ in self.player.world.loader:
                    module(x)
            module.train()

        if left and self.player is not None:
            self.player.leave()
        self.attempt(f"evaluate {left}", look)

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
            self.clip_to(np.array(caps))

        self.attempt(f"caps {caps}", change)

    def clip_to(self, caps: np.ndarray) -> None:
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
                engine.accountant.get_epsilon(1e-5, alphas=list(ORDERS))  # all take a second

        self.attempt(what, call)

    # --- files --------------------------------------------------------------------------------

    @precondition(lambda self: self.player is not None)
    @rule()
    def save(self) -> None:
        def call() -> None:
            file, world = io.BytesIO(), self.player.world
            world.engine.save_checkpoint(path=file, module=world.module, optimizer=world.optimizer)
            state = (self.player.account.copy(), self.player.caps, self.player.draw)
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
                begun = player.world.engine.per_instance.steps > 0
                player.world.engine.load_checkpoint(path=io.BytesIO(data), module=twin)
                if not begun:  # nothing goes on yet: the ledgers are the file's
                    self._take_over(player, state)
                return
            if where == "other engine":
                player = Player(self.setting, self.watch)
            world = player.world
            optimizer = None if where == "weights" else world.optimizer
            world.engine.load_checkpoint(
                path=io.BytesIO(data), module=world.module, optimizer=optimizer
            )
            if where == "other engine":
                self.other = None
            player.resume(state[2] if optimizer is not None else None)
            self._take_over(player, state)
            self.player = player

        self.attempt(f"load {where}", call)

    def _take_over(self, player: Player, state: tuple[Any, ...]) -> None:
        """The ledgers are those of a file, and so is the account."""
        player.account, player.caps = state[0].copy(), state[1]
        if self.other is not None:
            self.other.account, self.other.caps = player.account, player.caps
