"""The page of a demo or study: made from a summary and sections of figures.

Knows the keys of `summary.json` and how to say what each number claims. Computes no privacy number:
a missing one stays missing, and shown ones are rounded up.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import _validate as check
from ..files.container import write_atomic
from ..plots import rounded_up, to_png
from .templates import rendered
from .words import LABELS, NONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TASK_KEYS = (
    "name", "dataset", "num_instances", "delta", "worst_case_epsilon", "per_instance_epsilon",
    "guarantee", "test_accuracy", "forget_sets",
)  # fmt: skip
_QUANTILES = ("min", "q10", "median", "mean", "q90", "max")
_SET_KEYS = (
    "name", "size", "privacy_loss", "certificate", "certified", "steps", "steps_worst_case",
    "steps_retrain", "epsilon", "forget_accuracy", "retain_accuracy", "test_accuracy", "oracle",
)  # fmt: skip
_SPLITS = ("forget_accuracy", "retain_accuracy", "test_accuracy")


@dataclass(frozen=True)
class Illustration:
    """A figure with its words.

    Attributes:
        figure: Rendered to PNG inside the page.
        caption: Printed under it; say what the reader should see.
        alt: The same for a reader who cannot see it.
    """

    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A titled piece of the report.

    Attributes:
        title: Heading.
        text: Plain text; an empty line starts a new paragraph. Never HTML: it is escaped.
        figures: Shown after the text.
        task: Name of the task it belongs to, or None for a section after all tasks.
    """

    title: str
    text: str
    figures: Sequence[Illustration] = ()
    task: str | None = None


def render_report(
    *, title: str, summary: Mapping[str, Any], sections: Sequence[Section] = ()
) -> str:
    """Return the report as one HTML page that loads nothing from outside.

    Privacy numbers are rounded up to four digits. A null is shown as "–" or in words, never as 0. A
    number without a certificate behind it is never shown as a certified one.

    Args:
        title: Heading of the page.
        summary: `summary.json` as a mapping: `tasks`, each with the keys of the demo's summary. A
            forget set may also have `time_to_unlearn` (steps, or None where the oracles were not
            reached), `assumptions` (of its certificate, a list of sentences) and `confidence` (of a
            claim certified with confidence 1 − β); a task may have `worst_case_epsilon_prv`.
        sections: Text and figures, in reading order.

    Returns:
        HTML, self-contained: style and the family's script inline, figures as base64 PNG.

    Raises:
        ValueError: A missing key (named with its place), an unknown label, a value outside its
            domain, a section of an unknown task, an ε without a certificate, or a set called
            certified without certificate or ε.

    Privacy: the page shows per-instance values: keep it private. It says so at its top.
    """
    tasks = [_task(task, f"tasks[{i}]") for i, task in enumerate(_keys(summary, ("tasks",), ""))]
    names = [task["name"] for task in tasks]
    for section in sections:
        if section.task is not None and section.task not in names:
            raise ValueError(check.expected("section.task", f"to be one of {names}", section.task))
    shown = [_section(section) for section in sections]
    return rendered("summary.html.j2", title=title, tasks=tasks, sections=shown)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, Any],
    sections: Sequence[Section] = (),
) -> None:
    """Write `render_report` to a file that only its owner may read (mode 0600).

    Args:
        path: Target file; the old one stays whole until the new one is complete.
        title: As in `render_report`.
        summary: As in `render_report`.
        sections: As in `render_report`.

    Raises:
        ValueError: As in `render_report`; nothing is written.
        OSError: The folder is missing or not writable.

    Privacy: as in `render_report`.
    """
    page = render_report(title=title, summary=summary, sections=sections)
    write_atomic(path, page.encode("utf-8"), private=True)


def _keys(record: Any, keys: Sequence[str], place: str) -> Any:
    """Return the value of one key, or the values of several; name every missing one."""
    if not isinstance(record, Mapping):
        raise ValueError(
            check.expected(place or "summary", "to be a mapping", type(record).__name__)
        )
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(
            f"Expected {place or 'summary'} to have the keys {', '.join(keys)}, got none for "
            f"{', '.join(missing)}. Write null where a value does not exist."
        )
    return record[keys[0]] if len(keys) == 1 else [record[key] for key in keys]


def _task(task: Any, place: str) -> dict[str, Any]:
    """Check one task of the summary and put its values into words."""
    _keys(task, _TASK_KEYS, place)
    spread = task["per_instance_epsilon"]
    _keys(spread, _QUANTILES, f"{place}.per_instance_epsilon")
    label = check.choice(f"{place}.guarantee", task["guarantee"], tuple(LABELS))
    size = check.integer(f"{place}.num_instances", task["num_instances"], low=1)
    sets = [
        _forget_set(record, f"{place}.forget_sets[{i}]")
        for i, record in enumerate(task["forget_sets"])
    ]
    worst = _number(task["worst_case_epsilon"], f"{place}.worst_case_epsilon")
    return {
        "name": str(task["name"]),
        "dataset": str(task["dataset"]),
        "num_instances": f"{size:,}",
        "delta": rounded_up(check.delta(task["delta"]), digits=3),
        "worst": _epsilon(worst),
        "prv": _epsilon(
            _number(task.get("worst_case_epsilon_prv"), f"{place}.worst_case_epsilon_prv")
        ),
        "has_prv": task.get("worst_case_epsilon_prv") is not None,
        "spread": [
            (key, _epsilon(_number(spread[key], f"{place}.per_instance_epsilon.{key}")))
            for key in _QUANTILES
        ],
        "guarantee": label,
        "claim": LABELS[label][0],
        "test_accuracy": _share(task["test_accuracy"], f"{place}.test_accuracy"),
        "sets": sets,
        "groups": _by_assumptions(sets),
    }


