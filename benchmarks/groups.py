"""What a forget set costs beyond its members: ours against the two textbook group-privacy rules.

For sets of 2 to 1,000 members, ε(δ) after T Poisson-sampled steps, add or remove the whole set:

- group_rdp: opacus_pil's bound for the set, composed, then converted;
- RDP rule: 2^c members cost 3^c·ε at order α/2^c (Mironov 2017, arXiv:1702.07476, Prop. 2), the
  order needs α >= 2^(c+1); c = ceil(log2 of the number of members);
- (ε, δ) rule: kε at δ' with δ'·(e^{kε} − 1)/(e^ε − 1) = δ, over the single instance's ε(δ').

Also prints how tight the bound is where an exact value is known, and its time.

    python benchmarks/groups.py
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from opacus_pil.accounting import (
    DEFAULT_ORDERS,
    group_rdp,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)

DELTA = 1e-5
ORDERS = np.array(DEFAULT_ORDERS)
MEMBERS = (2, 10, 100, 1000)
SETTINGS = (  # sensitivity, sample rate, noise multiplier, steps
    (1.0, 0.01, 1.0, 1000),
    (1.0, 0.001, 4.0, 1000),
    (0.1, 0.01, 1.0, 1000),
    (0.1, 0.01, 4.0, 1000),
    (0.01, 0.01, 1.0, 1000),
    (0.01, 0.05, 4.0, 10_000),
)


def rdp_rule(single: np.ndarray, members: int) -> float:
    """ε by the RDP group-privacy property, at the orders that it leaves."""
    power = math.ceil(math.log2(members))
    usable = 2.0 ** (power + 1) <= ORDERS
    if not usable.any():
        return math.inf
    halved = ORDERS[usable] / 2.0**power
    return float(rdp_to_epsilon(3.0**power * single[usable], orders=halved, delta=DELTA)[0])


def epsilon_delta_rule(single: np.ndarray, members: int) -> float:
    """kε, minimised over the δ' of the single instance that leaves δ for the set."""
    best = math.inf
    for exponent in np.linspace(math.log10(DELTA), -290.0, 2000):
        epsilon = float(rdp_to_epsilon(single, orders=ORDERS, delta=10.0**exponent)[0])
        total = members * epsilon
        if epsilon == 0.0:
            log_factor = math.log(members)
        else:  # log of (e^total − 1)/(e^ε − 1) without overflow
            log_factor = total - epsilon + math.log(math.expm1(-total) / math.expm1(-epsilon))
        if exponent * math.log(10.0) + log_factor <= math.log(DELTA):
            best = min(best, total)
    return best


def table() -> list[dict[str, Any]]:
    rows = []
    for sensitivity, rate, noise, steps in SETTINGS:
        single = steps * sampled_gaussian_rdp(
            sensitivity, noise_multiplier=noise, sample_rate=rate, orders=ORDERS
        )
        for members in MEMBERS:
            ours = steps * group_rdp(
                np.full(members, sensitivity),
                noise_multiplier=noise, sample_rate=rate, orders=ORDERS,
            )  # fmt: skip
            epsilon, order = rdp_to_epsilon(ours, orders=ORDERS, delta=DELTA)
            rows.append(
                {
                    "members": members,
                    "sensitivity": sensitivity,
                    "sample_rate": rate,
                    "noise_multiplier": noise,
                    "steps": steps,
                    "delta": DELTA,
                    "single_epsilon": float(rdp_to_epsilon(single, orders=ORDERS, delta=DELTA)[0]),
                    "group_rdp_epsilon": float(epsilon),
                    "group_rdp_order": float(order),
                    "rdp_rule_epsilon": rdp_rule(single, members),
                    "epsilon_delta_rule_epsilon": epsilon_delta_rule(single, members),
                }
            )
    return rows


def excess() -> list[dict[str, Any]]:
    """Order 2, unequal members: the bound against the same lattice with members rounded down.

    The exact value lies between the two, so the quotient bounds what rounding up costs.
    """
    rows = []
    for members, rate in ((20, 0.1), (100, 0.05), (1000, 0.01)):
        shifts = np.random.default_rng(0).uniform(0.05, 1.0, size=members) / math.sqrt(members)
        step = shifts.max() / 200
        masses = np.ones(1)
        for place in np.floor(shifts / step).astype(int):
            moved = np.append(np.zeros(place), rate * masses)
            moved[: len(masses)] += (1 - rate) * masses
            masses = moved
        kept = masses > 1e-18  # lowers the lower value
        atoms = step * np.flatnonzero(kept)
        below = 0.0
        for block in np.array_split(np.arange(len(atoms)), 50):
            moment = np.expm1(np.outer(atoms[block], atoms))
            below += float(masses[kept][block] @ moment @ masses[kept])
        above = group_rdp(shifts, noise_multiplier=1.0, sample_rate=rate, orders=[2.0])[0]
        rows.append(
            {
                "members": members,
                "sample_rate": rate,
                "rdp_at_2": float(above),
                "excess_at_most": float(above / math.log1p(below)) - 1.0,
            }
        )
    return rows


def timing(repeats: int) -> list[dict[str, Any]]:
    """Seconds for 1,000 members at all default orders."""
    rows = []
    for name, values in (
        ("equal", np.full(1000, 0.1)),
        ("unequal", np.random.default_rng(0).uniform(0.0, 0.2, size=1000)),
    ):
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            group_rdp(values, noise_multiplier=1.0, sample_rate=0.01, orders=ORDERS)
            taken.append(time.perf_counter() - start)
        rows.append(
            {"sensitivities": name, "median_s": statistics.median(taken), "max_s": max(taken)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results" / "groups.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=7, help="runs per timing")
    arguments = parser.parse_args()

    rows, tightness, times = table(), excess(), timing(arguments.repeats)
    print(f"ε at δ = {DELTA:g}\n")
    print("    s     q    z      T   |F|  one member  group_rdp   RDP rule  (ε, δ) rule")
    for row in rows:
        print(
            "{sensitivity:5g} {sample_rate:5g} {noise_multiplier:4g} {steps:6d} {members:5d} "
            "{single_epsilon:11.4g} {group_rdp_epsilon:10.4g} {rdp_rule_epsilon:10.4g} "
            "{epsilon_delta_rule_epsilon:12.4g}".format(**row)
        )
    print("\nrounding unequal members up, D at order 2: at most")
    for row in tightness:
        print("{members:5d} members, q = {sample_rate:g}: {excess_at_most:.2%}".format(**row))
    print(f"\n1,000 members x {len(ORDERS)} orders, one step:")
    for row in times:
        print("{sensitivities:>8}: median {median_s:.2f} s, max {max_s:.2f} s".format(**row))
    result = {
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "epsilon": rows,
        "rounding": tightness,
        "timing": times,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # JSON has no infinity: a rule without a usable order gives null
    text = json.dumps(_without_infinities(result), indent=2, allow_nan=False)
    arguments.out.write_text(text + "\n")


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
