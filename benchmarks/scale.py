"""Ten million instances: what a step, ε for everyone and the ledger cost as their number grows.

Accountants of 10⁴ … 10⁷ instances with COMPACT_ORDERS take turns in one process, on batches of 500
rows whose levels move at every step. "first touch": nobody was seen before; "warm": steps right
after one another; "training": 64 MB are overwritten between two steps (not timed), as a training
step does, so that no instance is in a cache. "file" is an accountant with `memory_map`. Questions
to the ledger run in a process of their own, so that its peak memory is theirs. One thread.

    python benchmarks/scale.py
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # read when numpy is imported

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from opacus_pil.accounting import (  # noqa: E402
    COMPACT_ORDERS,
    DEFAULT_ORDERS,
    PerInstanceAccountant,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)
from opacus_pil.files.ledger_table import LedgerTable  # noqa: E402

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BATCH = 500
CLASSES = 10
KERNEL = {"noise_multiplier": 1.0, "sample_rate": 0.01}

NOISES = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
RATES = (1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 4e-3, 0.01, 0.05, 0.1, 1.0)
STEPS = (10, 100, 1000, 10_000, 100_000)
SENSITIVITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
DELTAS = (1e-4, 1e-5, 1e-6, 1e-7)


def orders() -> list[dict[str, Any]]:
    """ε with COMPACT_ORDERS over ε with DEFAULT_ORDERS, by the latter."""
    kept = np.isin(DEFAULT_ORDERS, COMPACT_ORDERS)
    pairs = []
    for noise, rate in itertools.product(NOISES, RATES):
        rdp = sampled_gaussian_rdp(
            SENSITIVITIES, noise_multiplier=noise, sample_rate=rate, orders=DEFAULT_ORDERS
        )
        for count, delta in itertools.product(STEPS, DELTAS):
            full, _ = rdp_to_epsilon(count * rdp, orders=DEFAULT_ORDERS, delta=delta)
            few, _ = rdp_to_epsilon(count * rdp[:, kept], orders=COMPACT_ORDERS, delta=delta)
            pairs.append(np.stack([full, few]))
    full, few = np.concatenate(pairs, axis=1)
    rows = []
    for low, high in itertools.pairwise((0.0, 0.05, 1.0, 10.0, 50.0)):
        here = (full > 0) & (full >= low) & (full < high)
        ratio = few[here] / full[here]
        quantiles = np.quantile(ratio, [0.5, 0.9, 0.99, 1.0])
        rows.append(
            {"epsilon_from": low, "epsilon_to": high, "cases": int(here.sum()),
             **dict(zip(("median", "q90", "q99", "max"), quantiles.tolist(), strict=True)),
             "largest_difference": float((few - full)[here].max())}
        )  # fmt: skip
    return rows


class Contestant:
    """An accountant that takes steps on random batches."""

    def __init__(self, size: int, folder: str | None = None) -> None:
        self.size, self.mapped = size, folder is not None
        self.generator = np.random.default_rng(0)
        started = time.perf_counter()
        self.accountant = PerInstanceAccountant(size, orders=COMPACT_ORDERS, memory_map=folder)
        self.creation = time.perf_counter() - started

    def step(self) -> float:
        rows = np.sort(self.generator.choice(self.size, BATCH, replace=False))
        values = self.generator.uniform(0.01, 1.0, size=BATCH)
        started = time.perf_counter()
        self.accountant.step(indices=rows, sensitivities=values, **KERNEL)
        return time.perf_counter() - started

    def full_pass(self) -> float:
        values = self.generator.uniform(0.01, 1.0, size=self.size)
        started = time.perf_counter()
        self.accountant.observe_all(values)
        return time.perf_counter() - started


def take_turns(
    contestants: list[Contestant], *, rounds: int, block: int, between: Callable[[], object]
) -> np.ndarray:
    """Return seconds per step, shape (contestants, rounds * block)."""
    taken: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds):
        order = range(len(contestants))
        for which in order if number % 2 else reversed(order):  # nobody always goes first
            for _ in range(block):
                between()
                taken[which].append(contestants[which].step())
    return np.array(taken)


def ratio_interval(ours: np.ndarray, base: np.ndarray) -> list[float]:
    """Return a bootstrap 95 % interval of the ratio of medians."""
    generator = np.random.default_rng(0)
    medians = [
        np.median(generator.choice(values, size=(2000, len(values))), axis=1)
        for values in (ours, base)
    ]
    return np.quantile(medians[0] / medians[1], [0.025, 0.975]).tolist()


def step_rows(contestants: list[Contestant], taken: np.ndarray, setting: str) -> list[dict]:
    rows = []
    for contestant, seconds in zip(contestants, taken, strict=True):
        low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
        ratio_low, ratio_high = ratio_interval(seconds, taken[0])
        rows.append(
            {"setting": setting, "instances": contestant.size, "mapped": contestant.mapped,
             "median_s": float(middle), "q25_s": float(low), "q75_s": float(high),
             "mean_s": float(seconds.mean()), "ratio": float(middle / np.median(taken[0])),
             "ratio_low": ratio_low, "ratio_high": ratio_high}
        )  # fmt: skip
        print(
            f"{setting:>12} {contestant.size:>11,}{' file' if contestant.mapped else '     '}"
            f" {1e3 * middle:>8.3f} [{1e3 * low:.3f}, {1e3 * high:.3f}] ms"
            f"   ratio {rows[-1]['ratio']:.3f} [{ratio_low:.3f}, {ratio_high:.3f}]"
        )
    return rows


def resident(key: str = "VmRSS") -> int:
    """Return bytes of this process's memory from /proc (VmRSS, RssAnon, RssFile, VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_of(call: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return the result, the seconds and the highest resident memory above that before."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before, started = resident(), time.perf_counter()
    result = call()
    return result, time.perf_counter() - started, resident("VmHWM") - before


