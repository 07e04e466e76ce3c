"""The audit as a page of the report family: verdict, exposure, upper beside lower, what ran.

Is the claimed ε true, who is exposed, what can be shown to others. Computes nothing: privacy
numbers that bound from above are rounded up, lower bounds down.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .. import __version__
from ..accounting.best_guess import best_guess
from ..report import Exposed, Report, Table, render_page, write_page
from ..report.numbers import down, plain, up
from ..report.page import listed
from ..unlearning import UnlearningResult
from ..unlearning.reported import claims_of, request_of

_VERDICTS = {
    "consistent": "Nothing was found against the claim, by tests that could have found twice as "
    "much: evidence, not proof",
    "red flag": "The claim does not hold for what ran: do not rely on it, find the fault",
    "no power": "Nothing can be concluded: these tests could not have found twice the claim",
}
_TONES = {"consistent": "good", "red flag": "bad", "no power": "careful"}
_SHOW = (
    "What `public=True` writes: the claim with its neighbouring relation and δ, how it was tested, "
    "the verdict and the hash of the model; not values of single records: no ε covers them."
)
_NEIGHBOURS = {"add_remove": "one record more or less", "replace": "one record exchanged"}
_RELATION = {"pairs": "one record exchanged", "canaries": "one record more or less"}


def write(
    audit: Any,
    path: str | os.PathLike[str],
    *,
    results: Sequence[UnlearningResult] = (),
    public: bool = False,
) -> None:
    """Write the page, mode 0600, whole or not at all.

    Args:
        audit: An Audit.
        path: Target file.
        results: What was forgotten since, oldest first; not on a public page.
        public: What may be shown only.

    Raises:
        ImportError: An extra is missing.
        OSError: The folder is missing or not writable.
    """
    write_page(path, public_report(audit) if public else report_of(audit, results=results))


def page(audit: Any, *, results: Sequence[UnlearningResult] = ()) -> str:
    """Return the page.

    Privacy: it shows the spread of private values; of single records only what the audit keeps.
    """
    return render_page(report_of(audit, results=results))


def public_report(audit: Any) -> Report:
    """Return what may be shown of an audit: claim, how it was tested, verdict.

    Measurements, bounds and records are on the private page; the verdict is a word that they gave.
    """
    claim = audit.claim
    told = "The claim does not hold for what ran; no ε is stated here."
    if audit.verdict != "red flag":
        right = up(100 * best_guess(claim.epsilon, delta=claim.delta))
        told = (
            f"ε = {up(claim.epsilon)} at δ = {up(claim.delta)}, {_NEIGHBOURS[claim.neighbours]}, "
            "if what ran is what was accounted: whoever sees the model guesses rightly in at most "
            f"{right} % of all cases whether one record was used, by the toss of a coin."
        )
    return Report(
        title=f"Privacy audit: {audit.verdict}",
        subtitle=f"By opacus_pil {__version__}; an audit never proves privacy",
        verdict=(
            ("What is claimed?", told),
            ("Is it true?", f"{audit.verdict.capitalize()}. {_VERDICTS[audit.verdict]}."),
            ("Who is exposed?",
             "This page does not say: which record lost how much depends on the data."),
        ),
        tone=_TONES[audit.verdict],
        constants=(
            ("claim", f"{_runs(claim)}; δ = {up(claim.delta)}; neighbours: {claim.neighbours}"),
            ("test", _design(audit.design)),
            ("model, SHA-256", str(audit.hashes["model"])),
            ("opacus_pil", __version__),
        ),
        limits=(
            "How the tests came out: bounds and measurements are on the private page.",
            "N, which is public: rate and divisor tell it nearly.",
            "Trials of hyper-parameters on the private data: they are in no ε here.",
        ),
        public=True,
        depends="The verdict is the one word that depends on the data.",
    )  # fmt: skip


def _runs(claim: Any) -> str:
    return ", ".join(f"{n:,} steps of noise {plain(z)} at rate {plain(q)}"
                     for z, q, n in claim.runs)  # fmt: skip


def report_of(audit: Any, *, results: Sequence[UnlearningResult] = ()) -> Report:
    """Return an audit, and what was forgotten since, as plain records of the report."""
    claim, upper = audit.claim, audit.upper
    because = f": {listed(audit.reasons)}" if audit.reasons else ""
    most = audit.exposed[0] if audit.exposed else None
    known = audit.records is not None
    requests = [replace(one, title=f"Request {number}: {one.title}")
                for number, one in enumerate(map(request_of, results), start=1)]  # fmt: skip
    return Report(
        title=f"Privacy audit: {audit.verdict}",
        subtitle=f"{audit.sizes['rows']:,} training records, by opacus_pil {__version__}; "
        "an audit never proves privacy",
        verdict=(
            ("Is the claimed ε true?",
             f"{audit.verdict.capitalize()}. {_VERDICTS[audit.verdict]}{because}."),
            ("Who is exposed?", _who(audit, most)),
            ("What can be shown?", _SHOW),
        ),
        tone=_TONES[audit.verdict],
        facts=(
            (f"claimed ε at δ = {up(claim.delta)}", up(claim.epsilon)),
            ("largest lower bound", down(max((b.epsilon for b in audit.lower), default=None))),
            ("the claim by Rényi, as records are", up(audit.worst_case_epsilon)),
            ("most exposed record (Rényi)", up(None if most is None else most.epsilon)),
            ("median record (Rényi)", up(audit.spread["median"])),
        ),
        exposed=Exposed.of(upper, named=known),
        evidence=tuple(_evidence(audit, most, known=known)),
        reasons=tuple(upper.reasons),
        requests=tuple(requests),
        claims=claims_of(results, titles=[request.title for request in requests]),
        constants=(
            ("claim", f"{_runs(claim)}; δ = {up(claim.delta)}; neighbours: {claim.neighbours}"),
            ("test", _design(audit.design)),
            ("model, SHA-256", str(audit.hashes["model"])),
            ("scores, SHA-256", str(audit.hashes["scores"] or "none")),
            ("seconds", ", ".join(f"{k} {plain(v)}" for k, v in audit.seconds.items())),
            ("opacus_pil", __version__),
        ),
        limits=(
            *audit.notes,
            *(() if known else ("Single records are left out of this page; ask for per_record.",)),
        ),
    )  # fmt: skip


def _who(audit: Any, most: Any) -> str:
    """Say in a sentence who is exposed and what may be said about it."""
    top = "–" if most is None else up(most.epsilon)
    tight = ""
    if most is not None and most.tight_epsilon is not None:
        tight = f" (by loss distributions {up(most.tight_epsilon)})"
    label = audit.upper.guarantee
    caution = ": for ranking and planning, they can be too small" if label == "estimate" else ""
    count = 0 if most is None else most.tied
    return (
        f"{count:,} of {audit.sizes['rows']:,} records stand at the top with Rényi ε {top}{tight}; "
        f"half of all are at most {up(audit.spread['median'])}; labelled {label}{caution}."
    )


def _evidence(audit: Any, most: Any, *, known: bool) -> list[Table]:
    """Return upper numbers, lower bounds, the attack, the exposed and the conformance."""
    claim = audit.claim
    relation = _RELATION.get(audit.design.kind, "nothing tested")
    upper = (
        ("claim, by loss distributions", up(claim.epsilon), "one record more or less"),
        ("claim, by Rényi accounting", up(audit.worst_case_epsilon), "one record more or less"),
        (f"claim, for {audit.design.kind}", up(audit.design.claimed_epsilon)
         if audit.design.kind != "none" else "–", relation),
    )  # fmt: skip
    bounds = [
        (bound.method, down(bound.epsilon), plain(bound.confidence), _assumed(bound),
         plain(bound.ceiling), plain(bound.null_share), plain(p))
        for bound, p in [*zip(audit.lower, audit.p_values, strict=True),
                         *((bound, None) for bound in audit.shown)]
    ]  # fmt: skip
    found = [
        Table(
            caption="Upper: what the claim allows", head=("number", "ε at most", "relation"),
            rows=upper, words=(2,),
            note="Loss distributions are a tighter method than Rényi accounting: compare records, "
            "which are accounted by Rényi, with the Rényi number only.",
        ),
        Table(
            caption="Lower: what the tests saw",
            head=("method", "ε at least", "confidence", "assumption", "ceiling", "null check",
                  "p-value of the claim"),
            rows=tuple(bounds), words=(3,),
            note=_design(audit.design) + " A bound of 0 says only that this design saw nothing. "
            "The null check is the share of permuted coins for which a bound is above 0. Bounds "
            "without a p-value are shown, not in the verdict.",
        ),
    ]  # fmt: skip
    if audit.attack is not None:
        found.append(_attack(audit.attack))
    if known and audit.exposed:
        found.append(
            Table(
                caption="Most exposed records", head=("id", "row", "ε", "ε by loss distributions"),
                rows=tuple(
                    (str(e.instance_id), str(e.row), up(e.epsilon), up(e.tight_epsilon))
                    for e in audit.exposed
                ),
            )
        )  # fmt: skip
    found.append(
        Table(
            caption="What ran, beside what was accounted",
            head=("quantity", "state", "measured", "interval", "accounted", "reason"),
            rows=tuple(
                (check.what, check.state, plain(check.measured),
                 "–" if check.low is None else f"{plain(check.low)} to {plain(check.high)}",
                 plain(check.accounted), check.reason)
                for check in audit.conformance.checks
            ),
            words=(1, 5),
        )
    )  # fmt: skip
    return found


def _assumed(bound: Any) -> str:
    return f"{bound.assumption}, if {bound.condition}" if bound.condition else bound.assumption


def _design(design: Any) -> str:
    """Say how membership was tested."""
    if design.kind == "none":
        return f"Nothing was tested: {design.why_none}."
    weak = "" if design.powerful else (
        " A training of twice the claimed ε would not have been seen either.")  # fmt: skip
    return (
        f"{design.units:,} {design.kind}, {_RELATION[design.kind]}; a correct training is a red "
        f"flag with probability at most {plain(design.level)}.{weak}"
    )


def _attack(attack: Any) -> Table:
    auc = attack.auc
    return Table(
        caption=f"The attack: {attack.attack}, {attack.members} members and "
        f"{attack.nonmembers} others",
        head=("measure", "value", "interval"),
        rows=(
            ("AUC", plain(auc.value), f"{plain(auc.low)} to {plain(auc.high)}"),
            *(
                (f"true positives at {plain(100 * point.target)} % false ones",
                 *(("–", point.note) if point.tpr is None else
                   (plain(point.tpr.value),
                    f"{plain(point.tpr.low)} to {plain(point.tpr.high)}")))
                for point in attack.true_positives
            ),
        ),
    )  # fmt: skip
