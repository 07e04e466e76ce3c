"""What a run's page says: everybody's ε, upper numbers beside lower ones, settings and versions.

Puts an account and what is known of its training into the report's plain records. Computes no
privacy number.
"""

from __future__ import annotations

import copy
import itertools
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import opacus
import torch

from .. import __version__
from ..accounting.best_guess import best_guess
from ..capture.row_losses import moved_to
from ..exposure import PerInstanceEpsilon
from ..report import LABELS, Exposed, Report, Table
from ..report.numbers import down, plain, up
from ..report.page import pairs
from .account import Account
from .evidence import rows_of
from .trainings import Trainings

_CHUNK = 256  # rows of a forward pass


@dataclass(frozen=True)
class Run:
    """What there is to report of.

    Attributes:
        account: Both ledgers.
        trainings: What was trained.
        opacus_epsilon: Opacus's own ε at `delta`.
        delta: δ of all numbers.
    """

    account: Account
    trainings: Trainings
    opacus_epsilon: float
    delta: float

    @property
    def against(self) -> tuple[str, ...]:
        """What was seen that speaks against the accounted steps, for anybody; a sentence each.

        By the table of `evidence.py`, as it concerns an instance that is charged the clip bound in
        every step. Empty: nothing was seen; that is no label.
        """
        found = []
        for code in self.account.findings:
            row = next((row for row in rows_of(code) if row.concerns("worst_case")), None)
            if row is not None and row.leaves == "estimate":
                found.append(row.words.replace("({detail})", "").replace("{detail}", "see reasons"))
        return tuple(" ".join(words.split()) for words in found)

    @property
    def unamplified(self) -> str:
        """Why Opacus's own ε is no bound though nothing went wrong; "": it is not so."""
        if all(kernel.poisson_sampling for kernel in self.trainings.kernels):
            return ""
        return (
            "Opacus's ε takes batches as drawn by independent coins, and claims an amplification "
            "that fixed or shuffled batches do not have"
        )


def public_report(run: Run) -> Report:
    """Return the constants of a run, and nothing that a training instance could have changed.

    Their ε is Opacus's, of the steps that ran, where nothing was seen that speaks against it.
    Whether something was is the one word that depends on the run: an ε that does not hold is worse.
    A distribution of per-instance values, a ranking or a measurement is private and not here.
    """
    _require_steps(run)
    delta = up(run.delta, digits=3)
    if run.against or run.unamplified:
        answer = (
            "No ε is stated here: it was not seen that what ran is what was accounted; the private "
            "page of this training says why."
        )
    else:
        answer = (
            f"By Opacus's {_method(run)} accountant ε is {up(run.opacus_epsilon)} at δ = {delta} "
            "for every instance, if the steps that ran were those that were accounted: "
            f"{_guess(run)}."
        )
    return Report(
        title="Privacy of a training: its constants",
        subtitle=f"By opacus_pil {__version__}",
        verdict=(
            ("How private was this training?", answer),
            ("Who is exposed?",
             "This page does not say: which instance lost how much depends on the data."),
            ("What may be claimed?",
             "The answer above with the constants below: δ, neighbouring relation, noise, rate and "
             "number of steps."),
        ),
        constants=_constants(run, public=True),
        limits=(
            "Choices that were made by looking at the data, hyper-parameters among them: their "
            "privacy is not included.",
        ),
        public=True,
        depends="Whether an ε may be stated at all is the one thing that depends on the run.",
    )  # fmt: skip


def _require_steps(run: Run) -> None:
    """Refuse a page about no training: an ε of 0 says nothing about what comes.

    Raises:
        ValueError: No step was made.
    """
    if not run.account.per_instance.steps:
        raise ValueError("Expected at least one step to report of, got none. Train first.")


def _guess(run: Run) -> str:
    """Say how often a guess is right at Opacus's ε."""
    right = best_guess(run.opacus_epsilon, delta=run.delta)
    return (
        "whoever sees everything that was released guesses rightly in at most "
        f"{up(100 * right)} % of all cases whether one of them was used, by the toss of a coin"
    )


def _how_private(run: Run, exposed: Exposed) -> str:
    """Answer for everybody at once: by Opacus's accountant where its ε holds, else by Rényi."""
    renyi = (
        f"accounted as if every step had moved each instance by the whole clip bound, ε is "
        f"{exposed.worst} at δ = {exposed.delta}, by Rényi accounting"
    )
    if run.against or run.unamplified:
        return f"{renyi[0].upper()}{renyi[1:]}{_doubt(run)}."
    return (
        f"ε is {up(run.opacus_epsilon)} at δ = {exposed.delta} for everybody, by Opacus's "
        f"{_method(run)} accountant, not comparable with the Rényi values of single instances, "
        f"whose own worst case is {exposed.worst}: {_guess(run)}."
    )


