"""How long does an ε of a mini-batch certificate take, and a search for the steps, beside before?

A logistic head on n = 3,000 instances with features of norm 1, unequal caps, noise in proportion to
the number of members. Side by side in one process, in processor seconds: an ε as releases before
this one computed it (every step of training by itself, `epsilon_of_earlier_releases`), an ε as it
is computed now (the median over three numbers of steps, the laws of the blocks included in the
first), both values of ε, and the search for the steps that halve what training alone gives away.
"One factor": no batch expands, the step size is small enough. "Random factors": some do.

    python benchmarks/poisson_certificates.py            # about five minutes
    python benchmarks/poisson_certificates.py --quick    # half a minute
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # read when numpy is imported

import argparse  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from opacus_pil.certificates import PoissonContractionCertificate  # noqa: E402

SIZE, DELTA = 3_000, 1.0 / 3_000
STEP_SIZES = {"one factor": 3.0, "random factors": 6.0}
STEPS = (50, 20, 100)


def certificate(
    *, training: int, members: int, rate: float, step_size: float
) -> PoissonContractionCertificate:
    caps = np.random.default_rng(0).uniform(0.02, 0.5, members)
    return PoissonContractionCertificate.one_output_glm(
        caps=caps,
        max_grad_norm=1.0,
        step_size=step_size,
        weight_decay=3.0 / (step_size * training),
        feature_norm=1.0,
        noise_multiplier=0.02 * members * rate * SIZE / step_size,
        expected_batch_size=rate * SIZE,
        num_instances=SIZE,
        training_steps=training,
        sample_rate=rate,
    )


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    found = function()
    return found, time.process_time() - started


def measured(*, factors: str, training: int, members: int, rate: float) -> dict[str, Any]:
    ours = certificate(training=training, members=members, rate=rate, step_size=STEP_SIZES[factors])
    seconds, values = [], []
    for steps in STEPS:
        value, second = timed(lambda steps=steps: ours.epsilon(delta=DELTA, steps=steps))
        seconds.append(second)
        values.append(value)
    before, slow = timed(lambda: ours.epsilon_of_earlier_releases(delta=DELTA, steps=STEPS[0]))
    target = ours.epsilon(delta=DELTA, steps=0) / 2.0
    looks: list[int] = []
    again = certificate(  # one that has kept nothing
        training=training, members=members, rate=rate, step_size=STEP_SIZES[factors]
    )
    needed, search = timed(
        lambda: again.steps_for(
            epsilon=target, delta=DELTA, on_probe=lambda steps, _: looks.append(steps)
        )
    )
    return {
        "factors": factors, "training": training, "members": members, "rate": rate,
        "seconds_before": slow, "seconds_first": seconds[0],
        "seconds": statistics.median(seconds), "ratio": slow / statistics.median(seconds),
        "epsilon_before": before, "epsilon": values[0], "target": target, "steps": needed,
        "looks": len(looks), "seconds_steps_for": search,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    print("| batches | T | members | q | s per ε before | now | ratio | ε before | now | "
          "steps_for, s | looks | K |")  # fmt: skip
    print("|---" * 12 + "|")
    for row in rows:
        print(
            f"| {row['factors']} | {row['training']:,} | {row['members']} | {row['rate']:g} | "
            f"{row['seconds_before']:.2f} | {row['seconds']:.2f} | {row['ratio']:.0f} | "
            f"{row['epsilon_before']:.4g} | {row['epsilon']:.4g} | "
            f"{row['seconds_steps_for']:.1f} | {row['looks']} | {row['steps']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results" / "poisson_certificates.json"
    parser.add_argument("--quick", action="store_true", help="short trainings only")
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    arguments = parser.parse_args()
    lengths = (300,) if arguments.quick else (300, 1_000, 3_000)
    settings = [
        {"factors": "one factor", "training": training, "members": members, "rate": rate}
        for training in lengths
        for members in (1, 10, 100)
        for rate in (0.02, 0.1)
    ] + [
        {"factors": "random factors", "training": training, "members": members, "rate": 0.1}
        for training in lengths[:2]
        for members in (1, 10)
    ]
    rows = [measured(**setting) for setting in tqdm(settings, disable=None)]
    show(rows)
    result = {
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
