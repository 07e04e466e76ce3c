"""Runs a study's conditions and the certified head, and writes what came out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__, datasets
from .. import _validate as check
from ..files.container import write_atomic
from ..plots import to_png
from ..report import Illustration, Section, write_report
from . import figures
from .certified import HEADS, judged
from .condition import run_condition
from .settings import Settings, study_settings
from .training import Bench
from .words import CLAIMS, verdicts

TRIALS, FIGURES = "trials", "figures"


@dataclass(frozen=True)
class StudyOutcome:
    """What a study left behind.

    Attributes:
        summary: The content of study.json.
        folder: Where the files are.
        seconds: Wall time of this call; little where trials were finished before.
    """

    summary: dict[str, Any]
    folder: Path
    seconds: float


def run_study(
    *,
    dataset: str = "mnist5k",
    model: str = "both",
    out: str | os.PathLike[str] = "study",
    form: str = "full",
    seed: int = 0,
    jobs: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> StudyOutcome:
    """Test the claims of Sepahvand et al. (2025) on real images; resumable at any moment.

    Writes study.json, report.html, figures/*.png and trials/ into `out`, files mode 0600: they hold
    what depends on single instances. Every training is kept when it is done, so that the same call
    goes on after a kill; the same seed gives the same study on the same machine.

    Guarantee: none. Privacy losses are estimates; only claim (d) is about certificates.

    Args:
        dataset: "digits" or "mnist5k"; both ship inside packages.
        model: "cnn", "mlp" or "both".
        out: Folder; made if missing, gone on with if it is a study's.
        form: "full", "quick" or "smallest" (see `study_settings`).
        seed: Of the split, the initialisation and all trials.
        jobs: Processes, >= 1. More than one takes joblib.
        progress: Show progress bars when the output is a terminal.
        say: Takes lines about the budget.

    Raises:
        ValueError: An unknown dataset, model or form, a negative seed, jobs below 1.
        FileExistsError: `out` is a file, or a folder with something else in it.

    Source: arXiv:2505.18786; definitions of time to unlearn and hardness are ours, see the report.
    """
    check.choice("dataset", dataset, datasets.NAMES, "These need no network.")
    number = check.integer("seed", seed, low=0)
    processes = check.integer("jobs", jobs, low=1)
    settings = study_settings(dataset, model=model, form=form)
    folder = _folder(Path(out))
    started = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small lose more to threads than they gain
    try:
        bench = Bench(settings, folder / TRIALS, number, processes, progress, say)
        conditions = [run_condition(condition, bench=bench) for condition in settings.conditions]
        certified = {}
        for name, (trial, config) in HEADS.items():
            (found,) = bench.run(
                trial, [config(dataset, settings=settings, seed=number)], f"{name}, certified"
            )
            certified[name] = judged(found)
        summary = {
            "version": __version__,
            "dataset": dataset,
            "form": form,
            "seed": number,
            "settings": settings.as_dict(),
            "conditions": conditions,
            "certified": certified,
        }
        summary["verdicts"] = verdicts(summary, definition=_definition(settings))
        _write(folder, summary, definition=_definition(settings))
    finally:
        torch.set_num_threads(threads)
    return StudyOutcome(summary, folder, time.monotonic() - started)


def _definition(settings: Settings) -> str:
    """Return the definition of reached that tables and figures show; study.json has all."""
    return f"confidence within {settings.tolerances[0]:g}"


def _folder(out: Path) -> Path:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"Expected out to be a folder, got the file {out}. Name a folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / TRIALS).is_dir():
        raise FileExistsError(
            f"Expected out to be new, empty or a study's folder, got {out} with other files in "
            "it. Name another folder."
        )
    (out / TRIALS).mkdir(mode=0o700, parents=True, exist_ok=True)
    (out / FIGURES).mkdir(mode=0o700, exist_ok=True)
    return out


def _write(folder: Path, summary: dict[str, Any], *, definition: str) -> None:
    drawn = _figures(summary, definition=definition)
    for name, (illustration, _) in drawn.items():
        write_atomic(folder / FIGURES / f"{name}.png", to_png(illustration.figure, dpi=110))
    text = json.dumps(summary, indent=1, allow_nan=False)
    write_atomic(folder / "study.json", (text + "\n").encode())
    write_report(
        folder / "report.html",
        title=f"Privacy loss and unlearning on {summary['dataset']}: a study",
        summary={"tasks": []},
        sections=_sections(summary, drawn),
    )


def _figures(
    summary: dict[str, Any], *, definition: str
) -> dict[str, tuple[Illustration, tuple[str, ...]]]:
    """Return file name -> illustration and the claims it belongs to."""
    entries = summary["conditions"]
    budget = list(entries[0]["gap_against_log_privacy_loss"])[-2]
    found: dict[str, tuple[Illustration, tuple[str, ...]]] = {
        "time": (
            Illustration(
                figures.times_figure(entries, definition=definition),
                f"Epochs of fine-tuning until the forget set's {definition} of the oracles, and "
                "staying there, against its mean log privacy loss.",
                "Scatter plots of time to unlearn against log privacy loss, one per condition.",
            ),
            ("a",),
        ),
        "gap": (
            Illustration(
                figures.gaps_figure(entries, budget=budget),
                f"Distance of the forget set's confidence from the oracles' after {budget}.",
                "Scatter plots of the gap against log privacy loss, one per condition.",
            ),
            ("a, gap",),
        ),
        "barriers": (
            Illustration(
                figures.barriers_figure(entries),
                "Loss barrier on the forget set between two models and their retrained oracles, "
                "above the chord (filled) and above the larger end (hollow).",
                "Scatter plots of loss barriers against log privacy loss, one per condition.",
            ),
            ("c",),
        ),
        "certified": (
            Illustration(
                figures.certified_figure(summary["certified"]),
                "Steps that a certificate asks for at the same ε: per-instance caps against the "
                "worst case.",
                "Scatter plot of certified steps against those of the worst case.",
            ),
            ("d",),
        ),
    }
    found["scores"] = (
        Illustration(
            figures.scores_figure(entries),
            "Rank correlation of each score with the gap of the instances of random forget sets; "
            "bars are 95 % bootstrap intervals over trainings and instances.",
            "Points with intervals for each difficulty score.",
        ),
        ("b",),
    )
    found["tops"] = (
        Illustration(
            figures.tops_figure(entries),
            "Gap of each score's hardest instances, forgotten together; bars are 95 % bootstrap "
            "intervals over trainings and instances.",
            "Points with intervals for each difficulty score.",
        ),
        ("b, top sets",),
    )
    return found


def _sections(
    summary: dict[str, Any], drawn: dict[str, tuple[Illustration, tuple[str, ...]]]
) -> list[Section]:
    sections = [Section("What was done", _METHOD)]
    for claim, sentence in CLAIMS.items():
        rows = [row for row in summary["verdicts"] if row["claim"] == claim]
        lines = [f"{r['reproduced'].upper()} — {r['condition']}: {r['numbers']}" for r in rows]
        if rows:
            shown = tuple(figure for figure, claims in drawn.values() if claims[0] == claim)
            sections.append(
                Section(f"({claim}) {sentence[0].upper()}{sentence[1:]}", "\n".join(lines), shown)
            )
    return sections


_METHOD = """\
Each condition trains a network several times, each time on a split, from a start and with batches \
of its own, with full passes for every instance's gradient norm before each epoch. From these \
norms, clipped at their median and held through the epoch, and the noise (a nominal one where \
training has none) comes each instance's privacy loss: a Rényi divergence summed over the steps, \
an estimate and no guarantee. Variants are the loss without a clip, the shift that is left where \
an epoch shrinks it by a tenth, and the divergence in runs without the instance (five folds). \
Forget sets are groups at quantiles of this loss, random groups, and the instances that each score \
calls hardest, all of one size. Each is forgotten by fine-tuning on the others, with the same \
steps as in training, and compared with models retrained without it from the same start.

Confidence is the mean probability of the true class. Time to unlearn is the first step from \
which the mean confidence of the runs stays within a tolerance of the oracles'. Hardness of an \
instance is the distance of its confidence from the oracles' after a fixed budget; scores are \
compared on the instances of random forget sets, in whose choice no score had a part, and by the \
sets of their hardest.

YES, NO and UNDECIDED are what 95 % bootstrap intervals over trainings and, within them, sets or \
instances say. A few trainings show roughly how much trainings differ, no more."""
