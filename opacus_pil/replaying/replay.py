"""replay: from the checkpoints of somebody's training to an account of every instance.

Measures norms at the weights that were kept, and charges the steps that the caller describes.
Nobody watched that training, so a single run is an "estimate", whatever was kept of it.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from .. import _validate as check
from .._validate import FloatArray
from ..accounting import DEFAULT_ORDERS, PerInstanceAccountant
from ..capture.row_losses import LossOf
from ..training.task import Task
from .composed import ORDERS, RunLevels, composed
from .row_norms import RowNorms, each_step
from .trajectory import Trajectory, trajectories

UNSEEN = "nobody watched the steps: loss, clip, noise, rate and their number are as described"
GAP = "charged at the larger norm of the checkpoints before and after it"
AFTER = "after the last checkpoint, charged at its norms"
BEFORE = "before the first checkpoint, charged the worst case (before_first='worst_case')"
AS_FIRST = (
    "before the first checkpoint, charged at its norms (before_first='as_first'), though norms are "
    "larger early on"
)
RANDOM = "the forward pass draws random numbers: a norm is one draw of many"
MEANS = "means over few runs in place of expectations: too low more often than too high"
DROPOUT = "dropout was switched off to measure norms, which it changes"


@check.known_keywords
def replay(
    checkpoints: Any,
    *,
    module: nn.Module | Callable[[], nn.Module],
    dataset: Any,
    criterion: Any = None,
    loss_of: LossOf | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    loss_reduction: str = "mean",
    noise_multiplier: float | Sequence[float],
    max_grad_norm: float | Sequence[float],
    sample_rate: float | Sequence[float],
    steps: int | None = None,
    before_first: str = "worst_case",
    confidence: float | None = 0.95,
    instance_ids: npt.ArrayLike | None = None,
    orders: Sequence[float] | None = None,
    levels: int | None = None,
    history: bool = False,
    chunk_size: int = 256,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> PerInstanceAccountant:
    """Account for a training that was run elsewhere, from the checkpoints it left.

    Guarantee: none for one run: "estimate", for ranking and planning. Of two or more independent
        runs "expectation_bound" with the confidence named in `.reasons`, if the training was as
        described; there a step whose start was not kept is charged the worst case. In either case
        nobody is charged more than the worst case.

    Args:
        checkpoints: One run: a folder, a checkpoint, a list of checkpoints, or {noisy steps made:
            checkpoint}. Several runs: a list of folders, lists or mappings. A checkpoint is a file
            of torch.save or a state dict; plain, of Opacus, of this package, wrapped or not. One
            alone that does not say its step is taken to be where training ended.
        module: The model that was trained, or a function that builds it; its weights do not matter,
            its requires_grad does. It is copied.
        dataset: Map-style: the private training set, in the order of the accounts.
        criterion: The training's loss of (outputs, targets); or
        loss_of: loss_of(module, batch) -> one loss per row.
        collate_fn: As in training.
        loss_reduction: As make_private was given it.
        noise_multiplier: Of every step, or shape (steps,).
        max_grad_norm: Clip bound; or a list, one per trainable parameter, for per-layer clipping.
        sample_rate: Poisson rate of every step, or shape (steps,). Opacus's is 1 / len(loader).
        steps: Noisy steps that were made; None: as the checkpoints' own accountant says.
        before_first: What steps before the first checkpoint are charged in a single run:
            "worst_case", or "as_first", its norms, which ranks instances where only the final model
            was kept, and is too small more often.
        confidence: With several runs, of each instance's value: with few runs it is close to the
            worst case. None: the means over the runs themselves, an "estimate".
        instance_ids: Shape (rows,), stable ids. Default 0 … N−1.
        orders: Rényi orders. Default: DEFAULT_ORDERS; of several runs eight of them are composed,
            and the others hold the worst case.
        levels: Sensitivities on the grid. Default: 1024, with several runs 256.
        history: Keep levels for `group_rdp` and `tight_epsilon` (one run only).
        chunk_size: Rows per forward pass.
        work_dir: Folder for norms, mode 0600: the same call goes on after a kill.
        progress: Show bars.

    Returns:
        PerInstanceAccountant with label and reasons.

    Raises:
        ValueError: Weights that do not fit the module or are not finite; missing steps; a ledger in
            the checkpoints that says something else than the arguments; the same run twice.
        LedgerError: A file that cannot be read safely; norms in work_dir of another training.
        UnsupportedError: A model that mixes instances, or batches that need `loss_of`.

    Source: per-instance composition, arXiv:2307.00310; estimates as in arXiv:2206.02617, App. B.2,
        which shows what stale norms are worth.
    Privacy: the account depends on private data; it is itself not private to release.
    """
    check.choice("before_first", before_first, ("worst_case", "as_first"))
    if confidence is not None:
        check.real("confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True)
    count = None if steps is None else check.integer("steps", steps, low=1)
    check.integer("chunk_size", chunk_size, low=1)
    if (criterion is None) == (loss_of is None):
        raise ValueError(
            "Expected criterion or loss_of, got both or none. Name the loss of the training."
        )
    runs = trajectories(checkpoints, steps=count)
    total = _steps(runs, count)
    noises = each_step(noise_multiplier, "noise_multiplier", total, _noise)
    rates = each_step(sample_rate, "sample_rate", total, check.probability)
    for number, run in enumerate(runs):
        _require_as_counted(run, noises, rates, number=number, several=len(runs) > 1)
    for why in dict.fromkeys(why for run in runs for why in unseen_end(run, total)):
        warnings.warn(why, stacklevel=3)  # whoever called, past check.known_keywords
    norms = RowNorms(
        _plain(module), dataset, task=Task(criterion, loss_of, collate_fn, loss_reduction),
        max_grad_norm=_bounds(max_grad_norm), chunk_size=chunk_size, folder=work_dir,
        progress=progress,
    )  # fmt: skip
    several = len(runs) > 1
    accountant = PerInstanceAccountant(
        len(dataset), orders=DEFAULT_ORDERS if orders is None else orders,
        levels=(256 if several else 1024) if levels is None else levels,
        instance_ids=instance_ids, history=history and not several,
    )  # fmt: skip
    if not several:
        _charge(accountant, runs[0], norms, noises, rates, as_first=before_first == "as_first")
    else:
        if (noises == 0.0).any():
            raise ValueError(
                "Expected noise at every step of several runs, got noise_multiplier=0. Without "
                "noise the loss is infinite, in expectation too."
            )
        accountant = _compose(
            accountant, runs, norms, noises, rates, confidence, progress,
            orders=ORDERS if orders is None else accountant.orders.tolist(),
        )  # fmt: skip
    reason = _random(norms)
    if reason:
        accountant.weaken("estimate", reason=reason)
    return accountant


# --- one run --------------------------------------------------------------------------------------


def _charge(
    accountant: PerInstanceAccountant,
    run: Trajectory,
    norms: RowNorms,
    noises: FloatArray,
    rates: FloatArray,
    *,
    as_first: bool,
) -> None:
    """Charge stretch by stretch; two passes are in memory at a time."""
    total = len(noises)

    def charge(start: int, stop: int, *why: str) -> None:
        for step in range(start, min(stop, total)):
            accountant.step(
                indices=[], sensitivities=[], noise_multiplier=float(noises[step]),
                sample_rate=float(rates[step]), reasons=(UNSEEN, *why),
            )  # fmt: skip

    places = run.places
    if places[0].at > 0 and not as_first:
        charge(0, places[0].at, BEFORE)
    before = norms.sensitivities(places[0].read())
    if places[0].at > 0 and as_first:
        accountant.observe_all(before)
        charge(0, places[0].at, AS_FIRST)
    for place, following in zip(places, [*places[1:], None], strict=True):
        if place.at < total:  # the step that starts from here
            accountant.observe_all(before)
            charge(place.at, place.at + 1)
        if following is None:
            charge(place.at + 1, total, AFTER, *unseen_end(run, total))
            break
        after = norms.sensitivities(following.read())
        if following.at > place.at + 1:
            accountant.observe_all(np.maximum(before, after))
            charge(place.at + 1, following.at, GAP)
        before = after


def unseen_end(run: Trajectory, total: int) -> tuple[str, ...]:
    """Return what to say where the checkpoints' own accountant counted fewer steps than described.

    Training may have gone on after them; then nothing but the caller's word speaks of its end.
    """
    counted = sum(one[2] for one in run.history) if run.history else total
    if counted >= total:
        return ()
    return (
        f"the accountant in the checkpoints counted {counted} steps, and steps={total} were "
        f"described: pass steps={counted} if training ended there",
    )


# --- several runs ---------------------------------------------------------------------------------


def _compose(
    accountant: PerInstanceAccountant,
    runs: Sequence[Trajectory],
    norms: RowNorms,
    noises: FloatArray,
    rates: FloatArray,
    confidence: float | None,
    progress: bool,
    *,
    orders: Sequence[float],
) -> PerInstanceAccountant:
    total = len(noises)
    table = RunLevels(len(norms), runs=len(runs), steps=total, levels=accountant.levels)
    for number, run in enumerate(runs):
        for place in run.places:
            if place.at < total:
                table.set(number, place.at, norms.sensitivities(place.read()))
    reasons = [
        f"{len(runs)} runs were passed as independent, each with every instance: that their coins "
        "were, numbers cannot show",
        UNSEEN,
        f"each value holds with confidence {confidence:g} over the runs, not all of them together"
        if confidence is not None
        else MEANS,
    ]
    missed = int((~table.looked).sum())
    if missed:
        reasons.append(
            f"{missed} of {table.looked.size} steps start from weights that were not kept, and are "
            "charged the worst case"
        )
    return composed(
        table, accountant=accountant, orders=orders, noises=noises, rates=rates,
        confidence=confidence, reasons=reasons, progress=progress,
    )  # fmt: skip


# --- what the caller says -------------------------------------------------------------------------


def _steps(runs: Sequence[Trajectory], steps: int | None) -> int:
    if steps is not None:
        return steps
    counted = {sum(r[2] for r in run.history) if run.history else None for run in runs}
    if len(counted) > 1 or None in counted:
        raise ValueError(
            "Expected to know how many noisy steps were made, got checkpoints that do not say, or "
            f"say different numbers ({sorted(map(str, counted))}). Pass steps=."
        )
    (found,) = counted
    assert found is not None
    if found < 1:
        raise ValueError("Expected a run with noisy steps, got checkpoints from before the first.")
    return found


def _noise(name: str, value: Any) -> float:
    return check.real(name, value, low=0.0)


def _bounds(max_grad_norm: float | Sequence[float]) -> float | Sequence[float]:
    if np.ndim(max_grad_norm) == 0:
        return check.real("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
    return [
        check.real(f"max_grad_norm[{i}]", bound, low=0.0, open_low=True)
        for i, bound in enumerate(max_grad_norm)  # type: ignore[arg-type]
    ]


def _require_as_counted(
    run: Trajectory, noises: FloatArray, rates: FloatArray, *, number: int, several: bool
) -> None:
    """Raise where the checkpoints' own accountant says another training than the caller."""
    which = f" of run {number}" if several else ""
    done = 0
    for noise, rate, count in run.history or ():
        stretch = slice(done, done + count)
        done += count
        if done > len(noises):
            raise ValueError(
                f"Expected steps={len(noises)} to be all that was made, got {done} by the "
                f"accountant in the checkpoints{which}. Pass steps={done}."
            )
        for name, own, given in (
            ("noise_multiplier", noise, noises), ("sample_rate", rate, rates)
        ):  # fmt: skip
            if not np.allclose(given[stretch], own, rtol=1e-6, atol=0.0):
                raise ValueError(
                    f"Expected {name} as the accountant in the checkpoints{which} counted it "
                    f"({own!r} for {count} steps), got {name}={float(given[stretch][0])!r}. Pass "
                    "its value, or save the weights alone if it was another training's."
                )


def _plain(module: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    made = module if isinstance(module, nn.Module) else module()
    if not isinstance(made, nn.Module):
        raise TypeError(
            check.expected(
                "module", "to be a torch.nn.Module or a function that builds one",
                type(made).__name__,
            )
        )  # fmt: skip
    return copy.deepcopy(getattr(made, "_module", made))


def _random(norms: RowNorms) -> str:
    """Return why a norm may be another at another look; empty if it is not."""
    if not norms.deterministic:
        return RANDOM
    return DROPOUT if norms.has_dropout else ""
