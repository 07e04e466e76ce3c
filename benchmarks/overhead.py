"""What per-instance accounting costs: one training step with plain Opacus and with ours.

Both trainings run side by side in one process and take turns step by step, on the same batches, so
that whatever else the machine does hits both. Prints medians, the ratio of medians and a bootstrap
95 % interval of that ratio; an interval containing 1.00 means that no difference was measured.

    python benchmarks/overhead.py --steps 200
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine

BATCH = 64
INSTANCES = 2048


def small_cnn(side: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 10),
    )  # fmt: skip


def steps(engine: Any, *, side: int, mode: str, device: torch.device) -> Iterator[None]:
    """Train for ever; one step between two yields."""
    pixels = torch.randn(INSTANCES, 1, side, side, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 10, (INSTANCES,), generator=torch.Generator().manual_seed(2))
    module = small_cnn(side, seed=0).to(device)
    draws = torch.Generator().manual_seed(3)  # the same batches on both sides
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(pixels, labels), batch_size=BATCH, generator=draws),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    wrapped, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(wrapped(inputs.to(device)), targets.to(device)).backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield


def measure(
    *, side: int, mode: str, count: int, warm_up: int, device: torch.device
) -> tuple[np.ndarray, PerInstancePrivacyEngine]:
    """Return seconds per step, shape (2, count): plain Opacus, ours."""
    ours = PerInstancePrivacyEngine(accountant="rdp", norm_policy="last_seen")
    sides = [
        steps(opacus.PrivacyEngine(accountant="rdp"), side=side, mode=mode, device=device),
        steps(ours, side=side, mode=mode, device=device),
    ]
    seconds = np.empty((2, warm_up + count))
    for number in range(warm_up + count):
        for which in (0, 1) if number % 2 else (1, 0):  # nobody always goes first
            start = time.perf_counter()
            next(sides[which])
            seconds[which, number] = time.perf_counter() - start
    return seconds[:, warm_up:], ours


def ratio_interval(seconds: np.ndarray, *, resamples: int = 4000) -> tuple[float, float]:
    """Return a bootstrap 95 % interval of the ratio of medians, resampling pairs of steps."""
    generator = np.random.default_rng(0)
    picks = generator.integers(seconds.shape[1], size=(resamples, seconds.shape[1]))
    medians = np.median(seconds[:, picks], axis=-1)
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="measured steps per side (>= 60)")
    parser.add_argument("--warm-up", type=int, default=40, help="steps before measuring")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads")
    parser.add_argument("--device", default="cpu")
    default = Path(__file__).parent / "results" / "overhead.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    if options.steps < 60:
        parser.error(f"Expected --steps >= 60, got {options.steps}. Fewer say little.")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    device = torch.device(options.device)
    rows = []
    print(
        f"{'images':>8} {'mode':>6} {'Opacus ms':>10} {'ours ms':>9} {'ratio':>6}   95 % interval"
    )
    for side in (8, 28):
        for mode in ("hooks", "ghost"):
            seconds, ours = measure(
                side=side, mode=mode, count=options.steps, warm_up=options.warm_up, device=device
            )
            plain, recorded = np.median(seconds, axis=1)
            low, high = ratio_interval(seconds)
            rows.append(
                {
                    "image_side": side, "grad_sample_mode": mode, "batch_size": BATCH,
                    "num_instances": INSTANCES, "steps": options.steps,
                    "opacus_median_seconds": float(plain), "ours_median_seconds": float(recorded),
                    "ratio": float(recorded / plain), "ratio_low": low, "ratio_high": high,
                    "unattributed_steps": ours.per_instance.unattributed_steps,
                }
            )  # fmt: skip
            print(
                f"{side:>5}x{side:<2} {mode:>6} {plain * 1e3:>10.3f} {recorded * 1e3:>9.3f} "
                f"{recorded / plain:>6.3f}   [{low:.3f}, {high:.3f}]"
            )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    report = {
        "threads": options.threads, "device": name, "torch": torch.__version__,
        "opacus": opacus.__version__, "norm_policy": "last_seen", "measurements": rows,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
