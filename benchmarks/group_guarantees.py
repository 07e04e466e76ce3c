"""What a set of 1 to 50 instances gave away in a real training, by four rules.

DP-SGD by Opacus (MLP, 2,000 images of MNIST-5k; a full pass in every epoch measures everybody's
clipped norm, which is held through it: label `estimate`). ε(δ) of adding or removing a whole set:

- joint: `PerInstanceAccountant.group_rdp` of the members' own sensitivities;
- worst case: the same bound for a set of that size whose members all reach the clipping bound;
- k times: the members' largest single ε times k, at the same δ: what is often written, and no
  guarantee, since δ grows too;
- by the rule: the textbook (kε', δ'(e^{kε'} − 1)/(e^ε' − 1)) with the largest member's ε'(δ') and
  the δ' that leaves δ: the guarantee that "k times" pretends to be. It speaks of a chain of data
  sets, on each of which the member's loss would have to hold; the joint bound does not need that.

    python benchmarks/group_guarantees.py
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import torch
from groups import epsilon_delta_rule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil.accounting import (
    DEFAULT_ORDERS,
    PerInstanceAccountant,
    group_rdp,
    rdp_to_epsilon,
)
from opacus_pil.capture.sweep import sweep
from opacus_pil.datasets import load, split

DELTA = 1e-5  # that of `epsilon_delta_rule` too
ORDERS = np.array(DEFAULT_ORDERS)
SIZES = (1, 2, 5, 10, 50)
NOISES = (1.0, 4.0)
TRAIN, BATCH, EPOCHS = 2000, 64, 20
SAMPLE_RATE = 1 / 32  # of Opacus: one over the batches of an epoch


def epsilon(rdp: np.ndarray) -> float:
    return float(rdp_to_epsilon(rdp, orders=ORDERS, delta=DELTA)[0])


def trained(number: int, noise: float) -> PerInstanceAccountant:
    """Train with Opacus; return everybody's account at the norms before each epoch."""
    data = split(
        load("mnist5k"), sizes={"train": TRAIN}, generator=torch.Generator().manual_seed(number)
    )["train"]
    rows = TensorDataset(data.images, data.labels)
    torch.manual_seed(number)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    criterion = nn.CrossEntropyLoss()
    wrapped, optimizer, loader = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
        data_loader=DataLoader(rows, batch_size=BATCH),
        noise_multiplier=noise,
        max_grad_norm=1.0,
    )
    account = PerInstanceAccountant(TRAIN, history=True)
    for _ in range(EPOCHS):
        account.observe_all(np.minimum(sweep(wrapped, rows, criterion=criterion).norms, 1.0))
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(wrapped(images), labels).backward()
            optimizer.step()
            account.step(
                indices=np.empty(0, dtype=np.int64), sensitivities=np.empty(0),
                noise_multiplier=noise, sample_rate=SAMPLE_RATE,
            )  # fmt: skip
    return account


def set_rows(account: PerInstanceAccountant, *, number: int, noise: float) -> list[dict]:
    """Return one row for each set."""
    single = account.rdp()
    loss = single[:, np.searchsorted(ORDERS, 2.0)]
    order = np.argsort(loss, kind="stable")
    generator = np.random.default_rng(number)
    middle = len(order) // 2
    found = []
    for size in SIZES:
        half = (size + 1) // 2
        sets = {
            "easiest": order[:size],
            "median": order[middle - half : middle - half + size],
            "random": generator.choice(len(order), size, replace=False),
            "hardest": order[-size:],
        }
        worst = account.steps * group_rdp(
            np.ones(size), noise_multiplier=noise, sample_rate=SAMPLE_RATE, orders=ORDERS
        )
        for kind, rows in sets.items():
            largest = single[rows[np.argmax(loss[rows])]]
            found.append(
                {"training": number, "noise_multiplier": noise, "steps": account.steps,
                 "guarantee": account.guarantee, "kind": kind, "members": size,
                 "joint": epsilon(account.group_rdp(rows)), "worst_case": epsilon(worst),
                 "k_times": size * epsilon(largest), "rule": epsilon_delta_rule(largest, size)}
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(__file__).parent / "results" / "group_guarantees.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    parser.add_argument("--trainings", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for noise in NOISES:
        for number in range(options.trainings):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notices of Opacus and torch
                account = trained(number, noise)
            rows += set_rows(account, number=number, noise=noise)
            print(f"noise {noise:g}, training {number}: {rows[-1]['guarantee']}", flush=True)
    print("\n| z | set | members | joint | worst case | k times | by the rule |")
    for key in dict.fromkeys((r["noise_multiplier"], r["kind"], r["members"]) for r in rows):
        same = [r for r in rows if (r["noise_multiplier"], r["kind"], r["members"]) == key]
        cells = []
        for name in ("joint", "worst_case", "k_times", "rule"):
            values = [r[name] for r in same]
            spread = f" [{min(values):.3g}, {max(values):.3g}]" if name != "worst_case" else ""
            cells.append(f"{np.median(values):.3g}{spread}")
        print(f"| {key[0]:g} | {key[1]} | {key[2]} | {' | '.join(cells)} |")
    finite = [{k: v if v != np.inf else None for k, v in row.items()} for row in rows]
    options.out.write_text(json.dumps(finite, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
