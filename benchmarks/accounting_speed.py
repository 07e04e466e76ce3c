"""How long does the mathematics take: tables, ε for a million instances, steps, sets, composition.

Where Opacus computes the same thing one instance at a time, a loop over its functions runs in the
same process, in turns with ours, on a subsample; its time per item times the number of items is
what the ratio compares with (both are linear in the number of items). One thread. All measurements
take turns; medians and interquartile ranges over the rounds.

    python benchmarks/accounting_speed.py
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # read when numpy is imported

import argparse  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent  # noqa: E402
from tqdm import tqdm  # noqa: E402

from opacus_pil.accounting import (  # noqa: E402
    DEFAULT_ORDERS,
    PerInstanceAccountant,
    compose_per_instance,
    group_rdp,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)

DELTA = 1e-5
INSTANCES = 1_000_000
LEVELS = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, 1023)])
KERNELS = ((1.0, 0.01), (0.6, 0.001), (4.0, 0.1), (1.0, 0.5))  # noise multiplier, sample rate
BATCH = 256


@dataclass(frozen=True)
class Work:
    """`call()` does `items` of the `total` items of its row; a round is the median of `repeats`."""

    name: str
    side: str
    call: Callable[[], object]
    items: int
    total: int
    repeats: int = 1


def epsilons() -> list[Work]:
    """ε of every instance from a curve of its own."""
    orders = np.array(DEFAULT_ORDERS)
    scale = np.random.default_rng(0).uniform(0.001, 1.0, size=INSTANCES)
    single = 1000 * sampled_gaussian_rdp(1.0, noise_multiplier=1.0, sample_rate=0.01, orders=orders)
    curves = scale[:, None] * single
    name = f"ε of {INSTANCES:,} instances"
    some = 500

    def opacus() -> None:
        for row in curves[:some]:
            get_privacy_spent(orders=DEFAULT_ORDERS, rdp=row, delta=DELTA)

    return [
        Work(name, "ours", lambda: rdp_to_epsilon(curves, orders=orders, delta=DELTA),
             INSTANCES, INSTANCES),
        Work(name, "opacus", opacus, some, INSTANCES),
    ]  # fmt: skip


def tables() -> list[Work]:
    """One step's RDP at every level and order, nothing kept from earlier calls."""
    works = []
    for noise, rate in KERNELS:
        name = f"table of {len(LEVELS)} levels, z = {noise:g}, q = {rate:g}"
        # Opacus: without the smallest levels, where its sums cancel and it is no faster
        some = LEVELS[len(LEVELS) // 2 :: 64]

        def ours(noise: float = noise, rate: float = rate) -> Any:
            return sampled_gaussian_rdp(
                LEVELS, noise_multiplier=noise, sample_rate=rate, orders=DEFAULT_ORDERS
            )

        def opacus(noise: float = noise, rate: float = rate, some: Any = some) -> None:
            for level in some:
                compute_rdp(q=rate, noise_multiplier=noise / level, steps=1, orders=DEFAULT_ORDERS)

        works += [
            Work(name, "ours", ours, len(LEVELS), len(LEVELS)),
            Work(name, "opacus", opacus, len(some), len(LEVELS)),
        ]
    return works


def steps() -> list[Work]:
    """A step of the accountant, its table known: a batch with new sensitivities each time."""
    works = []
    for size in (10_000, INSTANCES):
        accountant = PerInstanceAccountant(size)
        generator = np.random.default_rng(0)

        def step(
            accountant: Any = accountant, generator: Any = generator, size: int = size
        ) -> None:
            rows = np.unique(generator.integers(0, size, size=BATCH))
            accountant.step(
                indices=rows, sensitivities=generator.uniform(0.01, 1.0, size=len(rows)),
                noise_multiplier=1.0, sample_rate=0.01,
            )  # fmt: skip

        step()
        # once for everyone, so that no step is the first to touch an instance's memory
        accountant.observe_all(generator.uniform(0.01, 1.0, size=size))
        name = f"step, batch {BATCH}, {size:,} instances"
        works.append(Work(name, "ours", step, 1, 1, repeats=50))
    return works


def sets() -> list[Work]:
    """One step's RDP of a forget set at the default orders."""
    members = {
        "equal": np.full(1000, 0.1),
        "unequal": np.random.default_rng(0).uniform(0.0, 0.2, size=1000),
    }
    return [
        Work(
            f"group_rdp, 1,000 {kind} members",
            "ours",
            lambda values=values: group_rdp(  # type: ignore[misc]
                values, noise_multiplier=1.0, sample_rate=0.01, orders=DEFAULT_ORDERS
            ),
            1,
            1,
        )
        for kind, values in members.items()
    ]


def compositions() -> list[Work]:
    """1,000 instances, 10 runs, 100 steps at order 8, sensitivities already on levels."""
    generator = np.random.default_rng(0)
    size = generator.uniform(0.01, 1.0, size=(1000, 1, 1))
    values = np.clip(size * generator.lognormal(0.0, 0.3, size=(1000, 10, 100)), 0.0, 1.0)
    places = np.searchsorted(LEVELS, values)
    holder = {"24 candidate exponents": None, "one exponent": 300.0}

    def step_rdp(order: float) -> Any:
        table = sampled_gaussian_rdp(LEVELS, noise_multiplier=1.0, sample_rate=0.01, orders=[order])
        return table[:, 0][places]

    return [
        Work(
            f"composition 1,000 x 10 x 100, {kind}",
            "ours",
            lambda exponent=exponent: compose_per_instance(  # type: ignore[misc]
                step_rdp, order=8.0, holder_exponent=exponent
            ),
            1,
            1,
        )
        for kind, exponent in holder.items()
    ]


def measure(works: list[Work], rounds: int) -> dict[tuple[str, str], np.ndarray]:
    """Seconds for all items of each work, one value per round; every round does each once."""
    taken: dict[tuple[str, str], list[float]] = {(work.name, work.side): [] for work in works}
    for work in tqdm([*works] * rounds, unit="call", mininterval=1.0):
        laps = []
        for _ in range(work.repeats):
            started = time.perf_counter()
            work.call()
            laps.append(time.perf_counter() - started)
        seconds = float(np.median(laps))  # short calls: a pause of the machine is not the call's
        taken[work.name, work.side].append(seconds * work.total / work.items)
    return {key: np.array(values) for key, values in taken.items()}


def rows_of(works: list[Work], taken: dict[tuple[str, str], np.ndarray]) -> list[dict[str, Any]]:
    rows = []
    for work in works:
        if work.side == "opacus":
            continue
        ours, theirs = taken[work.name, "ours"], taken.get((work.name, "opacus"))
        row = {"what": work.name, "items": work.total, "ours_s": _spread(ours)}
        if theirs is not None:
            loop = next(w for w in works if w.name == work.name and w.side == "opacus")
            row["opacus_loop_s"] = _spread(theirs)
            row["opacus_items_measured"] = loop.items
            row["ratio_of_medians"] = float(np.median(theirs) / np.median(ours))
        rows.append(row)
    return rows


def _spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def _shown(seconds: dict[str, float] | None) -> str:
    if seconds is None:
        return ""
    low, middle, high = (1e3 * seconds[key] for key in ("q25", "median", "q75"))
    return f"{middle:.4g} [{low:.4g}, {high:.4g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results" / "accounting_speed.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9, help="times that each takes its turn")
    arguments = parser.parse_args()
    # Opacus's advice on the range of orders, given for each instance
    warnings.filterwarnings("ignore", message="Optimal order is the")

    works = [*epsilons(), *tables(), *steps(), *sets(), *compositions()]
    for work in works:
        work.call()  # imports, caches and memory pages
    rows = rows_of(works, measure(works, arguments.rounds))
    print(f"ms, median [quartiles] of {arguments.rounds} rounds; {len(DEFAULT_ORDERS)} orders\n")
    print(f"{'what':52s} {'ours':>30s} {'loop over Opacus':>32s} {'ratio':>7s}")
    for row in rows:
        ratio = f"{row['ratio_of_medians']:7.0f}" if "ratio_of_medians" in row else ""
        print(
            f"{row['what']:52s} {_shown(row['ours_s']):>30s} "
            f"{_shown(row.get('opacus_loop_s')):>32s} {ratio}"
        )
    print("\nOpacus: measured on a subsample (JSON: opacus_items_measured), scaled to all items")
    result = {
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "rounds": arguments.rounds,
        "orders": len(DEFAULT_ORDERS),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
