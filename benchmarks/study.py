"""Do the paper's claims reproduce? Runs `opacus-pil study` at full size and keeps what came out.

    python benchmarks/study.py

Trainings are kept in --work, so that the same command goes on after an interruption. Results go to
benchmarks/results/: study.json and study_*.png; tables are printed for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opacus_pil.study import run_study
from opacus_pil.study.words import CLAIMS


def verdicts(summary: Mapping[str, Any]) -> str:
    """Return one line per claim and condition."""
    rows = [
        [row["claim"], row["condition"], _bold(row["reproduced"]), row["numbers"]]
        for row in summary["verdicts"]
    ]
    claims = [f"- ({claim}) {sentence}" for claim, sentence in CLAIMS.items()]
    return "\n".join([*claims, "", _table(["claim", "condition", "reproduced", "numbers"], rows)])


def scores(summary: Mapping[str, Any]) -> str:
    """Return every score's rank correlation, and whether it is above or below the reference's."""
    conditions = summary["conditions"]
    names = list(conditions[0]["scores"]["confidence"]["scores"])
    rows = []
    for name in names:
        each = [entry["scores"]["confidence"]["scores"][name] for entry in conditions]
        rows.append([name, *(f"{_estimate(one['spearman'])}{_mark(one)}" for one in each)])
    leads = [entry["scores"]["confidence"] for entry in conditions]
    rows.append(
        [
            "lead over the best proxy",
            *(
                f"{_estimate(one['scores'][one['best_proxy']]['reference_minus_this'], '+.3f')} "
                f"({one['best_proxy']})"
                for one in leads
            ),
        ]
    )
    return _table(["score", *map(_name, conditions)], rows)


def tops(summary: Mapping[str, Any]) -> str:
    """Return gap and time of every score's top set."""
    conditions = summary["conditions"]
    names = list(conditions[0]["top_sets"]["scores"])
    rows = []
    for name in names:
        row = [name]
        for entry in conditions:
            one = entry["top_sets"]["scores"][name]
            times = "/".join(
                f"{measure['value']['value'] / entry['steps_per_epoch']:.1f}"
                for label, measure in one.items()
                if label != "gap"
            )
            row.append(f"{one['gap']['value']['value']:.3f}{_mark(one['gap'])}; {times}")
        rows.append(row)
    return _table(["top set of", *map(_name, conditions)], rows)


def predictions(summary: Mapping[str, Any]) -> str:
    """Return how many held-out sets the fitted contraction covers, for confidence."""
    rows = []
    for entry in summary["conditions"]:
        for predictor, found in entry["prediction"].items():
            for definition, one in found.items():
                if one is None or not definition.startswith("confidence"):
                    continue
                rates = [
                    "–" if c is None else f"{c ** entry['steps_per_epoch']:.3f}"
                    for c in one["contraction_per_step"]
                ]
                rows.append(
                    [
                        _name(entry), predictor, definition, f"{one['covered']} of {one['sets']}",
                        f"{one['width']:.2f}", f"{one['top_covered']} of {one['top_sets']}",
                        " / ".join(map(str, one["pilots_between"])), " / ".join(rates),
                    ]
                )  # fmt: skip
    head = [
        "condition", "from", "reached", "covered", "width", "tops covered", "pilots between",
        "c per epoch",
    ]  # fmt: skip
    return _table(head, rows)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['model']}, {entry['name']}"


def _mark(one: Mapping[str, Any]) -> str:
    return {"worse": " ▲", "easier": " ▲", "better": " ▼", "harder": " ▼"}.get(
        one["reference_is"], ""
    )


def _bold(verdict: str) -> str:
    return {"no": "**no**"}.get(verdict, verdict)


def _estimate(found: Mapping[str, Any], form: str = ".2f") -> str:
    return "{} [{}, {}]".format(
        *(
            "–" if found[end] is None else format(found[end], form)
            for end in ("value", "low", "high")
        )
    )


def _rounded(value: Any) -> Any:
    """Return a record with seven digits to a number: its file is read by people too."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mnist5k")
    parser.add_argument("--work", type=Path, default=Path("study_mnist5k"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    outcome = run_study(
        dataset=arguments.dataset, out=arguments.work, seed=arguments.seed, jobs=arguments.jobs
    )
    kept = json.dumps(_rounded(outcome.summary), separators=(",", ":"), allow_nan=False)
    (arguments.out / "study.json").write_text(kept + "\n", encoding="utf-8")
    for figure in (outcome.folder / "figures").iterdir():
        shutil.copyfile(figure, arguments.out / f"study_{figure.name}")
    for part in (verdicts, scores, tops, predictions):
        print(part(outcome.summary), end="\n\n")
    print(f"{outcome.seconds:.0f} s")


if __name__ == "__main__":
    main()
