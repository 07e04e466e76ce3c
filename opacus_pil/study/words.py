"""What came out, in lines a person reads: one verdict per claim and condition, with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .claims import BARRIER, REFERENCE

CLAIMS = {
    "a": "time to unlearn grows with the logarithm of the privacy loss",
    "a, gap": "the gap to the oracles after a fixed budget grows with log privacy loss",
    "b": "privacy loss ranks difficulty at least as well as each proxy",
    "b, top decile": "its top decile is harder than those of the proxies",
    "c": "loss barriers to the oracles grow with the privacy loss",
    "d": "per-instance budgets certify the same ε with fewer steps than the worst case",
}


def verdicts(summary: Mapping[str, Any], *, definition: str) -> list[dict[str, str]]:
    """Return one row per claim and condition: claim, condition, reproduced, numbers."""
    rows = []
    for entry in summary["conditions"]:
        rows += _condition(entry, definition)
    found = summary["certified"]
    ratio = found["median_ratio"]
    rows.append(
        {
            "claim": "d",
            "condition": f"logistic, {summary['dataset']} 3 against 8",
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
        one = barriers[f"{pair} to oracle, forget"]
        rows.append(
            {
                "claim": "c",
                "condition": f"{name}: {pair} to oracle",
                "reproduced": one["reproduced"],
                "numbers": f"{one['barriers']} of {time['sets']} sets above {BARRIER:g} nats, the "
                f"highest {one['largest']:.3f}; rank correlation {_estimate(one['spearman'])}",
            }
        )
    for statistic, found in (entry["scores"] or {}).items():
        rows += _scores(found, f"{name}: gap in {statistic}")
    return rows


def _scores(found: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    own = found["scores"][REFERENCE]["spearman"]
    others = [k for k in found["scores"] if k != REFERENCE and k not in found["variants"]]
    best = max(others, key=lambda key: found["scores"][key]["spearman"]["value"] or -1.0)
    easier = found["easier_top_than"]
    harder = found["harder_top_than"]
    return [
        {
            "claim": "b",
            "condition": name,
            "reproduced": found["reproduced"],
            "numbers": f"rank correlation {_estimate(own)}; better than "
            f"{_names(found['better_than'])}; worse than {_names(found['worse_than'])}; best proxy "
            f"{best} {_estimate(found['scores'][best]['spearman'])}"
            + "".join(
                f"; {k} {_estimate(found['scores'][k]['spearman'])}" for k in found["variants"]
            ),
        },
        {
            "claim": "b, top decile",
            "condition": name,
            "reproduced": "no" if easier else ("yes" if harder else "undecided"),
            "numbers": f"harder than those of {_names(harder)}; easier than {_names(easier)}; "
            f"undecided for {len(others) - len(harder) - len(easier)} of {len(others)}",
        },
    ]


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


def _estimate(found: Mapping[str, Any]) -> str:
    return f"{_number(found['value'])} [{_number(found['low'])}, {_number(found['high'])}]"
