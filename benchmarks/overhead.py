"""What per-instance accounting costs: one training step with plain Opacus and with ours.

Time: the trainings of plain Opacus, `last_seen` and `capped` (caps fixed before the run, no full
pass) take turns step by step in one process, on the same batches, so that whatever else the
machine does hits all three. Prints the ratio of the median step to plain Opacus's and a bootstrap
95 % interval of it; an interval containing 1.00 means that no difference was measured. On a CPU a
step's time is the processor time of this process, which waiting for other processes does not
lengthen; on a GPU, and with --wall, it is the time that passes.

Memory: each training again in a process of its own, peak resident size after some steps (on a GPU:
torch's peak of allocated bytes), as a ratio to plain Opacus of the whole process and of what the
process grew by from just before `make_private`.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --cases "mlp" --modes hooks --steps 300 --parts time
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import torch
from opacus.layers import DPGRU, DPMultiheadAttention
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.datasets import load

POLICIES = ("last_seen", "capped")
VOCABULARY, LENGTH, SEQUENCES, WIDTH = 500, 24, 4096, 32


class TextModel(nn.Module):
    """Embedding, DPGRU, and a linear layer on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.gru = DPGRU(WIDTH, WIDTH, batch_first=True)
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.embedding(tokens))
        return self.last(states[:, -1])


class Encoder(nn.Module):
    """Embedding, one transformer encoder layer, and a linear layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = DPMultiheadAttention(WIDTH, 4, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = self.norms[0](hidden + self.attention(hidden, hidden, hidden)[0])
        hidden = self.norms[1](hidden + self.feed_forward(hidden))
        return self.last(hidden.mean(dim=1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip


def images(name: str) -> TensorDataset:
    data = load(name)
    return TensorDataset(data.images, data.labels)


def sequences() -> TensorDataset:
    """Return random tokens whose class is whether the first is above the middle."""
    draws = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=draws)
    return TensorDataset(tokens, (tokens[:, 0] >= VOCABULARY // 2).long())


@dataclass(frozen=True)
class Case:
    """One model on its data."""

    make_module: Callable[[], nn.Module]
    make_data: Callable[[], TensorDataset]
    batch_size: int = 64


CASES = {
    "mlp, digits": Case(mlp, lambda: images("digits")),
    "cnn, mnist5k": Case(cnn, lambda: images("mnist5k")),
    "embedding + gru": Case(TextModel, sequences),
    "encoder layer": Case(Encoder, sequences),
}


def make_engine(policy: str, instances: int) -> opacus.PrivacyEngine:
    """Return plain Opacus's engine, or ours with a policy."""
    if policy == "opacus":
        return opacus.PrivacyEngine(accountant="rdp")
    caps = np.linspace(0.2, 1.0, instances) if policy == "capped" else None
    return PerInstancePrivacyEngine(accountant="rdp", norm_policy=policy, caps=caps)


def steps(
    case: Case, *, policy: str, mode: str, device: torch.device
) -> Iterator[opacus.PrivacyEngine]:
    """Train for ever: everything up to make_private before the first yield, then a step each."""
    data = case.make_data()
    torch.manual_seed(0)
    module = case.make_module().to(device)
    engine = make_engine(policy, len(data))
    yield engine
    draws = torch.Generator().manual_seed(3)  # the same batches on every side
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=case.batch_size, generator=draws),
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
            yield engine


def measure(
    case: Case,
    *,
    mode: str,
    count: int,
    warm_up: int,
    device: torch.device,
    clock: Callable[[], float] = time.process_time,
) -> tuple[np.ndarray, list[int]]:
    """Return seconds per step, shape (1 + policies, count), and each policy's unmatched steps."""
    sides = [steps(case, policy=p, mode=mode, device=device) for p in ("opacus", *POLICIES)]
    engines = [next(side) for side in sides]
    seconds = np.empty((len(sides), warm_up + count))
    for number in range(warm_up + count):
        for turn in range(len(sides)):  # nobody always goes first, nor always after the same
            backwards = -1 if number % 2 else 1
            which = (number + backwards * turn) % len(sides)
            start = clock()
            next(sides[which])
            seconds[which, number] = clock() - start
    unattributed = [engine.per_instance.unattributed_steps for engine in engines[1:]]
    return seconds[:, warm_up:], unattributed


def ratio_interval(seconds: np.ndarray, *, resamples: int = 4000) -> tuple[float, float]:
    """Return a bootstrap 95 % interval of the ratio of medians, resampling rounds of steps."""
    generator = np.random.default_rng(0)
    picks = generator.integers(seconds.shape[1], size=(resamples, seconds.shape[1]))
    medians = np.median(seconds[:, picks], axis=-1)
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    return float(low), float(high)


