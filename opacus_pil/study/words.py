"""What came out, in lines a person reads: one verdict per claim and condition, with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .claims import BARRIER
from .prediction import PREDICTORS
from .training import REFERENCE

CLAIMS = {
    "a": "time to unlearn grows with the logarithm of the privacy loss",
    "a, predicted": "ln(distance / threshold) / ln(1 / contraction) steps, fitted in other "
    "trainings, predict it",
    "a, gap": "the gap to the oracles after a fixed budget grows with log privacy loss",
    "b": "privacy loss ranks difficulty at least as well as each proxy",
    "b, top sets": "the instances it calls hardest are harder to forget than those of the proxies",
    "c": "loss barriers to the oracles grow with the privacy loss",
    "d": "per-instance budgets certify the same ε with fewer steps than the worst case",
}


def verdicts(summary: Mapping[str, Any], *, definition: str) -> list[dict[str, str]]:
    """Return one row per claim and condition: claim, condition, reproduced, numbers."""
    rows = []
    for entry in summary["conditions"]:
        rows += _condition(entry, definition)
    for name, found in summary["certified"].items():
        ratio = found["median_ratio"]
        rows.append(
            {
                "claim": "d",
                "condition": f"{name}, {summary['dataset']}",
                "reproduced": found["reproduced"],
                "numbers": f"fewer steps in {found['fewer']} of {found['compared']} plans, more in "
                f"{found['more']}; median ratio {'–' if ratio is None else format(ratio, '.2f')}",
            }
        )
    order = list(CLAIMS)
    return sorted(rows, key=lambda row: order.index(row["claim"]))


def _condition(entry: Mapping[str, Any], definition: str) -> list[dict[str, str]]:
    name = f"{entry['model']}, {entry['name']}"
    time = entry["time_against_log_privacy_loss"][definition]
    whole = time["line_with_unreached_at_the_end"]
    rows = [
        {
            "claim": "a",
            "condition": name,
            "reproduced": time["reproduced"],
            "numbers": f"of {time['sets']} sets {time['at_once']} are there at once, "
            f"{time['later']} later, {time['sets'] - time['reached']} never; "
            f"R² {_number(time['line']['r2'])} (all: {_number(whole['r2'])}), "
            f"{_number(whole['slope'], '.1f')} steps per nat {_interval(whole['interval'], '.1f')},"
            f" rank correlation {_estimate(time['spearman'])}",
        }
    ]
    rows += [
        _predicted(entry["prediction"][predictor][definition], f"{name}: from {predictor}", entry)
        for predictor in PREDICTORS
    ]
    gaps = entry["gap_against_log_privacy_loss"]
    budget = list(gaps)[-2]
    rows.append(
        {
            "claim": "a, gap",
            "condition": name,
            "reproduced": gaps[budget]["reproduced"],
            "numbers": f"after {budget}: rank correlation {_estimate(gaps[budget]['spearman'])}, "
            f"R² {_number(gaps[budget]['line']['r2'])}",
        }
    )
    barriers = entry["barriers_against_log_privacy_loss"]
    for pair in ("original", "unlearned"):
        for height, one in barriers[f"{pair} to oracle, forget"].items():
            rows.append(
                {
                    "claim": "c",
                    "condition": f"{name}: {pair} to oracle, {_HEIGHTS[height]}",
                    "reproduced": one["reproduced"],
                    "numbers": f"{one['barriers']} of {one['sets']} sets above {BARRIER:g} nats, "
                    f"the highest {one['largest']:.3f}; rank correlation "
                    f"{_estimate(one['spearman'])}",
                }
            )
    rows += [
        _scores(found, f"{name}: gap in {statistic}")
        for statistic, found in entry["scores"].items()
    ]
    rows += _tops(entry["top_sets"], name)
    return rows


_HEIGHTS = {"chord": "above the chord", "above_ends": "above both ends"}


def _predicted(
    found: Mapping[str, Any] | None, name: str, entry: Mapping[str, Any]
) -> dict[str, str]:
    row = {"claim": "a, predicted", "condition": name}
    if found is None:
        numbers = "the pilots show no rate: fewer than three are reached neither at once nor never"
        return {**row, "reproduced": "undecided", "numbers": numbers}
    rates = [
        None if c is None else c ** entry["steps_per_epoch"] for c in found["contraction_per_step"]
    ]
    return {
        **row,
        "reproduced": found["reproduced"],
        "numbers": f"{found['covered']} of {found['sets']} held-out sets inside the "
        f"{100 * found['level']:.0f} % interval, which is {100 * found['width']:.0f} % of the run "
        f"wide; tops of scores {found['top_covered']} of {found['top_sets']}; contraction per "
        "epoch " + " / ".join(_number(rate) for rate in rates),
    }


def _scores(found: Mapping[str, Any], name: str) -> dict[str, str]:
    scores, best = found["scores"], found["best_proxy"]
    return {
        "claim": "b",
        "condition": name,
        "reproduced": found["reproduced"],
        "numbers": f"rank correlation {_estimate(scores[REFERENCE]['spearman'])}; better than "
        f"{_names(found['better_than'])}; worse than {_names(found['worse_than'])}; best proxy "
        f"{best} {_estimate(scores[best]['spearman'])}, lead over it "
        f"{_estimate(scores[best]['reference_minus_this'])}"
        + ("" if found["within_margin"] else f", not within {found['margin']:g}")
        + "".join(f"; {k} {_estimate(scores[k]['spearman'])}" for k in found["variants"]),
    }


def _tops(found: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    rows = []
    for label, harder in found["harder_than"].items():
        easier = found["easier_than"][label]
        one = {key: score[label] for key, score in found["scores"].items()}
        hardest = max(found["proxies"], key=lambda key: one[key]["value"]["value"])
        form = ".2f" if label == "gap" else ".0f"
        rows.append(
            {
                "claim": "b, top sets",
                "condition": f"{name}: {label}",
                "reproduced": "no" if easier else ("yes" if harder else "undecided"),
                "numbers": f"{_estimate(one[REFERENCE]['value'], form)}; harder than those of "
                f"{_names(harder)}; easier than {_names(easier)}; hardest of a proxy "
                f"{hardest} {_estimate(one[hardest]['value'], form)}, lead over it "
                f"{_estimate(one[hardest]['reference_minus_this'], form)}",
            }
        )
    return rows


def as_text(summary: Mapping[str, Any]) -> str:
    """Return the verdicts as indented lines, claim by claim."""
    lines: list[str] = []
    last = ""
    for row in summary["verdicts"]:
        if row["claim"] != last:
            lines += ["", f"({row['claim']}) {CLAIMS[row['claim']]}"]
            last = row["claim"]
        lines.append(f"  {row['reproduced']:9}  {row['condition']}: {row['numbers']}")
    return "\n".join(lines).lstrip("\n")


def _names(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _interval(ends: Any, form: str = ".2f") -> str:
    return "" if ends is None else f"[{_number(ends[0], form)}, {_number(ends[1], form)}]"


def _estimate(found: Mapping[str, Any], form: str = ".2f") -> str:
    return f"{_number(found['value'], form)} {_interval([found['low'], found['high']], form)}"
