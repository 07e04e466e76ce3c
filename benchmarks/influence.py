"""Influence functions beside the privacy loss: which ranks instances by distance from retraining?

Instances of random sets; distance: |confidence of the model − mean confidence of the oracles
retrained without the set|, at once and after five epochs of fine-tuning without it; and the rise of
the loss itself at once (mean of the oracles − model), which is what influence predicts. Influence:
of the last layer on the own loss (`influence_scores`), at the end of training (of the MLP with the
exact Hessian, of the CNN in blocks) and as a mean over the weights before each epoch and at the end
(blocks), as the other scores look at all of training. Weight decay is 0, so the damping is nominal;
on the MLP three values are tried.

    python benchmarks/influence.py
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import retrainings as re
import torch

from opacus_pil.evaluation import compare_scores, influence_scores

REFERENCE = "privacy loss, clipped"
DAMPINGS = {"mlp": (1e-4, 1e-2, 1.0), "cnn": (1e-2,)}


@torch.no_grad()
def influence(
    found: re.Retraining, weights: dict[str, torch.Tensor], *, damping: float, largest: int = 1024
) -> np.ndarray:
    """Self-influence of every training image through the last layer."""
    train, module = found.data["train"], found.module(weights)
    features = module[:-1](train.images)
    scores = influence_scores(
        features, module[-1](features), train.labels, weight_decay=0.0, damping=damping,
        largest_hessian=largest,
    )  # fmt: skip
    return scores.self_influence


def all_scores(found: re.Retraining) -> dict[str, np.ndarray]:
    """Return every score, higher is harder."""
    checkpoints = found.checkpoints()
    seen = {name: values.numpy() for name, values in found.original["scores"].items()}
    return {
        REFERENCE: found.clipped(),
        "privacy loss, unclipped": found.losses(found.norms),
        **{
            f"influence, end, damping {damping:g}": influence(
                found, checkpoints[-1], damping=damping
            )
            for damping in DAMPINGS[found.condition.model]
        },
        **{
            f"influence, all epochs, damping {damping:g}": np.mean(
                [influence(found, w, damping=damping, largest=0) for w in checkpoints], axis=0
            )
            for damping in DAMPINGS[found.condition.model]
        },
        "gradient norm, end": found.original["last_norms"].numpy(),
        "gradient norm, mean": seen["mean_gradient_norm"],
        "area under margin": seen["area_under_margin"],
    }


def compared(found: re.Retraining) -> dict[str, Any]:
    """Rank correlations of every score with both distances, on the random sets' instances."""
    pairs = [i for i, s in enumerate(found.sets) if s.kind == "random"]
    rows = np.concatenate([found.sets[i].rows for i in pairs])
    oracles = [re.confidence(found.oracles[i], found.sets[i].rows) for i in pairs]
    after = [re.confidence(found.runs[i], found.sets[i].rows) for i in pairs]
    before = re.confidence([found.original], rows)
    own = found.original["loss"].numpy()[rows]
    losses = [
        np.mean([o["loss"].numpy()[found.sets[i].rows] for o in found.oracles[i]], 0) for i in pairs
    ]
    targets = {
        "at once": np.abs(before - np.concatenate(oracles)),
        "after 5 epochs": np.abs(np.concatenate(after) - np.concatenate(oracles)),
        "rise of the loss": np.concatenate(losses) - own,
    }
    scores = {name: values[rows] for name, values in all_scores(found).items()}
    return {
        when: {
            name: {
                "value": c.correlation.value, "low": c.correlation.low, "high": c.correlation.high,
                "reference_is": c.verdict,
                "reference_minus_it": [c.difference.value, c.difference.low, c.difference.high],
            }
            for name, c in compare_scores(scores, target=target, reference=REFERENCE).items()
        }
        for when, target in targets.items()
    }  # fmt: skip


def main() -> None:
    options = re.arguments((__doc__ or "").split("\n")[0], out="influence.json")
    result: dict[str, Any] = options.before
    for condition in options.chosen:
        each = [
            compared(
                re.retrain(condition, number, folder=options.work, jobs=options.jobs, say=print)
            )
            for number in range(options.trainings)
        ]
        name = f"{condition.model}, {condition.name}"
        result[name] = each
        for when in each[0]:
            print(
                f"\n{name}, {when}: score, correlation of each training, reference better / worse"
            )
            for score in each[0][when]:
                entries = [one[when][score] for one in each]
                cells = [f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]" for e in entries]
                verdicts = [e["reference_is"] for e in entries]
                print(
                    f"| {score} | {' | '.join(cells)} | {verdicts.count('better')} / "
                    f"{verdicts.count('worse')} |"
                )
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
