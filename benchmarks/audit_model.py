"""`opacus-pil audit` on a model that a plain Opacus script trained: verdict, numbers, time.

A script that knows nothing of opacus_pil trains a CNN on half of mnist5k, chosen at random, and
leaves its checkpoints; then one command audits it. Processes of their own, one thread each.

    python benchmarks/audit_model.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPT = HERE / "audit_scripts" / "mnist5k.py"
TOML = """module = "mnist5k:make_model"
dataset = "mnist5k:training_data"
held_out = "mnist5k:held_out"
split = "random"
criterion = "torch.nn:CrossEntropyLoss"
checkpoints = "checkpoints/epoch*.pt"
noise_multiplier = 1.0
max_grad_norm = 4.0
batch_size = 64
delta = 1e-5
before_first = "as_first"
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    default = HERE / "results" / "audit_model.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--page", type=Path, help="keep the report page there")
    options = parser.parse_args()
    report: dict[str, Any] = {"epochs": options.epochs}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "mnist5k.py").write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
        (folder / "run.toml").write_text(TOML, encoding="utf-8")
        for part, command in {
            "training": ["mnist5k.py", "--epochs", str(options.epochs)],
            "audit": ["-m", "opacus_pil.cli", "audit", "run.toml", "--quiet"],
        }.items():
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *command], cwd=folder, env=environment,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            report[f"{part}_seconds"] = time.perf_counter() - start
            report[f"{part}_exit_code"] = done.returncode
            report[f"{part}_said"] = (done.stdout + done.stderr).strip()
        found = json.loads((folder / "audit" / "audit.json").read_text(encoding="utf-8"))
        if options.page is not None:
            options.page.write_bytes((folder / "audit" / "audit.html").read_bytes())
    report["audit"] = found
    print(report["training_said"])
    print(f"audit: {found['verdict']} in {report['audit_seconds']:.0f} s", found["seconds"])
    print(f"claimed {found['claim']['epsilon']:.3f}, replaced {found['design']['claimed_epsilon']}")
    print("lower", [bound["epsilon"] for bound in found["lower"]], found["attack"]["auc"])
    print("upper", found["upper"]["spread"], found["upper"]["most_exposed"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
