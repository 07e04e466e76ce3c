"""GradientCanaries: one training run inside Opacus's own optimizer that tests what it claims.

Behind the optimizer's tensors comes one more, of step size 0, with an entry for each canary and
control. A canary that is in is drawn by its own Poisson coin and then adds a row whose gradient is
above the clip bound on its entry and zero elsewhere; controls are never in. So the optimizer's own
clip, noise and scaling act on rows of which everything is known. Canaries throw their own coins:
they say nothing about the data loader. Knows the optimizer; what the numbers say is elsewhere.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer

from .. import _validate as check
from ..errors import UnsupportedError
from .canary_record import CanaryEvidence, CanaryRecord, evidence
from .claim import Claim
from .ledger import accountant_of, runs_since
from .seams import Listener, Seams
from .shadow_step import ShadowStep

CANARIES, CONTROLS = 1000, 256


class GradientCanaries(Listener):
    """Canaries in the gradient of one training, from now on.

    Guarantee: with the default generator every number of the training is what it is without
        canaries, bit for bit: they are clipped, noised and scaled in a pass of their own, after the
        real rows, with noise from a generator of their own. A generator that repeats is then seen
        only on real gradients. With `shared_generator` the canaries' noise comes from the
        training's stream: the same law, not the same bits.

    Args:
        optimizer: What `make_private` returned, before its first step.
        sample_rate: The accounted Poisson rate; None: that of the accountant's hook.
        count: Canaries, each in with probability 1/2.
        controls: Entries that are never in; the noise is measured on them.
        seed: Of coins and noise; None: from the system's randomness, as an audit should.
        shared_generator: As above.
        resumed: The training has begun before: what is tested is the rest of it, and claimed is
            what the accountant counts from now on.
        seams: The optimizer's, where somebody listens to it already.

    Raises:
        UnsupportedError: Ghost clipping, adaptive clipping, several processes.
        ValueError: A training that has begun: coins must be thrown before; no rate.
    """

    def __init__(
        self,
        optimizer: DPOptimizer,
        *,
        sample_rate: float | None = None,
        count: int = CANARIES,
        controls: int = CONTROLS,
        seed: int | None = None,
        shared_generator: bool = False,
        resumed: bool = False,
        seams: Seams | None = None,
    ) -> None:
        m = check.integer("count", count, low=1)
        free = check.integer("controls", controls, low=16, cure="The noise is measured on them.")
        hook = accountant_of(optimizer)
        self._accountant = hook.accountant
        rate = hook.sample_rate if sample_rate is None else sample_rate
        if rate is None:
            raise ValueError(
                "Expected a sample_rate, got none and no accountant's hook on the optimizer. Pass "
                "sample_rate=1 / len(data_loader)."
            )
        q = check.probability("sample_rate", rate)
        self._before = [] if hook.accountant is None else list(hook.accountant.history)
        if not resumed and (self._before or optimizer.original_optimizer.state):
            raise ValueError(
                "Expected coins to be thrown before training, got an optimizer that has made steps "
                "already. Attach canaries right after make_private, or pass resumed=True to test "
                "only what comes now."
            )
        entropy = secrets.randbits(62) if seed is None else check.integer("seed", seed, low=0)
        self._coins = np.random.default_rng(entropy)
        self.shared = bool(shared_generator)
        self._seams = Seams(optimizer) if seams is None else seams
        device = optimizer.params[0].device if optimizer.params else torch.device("cpu")
        noise = torch.Generator(device=device).manual_seed(entropy ^ 0x5EED)
        self._shadow = ShadowStep(
            self._seams, entries=m + free, generator=None if self.shared else noise
        )
        self.record = CanaryRecord(self._coins.random(m) < 0.5, free, q)
        self._places = np.flatnonzero(self.record.included)
        self._rows, self._stepped = 0, False
        self.reason = ""
        self._seams.listeners.append(self)

    def after(self, stage: str, optimizer: Any, result: Any) -> None:
        """Count rows, and make the canaries' step when the real one is ready to move."""
        if stage == "clip":
            samples = getattr(optimizer.params[0], "grad_sample", None)
            self._rows += len(samples) if torch.is_tensor(samples) else 0
            if isinstance(samples, list) and len(samples) > 1:
                self.reason = f"{len(samples)} batches are accumulated in one step"
        elif stage == "pre_step" and result:
            self._step(optimizer)
            self._stepped = True

    def move(self, optimizer: Any) -> None:
        """Make the canaries' step if the real one was made in another way."""
        if not self._stepped:
            self._step(optimizer)
        self._stepped = False

    @property
    def why_not(self) -> str:
        """Why nothing can be said, as the end of a sentence; empty otherwise."""
        if self.failure:
            return f"the optimizer's own step fails on canary rows ({self.failure})"
        return self.reason

    def detach(self) -> None:
        """Stop listening."""
        gone = (self, self._shadow)
        self._seams.listeners = [one for one in self._seams.listeners if one not in gone]

    def evidence(
        self, *, delta: float, claim: Claim | None = None, confidence: float = 0.95
    ) -> CanaryEvidence:
        """Return what the canaries say against what was accounted.

        Args:
            delta: δ of the claim.
            claim: None: what the accountant counted since the canaries were attached.
            confidence: Of each lower bound.

        Raises:
            UnsupportedError: A training that canaries could not follow.
            ValueError: No step was made, or a claim without noise.
        """
        level = 1.0 - check.real(
            "confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True
        )
        if self.why_not:
            raise UnsupportedError(
                f"Expected a training that canaries can follow, got one in which {self.why_not}."
            )
        if self.record.steps == 0:
            raise ValueError(
                "Expected a training with noisy steps, got none since the canaries were attached. "
                "Train first."
            )
        if claim is None:
            if self._accountant is None:
                raise ValueError(
                    "Expected a claim, got none and no accountant on the optimizer. Pass claim="
                    "Claim(((noise_multiplier, sample_rate, steps),), delta=...)."
                )
            claim = Claim(runs_since(self._before, self._accountant.history), delta=delta)
        bits = "shared" if self.shared else "own"
        return evidence(self.record, claim=claim, level=level, bits=bits)

    def _step(self, optimizer: Any) -> None:
        rows, self._rows = self._rows, 0
        drawn = self._places[self._coins.random(len(self._places)) < self.record.sample_rate]
        found = self._shadow.run(rows=rows, hit=torch.from_numpy(drawn))
        if found is None:
            self.record.faults += 1
            return
        self.record.add(found.numpy(), drawn=drawn, noise=float(optimizer.noise_multiplier))
