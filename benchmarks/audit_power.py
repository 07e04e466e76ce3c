"""How much of the claimed ε do gradient canaries find in one correct run, and how often too much?

What a canary's entry holds at a step is known exactly, Bern(q)·in + z·N(0, 1) in units of the clip
bound, and independent over steps and canaries; it is drawn here without a training and given to the
same code (`CanaryRecord`) that listens to Opacus's optimizer. A few real trainings confirm it.

- power: lower bound / claimed ε, median and quantiles over seeds, five bounds on the same runs;
- coverage: share of correct runs whose bound would lie above the truth (p-value of the true claim
  below 5 %), and share of audits of runs that give nothing away with a bound above 0;
- training: digits MLP by Opacus itself with the same design;
- time: processor time of a step with canaries beside one without, in turns, medians of one run.

    python benchmarks/audit_power.py
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from opacus_pil.auditing import Claim
from opacus_pil.auditing.canary_record import CanaryRecord, evidence
from opacus_pil.auditing.error_test import step_bound, wrong_guess_p_value
from opacus_pil.auditing.guesses import by_rank, planned
from opacus_pil.auditing.one_run import (
    GaussianTradeOff,
    mahloujifar_p_value,
    mahloujifar_rejects,
    steinke_expected,
    steinke_p_value,
)

DELTA = 1e-5
CONTROLS = 256
NULL_DRAWS = 5  # coins thrown for each run that gives nothing away
SETTINGS = ((1.0, 0.036, 280), (2.0, 0.1, 300), (0.6, 0.01, 1000), (1.0, 0.01, 1000))
NAMES = ("whole run, likelihood ratio", "single steps", "total variation", "Steinke", "Mahloujifar")


def simulate(noise: float, rate: float, steps: int, canaries: int, seed: int) -> CanaryRecord:
    """Draw what canaries see of a correct training."""
    random = np.random.default_rng(seed)
    record = CanaryRecord(random.random(canaries) < 0.5, CONTROLS, rate)
    places = np.flatnonzero(record.included)
    for _ in range(steps):
        values = noise * random.standard_normal(canaries + CONTROLS)
        drawn = places[random.random(len(places)) < rate]
        values[drawn] += 1.0
        record.add(values, drawn=drawn, noise=noise)
    return record


def summary(values: list[float]) -> dict[str, float]:
    quantiles = np.quantile(values, [0.05, 0.5, 0.95])
    return {"median": quantiles[1], "q05": quantiles[0], "q95": quantiles[2]}


def power(canaries: int, seeds: int) -> list[dict[str, Any]]:
    """Lower bounds of all settings."""
    rows = []
    for setting in SETTINGS:
        claim = Claim((setting,), delta=DELTA)
        found: dict[str, list[float]] = {name: [] for name in NAMES}
        design: dict[str, Any] = {}
        start = time.process_time()
        for seed in range(seeds):
            proof = evidence(simulate(*setting, canaries, seed), claim=claim)
            for name, bound in zip(NAMES, proof.lower, strict=True):
                found[name].append(bound.epsilon / claim.epsilon)
                design[name] = {
                    "ceiling": bound.ceiling, "smallest_detectable": bound.smallest_detectable,
                    "assumption": bound.assumption, "condition": bound.condition,
                    "guesses": bound.guesses,
                }  # fmt: skip
        row = {
            "noise_multiplier": setting[0], "sample_rate": setting[1], "steps": setting[2],
            "canaries": canaries, "seeds": seeds, "claimed": claim.epsilon,
            "ratio": {name: summary(values) for name, values in found.items()},
            "design": design, "seconds_per_run": (time.process_time() - start) / seeds,
        }  # fmt: skip
        rows.append(row)
        medians = "  ".join(f"{row['ratio'][name]['median']:.2f}" for name in NAMES)
        print(f"{setting!s:>22} m={canaries} ε={claim.epsilon:.3f}  {medians}", flush=True)
    return rows


def coverage(runs: int, canaries: int = 1000) -> dict[str, Any]:
    """How often bounds at 95 % are too high: of a correct run, and of one without a secret."""
    setting = SETTINGS[0]
    claim = Claim((setting,), delta=DELTA)
    losses, half = claim.losses(), claim.losses(2.0)
    few = planned(losses, canaries=canaries,
                  score=lambda g: steinke_expected(g, delta=DELTA, level=0.05))  # fmt: skip
    some = planned(
        losses, canaries=canaries,
        score=lambda g: -mahloujifar_p_value(
            g.right, guesses=g.count, canaries=canaries, curve=half
        ),
    )  # fmt: skip
    correct: dict[str, list[bool]] = {name: [] for name in NAMES}
    secret_free: dict[str, list[bool]] = {name: [] for name in NAMES if name != "single steps"}
    nothing = GaussianTradeOff(0.0)
    for seed in range(runs):
        record = simulate(*setting, canaries, 10_000 + seed)
        m, wrong = canaries, record.wrong
        ranked = by_rank(record.scores, included=record.included, guesses=few)
        other = by_rank(record.scores, included=record.included, guesses=some)
        p = step_bound(
            record.hits, of=record.draws, false_alarms=record.false_alarms, among=record.undrawn,
            claim=claim, level=0.05,
        ).p_value  # fmt: skip
        tv = losses.total_variation
        correct[NAMES[0]].append(wrong_guess_p_value(wrong, canaries=m, total_variation=tv) < 0.05)
        correct[NAMES[1]].append((p or 0.0) < 0.05)
        correct[NAMES[2]].append(correct[NAMES[0]][-1])
        correct[NAMES[3]].append(
            float(steinke_p_value(ranked.right, guesses=few, canaries=m, epsilon=claim.epsilon,
                                  delta=DELTA)) < 0.05
        )  # fmt: skip
        correct[NAMES[4]].append(
            mahloujifar_rejects(other.right, guesses=some, canaries=m, curve=losses, level=0.05)
        )
        for draw in range(NULL_DRAWS):  # coins that never met the training
            coins = np.random.default_rng((seed, draw)).random(m) < 0.5
            errors = int((record.guessed_in != coins).sum())
            null = wrong_guess_p_value(errors, canaries=m, total_variation=0.0) < 0.05
            ranked = by_rank(record.scores, included=coins, guesses=few)
            other = by_rank(record.scores, included=coins, guesses=some)
            secret_free[NAMES[0]].append(null)
            secret_free[NAMES[2]].append(null)
            secret_free[NAMES[3]].append(
                float(steinke_p_value(ranked.right, guesses=few, canaries=m, epsilon=0.0,
                                      delta=DELTA)) < 0.05
            )  # fmt: skip
            secret_free[NAMES[4]].append(
                mahloujifar_rejects(
                    other.right, guesses=some, canaries=m, curve=nothing, level=0.05
                )
            )
    result = {
        "setting": setting, "canaries": canaries, "runs": runs, "null_draws": NULL_DRAWS,
        "above_the_truth": {name: float(np.mean(v)) for name, v in correct.items()},
        "above_zero_without_secret": {name: float(np.mean(v)) for name, v in secret_free.items()},
    }  # fmt: skip
    print(json.dumps(result, indent=1), flush=True)
    return result


def training(seeds: int) -> list[dict[str, Any]]:
    """The first setting, trained by Opacus on digits."""
    import torch
    from opacus import PrivacyEngine
    from sklearn.datasets import load_digits

    from opacus_pil.auditing import GradientCanaries

    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(
        torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    )
    rows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        )
        engine = PrivacyEngine(accountant="rdp")
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            data_loader=torch.utils.data.DataLoader(data, batch_size=65),
            noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
        canaries = GradientCanaries(optimizer, seed=seed)
        for _ in range(10):
            for inputs, targets in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
        proof = canaries.evidence(delta=DELTA)
        claim = Claim(tuple(engine.accountant.history), delta=DELTA)
        rows.append(
            {
                "seed": seed, "history": engine.accountant.history, "claimed": claim.epsilon,
                "ratio": {
                    name: bound.epsilon / claim.epsilon
                    for name, bound in zip(NAMES, proof.lower, strict=True)
                },
                "p_value": proof.refuted_p, "noise_ratio": proof.noise_ratio, "hit": proof.hit,
            }
        )  # fmt: skip
        print(f"trained, seed {seed}:", {k: round(v, 2) for k, v in rows[-1]["ratio"].items()},
              flush=True)  # fmt: skip
    return rows


def timed(steps: int, canaries: int = 1000) -> list[dict[str, Any]]:
    """Processor time per step with and without canaries, step by step in turns."""
    import torch
    from opacus import PrivacyEngine
    from torch import nn

    from opacus_pil.auditing import GradientCanaries
    from opacus_pil.datasets import load

    torch.set_num_threads(1)
    models = {
        "mlp, digits": ("digits", lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))),
        "cnn, mnist5k": ("mnist5k", lambda: nn.Sequential(
            nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(),
            nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))),
    }  # fmt: skip
    rows = []
    for name, (source, build) in models.items():
        images = load(source)
        data = torch.utils.data.TensorDataset(images.images, images.labels)
        sides = {}
        for kind in ("plain", "canaries"):
            torch.manual_seed(0)
            module = build()
            module, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
                module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                data_loader=torch.utils.data.DataLoader(data, batch_size=64),
                noise_multiplier=1.0, max_grad_norm=1.0,
            )  # fmt: skip
            if kind == "canaries":
                GradientCanaries(optimizer, seed=0, count=canaries)
            sides[kind] = (module, optimizer, loader)
        iterators = {kind: iter(side[2]) for kind, side in sides.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in sides}
        for step in range(steps + 5):
            for kind, (module, optimizer, loader) in sides.items():
                batch = next(iterators[kind], None)
                if batch is None:
                    iterators[kind] = iter(loader)
                    batch = next(iterators[kind])
                start = time.process_time()
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
                optimizer.step()
                if step >= 5:
                    seconds[kind].append(time.process_time() - start)
        medians = {kind: float(np.median(values)) for kind, values in seconds.items()}
        rows.append(
            {"model": name, "canaries": canaries, "steps": steps, "seconds": medians,
             "ratio": medians["canaries"] / medians["plain"]}
        )  # fmt: skip
        print(f"{name}: a step with canaries takes {rows[-1]['ratio']:.2f} times", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--large-seeds", type=int, default=10, help="at 5,000 canaries")
    parser.add_argument("--null-runs", type=int, default=200)
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--timed-steps", type=int, default=80)
    default = Path(__file__).parent / "results" / "audit_power.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    start = time.process_time()
    print(f"{'(z, q, T)':>22}  medians of lower / claimed: {', '.join(NAMES)}")
    report = {
        "delta": DELTA, "controls": CONTROLS, "machine": platform.machine(),
        "power": power(1000, options.seeds) + power(5000, options.large_seeds),
        "coverage": coverage(options.null_runs),
        "trainings": training(options.trainings), "time": timed(options.timed_steps),
    }  # fmt: skip
    report["processor_seconds"] = time.process_time() - start
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
