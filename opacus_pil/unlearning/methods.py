"""METHOD: what each method of unlearning is. Everything that depends on one is read off this table.

Knows what kind of steps a method takes and what they may touch; how steps are taken is `steps/`.
Which methods can be certified, and by which certificates, is `certificates/methods.py`'s to say:
whoever verifies a file has no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from ..certificates import Certificate
from ..certificates.methods import CERTIFIED_METHODS, SPEAKS_OF, members_of

RETRAINING = "retraining"
TRAINING = "training"  # the first phase of a model's life; no method


class Steps(Enum):
    """Kinds of steps."""

    KERNEL = "noisy steps of the training's own kernel, which charge the rows that are in them"
    AVERAGED = "clipped averaged gradients with the certificate's noise, which charge everyone"
    PLAIN = "steps without noise, which charge everyone infinitely"


class Term(Enum):
    """What a method adds to the loss of a retained batch."""

    PENALTY = "an L1 penalty that decays"
    ASCENT = "minus the loss of a batch of the forget set"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        name: What a caller writes.
        steps: Which kind of steps it takes.
        contracts: Steps are also counted by certificates of contraction.
        retrains: A new model is trained from its start.
        term: What it adds to the loss; None: nothing.
        strength: Default weight of the term.
    """

    name: str
    steps: Steps
    contracts: bool = False
    retrains: bool = False
    term: Term | None = None
    strength: float | None = None

    @cached_property
    def noisy(self) -> bool:
        """Whether its steps add noise."""
        return self.steps is not Steps.PLAIN

    @cached_property
    def certifiable(self) -> bool:
        """Whether there are certificates of it."""
        return self.name in CERTIFIED_METHODS

    @cached_property
    def own_constants(self) -> bool:
        """Whether it moves by the constants of its certificate, from a model clipped by them."""
        return self.steps is Steps.AVERAGED

    @cached_property
    def charges_rows(self) -> bool:
        """Whether a ledger is charged for who is in a step; else everyone is."""
        return self.steps is Steps.KERNEL

    @cached_property
    def reads_forget_set(self) -> bool:
        """Whether its steps look at what is to be forgotten."""
        return self.term is Term.ASCENT

    def described_by(self, certificate: Certificate) -> bool:
        """Whether a certificate may speak of its runs; classes of the caller's own may."""
        return all(
            self.name in methods
            for member in members_of(certificate)
            for kind, methods in SPEAKS_OF.items()
            if isinstance(member, kind)
        )


class _Table(dict[str, Method]):
    """Methods by name; one that nobody knows takes noisy steps, and is not certified.

    For plans, which are plain records: whether a method exists is checked where a goal is.
    """

    def __missing__(self, name: str) -> Method:
        return Method(name=name, steps=Steps.KERNEL)


_ALL = (
    Method(name="dp_sgd", steps=Steps.KERNEL),
    Method(name="langevin", steps=Steps.KERNEL, contracts=True),
    Method(name="noisy_finetuning", steps=Steps.AVERAGED),
    Method(name="finetuning", steps=Steps.PLAIN),
    Method(name="l1_sparse", steps=Steps.PLAIN, term=Term.PENALTY, strength=1e-4),
    Method(name="gradient_difference", steps=Steps.PLAIN, term=Term.ASCENT, strength=1.0),
    Method(name=RETRAINING, steps=Steps.KERNEL, retrains=True),
)
METHOD = _Table({method.name: method for method in _ALL})
METHODS = tuple(METHOD)
NOISE_FREE_METHODS = tuple(name for name, method in METHOD.items() if not method.noisy)
WEIGHTED_METHODS = tuple(name for name, method in METHOD.items() if method.term is not None)


def of_the_kernel(phase: str) -> bool:
    """Whether a phase of a model's life, training or a method, took steps of training's kernel."""
    return phase == TRAINING or METHOD[phase].charges_rows
