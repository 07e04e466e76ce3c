"""Audit: what is claimed of a trained model, what was measured, and the verdict, in one record.

Puts together and words what others computed; computes no privacy number.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import __version__
from ..accounting.shown import quantiles_above, rounded_up
from ..atomic_file import atomic_file
from ..exposure import PerInstanceEpsilon
from ..unlearning import UnlearningEngine, UnlearningResult
from .claim import Claim
from .conformance import Conformance
from .exposed import Exposed
from .lower_bound import LowerBound, plain

FORMAT, VERSION = "opacus_pil audit", 1


@dataclass(frozen=True)
class Design:
    """How membership was tested.

    Attributes:
        kind: "pairs": members against held-out rows of a random split, one record exchanged;
            "canaries": coins thrown before training, one record added or removed; "none".
        units: Pairs or canaries.
        claimed_epsilon: What the bounds are held against: the claim's ε for this relation.
        level: Probability that a correct training is a red flag, at most, over all tests.
        powerful: Whether the median audit of a training of twice the claimed ε would have refuted
            the claim, if its scores saw all that it gives away.
        why_none: Why nothing was tested; empty otherwise.
    """

    kind: str
    units: int = 0
    claimed_epsilon: float = math.nan
    level: float = 0.01
    powerful: bool = False
    why_none: str = ""


@dataclass(frozen=True)
class Audit:
    """An audit of one trained model.

    Attributes:
        verdict: "consistent", "red flag" or "no power".
        reasons: Why, a half sentence each.
        claim: The steps as somebody accounted for them.
        worst_case_epsilon: ε of the claim by Rényi accounting on the account's orders.
        upper: ε of every instance, with label and reasons; answers by id, `.top(10)`, `.plot()`.
        exposed: The most exposed ones, with a tight ε beside.
        lower: Bounds that take part in the verdict.
        shown: Bounds that assume independent canaries: beside it, never in it.
        p_values: Of the claim, one for each entry of `lower`.
        design: How membership was tested.
        conformance: What ran beside what was accounted, as far as somebody saw it.
        attack: What the attack achieved: AUC, true positives at few false ones; None: no scores.
        notes: What a reader must know: N, the neighbouring relation, what is not covered.
        hashes: SHA-256 of the model and of the scores.
        sizes: Rows, held-out rows.
        seconds: Wall time of each part.
        records: One mapping per scored row, only where they were asked for.
    """

    verdict: str
    reasons: tuple[str, ...]
    claim: Claim
    worst_case_epsilon: float
    upper: PerInstanceEpsilon
    exposed: tuple[Exposed, ...]
    lower: tuple[LowerBound, ...]
    shown: tuple[LowerBound, ...]
    p_values: tuple[float, ...]
    design: Design
    conformance: Conformance
    attack: Any
    notes: tuple[str, ...]
    hashes: dict[str, str | None]
    sizes: dict[str, int]
    seconds: dict[str, float]
    records: tuple[dict[str, Any], ...] | None = None
    _trained: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def unlearning_engine(
        self, make_optimizer: Callable[[nn.Module], Any], **options: Any
    ) -> UnlearningEngine:
        """Return an engine that can plan what this model should forget.

        Args:
            make_optimizer: Builds the training's plain optimizer for the audited model.
            options: Of `UnlearningEngine`.

        What this package did not train has no ledger that a certificate could rest on: such plans
        are "predicted", or rest on what the certificate's own run does.
        """
        module = self._trained["module"]()
        named = {k: self._trained[k] for k in ("criterion", "loss_of") if self._trained[k]}
        return UnlearningEngine(
            module, optimizer=make_optimizer(module), dataset=self._trained["dataset"],
            **{**named, **options},
        )  # fmt: skip

    def write_report(
        self,
        path: str | os.PathLike[str],
        *,
        results: Sequence[UnlearningResult] = (),
        public: bool = False,
    ) -> None:
        """Write the report page: one HTML file, mode 0600, that loads nothing from outside.

        Args:
            path: Target file; the old one stays whole until the new one is complete.
            results: What the audited model has forgotten since, oldest first; not on a public page.
            public: The claim, how it was tested and the verdict only: no measurement, no value of a
                record, no distribution. That page may be shown.

        Raises:
            ImportError: An extra is missing; install `report`.
            OSError: The folder is missing or not writable.

        Privacy: unless `public` the page shows values that no ε covers, and says so at its top.
        """
        from .audit_page import write  # the optional extra

        write(self, path, results=results, public=public)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json`, mode 0600, whole or not at all."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        with atomic_file(path) as file:
            file.write((text + "\n").encode("utf-8"))

    def to_json(self) -> dict[str, Any]:
        """Return plain types; the names are those of `docs/audit.md`, version 1."""
        ids = self.records is not None
        return plain(
            {
                "format": FORMAT,
                "version": VERSION,
                "made_by": f"opacus_pil {__version__}",
                "verdict": self.verdict,
                "reasons": self.reasons,
                "claim": {
                    "runs": self.claim.runs,
                    "delta": self.claim.delta,
                    "epsilon": self.claim.epsilon,
                    "neighbours": self.claim.neighbours,
                    "rdp_epsilon": self.worst_case_epsilon,
                },
                "upper": {
                    "guarantee": self.upper.guarantee,
                    "reasons": self.upper.reasons,
                    "delta": self.upper.delta,
                    "spread": self.spread,
                    "at_most_exposed": self.exposed[0].tied if self.exposed else 0,
                    "most_exposed": [
                        {
                            **({"id": e.instance_id, "row": e.row} if ids else {}),
                            "epsilon": e.epsilon,
                            "tight_epsilon": e.tight_epsilon,
                        }
                        for e in (self.exposed if ids else self.exposed[:1])
                    ],
                },
                "lower": [
                    {**bound.to_json(), "p_value": p}
                    for bound, p in zip(self.lower, self.p_values, strict=True)
                ],
                "shown": [bound.to_json() for bound in self.shown],
                "design": vars(self.design),
                "conformance": self.conformance,
                "attack": self._attack(),
                "notes": self.notes,
                "hashes": self.hashes,
                "sizes": self.sizes,
                "seconds": self.seconds,
                "records": self.records,
            }
        )

    @property
    def spread(self) -> dict[str, float]:
        """Quantiles of the instances' ε."""
        names = ("min", "q10", "median", "q90", "max")
        values = quantiles_above(self.upper.epsilon, [0.0, 0.1, 0.5, 0.9, 1.0])
        return dict(zip(names, values, strict=True))

    def _attack(self) -> dict[str, Any] | None:
        if self.attack is None:
            return None
        return {
            "name": self.attack.attack,
            "members": self.attack.members,
            "nonmembers": self.attack.nonmembers,
            "auc": vars(self.attack.auc),
            "true_positives": [
                {
                    "false_positive_rate": point.target,
                    "tpr": None if point.tpr is None else vars(point.tpr),
                    "fpr": None if point.fpr is None else vars(point.fpr),
                    "note": point.note,
                }
                for point in self.attack.true_positives
            ],
        }

    def __str__(self) -> str:
        """Say claim, upper and lower numbers, conformance and verdict."""
        runs = ", ".join(f"{n} steps of noise {z:g} at rate {q:.4g}" for z, q, n in self.claim.runs)
        lines = [
            f"claimed     ε = {rounded_up(self.claim.epsilon, digits=4)} at "
            f"δ = {rounded_up(self.claim.delta)} ({runs}), one record more or less",
            f"instances   {', '.join(f'{k} {rounded_up(v)}' for k, v in self.spread.items())} "
            f"({self.upper.guarantee})",
            *(f"              - {reason}" for reason in self.upper.reasons),
        ]
        if self.exposed:
            most = self.exposed[0]
            tight = (
                ""
                if most.tight_epsilon is None
                else f", tight {rounded_up(most.tight_epsilon, digits=4)}"
            )
            top = rounded_up(most.epsilon, digits=4)
            lines.append(f"exposed     {most.tied} at the top with ε = {top}{tight}")
        if self.design.kind != "none":
            what = "exchanged" if self.design.kind == "pairs" else "more or less"
            lines.append(
                f"tested      {self.design.units} {self.design.kind}, one record {what}: claimed "
                f"ε = {rounded_up(self.design.claimed_epsilon, digits=4)}"
            )
        lines += [
            f"lower       {bound}; p-value of the claim {p:.2g}"
            for bound, p in zip(self.lower, self.p_values, strict=True)
        ]
        lines += [f"shown only  {bound}" for bound in self.shown]
        if self.attack is not None:
            auc = self.attack.auc
            lines.append(f"attack      AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]")
        lines += [f"  {check}" for check in self.conformance.checks]
        lines += [f"note: {note}" for note in self.notes]
        why = f": {'; '.join(self.reasons)}" if self.reasons else ""
        lines.append(f"{self.verdict.upper()}{why}\n(an audit never proves privacy)")
        return "\n".join(lines)
