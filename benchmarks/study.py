"""Do the paper's claims reproduce? Runs `opacus-pil study` at full size and keeps what came out.

    python benchmarks/study.py --jobs 2

Trainings are kept in --work, so that the same command goes on after an interruption. Results go to
benchmarks/results/: study.json and study_*.png; the table is printed for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from opacus_pil.study import run_study
from opacus_pil.study.words import CLAIMS


def table(summary: dict[str, Any]) -> str:
    """Return the verdicts in Markdown."""
    lines = ["| claim | condition | reproduced | numbers |", "|---|---|---|---|"]
    for row in summary["verdicts"]:
        shown = {"yes": "yes", "no": "**no**", "undecided": "undecided"}[row["reproduced"]]
        lines.append(f"| {row['claim']} | {row['condition']} | {shown} | {row['numbers']} |")
    claims = [f"- ({claim}) {sentence}" for claim, sentence in CLAIMS.items()]
    return "\n".join([*claims, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mnist5k")
    parser.add_argument("--work", type=Path, default=Path("study_mnist5k"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    outcome = run_study(
        dataset=arguments.dataset, out=arguments.work, seed=arguments.seed, jobs=arguments.jobs
    )
    kept = json.dumps(outcome.summary, separators=(",", ":"), allow_nan=False)
    (arguments.out / "study.json").write_text(kept + "\n", encoding="utf-8")
    for figure in (outcome.folder / "figures").iterdir():
        shutil.copyfile(figure, arguments.out / f"study_{figure.name}")
    print(table(outcome.summary))
    print(f"\n{outcome.seconds:.0f} s")


if __name__ == "__main__":
    main()