def run_report(run: Run, spent: PerInstanceEpsilon, *, test: Any = None) -> Report:
    """Return a run as plain records of the report.

    Args:
        run: What there is to report of.
        spent: Everybody's ε at the run's δ.
        test: Lower bounds (an Audit, or records like `auditing.LowerBound`), or a data set that was
            not trained on; None: nothing was tested.

    Raises:
        ValueError: No instance; or a data set, and no loss or model to measure it with.
    """
    if not len(spent):
        raise ValueError("Expected at least one instance to report of, got none.")
    _require_steps(run)
    bounds = _bounds(test)
    measured = () if test is None or bounds is not None else (_losses(run, test),)
    exposed = Exposed.of(spent)
    words, _ = LABELS[spent.guarantee]
    quantiles = dict(exposed.quantiles)
    most = int(np.count_nonzero(spent.epsilon == spent.epsilon.max()))
    forgotten = run.account.per_instance.num_forgotten
    return Report(
        title="Privacy of a training, instance by instance",
        subtitle=f"{len(spent):,} instances, {run.account.per_instance.steps:,} steps, by "
        f"opacus_pil {__version__}",
        verdict=(
            ("How private was this training?",
             _how_private(run, exposed)),
            ("Who is exposed?",
             f"{most:,} of {len(spent):,} instances stand at the top with ε "
             f"{quantiles['most']}, and half of all are at most {quantiles['median']}."),
            ("What may be claimed?",
             f"The values of single instances are labelled {spent.guarantee}: {words}. None of "
             "them may be published: they depend on the data, and no ε covers them."),
        ),
        tone="bad" if run.against else _tone(spent, test),
        facts=(
            (f"worst case at δ = {exposed.delta} (Rényi)", exposed.worst),
            ("most exposed instance", quantiles["most"]),
            ("median instance", quantiles["median"]),
            ("largest lower bound", down(max((b.epsilon for b in bounds or ()), default=None))),
        ),
        exposed=exposed,
        evidence=(_upper(run, spent, exposed), _lower(bounds, test), *measured),
        reasons=tuple(dict.fromkeys([*spent.reasons, *run.against])),
        constants=_constants(run, public=False),
        limits=(
            "That what ran is what was accounted: evidence was taken of each step, and an audit "
            "(opacus_pil.audit, opacus_pil.auditing.watch) measures more.",
            "Choices that were made by looking at the data, hyper-parameters among them: their "
            "privacy is not included.",
            *((f"{forgotten:,} instances were forgotten since; each deletion has a page of its "
               "own.",) if forgotten else ()),
        ),
    )  # fmt: skip


def _tone(spent: PerInstanceEpsilon, test: Any) -> str:
    if math.isinf(spent.worst_case) or getattr(test, "verdict", "") == "red flag":
        return "bad"
    return "careful" if spent.guarantee == "estimate" else "good"


def _doubt(run: Run) -> str:
    """Say that the worst case is no bound, where something speaks against it."""
    if not run.against:
        return ""
    return f"; that is no bound, because {run.against[0]}"


def _method(run: Run) -> str:
    found: str = run.account.opacus.mechanism()
    return "PRV" if found == "prv" else found


def _upper(run: Run, spent: PerInstanceEpsilon, exposed: Exposed) -> Table:
    """Return the upper numbers; a number of another method says so beside it."""
    method = _method(run)
    return Table(
        caption=f"Upper: ε at δ = {exposed.delta}",
        head=("number", "ε", "method", "label"),
        rows=(
            ("worst case", exposed.worst, "Rényi, the orders of the instances", ""),
            *(
                (f"instances, {name}", value, "Rényi", spent.guarantee)
                for name, value in exposed.quantiles
            ),
            (f"worst case by Opacus ({method})", up(run.opacus_epsilon),
             f"{method}: another method, not comparable with the rows above", ""),
        ),
        words=(2, 3),
        note="Compare instances with the worst case of the same method. " + _to_state(run),
    )  # fmt: skip


def _to_state(run: Run) -> str:
    """Say what Opacus's number is worth."""
    if run.against:
        return "Neither worst case is a bound here: see the reasons below."
    if run.unamplified:
        return f"{run.unamplified}: it is no bound."
    return "Opacus's own number is the one to state for the training as a whole."


def _lower(bounds: Sequence[Any] | None, test: Any) -> Table:
    rows = tuple(
        (str(bound.method), down(bound.epsilon), plain(bound.confidence), str(bound.assumption))
        for bound in bounds or ()
    )
    verdict = getattr(test, "verdict", None) if bounds is not None else None
    return Table(
        caption="Lower: what tests saw",
        head=("test", "ε at least", "confidence", "assumption"),
        rows=rows or (("no test of membership was handed over", "–", "–", ""),),
        words=(3,),
        note=(f"The audit's verdict: {verdict}. " if verdict else "")
        + "A bound speaks of its own δ and relation (for pairs: one record exchanged), which its "
        "audit holds against the claim. No bound, or one of 0, says nothing.",
    )


