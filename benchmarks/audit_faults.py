"""Does `opacus-pil check` flag broken trainings, for the right reason, and no correct one?

Runs `opacus-pil check` on a script that knows nothing of it (`audit_scripts/digits.py`), each time
in a process of its own: ten faults and three correct trainings, several seeds each. A fault is
found for the right reason if the check that names it is among the violations; what follows from it
(a refuted claim, a larger part of a canary) may be, too.

    python benchmarks/audit_faults.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPT = HERE / "audit_scripts" / "digits.py"
REASON = {
    "noise_off": "noise",
    "noise_halved": "noise",
    "noise_on_one_layer": "noise_per_tensor",
    "reseeded": "noise_over_steps",
    "clip_off": "clip",
    "clip_after_averaging": "clip",
    "rate_doubled": "rate",
    "twice_the_steps": "steps",
    "divisor": "divisor",
    "gradient_twice": "gradient",
}
CORRECT = {
    "hooks": [], "functorch": ["--mode", "functorch"], "per-layer": ["--clipping", "per_layer"],
}  # fmt: skip


def check(arguments: list[str], seed: int) -> dict[str, Any]:
    """Run one check in a process of its own and return its JSON, with exit code and time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "audit.json"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "opacus_pil.cli", "check", str(SCRIPT),
             "--quiet", "--seed", str(seed), "--json", str(out), "--", *arguments,
             "--seed", str(seed)],
            capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        if not out.exists():
            raise RuntimeError(done.stdout + done.stderr)
        found = json.loads(out.read_text(encoding="utf-8"))
        found["exit_code"], found["wall_seconds"] = done.returncode, time.perf_counter() - start
    return found


def row_of(name: str, arguments: list[str], seeds: int) -> dict[str, Any]:
    """Check one training at several seeds."""
    runs = [check(arguments, seed) for seed in range(seeds)]
    reasons = []
    for run in runs:
        (training,) = run["trainings"]
        reasons.append(
            [c["name"] for c in training["conformance"]["checks"] if c["state"] == "violates"]
        )
    trainings = [run["trainings"][0] for run in runs]
    wanted = REASON.get(name)
    row = {
        "training": name, "seeds": seeds,
        "red_flags": sum(run["verdict"] == "red flag" for run in runs),
        "right_reason": None if wanted is None else sum(wanted in r for r in reasons),
        "reasons": reasons,
        "claimed": [t["epsilon"] for t in trainings],
        "lower_whole_run": [_lower(t, 0) for t in trainings],
        "lower_single_steps": [_lower(t, 1) for t in trainings],
        "refuted_p": [(t["evidence"] or {}).get("refuted_p") for t in trainings],
        "exit_codes": [run["exit_code"] for run in runs],
        "script_seconds": [run["seconds"]["script"] for run in runs],
        "watching_seconds": [t["seconds"]["watching"] for t in trainings],
        "analysis_seconds": [run["seconds"]["analysis"] for run in runs],
        "wall_seconds": [run["wall_seconds"] for run in runs],
    }  # fmt: skip
    middle = {key: statistics.median(row[key]) for key in
              ("claimed", "lower_whole_run", "lower_single_steps", "script_seconds",
               "analysis_seconds")}  # fmt: skip
    names = ", ".join(sorted({r for each in reasons for r in each})) or "none"
    print(
        f"{name:>20}  {row['red_flags']} of {seeds}  "
        f"{'-' if wanted is None else row['right_reason']}  ε {middle['claimed']:.2f}  "
        f"lower {middle['lower_whole_run']:.2f} {middle['lower_single_steps']:.2f}  "
        f"{middle['script_seconds']:.1f} s + {middle['analysis_seconds']:.1f} s  {names}",
        flush=True,
    )
    return row


def _lower(training: dict[str, Any], place: int) -> float:
    """A lower bound; 0 where canaries could not follow the training; "inf" is a word in JSON."""
    return float(training["evidence"]["lower"][place]["epsilon"]) if training["evidence"] else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[*REASON, *CORRECT])
    default = HERE / "results" / "audit_faults.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    rows = []
    for name in options.only:
        arguments = CORRECT.get(name, ["--fault", name])
        rows.append(row_of(name, arguments, options.seeds))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
