"""How many sequences of the machine are played, and what they amounted to."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.user_machine.machine import STRONG
from tests.user_machine.troubles import UserMachine

CALLS = 16  # rules in a sequence, at most; each may be several calls


def play(machine: type[UserMachine], *, sequences: int, start: int | None = None) -> None:
    """Play sequences; None: the same ones at each time, as tests do, shrunk if one fails.

    Raises:
        Violation: Unless the machine collects its findings.
    """
    phases = [Phase.generate] if machine.collect else [Phase.generate, Phase.shrink]
    options = settings(
        max_examples=sequences, stateful_step_count=CALLS, deadline=None, database=None,
        derandomize=start is None, suppress_health_check=list(HealthCheck), phases=phases,
        print_blob=False,
    )  # fmt: skip
    if start is not None:
        machine = seed(start)(machine)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Opacus's notice of every first batch that is empty
    try:
        run_state_machine_as_test(machine, settings=options)
    finally:
        logging.disable(before)


def counted(tally: Counter[Any], kind: str) -> dict[str, int]:
    """Return what was counted of one kind, most frequent first."""
    found = {k[1:]: n for k, n in tally.items() if isinstance(k, tuple) and k[0] == kind}
    names = {" / ".join(map(str, key)): n for key, n in found.items()}
    return dict(sorted(names.items(), key=lambda item: -item[1]))


def shares(tally: Counter[Any]) -> dict[str, float]:
    """Return the share of checks at which a label was strong, by policy and mode."""
    kinds = sorted({k[1:3] for k in tally if isinstance(k, tuple) and k[0] == "seen"})
    found = {kind: [tally[("seen", *kind, strong)] for strong in (False, True)] for kind in kinds}
    return {" / ".join(kind): strong / (weak + strong) for kind, (weak, strong) in found.items()}


def summary(machine: type[UserMachine]) -> dict[str, Any]:
    """Return the statistics of all sequences played so far."""
    tally = machine.tally
    ends = counted(tally, "end")
    strong = sum(n for name, n in ends.items() if name.split(" / ")[-1] in STRONG)
    ratios = np.array(machine.ratios or [np.nan])
    quantiles = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    return {
        "sequences": tally["sequences"],
        "ended with a strong label": strong,
        "noisy or raw steps": tally["steps"],
        "steps whose sum the account explains": tally["explained"],
        "claims checked": tally["claims checked"],
        "excused by a named assumption": tally["excused by a named assumption"],
        "excused: nothing to be seen yet": counted(tally, "excused: nothing to be seen yet"),
        "number / exact divergence, smallest of a check": {
            str(q): float(v) for q, v in zip(quantiles, np.quantile(ratios, quantiles), strict=True)
        },
        "policies": counted(tally, "policy"),
        "labels at checks": counted(tally, "label"),
        "share of checks with a strong label": shares(tally),
        "labels at the end": ends,
        "rules": counted(tally, "rule"),
        "refused by the package": counted(tally, "refused"),
        "errors of Opacus": counted(tally, "Opacus"),
        "violations": list(machine.found),
    }
