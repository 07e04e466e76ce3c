"""Is every bound a bound? Thousands of random cases of opacus_pil against exact values.

For each family of bounds: how many cases, how many fall below the exact value (must be none, else
exit code 1 and the parameters of each), and how far above it they are, bound/exact − 1.
Exact values come from `exact.py`, which calls nothing of opacus_pil: quadrature in extended
precision, closed forms and sums in mpmath, enumeration, the dual of a quadratic programme, linear
chains. A case's random numbers depend on the seed, its family and its number only.

    python benchmarks/soundness.py
    python benchmarks/soundness.py --family "one step, reverse" --number 17   # one case again
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # two processes, one thread each; read when numpy is imported

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import multiprocessing  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import zlib  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import soundness_accounting  # noqa: E402
import soundness_batches  # noqa: E402
import soundness_certificates  # noqa: E402
import soundness_composition  # noqa: E402
import soundness_heads  # noqa: E402
import soundness_langevin  # noqa: E402
import soundness_steps  # noqa: E402
from exact import require_extended_precision  # noqa: E402
from soundness_cases import Case, Family, excess  # noqa: E402
from tqdm import tqdm  # noqa: E402

MODULES = (
    soundness_steps,
    soundness_accounting,
    soundness_composition,
    soundness_certificates,
    soundness_langevin,
    soundness_batches,
    soundness_heads,
)  # a new bound brings its cases in a module with a list FAMILIES
FAMILIES: dict[str, Family] = {
    family.name: family for module in MODULES for family in module.FAMILIES
}
Outcome = dict[str, Any]


def draw(name: str, number: int, seed: int) -> Case:
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    return FAMILIES[name].draw(generator)


def judge(task: tuple[str, int, int]) -> Outcome:
    """One case, reduced to what the table needs; all of it if it fails."""
    name, number, seed = task
    started = time.perf_counter()
    case = draw(name, number, seed)
    values = [excess(float(bound), exact) for bound, exact in case.pairs]
    counted = [value for value in values if not math.isnan(value)]
    below = any(value < -FAMILIES[name].error for value in counted)
    lost = [name for name, (ours, rival) in case.rivals.items() if ours > rival * (1.0 + 1e-11)]
    return {
        "name": name,
        "number": number,
        "low": min(counted, default=math.nan),
        "high": max(counted, default=math.nan),
        "below": below,
        "rivals": {
            key: rival / ours - 1.0 if ours > 0.0 else math.inf
            for key, (ours, rival) in case.rivals.items()
        },
        "lost": lost,
        "case": describe(case) if below or lost else None,
        "seconds": time.perf_counter() - started,
    }


def describe(case: Case) -> dict[str, Any]:
    pairs = [(repr(float(bound)), str(exact)) for bound, exact in case.pairs]
    return {"bound, exact": pairs, "rivals": case.rivals, **case.parameters}


def shares(cases: int, names: list[str]) -> list[tuple[str, int]]:
    """How many cases each family gets: at least one, in sum `cases`."""
    weights = np.cumsum([0] + [FAMILIES[name].share for name in names])
    ends = np.round(weights / weights[-1] * cases).astype(int)
    return [(name, max(1, int(count))) for name, count in zip(names, np.diff(ends), strict=True)]


def summary(name: str, outcomes: list[Outcome]) -> dict[str, Any]:
    high = np.array([outcome["high"] for outcome in outcomes])
    low = np.array([outcome["low"] for outcome in outcomes])
    high, low = high[~np.isnan(high)], low[~np.isnan(low)]
    spread = np.quantile(high, [0.5, 0.9, 0.99], method="lower") if len(high) else [math.nan] * 3
    rivals = {}
    for rival in {name: None for outcome in outcomes for name in outcome["rivals"]}:
        gains = [outcome["rivals"][rival] for outcome in outcomes if rival in outcome["rivals"]]
        rivals[rival] = {
            "cases": len(gains),
            "lost": sum(rival in outcome["lost"] for outcome in outcomes),
            "rival_over_ours_median": float(np.median(gains)),
        }
    family = FAMILIES[name]
    return {
        "family": name,
        "truth": family.truth,
        "cases": len(outcomes),
        "below": sum(outcome["below"] for outcome in outcomes),
        "min": float(low.min()) if len(low) else math.nan,
        "median": float(spread[0]),
        "q90": float(spread[1]),
        "q99": float(spread[2]),
        "max": float(high.max()) if len(high) else math.nan,
        "documented_limit": family.limit,
        "above_limit": None if family.limit is None else int((high > family.limit).sum()),
        "error_of_exact": family.error,
        "too_small_for_a_ratio": len(outcomes) - len(high),
        "rivals": rivals,
        "seconds": sum(outcome["seconds"] for outcome in outcomes),
    }


def show(rows: list[dict[str, Any]]) -> None:
    print("bound/exact − 1: of a case's largest for all but `min`, which is the least of any\n")
    print(
        f"{'family':27s} {'exact by':22s} {'cases':>5s} {'below':>5s} {'min':>8s} {'median':>8s} "
        f"{'90 %':>8s} {'99 %':>8s} {'max':>8s} {'limit':>7s} {'over':>4s}"
    )
    for row in rows:
        limit = "" if row["documented_limit"] is None else f"{row['documented_limit']:.0e}"
        over = "" if row["above_limit"] is None else str(row["above_limit"])
        print(
            f"{row['family']:27s} {row['truth']:22s} {row['cases']:5d} {row['below']:5d} "
            + " ".join(f"{row[key]:8.1e}" for key in ("min", "median", "q90", "q99", "max"))
            + f" {limit:>7s} {over:>4s}"
        )
    for row in rows:
        for name, rival in row["rivals"].items():
            print(
                f"\n{row['family']}: at most {name} in {rival['cases'] - rival['lost']} of "
                f"{rival['cases']} cases, whose value is {rival['rival_over_ours_median']:.1e} "
                "above (median)"
            )


def finite_or_text(value: Any) -> Any:
    """JSON has neither inf nor nan."""
    if isinstance(value, dict):
        return {key: finite_or_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_or_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run(tasks: list[tuple[str, int, int]], processes: int) -> list[Outcome]:
    mixed = np.random.default_rng(0).permutation(len(tasks))  # an even progress bar
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.imap_unordered(judge, [tasks[i] for i in mixed])
        return list(tqdm(results, total=len(tasks), unit="case", mininterval=1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results" / "soundness.json"
    parser.add_argument("--cases", type=int, default=10_000, help="number of random cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases")
    parser.add_argument("--processes", type=int, default=2, help="each with a single thread")
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    parser.add_argument("--family", choices=FAMILIES, help="this family alone")
    parser.add_argument("--number", type=int, help="with --family: this case alone, in full")
    arguments = parser.parse_args()
    require_extended_precision()
    if arguments.number is not None:
        if arguments.family is None:
            parser.error("--number needs --family")
        print(json.dumps(describe(draw(arguments.family, arguments.number, arguments.seed))))
        return

    started = time.perf_counter()
    names = [arguments.family] if arguments.family else list(FAMILIES)
    tasks = [
        (name, number, arguments.seed)
        for name, count in shares(arguments.cases, names)
        for number in range(count)
    ]
    outcomes = sorted(
        run(tasks, arguments.processes), key=lambda outcome: (outcome["name"], outcome["number"])
    )
    rows = [
        summary(name, [outcome for outcome in outcomes if outcome["name"] == name])
        for name in names
    ]
    show(rows)
    failures = [outcome for outcome in outcomes if outcome["below"] or outcome["lost"]]
    for outcome in failures:
        kind = "BELOW THE EXACT VALUE" if outcome["below"] else "above its rival"
        print(f"\n{kind}: --family {outcome['name']!r} --number {outcome['number']}")
        print(f"    {outcome['case']}")
    below = sum(outcome["below"] for outcome in outcomes)
    seconds = time.perf_counter() - started
    print(f"\n{len(outcomes)} cases in {seconds:.0f} s: {below} below the exact value")
    result = {
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "arguments": {"cases": arguments.cases, "seed": arguments.seed},
        "seconds": seconds,
        "families": rows,
        "failures": [
            {key: outcome[key] for key in ("name", "number", "below", "case")}
            for outcome in failures
        ],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite_or_text(result), indent=2, allow_nan=False, default=str)
    arguments.out.write_text(text + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
