"""Loss barrier or membership attack: which ranks forget sets by their distance from retraining?

Distance: mean over a set's members of |confidence of the model − mean confidence of oracles|, half
of them. Barriers and attacks use the *other* half. Attacks: offline LiRA (shared variance; members
are the set, non-members the test images, both judged by models that saw neither) and the threshold
on the loss, which needs no other model: as it is, and minus what it finds in those oracles, since a
set that is harder than the test images looks like non-members to it, forgotten or not. "original"
is the model before unlearning, "unlearned" after five epochs of fine-tuning without the set. A
set's floor is the same distance between both halves: what cannot be told from retraining.

    python benchmarks/barriers_and_attacks.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import retrainings as re
import torch
from scipy.stats import rankdata

from opacus_pil.evaluation import (
    attack_summary,
    compare_scores,
    ensemble_outputs,
    membership_scores,
    rank_correlation,
)

MEASURES = ("barrier", "lira", "loss attack", "loss attack, less oracles")


def margins(found: re.Retraining, weights: list[Mapping[str, Any]], rows: np.ndarray) -> np.ndarray:
    """Log-odds margins of models on a forget set, then on the test images."""
    train, test = found.data["train"], found.data["test"]
    return ensemble_outputs(
        [found.module(w) for w in weights],
        x=torch.cat([train.images[rows], test.images]),
        y=torch.cat([train.labels[rows], test.labels]),
    ).margins


def loss_attack(models: np.ndarray, *, size: int) -> float:
    """Mean AUC over models of the threshold on the loss, which falls as the margin rises."""
    members = np.arange(models.shape[1]) < size
    found = [attack_summary(own, members=members, attack="threshold on the loss") for own in models]
    return float(np.mean([summary.auc.value for summary in found]))


def attacked(models: np.ndarray, others: np.ndarray, *, size: int) -> dict[str, float]:
    """Return what the attacks find, means over models."""
    members = np.arange(models.shape[1]) < size
    lira = [
        attack_summary(
            membership_scores(own, out_margins=others, shared_variance=True), members=members
        ).auc.value
        for own in models
    ]
    loss = loss_attack(models, size=size)
    return {
        "lira": float(np.mean(lira)),
        "loss attack": loss,
        "loss attack, less oracles": loss - loss_attack(others, size=size),
    }


def set_rows(found: re.Retraining) -> list[dict[str, Any]]:
    """Return one row for each forget set and each of the two models."""
    rows = []
    for chosen, oracles, runs in zip(found.sets, found.oracles, found.runs, strict=True):
        half = len(oracles) // 2
        first, second = oracles[:half], oracles[half:]
        target = re.confidence(first, chosen.rows)
        floor = np.abs(re.confidence(second, chosen.rows) - target).mean()
        others = margins(found, [o["weights"] for o in second], chosen.rows)
        for which, models in (("original", [found.original]), ("unlearned", runs)):
            own = margins(found, [m["weights"] for m in models], chosen.rows)
            distance = np.abs(re.confidence(models, chosen.rows) - target).mean()
            barrier = np.mean([run["barriers"][which]["forget"] for run in runs])
            rows.append(
                {"set": chosen.name, "which": which, "training": found.number,
                 "distance": float(distance), "floor": float(floor), "barrier": float(barrier),
                 **attacked(own, others, size=len(chosen.rows))}
            )  # fmt: skip
    return rows


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations with distance: per training, and of ranks within a training, pooled."""
    trainings = sorted({row["training"] for row in rows})

    def column(name: str, training: int) -> np.ndarray:
        return np.array([row[name] for row in rows if row["training"] == training])

    def within(name: str, training: int) -> float | None:
        value = rank_correlation(
            column(name, training), target=column("distance", training), resamples=100
        ).value
        return None if np.isnan(value) else value  # no set has a barrier: all are 0

    pooled = {
        name: np.concatenate([rankdata(column(name, t)) for t in trainings])
        for name in (*MEASURES, "distance")
    }
    target = pooled.pop("distance")
    found = compare_scores(pooled, target=target, reference="barrier")
    return {
        "sets": len(rows),
        "above_001_nats": int(sum(row["barrier"] > 0.01 for row in rows)),
        "distance_over_floor": float(np.median([r["distance"] / r["floor"] for r in rows])),
        "correlation": {
            name: {
                "value": c.correlation.value, "low": c.correlation.low, "high": c.correlation.high,
                "each": [within(name, t) for t in trainings],
                "barrier_is": c.verdict,
                "barrier_minus_it": [c.difference.value, c.difference.low, c.difference.high],
            }
            for name, c in found.items()
        },
    }  # fmt: skip


def main() -> None:
    options = re.arguments((__doc__ or "").split("\n")[0], out="barriers_and_attacks.json")
    result: dict[str, Any] = options.before
    for condition in options.chosen:
        rows = []
        for number in range(options.trainings):
            found = re.retrain(condition, number, folder=options.work, jobs=options.jobs, say=print)
            rows += set_rows(found)
        name = f"{condition.model}, {condition.name}"
        result[name] = {"rows": rows}
        for which in ("original", "unlearned"):
            verdict = judged([row for row in rows if row["which"] == which])
            result[name][which] = verdict
            cells = [
                f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}]"
                for c in verdict["correlation"].values()
            ]
            verdicts = [c["barrier_is"] for c in verdict["correlation"].values()][1:]
            print(
                f"| {name} | {which} | {verdict['above_001_nats']} of {verdict['sets']} | "
                f"{verdict['distance_over_floor']:.1f} | {' | '.join(cells)} | "
                f"{', '.join(verdicts)} |"
            )
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
