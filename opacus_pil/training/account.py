"""Account: the two ledgers of the same trainings, worst case and per instance, charged together.

What they hold and enforce, how they are copied, saved, taken over and joined. Knows no loader and
no model; how a step becomes a charge is `training.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from opacus.accountants.accountant import IAccountant

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..accounting import PerInstanceAccountant
from ..capture.randomness import Seen
from ..capture.shards import Shard
from ..errors import CertificateError, LedgerError, UnsupportedError
from .charger import Charger
from .distributed import gathered
from .enforced_caps import EnforcedCaps
from .policies import DEFAULT, DEFAULT_OF_FIXED, NormPolicy, policy_of
from .support import Asked
from .terms import Ready, Terms
from .verdict import uncertifiable


class Account:
    """Opacus's ledger and the per-instance ledger of one engine.

    Args:
        opacus: Opacus's accountant.
        terms: What the account is kept by.
        caps: Clipping bounds of the whole data set, with norm_policy "capped".

    Attributes:
        shard: Rows of this process among several; None: all rows.
        enforced: What instances of this process are clipped to; None: not to caps, or not yet.
    """

    def __init__(
        self, opacus: IAccountant, terms: Terms, *, caps: npt.ArrayLike | None = None
    ) -> None:
        self.opacus = opacus
        self.terms = terms
        self.shard: Shard | None = None
        self.enforced: EnforcedCaps | None = None
        self._given = None if caps is None else np.array(caps, dtype=np.float64)
        # Where coins and noise were drawn from: what repeats is found over all trainings.
        self.coins_seen, self.noise_seen = Seen(), Seen()
        self._charger: Charger | None = None
        self._origin: tuple[Account, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or a pickle, has: the ledgers as they are; it is nobody's fork."""
        return {**self.__dict__, "_origin": None}

    # --- what it knows ------------------------------------------------------------------------

    @property
    def charger(self) -> Charger:
        """What charges the per-instance ledger.

        Raises:
            ValueError: No training has begun, so the number of instances is unknown.
        """
        if self._charger is None:
            raise ValueError(
                "Expected make_private to be called first, got an engine without training."
            )
        return self._charger

    @property
    def begun(self) -> bool:
        """Whether the instances are known."""
        return self._charger is not None

    @property
    def per_instance(self) -> PerInstanceAccountant:
        """The per-instance ledger; in a distributed training that of this process's shard."""
        return self.charger.accountant

    @property
    def norm_policy(self) -> str:
        """How an instance's sensitivity at a step is found."""
        return self.terms.policy.name

    @property
    def caps(self) -> FloatArray | None:
        """What instances are clipped to; of the whole data set before a training has begun."""
        return self._given if self.enforced is None else self.enforced.values

    @property
    def unbounded(self) -> bool:
        """Whether no ε holds for the worst case: noise-free steps, or a gradient without norm."""
        lost = self._charger is not None and self._charger.unbounded
        return lost or any(noise == 0 for noise, _, _ in self.opacus.history)

    @property
    def findings(self) -> dict[str, int]:
        """What was found at the steps of this ledger: code of a fact -> number of steps."""
        return dict(self.charger.findings)

    @property
    def largest_norm(self) -> float:
        """The largest finite norm of a gradient before it was clipped; inf: it was not kept."""
        return self.charger.largest_norm

    def policy_for(self, *, poisson_sampling: bool) -> NormPolicy:
        """Return the policy of a training with such batches: the one in force, or the default."""
        if self.terms.named or self.begun:
            return self.terms.policy
        return policy_of(DEFAULT if poisson_sampling else DEFAULT_OF_FIXED)

    def rows(
        self, indices: npt.ArrayLike | None, rows: npt.ArrayLike | None, *, persons: bool = True
    ) -> IntArray:
        """Return the rows that a caller names, as `InstanceIds.rows`; they must be here.

        Raises:
            TypeError, ValueError: Instances that are not there, or named twice.
        """
        holder = self.per_instance if self.shard is None else self.shard
        found = self.terms.ids.rows(indices, rows=rows, size=holder.num_instances, persons=persons)
        if self.shard is not None:
            self.shard.positions(found)
        return found

    def positions(
        self, indices: npt.ArrayLike | None, rows: npt.ArrayLike | None
    ) -> IntArray | None:
        """Return the places in the ledger of the instances that a caller names; None: all."""
        everyone = indices is None and rows is None
        found = None if everyone else self.rows(indices, rows)
        return found if found is None or self.shard is None else self.shard.positions(found)

    def gathered(self, *, dst: int | None) -> PerInstanceAccountant | None:
        """Return one ledger of all shards; see `PerInstancePrivacyEngine.gather_per_instance`."""
        if self.shard is None:
            return self.per_instance.copy()
        claims = {"norm_policy": self.norm_policy, "history of noise and rates": self._history()}
        whole = gathered(self.per_instance, claims=claims, dst=dst)
        if whole is not None and self.terms.ids.array is not None:
            whole.rename(self.terms.ids.array)  # shards go by row, so that they join in order
        return whole

    def require_constant_steps(self, update: str) -> None:
        """Raise unless every step so far moved the model as `TrainingKernel.update_by` says.

        Raises:
            CertificateError: A schedule, other settings now, or steps that nothing is known about.
        """
        charged = self.charger.update
        if self.per_instance.steps and charged != update:
            raise CertificateError(
                "Expected every step of training to be one of the optimizer as it is now, "
                f"{update}; got {charged or 'steps that nothing is known about'}. The certificate "
                "counts constant steps; train without schedules, and leave the optimizer's "
                "settings as they are."
            )

    def require_evidence(self) -> None:
        """Raise unless what was seen of every step lets a certificate rest on the ledger.

        Raises:
            CertificateError: Names what was found, or what nobody has looked at.
        """
        charges = self.charger
        found = uncertifiable(charges.findings, policy=charges.policy.judged_as)
        if found is not None:
            raise CertificateError(
                f"Expected steps that a certificate can rest on, got some where {found}. "
                "get_per_instance_epsilon(delta).reasons lists everything."
            )

    # --- a training begins --------------------------------------------------------------------

    def prepared(
        self, asked: Asked, *, shard: Shard | None, policy: NormPolicy, loss_known: bool
    ) -> Ready:
        """Return what will charge a training, after every check; nothing is changed.

        Args:
            asked: The arguments of make_private.
            shard: Instances of this process; None: all.
            policy: Of the training.
            loss_known: Whether the loss that is trained with was named.

        Raises:
            UnsupportedError, TypeError, ValueError: A training that this account cannot be kept of.
        """
        size = asked.size
        mine = size if shard is None else check.integer(
            "rows of this rank", len(shard.rows), low=1, cure="Train on fewer processes."
        )  # fmt: skip
        self.terms.ids.require_size(size)
        if policy.refresh_every is not None and not loss_known:
            raise ValueError(
                f"Expected criterion to be named with norm_policy={policy.name!r}, got "
                "Opacus's default. A full pass needs the loss you train with: "
                "make_private(criterion=...), or loss_of=... for batches that are no pairs."
            )
        if self._charger is not None:
            if self.per_instance.num_instances != mine:
                raise UnsupportedError(
                    f"Expected the data set of {self.per_instance.num_instances} instances this "
                    f"engine accounts for, got one of {mine}. Use a new engine for other data, or "
                    "make_private_on for part of the same."
                )
            if self.enforced is not None and asked.output_bounds != self.enforced.output_bounds:
                raise UnsupportedError(
                    "Expected clipping as in the training before, in whose units caps are, got "
                    f"{asked.output_bounds or asked.clipping}. Use a new engine."
                )
            return Ready(self._charger, self.terms.policy, self.enforced)
        return self.terms.opened(
            asked, instances=mine, shard=shard, policy=policy, caps=self._given
        )

    def settle(self, ready: Ready, shard: Shard | None) -> None:
        """Charge by what was prepared from now on: its training was made private."""
        self._charger, self.shard = ready.charger, shard
        self.enforced = ready.enforced
        self.terms = replace(self.terms, policy=ready.policy)

    # --- caps ---------------------------------------------------------------------------------

    def set_caps(self, caps: npt.ArrayLike) -> None:
        """Clip each instance to another cap from the next step on.

        Raises:
            ValueError: Not one finite cap per instance, or caps that come too late.
        """
        charges, shard = self.charger, self.shard
        size = charges.accountant.num_instances if shard is None else shard.num_instances
        assert self.enforced is not None
        checked = EnforcedCaps.checked(
            caps, num_instances=size, output_bounds=self.enforced.output_bounds,
            rounding=self.enforced.rounding,
        )  # fmt: skip
        if shard is not None:
            checked = checked.of(shard.rows)
        charges.set_caps(checked.charged)
        self.enforced = checked

    def take_caps(self, values: FloatArray | None) -> None:
        """Clip to the caps of a file from now on, whose ledger charges them."""
        if self.enforced is not None and values is not None:
            self.enforced = replace(self.enforced, values=values)

    def caps_in_force(self, rows: IntArray, *, noise: float, rate: float) -> FloatArray:
        """Return the caps that rows of the data set are clipped to at a step of such a kernel.

        Shape (rows,), or (rows, outputs).
        """
        assert self.enforced is not None
        rows = rows if self.shard is None else self.shard.positions(rows)
        charged = self.per_instance.caps_for(noise_multiplier=noise, sample_rate=rate)[rows]
        return self.enforced.of(rows).within(charged)

    # --- both ledgers -------------------------------------------------------------------------

    def fork(self, *, norm_policy: str | None = None) -> Account:
        """Return an account with copies of both ledgers and the same caps, which `adopt` takes.

        Args:
            norm_policy: Policy of the fork; default: this one's. A ledger with caps keeps "capped",
                another cannot become it.

        Raises:
            ValueError: The policy does not fit this account's caps or refresh interval.
        """
        charges = self.charger
        name = self.norm_policy if norm_policy is None else norm_policy
        every = self.terms.policy.refresh_every
        policy = policy_of(
            name, refresh_every=every if name == "refresh" else None, caps=self.caps,
            budget=self.terms.budget,
        )  # fmt: skip
        named = self.terms.named or norm_policy is not None
        fork = Account(
            copy.deepcopy(self.opacus), replace(self.terms, policy=policy, named=named),
            caps=self._given,
        )  # fmt: skip
        fork.shard, fork.enforced = self.shard, self.enforced
        fork.coins_seen, fork.noise_seen = self.coins_seen.copied(), self.noise_seen.copied()
        fork._charger = Charger(charges.accountant.copy(), policy=policy)
        fork._charger.load_state_dict(charges.state_dict())
        fork._origin = (self, charges.accountant.steps)
        return fork

    def adopt(self, other: Account) -> None:
        """Take over the ledgers of a fork of this account.

        Raises:
            LedgerError: `other` is no fork of this one, or this one was charged since the fork,
                which the fork's ledgers would forget. Nothing is changed.
        """
        origin, steps = other._origin or (None, 0)
        if origin is not self:
            raise LedgerError("Expected a fork of this engine, got another engine.")
        if self.per_instance.steps != steps:
            raise LedgerError(
                f"Expected no step since the fork, got {self.per_instance.steps - steps}. Their "
                "charges would be lost; fork again."
            )
        self.load_state(other.state())
        self.coins_seen.join(other.coins_seen)
        self.noise_seen.join(other.noise_seen)
        other._origin = (self, self.per_instance.steps)

    def charge_everyone(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Charge both ledgers for one Poisson step that everybody may move by the clip bound.

        Args:
            noise_multiplier: Noise std / the most that one instance moves what is noised.
            sample_rate: Probability that an instance is drawn.

        Raises:
            ValueError: A value outside its range, or a ledger with budgets, which must know rows.
        """
        worst = not self.terms.policy.measured and not self.terms.policy.enforced
        self.per_instance.step(
            indices=None,
            sensitivities=None,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            guarantee="bound" if worst else "output_specific",
        )
        self.opacus.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
        self.charger.note_update("of another kind")

    def forget(self, indices: npt.ArrayLike) -> None:
        """Charge instances no more that left the training set; their rows become tombstones.

        Raises:
            TypeError, ValueError: An index out of range, repeated, or forgotten before.
        """
        rows = check.index_array("indices", indices, size=self.per_instance.num_instances)
        self.charger.forget(rows)

    def note_new_model(self) -> None:
        """Say that the steps to come train another model from its start, on the same ledgers."""
        self.charger.note_new_model()

    def charge_without_noise(self, steps: int) -> None:
        """Charge both ledgers for noise-free steps: infinitely, whoever may have taken part."""
        for _ in range(check.integer("steps", steps, low=0)):
            self.opacus.history.append((0.0, 1.0, 1))
            self.per_instance.step(
                indices=None, sensitivities=None, noise_multiplier=0.0, sample_rate=1.0
            )

    # --- saved form ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return both ledgers as arrays and plain values."""
        return {
            "opacus": {"history": self._history(), "mechanism": self.opacus.mechanism()},
            "per_instance": self.charger.state_dict(),
            "output_caps": None if self.enforced is None else self.enforced.of_outputs,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over both ledgers from `state`.

        Raises:
            LedgerError: They do not fit this account. Nothing is changed.
        """
        opacus = {**state["opacus"], "history": [tuple(run) for run in state["opacus"]["history"]]}
        if opacus["mechanism"] != self.opacus.mechanism():
            raise LedgerError(
                f"Expected a ledger of accountant {self.opacus.mechanism()!r}, got "
                f"{opacus['mechanism']!r}. Build the engine with that accountant."
            )
        self._require_enforced(state["per_instance"]["ledger"])
        if self.enforced is not None:
            self.enforced.require_same(state.get("output_caps"))
        self.charger.load_state_dict(state["per_instance"])
        self.opacus.load_state_dict(opacus)

    # --- inside -------------------------------------------------------------------------------

    def _history(self) -> list[tuple[float, float, int]]:
        return [(float(z), float(q), int(n)) for z, q, n in self.opacus.history]

    def _require_enforced(self, ledger: Mapping[str, Any]) -> None:
        """Raise if a ledger charges by caps or budgets that this account does not clip to."""
        capped = ledger.get("caps") is not None or ledger.get("privacy_filter") is not None
        if capped and not self.terms.policy.enforced:
            raise LedgerError(
                "Expected a ledger without caps or budgets, got one with: it charges what only "
                f"norm_policy='capped' enforces, and this engine's is {self.norm_policy!r}. Build "
                "the engine with the policy that the ledger was kept under."
            )
