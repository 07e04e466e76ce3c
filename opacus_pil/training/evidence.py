"""Which label a step has earned: one table from what was seen to what may be claimed, and why.

A label follows from what ran. Every fact that a step's record holds, or that is missing from it,
has one row here: which policies it concerns, the strongest label it leaves, how the step is charged
then, whether caps survive it, and the words that reach the user. Knows no torch and no accountant.
"""

from __future__ import annotations

from dataclasses import dataclass

# The label that a policy can have at best, and why not a stronger one.
BEST: dict[str, tuple[str, str]] = {
    "worst_case": ("bound", ""),
    "capped": ("bound", ""),
    "full": (
        "output_specific",
        "norms were measured along the run that happened: exact for it, and no bound before it",
    ),
    "participation": (
        "output_specific",
        "the schedule of batches is taken as public and an instance's slot as staying empty, and "
        "norms are those of the run that happened",
    ),
    "refresh": (
        "estimate",
        "norms are those of the last full pass, not those at each step",
    ),
    "last_seen": (
        "estimate",
        "an instance's norm is that of the last batch it was in, not the one at each step",
    ),
}

_MEASURED = ("full", "participation")
_ATTRIBUTED = ("capped", "full", "participation", "refresh", "last_seen")
_SPECIFIC = ("capped", "full", "participation")


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        code: Of the fact.
        leaves: The strongest label that a step with it can have.
        words: Why; `{detail}` is what was found.
        policies: That it concerns; None: all.
        unamplified: Whether the step is charged as if everybody had been in it: nothing says that
            its batch was drawn at the accounted rate.
        unbounded: Whether nothing bounds what the step gave away: everybody is charged infinitely.
        breaks_caps: Whether what caps and budgets promise would not hold: the step is refused.
        certifiable: Whether certificates of unlearning may rest on a ledger with it.
        chosen: Whether it follows from a documented setting of the caller's: no warning then.
    """

    code: str
    leaves: str
    words: str
    policies: tuple[str, ...] | None = None
    unamplified: bool = False
    unbounded: bool = False
    breaks_caps: bool = False
    certifiable: bool = False
    chosen: bool = False

    def concerns(self, policy: str) -> bool:
        """Whether it takes anything away from numbers of this policy."""
        return self.policies is None or policy in self.policies


_TABLE = (
    # --- which batch it was ---------------------------------------------------------------------
    Finding(
        "batch_not_drawn", "estimate",
        "a step's batch was not the one that the private loader had just handed out (a batch used "
        "twice, or one from elsewhere), so that nothing says at which rate it was drawn",
        unamplified=True, breaks_caps=True,
    ),
    Finding(
        "draw_skipped", "estimate",
        "a drawn batch made no private step (it was skipped, or another optimizer used it): how "
        "many steps there are then tells who was drawn",
    ),
    Finding(
        "coins_repeated", "estimate",
        "batches were drawn by random numbers that had drawn others before (a generator was seeded "
        "again), so that who is in both was decided by the same coins; seed once",
        unamplified=True, breaks_caps=True,
    ),
    Finding(
        "forgotten_rows_drawn", "estimate",
        "rows that were forgotten could be drawn again, which they are charged nothing for; train "
        "on the others (make_private_on)",
        policies=("worst_case", "full", "participation", "refresh", "last_seen"),
    ),
    Finding(
        "coins_tell_noise", "estimate",
        "batches and noise were drawn by two generators with the same seed, so that the coins and "
        "the noise are made of the same random numbers; give them different seeds",
        unamplified=True, breaks_caps=True,
    ),
    Finding(
        "rows_exchanged", "estimate",
        "a row of the data set is not always the same instance ({detail}); use one engine per data "
        "set, and leave its order as it is",
        policies=_ATTRIBUTED, breaks_caps=True,
    ),
    Finding(
        "rows_not_once", "estimate",
        "a batch had another number of gradients than rows were drawn (several views of a row, "
        "rows repeated or left out)",
        breaks_caps=True,
    ),
    Finding(
        "rows_not_apart", "estimate",
        "it was not shown that each row of a batch is one drawn row: {detail}",
        breaks_caps=True,
    ),
    Finding(
        "order_unknown", "estimate",
        "it was not known which row of a batch is whose, and everyone was charged the clip bound: "
        "{detail}",
        policies=_ATTRIBUTED, breaks_caps=True, certifiable=True,
    ),
    # --- what was clipped -----------------------------------------------------------------------
    Finding(
        "sum_above_clip", "estimate",
        "the sum of a step's clipped gradients was larger than its rows allow: clipping did not "
        "hold",
        unbounded=True, breaks_caps=True,
    ),
    Finding(
        "clip_changed_midway", "estimate",
        "parts of one draw were clipped to different bounds: a row that leaves moves others to "
        "another part; change the clip bound between steps",
        breaks_caps=True,
    ),
    Finding(
        "loss_not_per_row", "estimate",
        "the loss that was clipped was not one value per row (shape {detail}), which Opacus's "
        "ghost clipping multiplies by all rows' factors: nothing was clipped; squeeze outputs or "
        "targets to shape (rows,)",
        unbounded=True, breaks_caps=True,
    ),
    Finding(
        "not_clipped", "estimate",
        "parameters were trained whose gradients are not in the clipped norm ({detail}): they were "
        "unfrozen after make_private, or have no clip bound",
        unbounded=True, breaks_caps=True,
    ),
    Finding(
        "gradient_not_clipped", "estimate",
        "a step used a gradient that no clipped backward pass had made ({detail})",
        breaks_caps=True,
    ),
    Finding(
        "gradient_changed", "estimate",
        "the clipped gradient was changed before the step (a second backward pass, or a clip of "
        "the whole gradient)",
        breaks_caps=True,
    ),
    Finding(
        "gradient_not_finite", "estimate",
        "a gradient was not finite: whoever had it has lost everything, and others may have been "
        "in the same position without being drawn",
        policies=("worst_case", "capped", "refresh", "last_seen"), breaks_caps=True,
    ),
    Finding(
        "coarse_rounding", "estimate",
        "gradients were kept in a precision ({detail}) whose rounding moves their sum by more than "
        "the clip allows; leave autocast out of the forward pass, or train in float32",
        breaks_caps=True,
    ),
    # --- what was noised ------------------------------------------------------------------------
    Finding(
        "not_noised", "estimate",
        "parameters moved by gradients without noise ({detail})",
        unbounded=True, breaks_caps=True,
    ),
    Finding(
        "noise_not_seen", "estimate",
        "a step was made without Opacus's noise",
        unbounded=True, breaks_caps=True,
    ),
    Finding(
        "noise_repeated", "estimate",
        "two steps got the same noise (a generator was seeded again), and their difference has "
        "none; seed once",
        unbounded=True, breaks_caps=True,
    ),
    Finding(
        "noised_gradient_changed", "estimate",
        "a gradient was changed after its noise was added and before the model moved by it (by a "
        "step hook, or between pre_step and the plain optimizer's step)",
        breaks_caps=True,
    ),
    Finding(
        "buffer_changed", "estimate",
        "a buffer of the model, or a parameter that the private optimizer does not hold, changed "
        "during training, which adds no noise to it ({detail})",
    ),
    Finding(
        "weights_renormed", "estimate",
        "an embedding with max_norm rescales the weights of whatever a batch looks up, by no noise "
        "({detail}); leave max_norm out",
        unbounded=True, breaks_caps=True,
    ),
    Finding(
        "divisor_changed", "estimate",
        "the noisy sum was divided by another number than make_private had set ({detail}): one "
        "that follows the batch tells how many were drawn; leave expected_batch_size alone",
        breaks_caps=True,
    ),
    # --- what a row's gradient is ---------------------------------------------------------------
    Finding(
        "loss_not_checked", "bound",
        "assumed, not checked: each row that was handed out is trained on once, and its loss "
        "depends on that row alone ({detail})",
        policies=("worst_case",),
    ),
    Finding(
        "loss_not_checked", "estimate",
        "it was not checked that each row's loss depends on that row alone ({detail})",
        policies=_SPECIFIC,
    ),
    Finding(
        "loss_couples_rows",
        "estimate",
        "a row's loss depends on other rows of its batch: {detail}",
        breaks_caps=True,
    ),
    Finding(
        "rows_reordered",
        "estimate",
        "rows were trained on in another order than they were handed out; say "
        "batch(indices=...) in that order",
        breaks_caps=True,
    ),
    Finding(
        "loss_scaled",
        "estimate",
        "rows have other gradients in training than the named loss gives them alone: {detail}; "
        "pass loss_of with the factor",
    ),
    Finding(
        "loss_differs",
        "estimate",
        "rows have other gradients in training than the named loss gives them alone: {detail}; "
        "inputs, model or loss are others than described, or rows are mixed: pass loss_of and the "
        "loader's own collate_fn",
        breaks_caps=True,
    ),
    Finding(
        "not_compared",
        "bound",
        "assumed, not compared: rows are trained on as described (their order is not known, or "
        "data set or loss are random)",
        policies=("worst_case",),
        certifiable=True,
    ),
    Finding(
        "not_compared",
        "estimate",
        "it was not compared whether rows are trained on as described, each under its own cap "
        "(data set or loss are random)",
        policies=("capped",),
    ),
    Finding(
        "not_measured", "estimate",
        "a full pass failed, and everyone was charged the clip bound: {detail}",
        policies=("full", "refresh"),
    ),
    Finding(
        "random_gradient", "estimate",
        "the gradient given the model is random (dropout, augmentation): the norm is that of one "
        "draw, not the largest",
        policies=_MEASURED, certifiable=True,
        chosen=True,
    ),
    Finding(
        "random_rows", "estimate",
        "the data set gives other items when it is asked again: the norm is that of one draw, not "
        "the largest",
        policies=_MEASURED, certifiable=True,
    ),
    # --- settings -------------------------------------------------------------------------------
    Finding(
        "random_instance_on_empty", "estimate",
        "rand_on_empty puts a random instance into an empty draw: alone in a batch, an instance "
        "takes its place and moves the sum by both gradients",
        chosen=True,
    ),
    Finding(
        "count_released", "estimate",
        "adaptive clipping releases how many gradients it left whole, which is charged in full "
        "but not proved",
        chosen=True,
    ),
    Finding(
        "caps_changed", "output_specific",
        "caps were changed during the run without a budget",
        policies=("capped",),
        chosen=True,
    ),
    Finding(
        "levels_changed", "output_specific",
        "earlier steps of this ledger were charged by measured norms",
        policies=("worst_case",),
        chosen=True,
    ),
    # --- what came before -----------------------------------------------------------------------
    Finding(
        "earlier_release", "bound",
        "steps were charged by a release that did not look at what ran: the label is its own",
        certifiable=True,
    ),
    Finding(
        "other_data", "estimate",
        "earlier steps were made on other data, and everyone is charged the worst case for them",
    ),
)  # fmt: skip


def rows_of(code: str) -> tuple[Finding, ...]:
    """Return the rows of a fact, the one that counts first.

    Raises:
        KeyError: A fact that the table does not know: ours to mend.
    """
    return _ROWS[code]


def table() -> tuple[Finding, ...]:
    """Return all rows, in the order they are documented in."""
    return _TABLE


_ROWS: dict[str, tuple[Finding, ...]] = {}
for _row in _TABLE:
    _ROWS[_row.code] = (*_ROWS.get(_row.code, ()), _row)