def time_rows(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure and print every case."""
    print(f"{'model':>16} {'mode':>6} {'policy':>10} {'ratio':>6}   95 % interval")
    rows = []
    clock = time.perf_counter if options.wall else time.process_time
    for name, mode in selected(options):
        case = CASES[name]
        seconds, unattributed = measure(
            case, mode=mode, count=options.steps, warm_up=options.warm_up, device=device,
            clock=clock,
        )  # fmt: skip
        medians = np.median(seconds, axis=1)
        for number, policy in enumerate(POLICIES, start=1):
            low, high = ratio_interval(seconds[[0, number]])
            ratio = float(medians[number] / medians[0])
            rows.append(
                {
                    "model": name, "grad_sample_mode": mode, "norm_policy": policy,
                    "batch_size": case.batch_size, "steps": options.steps,
                    "opacus_median_seconds": float(medians[0]),
                    "ours_median_seconds": float(medians[number]),
                    "ratio": ratio, "ratio_low": low, "ratio_high": high,
                    "unattributed_steps": unattributed[number - 1],
                }
            )  # fmt: skip
            print(f"{name:>16} {mode:>6} {policy:>10} {ratio:>6.3f}   [{low:.3f}, {high:.3f}]")
    return rows


# --- memory ---------------------------------------------------------------------------------------


def resident_peak() -> int:
    """Return the largest resident size of this process since the last reset (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_here(name: str, mode: str, policy: str, count: int, device: str) -> tuple[int, int]:
    """Train in this process; return bytes before make_private and at the peak."""
    side = steps(CASES[name], policy=policy, mode=mode, device=torch.device(device))
    next(side)
    Path("/proc/self/clear_refs").write_text("5")  # reading data may have set the peak
    before = resident_peak()
    for _ in range(count):
        next(side)
    if device != "cpu":
        return 0, int(torch.cuda.max_memory_allocated(device))
    return before, resident_peak()


def memory_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print the peak of every case, medians over processes that take turns."""
    print(
        f"\n{'model':>16} {'mode':>6} {'policy':>10} {'peak':>6} {'growth':>7}  spread of Opacus's"
    )
    rows = []
    sides = ("opacus", *POLICIES)
    # A fork of this process, which has imported everything and trained nothing; CUDA cannot fork.
    processes = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
    for name, mode in selected(options):
        found: dict[str, list[tuple[int, int]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side in sides:
                with processes.Pool(1) as pool:
                    found[side].append(
                        pool.apply(
                            peak_here, (name, mode, side, options.memory_steps, options.device)
                        )
                    )
        peaks = {side: np.array(found[side], dtype=np.float64) for side in sides}
        plain = np.median(peaks["opacus"], axis=0)
        spread = float(np.ptp(peaks["opacus"][:, 1]) / plain[1])
        for policy in POLICIES:
            ours = np.median(peaks[policy], axis=0)
            row = {
                "model": name, "grad_sample_mode": mode, "norm_policy": policy,
                "repeats": options.repeats, "steps": options.memory_steps,
                "opacus_peak_bytes": plain[1], "ours_peak_bytes": ours[1],
                "peak_ratio": ours[1] / plain[1],
                "growth_ratio": (ours[1] - ours[0]) / (plain[1] - plain[0]),
                "opacus_relative_spread": spread,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name:>16} {mode:>6} {policy:>10} {row['peak_ratio']:>6.3f} "
                f"{row['growth_ratio']:>7.3f}  {spread:.3f}"
            )
    return rows


def selected(options: argparse.Namespace) -> list[tuple[str, str]]:
    return [(n, m) for n in CASES if any(c in n for c in options.cases) for m in options.modes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120, help="measured steps per side (>= 30)")
    parser.add_argument("--warm-up", type=int, default=30, help="steps before measuring")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads")
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of the models' names")
    parser.add_argument("--modes", nargs="+", default=["hooks", "ghost"])
    parser.add_argument("--repeats", type=int, default=3, help="processes per peak")
    parser.add_argument("--memory-steps", type=int, default=15, help="steps before a peak is read")
    parser.add_argument(
        "--parts", nargs="+", choices=("time", "memory"), default=["time", "memory"]
    )
    parser.add_argument("--wall", action="store_true", help="time that passes, on a CPU too")
    parser.add_argument("--device", default="cpu")
    default = Path(__file__).parent / "results" / "overhead.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    if options.steps < 30:
        parser.error(f"Expected --steps >= 30, got {options.steps}. Fewer say little.")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    device = torch.device(options.device)
    options.wall |= device.type != "cpu"
    memory = memory_rows(options) if "memory" in options.parts else []  # before anything trained
    rows = time_rows(options, device) if "time" in options.parts else []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    report = {
        "threads": options.threads, "clock": "wall" if options.wall else "processor",
        "device": name, "torch": torch.__version__,
        "opacus": opacus.__version__, "measurements": rows, "memory": memory,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
