"""The page of what one call of `serve` has finished: run by run, from the plan or from the file.

Puts requests, runs and certificate files into the report's plain records. Computes no privacy
number: what is claimed about a run of another process is what its certificate file proves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...certificates.certificate_file import read_certificate, read_key
from ...certificates.verification import verify_certificate
from ...errors import OpacusPilError, UnsupportedError
from ...report import Claim, Report, write_page
from ...report import Request as Part
from ...report.numbers import up
from ...report.page import pairs
from ..reported import COPIES, claims_of, deletion_report, first_of, public_deletion, request_of
from .queue import Request
from .served_run import ServedRun


def write_served(
    requests: Sequence[Request],
    path: str | os.PathLike[str],
    *,
    runs: Mapping[int, ServedRun],
    folder: Path,
    gap: Mapping[str, Any] | None = None,
    public: bool = False,
) -> None:
    """Write the page; see `Served.write_report`.

    Args:
        requests: As they stand.
        path: Target file.
        runs: By the number of their batch: those of this process.
        folder: Of the certificate files.
        gap: Of the model after the last run.
        public: What may be shown only.
    """
    report = served_report(requests, runs=runs, folder=folder, gap=gap)
    write_page(path, public_served([runs[key] for key in sorted(runs)]) if public else report)


def public_served(runs: Sequence[ServedRun]) -> Report:
    """Return what may be shown of runs: of each what `public_deletion` shows.

    Raises:
        UnsupportedError: No run.
    """
    pages = [public_deletion(run) for run in runs]
    if not pages:
        raise UnsupportedError(
            "Expected a run of this process for a page that may be shown, got none. Write it where "
            "the request is served, or hand over the certificate."
        )
    first = pages[0]
    if len(pages) == 1:
        return first
    claims = [
        replace(claim, title=f"Run {number}")
        for number, page in enumerate(pages, start=1)
        for claim in page.claims
    ]
    told = f"{len(claims):,} of {len(pages):,} runs have a certificate; each claim stands below."
    return replace(
        first,
        title=f"Deletions in {len(pages):,} runs: {len(claims):,} certified",
        subtitle=f"By opacus_pil {__version__}",
        verdict=(("Was it forgotten?", told), *first.verdict[1:2],
                 ("What may be claimed?", "Each claim, if its assumptions hold; nothing else.")),
        tone="good" if all(page.tone == "good" for page in pages) else "careful",
        claims=tuple(claims),
        constants=(("opacus_pil", __version__),),
        limits=tuple(dict.fromkeys(line for page in pages for line in page.limits)),
    )  # fmt: skip


def served_report(
    requests: Sequence[Request],
    *,
    runs: Mapping[int, ServedRun],
    folder: Path,
    gap: Mapping[str, Any] | None = None,
) -> Report:
    """Return served requests as plain records of the report; arguments as in `write_served`."""
    together = _together(requests)
    batches = [_batch(members[0]) for members in together]
    last = max((one for one in batches if one is not None and one in runs), default=None)
    parts: list[Part] = []
    claims: list[Claim] = []
    for members, number in zip(together, batches, strict=True):
        run = None if number is None else runs.get(number)
        part, found = (
            _without_run(members, folder)
            if run is None
            else _of_run(members, run, gap=gap if number == last else None)
        )
        parts.append(part)
        claims += found
    base = _nothing_known() if last is None else deletion_report(runs[last], gap=gap)
    if len(parts) > 1 or last is None:
        base = replace(base, **_about_several(base, requests, parts))
    if gap and last is None:
        unshown = "The gap that was passed is not shown: no run of this process goes with it."
        base = replace(base, limits=(*base.limits, unshown))
    return replace(base, requests=tuple(parts), claims=tuple(claims))


def _together(requests: Sequence[Request]) -> list[list[Request]]:
    """Return the requests of each run, and each other request alone, in their order."""
    found: dict[Any, list[Request]] = {}
    for one in requests:
        number = _batch(one)
        found.setdefault(one.request_id if number is None else number, []).append(one)
    return list(found.values())


def _batch(request: Request) -> int | None:
    """Return the number of the run that served a request; None: none has."""
    number = (request.result or {}).get("batch")
    return number if isinstance(number, int) else None


def _of_run(
    members: Sequence[Request], run: ServedRun, *, gap: Mapping[str, Any] | None
) -> tuple[Part, Sequence[Claim]]:
    part = request_of(run, gap=gap)
    part = replace(part, title=f"{_names(members)}: {part.title}")
    unwritten = (members[0].result or {}).get("no_certificate_file")
    if unwritten:
        part = replace(part, notes=(*part.notes, f"There is no certificate file: {unwritten}"))
    return part, claims_of([run], titles=[part.title])


def _without_run(members: Sequence[Request], folder: Path) -> tuple[Part, Sequence[Claim]]:
    """Return what the queue alone says of requests, with what is missing in words."""
    one, result = members[0], dict(members[0].result or {})
    title, ids = f"{_names(members)}: {one.state}", [str(i) for m in members for i in m.ids]
    names = list(dict.fromkeys(ids))
    facts = {
        "asked for": first_of(names),
        "instances": f"{len(names):,}",
        "method": result.get("method"),
        "steps that ran": f"{result['steps']:,}" if "steps" in result else None,
    }

    def part(claim: str, *notes: str, **more_facts: Any) -> Part:
        return Part(title=title, claim=claim, facts=pairs({**facts, **more_facts}), notes=notes)

    if one.state == "failed":
        return part("no claim: failed", f"Nothing ran: {result.get('reason', 'not said why')}"), ()
    if one.state != "done":
        return part("no claim: not served yet", "It waits in the queue."), ()
    if not result.get("steps") and result.get("status") == "forgotten before":
        note = "Nothing ran: all its instances had been forgotten by runs before."
        return part("no claim of its own: forgotten before", note), ()
    missing = (
        "Another process ran this and kept no plan for the page: why these steps, how many in the "
        "worst case, and the batch size are not known here."
    )
    name = result.get("certificate_file")
    if not name:
        why = result.get("no_certificate_file") or "Nothing is certified about it."
        return part("no claim", missing, str(why)), ()
    path = folder / str(name)
    try:
        record = read_certificate(path)
        key = Path(f"{path}.key")
        found = verify_certificate(record, key=read_key(key) if key.exists() else None)
    except (OpacusPilError, OSError) as error:
        return part("no claim", missing, f"Its certificate {name} cannot be read: {error}"), ()
    if not found.holds:
        return part("no claim", missing, f"Its certificate {name} does not hold."), ()
    claim = Claim(
        title=title,
        kind=str(record.certificate_class),
        statement=" ".join(found.statement),
        assumptions=tuple(sentence for _, sentence in found.assumptions),
    )
    certified = part(
        "certified", missing, **{
            "ε reached": f"{up(record.epsilon)} at δ = {up(record.delta, digits=3)}",
            "ε asked for": up(record.target_epsilon),
            "steps of retraining": f"{record.training_steps:,}",
            "certificate": name,
            "model before, SHA-256": record.model_before,
            "model after, SHA-256": record.model_after,
        },
    )  # fmt: skip
    return certified, (claim,)


def _about_several(base: Report, requests: Sequence[Request], parts: Sequence[Part]) -> Any:
    """Return what the top of the page says where it is about more than one run."""
    counts = {state: sum(one.state == state for one in requests) for state in ("done", "failed")}
    told = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    size = f"{len(requests):,} deletion request{'' if len(requests) == 1 else 's'}"
    settled = all(part.kind == "certified" for part in parts)
    return {
        "title": f"{size}: {told or 'none served'}",
        "subtitle": f"Evidence request by request, by opacus_pil {__version__}",
        "verdict": tuple(
            (question, f"Of the last run: {answer}" if base.requests else answer)
            for question, answer in base.verdict
        ),
        "tone": "good" if settled and parts else "careful",
    }


def _nothing_known() -> Report:
    return Report(
        title="",
        subtitle="",
        verdict=(
            ("Was it forgotten?", "No run of this process is on this page; each request says what "
             "its file proves."),
            ("What did it cost?", "What ran is said request by request, as far as it is known."),
            ("What may be claimed?", "What a certificate below says, with its assumptions; nothing "
             "about a request without one."),
        ),
        constants=(("opacus_pil", __version__),),
        limits=(COPIES,),
    )  # fmt: skip


def _names(members: Sequence[Request]) -> str:
    return ", ".join(one.request_id for one in members)