def _forget_set(record: Any, place: str) -> dict[str, Any]:
    """Check one forget set of the summary and put its values into words."""
    _keys(record, _SET_KEYS, place)
    _keys(record["oracle"], _SPLITS, f"{place}.oracle")
    certificate, epsilon = record["certificate"], _number(record["epsilon"], f"{place}.epsilon")
    certified = record["certified"]
    if certified is not None and not isinstance(certified, bool):
        raise ValueError(
            check.expected(f"{place}.certified", "to be true, false or null", certified)
        )
    if certificate is None and epsilon is not None:
        raise ValueError(
            f"Expected {place}.epsilon to be null without a certificate, got {epsilon}. "
            "A run that no certificate covers has no ε."
        )
    if certified and (certificate is None or epsilon is None):
        raise ValueError(
            f"Expected {place}.certified only with a certificate and its ε, got "
            f"certificate={certificate!r}, epsilon={epsilon!r}. Write false."
        )
    shown: dict[str, Any] = {
        "name": str(record["name"]),
        "size": f"{check.integer(f'{place}.size', record['size'], low=1):,}",
        "privacy_loss": _epsilon(_number(record["privacy_loss"], f"{place}.privacy_loss")),
        "certificate": None if certificate is None else str(certificate),
        "certified": bool(certified),
        "status": _status(certificate, certified, record.get("confidence"), place),
        "epsilon": _epsilon(epsilon),
        "assumptions": [str(line) for line in record.get("assumptions") or ()],
        "time": "not measured",
    }
    for key in ("steps", "steps_worst_case", "steps_retrain"):
        shown[key] = _steps(record[key], f"{place}.{key}")
    if "time_to_unlearn" in record:
        time = _steps(record["time_to_unlearn"], f"{place}.time_to_unlearn")
        shown["time"] = "not reached" if time == NONE else time
    shown["accuracies"] = [
        (
            _share(record[key], f"{place}.{key}"),
            _share(record["oracle"][key], f"{place}.oracle.{key}"),
            _points(record[key], record["oracle"][key]),
        )
        for key in _SPLITS
    ]
    return shown


def _by_assumptions(sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put forget sets with the same assumptions together, so that each list is read once."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in sets:
        shared = {key: item[key] for key in ("certificate", "status", "assumptions")}
        key = (item["certificate"], item["status"], tuple(item["assumptions"]))
        groups.setdefault(key, {"names": [], **shared})["names"].append(item["name"])
    return list(groups.values())


def _status(certificate: Any, certified: Any, confidence: Any, place: str) -> str:
    """Say in words what stands behind the ε of a forget set."""
    if certificate is None:
        return "no certificate"
    if not certified:
        return "predicted, not guaranteed"
    if confidence is None:
        return "certified"
    level = check.probability(f"{place}.confidence", confidence)
    # Rounded down: the claim's confidence is never shown too large.
    return f"certified with confidence {math.floor(level * 1e4 + 1e-9) / 1e2:g} %"


def _number(value: Any, place: str) -> float | None:
    """Return a non-negative number that may be infinite, or None for null."""
    if value is None:
        return None
    number = check.real_array(place, value, low=0.0, allow_infinite=True)
    if isinstance(value, bool | str) or number.ndim:
        raise ValueError(check.expected(place, "to be a number or null", value))
    return float(number)


def _epsilon(value: float | None) -> str:
    """Print a privacy number rounded up, or a dash for null."""
    return NONE if value is None else rounded_up(value, digits=4)


def _steps(value: Any, place: str) -> str:
    """Print a number of steps, or a dash for null."""
    return NONE if value is None else f"{check.integer(place, value, low=0):,}"


def _share(value: Any, place: str) -> str:
    """Print an accuracy in per cent, or a dash for null."""
    return NONE if value is None else f"{100 * check.probability(place, value):.1f} %"


def _points(value: Any, oracle: Any) -> str:
    """Print the signed difference of two accuracies in percentage points, or a dash."""
    if value is None or oracle is None:
        return NONE
    text = f"{100 * (float(value) - float(oracle)):+.1f}"
    return "±0.0" if float(text) == 0 else text.replace("-", "−")


def _section(section: Section) -> dict[str, Any]:
    """Split a section into paragraphs and encode its figures."""
    return {
        "title": section.title,
        "paragraphs": [part.strip() for part in section.text.split("\n\n") if part.strip()],
        "task": section.task,
        "figures": [
            {
                "png": base64.b64encode(to_png(item.figure)).decode("ascii"),
                "caption": item.caption,
                "alt": item.alt,
            }
            for item in section.figures
        ],
    }
