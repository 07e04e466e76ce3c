"""How users set their trainings up, and what trouble they make: strategies of hypothesis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from tests.user_machine.world import TURNED, Setting

TROUBLES = (
    "reuse", "reuse", "skip", "skip", "foreign", "foreign", "coins", "join", "rows", "passes",
    "ahead", "scale", "spare",
    "plain step", "noise", "second backward", "signal", "hook", "clip grad", "one bound",
    "caps in hand", "second model", "seed", "seed", "divisor", "rate",
)  # fmt: skip
_POLICIES = ("worst_case",) * 6 + ("capped",) * 6 + ("full",) * 3 + ("participation",) * 2
_POLICIES += ("last_seen", "refresh")
_CAPS = ((1.0,) * 6, (0.5,) * 6, (1.0, 0.5, 0.2, 0.0, 0.9, 0.3))


@st.composite
def settings(draw: Any) -> Setting:
    """One training, plain in most of its parts."""

    def pick(plain: Any, *others: Any, often: int = 3) -> Any:
        return draw(st.sampled_from((plain,) * often * len(others) + others))

    policy = draw(st.sampled_from(_POLICIES))
    mode = draw(st.sampled_from(("hooks", "hooks", "ghost", "ghost", "functorch")))
    clipping = "flat"
    if mode != "ghost" and policy != "capped":
        clipping = draw(st.sampled_from(("flat", "per_layer")))
    caps = budget = None
    if policy == "capped":
        caps = draw(st.sampled_from((None, *_CAPS)))
        budget = draw(st.sampled_from((None, 5.0, 40.0)))
        if caps is None and budget is None:
            budget = 5.0
    poisson = policy != "participation"
    entry = pick("make_private", "attach", "attach without loader", often=1)
    entry = entry if poisson else "make_private"
    loader = entry != "attach without loader"
    loss = pick(
        "plain", "unnamed", "loss_of", "scaled", "weighted", "weighted named", "weighted unnamed",
        "column", TURNED, often=2,
    )  # fmt: skip
    if policy in ("full", "refresh") and loss in ("unnamed", "weighted unnamed"):
        loss = "plain"  # a full pass needs a named loss
    return Setting(
        policy=policy, mode=mode, clipping=clipping, entry=entry, loss=loss, caps=caps,
        budget=budget, batch=draw(st.sampled_from((1, 2, 3))),
        collate=pick("default", "own", "sorting", "twice", "dropping", often=2)
        if loader
        else "default",
        manager=pick("none", "ours", *("Opacus's",) * (policy != "capped")) if loader else "none",
        noise=draw(st.sampled_from((0.7, 1.0, 3.0))),
        reduction=pick("mean", "sum") if "weighted" not in loss else "mean",
        early_hook=pick("none", "louder", "swinging", often=1) if entry == "attach" else "none",
        accumulation=pick(False, True) and mode != "ghost",
        history=pick(False, True), seed=draw(st.integers(0, 999)),
    )  # fmt: skip


def suited(setting: Setting, trouble: str) -> Setting:
    """The same, so that one kind of trouble has something to break."""
    found = setting
    if trouble in ("divisor", "rate", "seed", "skip", "caps in hand"):  # of drawn batches
        policy = "worst_case" if found.policy == "participation" else found.policy
        found = replace(found, policy=policy, reduction="mean")
        if found.entry == "attach without loader":
            found = replace(found, entry="make_private")
    if trouble == "one bound" and found.mode != "ghost" and found.policy != "capped":
        found = replace(found, clipping="per_layer")
    if trouble == "caps in hand" and found.policy != "capped":
        manager = "ours" if found.manager == "Opacus's" else found.manager
        found = replace(
            found, policy="capped", clipping="flat", caps=_CAPS[0], budget=None, manager=manager
        )
    return found


def without_trouble(setting: Setting) -> Setting:
    """The same without what would take its label away by itself."""
    loss = setting.loss if setting.loss in ("unnamed", "loss_of") else "plain"
    if setting.policy != "worst_case":
        loss = "plain"  # stronger labels than its need a named loss
    collate = "default" if setting.collate in ("twice", "dropping") else setting.collate
    return replace(setting, loss=loss, collate=collate)