def ask(path: Path, which: str, repeats: int) -> None:
    """Print seconds and peak memory of one question; runs in a process of its own."""
    table = LedgerTable(path)
    middle = len(table) // 2
    questions: dict[str, Callable[[], object]] = {
        "top 100": lambda: table.top(100),
        "quantiles by label": lambda: table.quantiles(by="label"),
        "one instance": lambda: table.instance(middle),
        "read all with pandas": lambda: pd.read_parquet(path),
    }
    call = questions[which]
    _, first, peak = peak_of(call)
    later = [peak_of(call)[1] for _ in range(repeats - 1)]
    print(json.dumps({"first_s": first, "median_s": float(np.median([first, *later])),
                      "peak_bytes": peak}))  # fmt: skip


def ledger(accountant: PerInstanceAccountant, folder: str, repeats: int) -> dict[str, Any]:
    """Write the rows of everyone and ask the file."""
    path = Path(folder) / "ledger.parquet"
    labels = (np.arange(accountant.num_instances) % CLASSES).astype(np.int8)
    _, seconds, peak = peak_of(lambda: accountant.to_parquet(path, columns={"label": labels}))
    found: dict[str, Any] = {
        "instances": accountant.num_instances, "write_s": seconds, "write_peak_bytes": peak,
        "file_bytes": path.stat().st_size, "questions": {},
    }  # fmt: skip
    print(f"write {accountant.num_instances:,} rows: {seconds:.1f} s, {peak / 1e6:.0f} MB more "
          f"memory at most, {found['file_bytes'] / 1e6:.0f} MB file")  # fmt: skip
    for which in ("top 100", "quantiles by label", "one instance", "read all with pandas"):
        command = [sys.executable, __file__, "--ask", which, "--file", str(path)]
        command += ["--rounds", str(1 if "pandas" in which else repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        answer = found["questions"][which] = json.loads(done.stdout)
        print(f"{which:>22}: {answer['median_s']:.3f} s (first {answer['first_s']:.3f} s), "
              f"{answer['peak_bytes'] / 1e6:.0f} MB more memory at most")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results" / "scale.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15, help="turns that each accountant takes")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="skip sizes above this")
    parser.add_argument("--folder", help="for the mapped file and the ledger (default: temporary)")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(options.file, options.ask, options.rounds)
        return

    result: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "python": platform.python_version(),
                    "cpus": os.cpu_count(), "load": os.getloadavg()},
        "numpy": np.__version__, "batch": BATCH, "orders": len(COMPACT_ORDERS), "levels": 1024,
        "rounds": options.rounds, "compact_orders": orders(),
    }  # fmt: skip
    for row in result["compact_orders"]:
        print(f"ε {row['epsilon_from']:g} … {row['epsilon_to']:g}: {row['cases']:,} cases, compact "
              f"over default median {row['median']:.3f}, 90 % {row['q90']:.2f}, 99 % "
              f"{row['q99']:.2f}, largest {row['max']:.2f}")  # fmt: skip

    sizes = [size for size in SIZES if size <= options.largest]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        contestants, memory, epsilons = [], [], []
        waste = np.ones(8_000_000)
        started = resident("RssAnon"), resident("RssFile") + resident("RssShmem")
        for size, place in [*((size, None) for size in sizes), (sizes[-1], folder)]:
            made = Contestant(size, place)
            made.step()  # builds the table
            contestants.append(made)
        result["creation_s"] = [made.creation for made in contestants]

        turns: dict[str, Any] = {"rounds": options.rounds}
        first = take_turns(contestants, **turns, block=10, between=lambda: None)
        result["steps"] = step_rows(contestants, first, "first touch")
        for made in contestants:
            _, seconds, peak = peak_of(made.full_pass)
            memory.append(
                {"instances": made.size, "mapped": made.mapped, "seconds": seconds,
                 "peak_bytes": peak}
            )  # fmt: skip
            print(f"full pass of {made.size:,}{' (file)' if made.mapped else ''}: {seconds:.2f} s, "
                  f"{peak / 1e6:.0f} MB more memory at most")  # fmt: skip
        result["full_pass"] = memory
        result["all_accountants_bytes"] = {
            "anonymous": resident("RssAnon") - started[0],
            "file": resident("RssFile") + resident("RssShmem") - started[1],
            "instances_in_memory": sum(sizes), "instances_in_file": sizes[-1],
        }  # fmt: skip
        held = result["all_accountants_bytes"]
        print(
            f"{sum(sizes):,} instances in memory, {sizes[-1]:,} in a file: "
            f"{held['anonymous'] / 1e6:.0f} MB and {held['file'] / 1e6:.0f} MB resident"
        )
        warm = take_turns(contestants, **turns, block=20, between=lambda: None)
        result["steps"] += step_rows(contestants, warm, "warm")
        training = take_turns(contestants, **turns, block=5, between=lambda: waste.fill(0.0))
        result["steps"] += step_rows(contestants, training, "training")

        for _ in range(2):  # so that nearly everyone has an ε of their own
            contestants[len(sizes) - 1].full_pass()
            contestants[len(sizes) - 1].step()
        for made in contestants:
            call = made.accountant.get_epsilon
            _, seconds, peak = peak_of(lambda call=call: call(1e-7))
            epsilons.append({"instances": made.size, "mapped": made.mapped, "seconds": seconds,
                             "peak_bytes": peak})  # fmt: skip
            print(f"ε of {made.size:,}{' (file)' if made.mapped else ''}: {seconds:.3f} s, "
                  f"{peak / 1e6:.0f} MB more memory at most")  # fmt: skip
        result["epsilon"] = epsilons
        result["ledger"] = ledger(contestants[len(sizes) - 1].accountant, folder, 5)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
