"""What the per-instance estimate costs as the model and the data grow, beside plain Opacus.

The trainings take turns step by step in one process on the same batches, as in `overhead.py`:
medians of processor time per step as a ratio to plain Opacus's, with bootstrap 95 % intervals. An
estimate by `refresh` besides makes a full pass now and then: its time per row over that of a row in
a step of plain Opacus is how many epochs of training a pass costs. The fingerprint of the data
(they are read once, for checkpoints and certificates) and ε for everybody are given as shares of an
epoch of plain Opacus: median step × steps. Random data of 64 features, 10 classes, networks with
one or two hidden layers, batches of 64 on average. Plain Opacus holds every row's gradient in
"hooks" mode, 2.5 GB at 10⁷ parameters: there it is measured in ghost mode only.

    python benchmarks/estimate_cost.py
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import POLICIES, Case, measure, ratio_interval
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pil.accounting import PerInstanceAccountant
from opacus_pil.capture.sweep import sweep
from opacus_pil.files.fingerprint import dataset_fingerprint

FEATURES, CLASSES, BATCH = 64, 10, 64
PARAMETERS = (10**3, 10**4, 10**5, 10**6, 10**7)
ROWS = (10**3, 10**4, 10**5, 10**6)
SWEPT = 2048  # rows of the full pass that is timed
DELTA = 1e-5


def data(rows: int) -> TensorDataset:
    draws = torch.Generator().manual_seed(1)
    features = torch.randn(rows, FEATURES, generator=draws)
    return TensorDataset(features, torch.randint(0, CLASSES, (rows,), generator=draws))


def network(parameters: int) -> nn.Sequential:
    """Return a network of about so many parameters: one hidden layer up to 10⁴, then two."""
    if parameters <= 10**4:
        width = round((parameters - CLASSES) / (FEATURES + CLASSES + 1))
        hidden = [nn.Linear(FEATURES, width), nn.ReLU()]
    else:
        ends = FEATURES + CLASSES + 2
        width = round((math.sqrt(ends**2 + 4 * (parameters - CLASSES)) - ends) / 2)
        hidden = [nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def step_ratios(
    make_module: Any, rows: TensorDataset, *, mode: str, steps: int
) -> tuple[dict[str, Any], float]:
    """Return each policy's ratio with its interval, and plain Opacus's median step in seconds."""
    seconds, _ = measure(
        Case(make_module, lambda: rows, BATCH), mode=mode, count=steps,
        warm_up=max(4, steps // 5), device=torch.device("cpu"),
    )  # fmt: skip
    medians = np.median(seconds, axis=1)
    found = {}
    for turn, policy in enumerate(POLICIES, 1):
        low, high = ratio_interval(seconds[[0, turn]])
        found[policy] = {"ratio": float(medians[turn] / medians[0]), "low": low, "high": high}
    return found, float(medians[0])


def clocked(call: Any, *, repeats: int = 3) -> tuple[float, Any]:
    """Return the median processor time of a call, and what it returned last."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        taken.append(time.process_time() - start)
    return float(np.median(taken)), result


def model_rows(steps: int) -> list[dict[str, Any]]:
    found = []
    rows = data(4096)
    print(
        "| parameters | mode | last_seen | capped | a full pass, in epochs |\n|---|---|---|---|---|"
    )
    for parameters in PARAMETERS:
        for mode in ("hooks", "ghost"):
            if mode == "hooks" and parameters > 10**6:
                continue
            count = steps if parameters <= 10**5 else max(steps * 10**5 // parameters, 20)
            ratios, step = step_ratios(
                lambda p=parameters: network(p), rows, mode=mode, steps=count
            )
            module = network(parameters)
            pass_time, _ = clocked(
                lambda m=module: sweep(
                    m, rows, criterion=nn.CrossEntropyLoss(), indices=np.arange(SWEPT)
                )
            )
            epochs = (pass_time / SWEPT) / (step / BATCH)
            size = sum(p.numel() for p in module.parameters())
            found.append(
                {"parameters": size, "mode": mode, "steps": count, **ratios,
                 "full_pass_in_epochs": epochs}
            )  # fmt: skip
            print(f"| {size:,} | {mode} | {_cells(ratios)} | {epochs:.2f} |", flush=True)
    return found


def data_rows(steps: int) -> list[dict[str, Any]]:
    found = []
    print("\n| rows | last_seen | capped | fingerprint, in epochs | ε, in epochs |")
    for count in ROWS:
        rows = data(count)
        ratios, step = step_ratios(lambda: network(10**4), rows, mode="hooks", steps=steps)
        epoch = step * count / BATCH

        read, _ = clocked(lambda rows=rows: dataset_fingerprint(rows))
        account = PerInstanceAccountant(count)
        account.observe_all(np.linspace(0.01, 1.0, count))
        account.step(
            indices=np.empty(0, dtype=np.int64), sensitivities=np.empty(0),
            noise_multiplier=1.0, sample_rate=BATCH / count,
        )  # fmt: skip
        asked, _ = clocked(lambda a=account: a.get_epsilon(delta=DELTA))
        found.append(
            {"rows": count, "steps": steps, **ratios, "fingerprint_in_epochs": read / epoch,
             "epsilon_in_epochs": asked / epoch}
        )  # fmt: skip
        print(
            f"| {count:,} | {_cells(ratios)} | {read / epoch:.4f} | {asked / epoch:.4f} |",
            flush=True,
        )
    return found


def _cells(ratios: dict[str, Any]) -> str:
    return " | ".join(
        f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in ratios.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(__file__).parent / "results" / "estimate_cost.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--parts", default="", help="models or data; the file keeps the other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # notices of Opacus and torch
    result = {}
    if options.parts and options.out.exists():
        result = json.loads(options.out.read_text())
    for name, rows in (("models", model_rows), ("data", data_rows)):
        if options.parts in ("", name):
            result[name] = rows(options.steps)
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
