"""Whether rows were drawn as accounted: by which loader, at which rate, independently or not.

Knows measurements and the accounted rate; no loader.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import beta, binom

from .comparison import AGREES, DIFFERS, UNKNOWN, VIOLATES, Check, dispersion_check
from .measurements import Measurements

_RARE = 0.1  # of all steps: a loop may combine and reorder batches in ways nobody thought of


def loader_check(m: Measurements) -> Check:
    """Hold each step against the batches that the private loader had handed out for it."""
    name, what = "loader", "steps on batches of the private loader"
    if "loader" in m.notes or not m.sourced:
        reason = m.notes.get("loader", "batches were not seen on their way to a step")
        return Check(name, what, state=UNKNOWN, reason=reason)
    overfull = min(m.unordered, m.unequal)  # a loop keeps the order, or each batch as it is
    state, reason = _of_loader(m, overfull)
    own = float(m.sourced - max(m.unfed, overfull))
    return Check(name, what, float(m.sourced), own, state=state, reason=reason)


def _of_loader(m: Measurements, overfull: int) -> tuple[str, str]:
    """Return a state, and what is wrong."""
    loader = "the loader that make_private returned"
    if not m.handed:
        return VIOLATES, (
            f"{loader} was never iterated while weights moved {m.sourced} times: loop over it, "
            "not over your own"
        )
    if m.unfed:
        return VIOLATES, (
            f"{m.unfed} of {m.sourced} steps had no batch of {loader}, which handed out "
            f"{m.handed}: step once on each batch of it"
        )
    if overfull > _RARE * m.sourced:
        return VIOLATES, (
            f"{overfull} of {m.sourced} steps had more rows than {loader} had handed out: step "
            "on its batches, as they are"
        )
    if overfull or m.partial:
        count = max(overfull, m.partial)
        return DIFFERS, f"{count} of {m.sourced} steps had other rows than all of a batch"
    return AGREES, ""


def _why_no_rate(m: Measurements, rate: float | None) -> str:
    if rate is None:
        return "no accountant says at which rate"
    if m.instances is None:
        return "the size of the data set is not known"
    if not m.sizes:
        return "no batch was seen"
    if m.phantom and len(m.sizes) * (1.0 - rate) ** m.instances > 1e-4:
        return "empty draws are given as a random row"
    return ""


def rate_check(m: Measurements, rate: float | None, each: float) -> Check:
    """Compare the number of rows in all steps with binomial draws."""
    name, what = "rate", "rows drawn per step / rows of the data set"
    why = _why_no_rate(m, rate)
    if why or rate is None or m.instances is None:
        return Check(name, what, rate, state=UNKNOWN, reason=why)
    total, trials = int(sum(m.sizes)), m.instances * len(m.sizes)
    found = total / trials
    if total > trials:
        return Check(name, what, rate, found, found, found, 0.0, VIOLATES,
                     "more rows in the steps than there are")  # fmt: skip
    p = min(2.0 * min(float(binom.cdf(total, trials, rate)),
                      float(binom.sf(total - 1, trials, rate))), 1.0)  # fmt: skip
    low = 0.0 if total == 0 else float(beta.ppf(each / 2, total, trials - total + 1))
    high = 1.0 if total == trials else float(beta.isf(each / 2, total + 1, trials - total))
    state = AGREES if p >= each else VIOLATES if found > rate else DIFFERS
    reason = "" if state == AGREES else f"rows are drawn at {found / rate:.3g} times the rate"
    return Check(name, what, rate, found, low, high, p, state, reason)


def batch_sizes_check(m: Measurements, rate: float | None, each: float) -> Check:
    """Compare the spread of batch sizes with that of Poisson draws."""
    name, what = "batch_sizes", "variance of batch sizes / that of Poisson draws"
    why = _why_no_rate(m, rate)
    if not why and len(m.sizes) < 8:
        why = "fewer than eight steps were seen"
    if why or rate is None or m.instances is None:
        return Check(name, what, 1.0, state=UNKNOWN, reason=why)
    sizes = np.array(m.sizes, dtype=np.float64)
    rate = float(sizes.mean()) / m.instances  # of the rate itself speaks the check above
    if not 0 < rate < 1:
        return Check(name, what, 1.0, state=UNKNOWN, reason="all rows or none are drawn")
    return dispersion_check(
        name, what, sizes, m.instances, rate, lost=1, each=each,
        small="batches have nearly the same size: fixed or shuffled, accounted as Poisson draws",
        large="batch sizes vary more than Poisson draws do",
    )  # fmt: skip


def rows_check(m: Measurements, each: float) -> Check:
    """Compare how often each row was drawn with independent coins."""
    name, what = "rows", "variance of draws per row / that of independent coins"
    if m.drawn is None or m.draws < 8:
        return Check(name, what, 1.0, state=UNKNOWN, reason="the drawn rows were not seen")
    counts = m.drawn.astype(np.float64)
    mean = float(counts.mean()) / m.draws
    if not 0 < mean < 1:
        return Check(name, what, 1.0, state=UNKNOWN, reason="all rows or none are drawn")
    return dispersion_check(
        name, what, counts, m.draws, mean, lost=1, each=each,
        small="rows are drawn equally often: without replacement, not by independent coins",
        large="some rows are drawn more often than others",
    )  # fmt: skip