def _bounds(test: Any) -> list[Any] | None:
    """Return the lower bounds that were handed over; None: it is something else."""
    found = getattr(test, "lower", test)
    if not isinstance(found, list | tuple):
        return None
    fields = ("epsilon", "confidence", "method", "assumption")
    return list(found) if all(all(hasattr(b, f) for f in fields) for b in found) else None


def _losses(run: Run, test: Any) -> Table:
    """Return the mean loss on training rows and on rows that were not trained on.

    Raises:
        ValueError: No model of this process, no named loss, or no rows.
    """
    if not run.trainings.all:
        raise ValueError(
            "Expected a training of this process to measure `test` with, got an engine that only "
            "holds ledgers. Leave test out, or report from the engine that trained."
        )
    training = run.trainings.all[-1]
    task = run.trainings.task
    model = copy.deepcopy(training.module._module).eval()  # a copy reports to nobody
    rows = []
    for name, data in (("training instances", training.dataset), ("test", test)):
        losses = _row_losses(model, data, task)
        error = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        mean = float(losses.mean())
        interval = f"{plain(mean - 1.96 * error)} to {plain(mean + 1.96 * error)}"
        rows.append((name, f"{len(losses):,}", plain(mean),
                     "–" if math.isnan(error) else interval))  # fmt: skip
    return Table(
        caption="Loss of the model on what it was trained on, and on what it was not",
        head=("rows", "number", "mean loss", "95 % of the mean"),
        rows=tuple(rows),
        note="A gap between the two is what attacks on membership live on. No ε follows from it.",
    )


def _row_losses(model: torch.nn.Module, data: Any, task: Any) -> Any:
    """Return one loss per row; draws no random number of the caller's."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for start in range(0, len(data), _CHUNK):
            items = [data[row] for row in range(start, min(start + _CHUNK, len(data)))]
            batch = moved_to(task.collate(items), device)
            found.append(task.loss_of(model, batch).double().cpu().numpy())
    if not found:
        raise ValueError("Expected test to hold at least one row, got none. Leave it out.")
    return np.concatenate(found)


def _constants(run: Run, *, public: bool) -> tuple[tuple[str, str], ...]:
    """Return settings and versions; without what depends on the data if `public`."""
    account, kernels = run.account, run.trainings.kernels
    orders = account.per_instance.orders
    stated = None if public and (run.against or run.unamplified) else up(run.opacus_epsilon)
    found = pairs({
        "instances": f"{account.per_instance.num_instances:,}",
        "steps": _steps(account),
        "δ": up(run.delta, digits=3),
        "neighbours": "one instance added or removed",
        f"ε by Opacus ({_method(run)}, not comparable with Rényi values)": stated,
        "norm_policy": account.norm_policy,
        "Rényi orders": f"{len(orders)} from {plain(orders[0])} to {plain(orders[-1])}",
    })  # fmt: skip
    for kernel in itertools.islice(dict.fromkeys(kernels), 3):
        found += pairs({
            "max_grad_norm": plain(kernel.max_grad_norm),
            "expected_batch_size": f"{kernel.expected_batch_size:,}",
            "clipping": kernel.clipping,
            "batches": "Poisson" if kernel.poisson_sampling else "fixed",
            "grad_sample_mode": kernel.grad_sample_mode,
            "loss_reduction": kernel.loss_reduction,
            "processes": kernel.world_size if kernel.world_size > 1 else None,
        })  # fmt: skip
    found += pairs({
        "opacus_pil": __version__,
        "Opacus": opacus.__version__,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
    })  # fmt: skip
    fingerprint = None if public else run.trainings.fingerprint
    if fingerprint is None:
        return found
    return (
        *found,
        ("fingerprint of the training data", f"{fingerprint.how} {fingerprint.sha256}"),
        *((("not in the fingerprint", "; ".join(fingerprint.notes)),) if fingerprint.notes else ()),
    )


def _steps(account: Account) -> str:
    """Say what Opacus's ledger holds: runs of equal steps."""
    runs = [(float(z), float(q), int(n)) for z, q, n in account.opacus.history]
    told = [f"{n:,} of noise {plain(z)} at rate {plain(q)}" for z, q, n in runs[:5]]
    if len(runs) > 5:
        told.append(f"{sum(n for _, _, n in runs[5:]):,} in {len(runs) - 5} more stretches")
    return "; ".join(told) or "none"
