"""Does the ranking by privacy loss depend on the noise it is computed at, and is there such noise?

Nominal: rank correlation of the privacy losses at a multiple of the noise with those at the noise
itself, from the norms of one training; of unclipped norms also the share of the hardest tenth that
stays there (clipped ones are at the clip throughout for many: ties, of which the share is shown).

Implicit: a privacy loss of training *without* noise stands on the assumption that drawing batches
acts like noise. With independent coins the sum of the others' gradients has an exact variance in
every direction: along the unit gradient u of instance x it is q(1 − q) Σ_{i≠x} ⟨g_i, u⟩². Shown are
its root along own gradients and along a random direction, over the median gradient norm; how far
from a Gaussian (excess kurtosis, exact as well); and whether a loss that takes each instance's own
implicit noise in the place of one nominal noise ranks instances alike, and distance from
retraining better or worse.

    python benchmarks/noise_levels.py
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import retrainings as re
import torch
from scipy.stats import spearmanr
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from opacus_pil.evaluation import compare_scores, estimate_convergence
from opacus_pil.study.noisy_steps import noise_multiplier

FACTORS = (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)
EVERY = 3  # epochs between two looks at the implicit noise
ORDERS = (1.25, 4.0, 8.0, 32.0)


def kept(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the top decile of one that is in the top decile of the other."""
    count = len(one) // 10
    return len(set(np.argsort(-one)[:count]) & set(np.argsort(-other)[:count])) / count


def nominal(found: re.Retraining) -> list[dict[str, Any]]:
    """Return one row for each noise and order, of clipped and unclipped norms."""
    sizes = found.settings.sizes
    noise = noise_multiplier(found.condition, batch_size=sizes.batch_size)
    rows = []
    tied = float((found.norms >= np.median(found.norms)).all(axis=0).mean())
    for kind, norms in (
        ("clipped", np.minimum(found.norms, np.median(found.norms))),
        ("unclipped", found.norms),
    ):
        stability = estimate_convergence(
            norms[None], noise_std=[noise, *(f * noise for f in FACTORS)],
            sample_rate=sizes.batch_size / sizes.train, steps_per_checkpoint=sizes.steps_per_epoch,
            resamples=500,
        )  # fmt: skip
        base = found.losses(norms)
        for factor, one in zip(FACTORS, stability, strict=False):
            assert one.varied == "noise_std"
            rows.append(
                {"norms": kind, "noise_times": factor, "order": 2.0,
                 "correlation": one.correlation.value, "low": one.correlation.low,
                 "high": one.correlation.high, "tied_at_the_clip": tied,
                 "top_decile_kept": kept(found.losses(norms, factor=factor), base)}
            )  # fmt: skip
        for order in ORDERS:
            other = found.losses(norms, order=order)
            rows.append(
                {"norms": kind, "noise_times": 1.0, "order": order,
                 "correlation": float(spearmanr(base, other).statistic),
                 "top_decile_kept": kept(other, base)}
            )  # fmt: skip
    return rows


def per_sample_gradients(found: re.Retraining, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Shape (instances, parameters)."""
    module, train = found.module(weights), found.data["train"]
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(module, values, (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, train.images, train.labels)
    return torch.cat([part.flatten(1) for part in each.values()], dim=1)


def implicit(found: re.Retraining) -> dict[str, Any]:
    """Measure the noise of drawing batches along every instance's gradient, at every epoch."""
    rate = found.settings.sizes.batch_size / found.settings.sizes.train
    chance = rate * (1 - rate)
    unit = float(np.median(found.norms))
    own, random, kurtosis, ratios, plain = [], [], [], [], []
    for weights in found.checkpoints()[:-1:EVERY]:
        gradients = per_sample_gradients(found, weights)
        gram = (gradients @ gradients.T).double().numpy()
        norms = np.sqrt(gram.diagonal())
        along = gram / norms  # column x: every gradient along that of x
        np.fill_diagonal(along, 0.0)
        variance = chance * (along**2).sum(axis=0)
        fourth = chance * (1 - 6 * chance) * (along**4).sum(axis=0)
        own.append(np.sqrt(variance))
        random.append(np.sqrt(chance * gram.diagonal().sum() / gradients.shape[1]))
        kurtosis.append(fourth / variance**2)
        ratios.append(norms**2 / variance)
        plain.append(np.minimum(norms, unit) ** 2)
    drawn = np.stack(own)
    by_own, by_nominal = np.sum(ratios, axis=0), np.sum(plain, axis=0)
    # A norm far above its noise says no more than one a little above: the clip of the nominal loss.
    capped = np.minimum(np.stack(ratios), np.median(ratios)).sum(axis=0)
    pairs = [i for i, s in enumerate(found.sets) if s.kind == "random"]
    rows = np.concatenate([found.sets[i].rows for i in pairs])
    oracles = np.concatenate([re.confidence(found.oracles[i], found.sets[i].rows) for i in pairs])
    after = np.concatenate([re.confidence(found.runs[i], found.sets[i].rows) for i in pairs])
    scores = {
        "one nominal noise, clipped": by_nominal, "implicit noise": by_own,
        "implicit noise, clipped": capped,
    }  # fmt: skip
    compared = compare_scores(
        {name: score[rows] for name, score in scores.items()},
        target=np.abs(after - oracles), reference="one nominal noise, clipped",
    )  # fmt: skip
    nominal_std = noise_multiplier(found.condition, batch_size=found.settings.sizes.batch_size)
    return {
        "median_norm": unit,
        "nominal_std_over_norm": nominal_std / unit,
        "own_std_over_norm": (np.quantile(drawn, [0.05, 0.5, 0.95]) / unit).tolist(),
        "own_std_by_epoch_over_norm": (np.median(drawn, axis=1) / unit).tolist(),
        "random_std_over_norm": float(np.median(random) / unit),
        "excess_kurtosis": np.quantile(kurtosis, [0.05, 0.5, 0.95]).tolist(),
        "rank_correlation": float(spearmanr(by_own, by_nominal).statistic),
        "rank_correlation_clipped": float(spearmanr(capped, by_nominal).statistic),
        "distance_after_5_epochs": {
            name: {
                "value": c.correlation.value, "low": c.correlation.low, "high": c.correlation.high,
                "nominal_is": c.verdict,
            }
            for name, c in compared.items()
        },
    }  # fmt: skip


def main() -> None:
    options = re.arguments((__doc__ or "").split("\n")[0], out="noise_levels.json")
    result: dict[str, Any] = options.before
    for condition in options.chosen:
        name = f"{condition.model}, {condition.name}"
        found = [
            re.retrain(condition, number, folder=options.work, jobs=options.jobs, say=print)
            for number in range(options.trainings)
        ]
        each = [nominal(one) for one in found]
        result[name] = {"nominal": each}
        for rows in zip(*each, strict=True):
            least = min(row["correlation"] for row in rows)
            share = min(row["top_decile_kept"] for row in rows)
            print(
                f"| {name} | {rows[0]['norms']} | {rows[0]['noise_times']:g} | "
                f"{rows[0]['order']:g} | {least:.3f} | {share:.2f} |"
            )
        if not condition.noise_std:
            result[name]["implicit"] = [implicit(one) for one in found]
            print(json.dumps(result[name]["implicit"], indent=1))
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
