"""How near do natural canaries come to the claim where the worst case is nearly attained?

A logistic head by Opacus with full batches (rate 1): noise z, T steps, so that one record gives
away a single Gaussian of mean √T/z. Scores are losses of the final model, one run each.

- rare tokens: every canary is a row with one feature of its own, beside 1,000 rows of digits;
  clipping is always in force, so each canary moves its own weight by the whole clip bound;
- digits: canaries are rows of digits with another label: they share all features with the others.

    python benchmarks/audit_natural.py
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from opacus_pil.auditing import Claim, canary_split
from opacus_pil.datasets import binary, load, logistic_features

STEPS, NOISE, CLIP, RATE_OF_LEARNING, DELTA = 100, 10.0, 0.1, 50.0, 1e-5


def rare_tokens(count: int) -> tuple[TensorDataset, TensorDataset]:
    """Canaries of one feature each, and digits on the other features."""
    digits = load("digits")
    features = logistic_features(digits.images[:1000])
    rest = torch.zeros(1000, features.shape[1] + count)
    rest[:, : features.shape[1]] = features
    own = torch.zeros(count, features.shape[1] + count)
    own[torch.arange(count), features.shape[1] + torch.arange(count)] = 1.0
    labels = (digits.labels[:1000] >= 5).float()[:, None]
    return TensorDataset(own, torch.ones(count, 1)), TensorDataset(rest, labels)


def shared_features() -> tuple[TensorDataset, None]:
    pair = binary(load("digits"), positive=3, negative=8)
    return TensorDataset(logistic_features(pair.images), pair.labels[:, None].long()), None


def one(kind: str, count: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    if kind == "rare tokens":
        data, rest = rare_tokens(count)
        split = canary_split(data, count, generator)
        training: Any = ConcatDataset([split.dataset, rest])
    else:
        data, _ = shared_features()
        count = len(data)
        split = canary_split(data, count, generator, kind="mislabelled", classes=2)
        training = split.dataset
    module = nn.Linear(data.tensors[0].shape[1], 1, bias=False)
    nn.init.zeros_(module.weight)
    wrapped, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE_OF_LEARNING),
        data_loader=DataLoader(training, batch_size=len(training)), noise_multiplier=NOISE,
        max_grad_norm=CLIP,
    )  # fmt: skip
    criterion = nn.BCEWithLogitsLoss()
    done = 0
    while done < STEPS:
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(wrapped(inputs), targets.float()).backward()
            optimizer.step()
            done += 1
    claim = Claim(((NOISE, 1.0, STEPS),), delta=DELTA)
    scores = split.loss_scores(
        module.eval(),
        loss_of=lambda m, b: nn.functional.binary_cross_entropy_with_logits(
            m(b[0]), b[1].float(), reduction="none"
        )[:, 0],
    )
    found = split.bounds(scores, delta=DELTA, claim=claim)
    return {
        "claimed": claim.epsilon, "canaries": count,
        "lower": {b.method: b.epsilon for b in found.lower},
        "shown": {b.method: b.epsilon for b in found.shown},
        "ceiling": {b.method: b.ceiling for b in found.lower},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--canaries", type=int, nargs="+", default=[1000, 4000])
    default = Path(__file__).parent / "results" / "audit_natural.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(1)
    designs = [("rare tokens", m) for m in options.canaries] + [("digits", 0)]
    rows = []
    for kind, count in designs:
        runs = [one(kind, count, seed) for seed in range(options.seeds)]
        row: dict[str, Any] = {"canaries": kind, "runs": runs}
        for part in ("lower", "shown"):
            row[f"{part}_by_claimed"] = {
                method: float(np.median([run[part][method] / run["claimed"] for run in runs]))
                for method in runs[0][part]
            }
        rows.append(row)
        print(kind, runs[0]["canaries"], f"claimed {runs[0]['claimed']:.3f}",
              {**row["lower_by_claimed"], **row["shown_by_claimed"]}, flush=True)  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"delta": DELTA, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
