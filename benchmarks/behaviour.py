"""What does the package do, bit for bit? A record at fixed seeds, to compare two trees with.

Run it before a refactoring and again after it. Recorded: trainings under every norm policy, mode
and clipping (weights, both ledgers, labels, warnings, errors), the same saved and resumed, in
physical batches and attached; custom loops and refusals; unlearning plans, runs and queues;
certificates; signatures of all public names. No claim is made that what is recorded is right.

    python benchmarks/behaviour.py --out before.json
    python benchmarks/behaviour.py --against benchmarks/results/behaviour.json

The record holds on one machine with one set of versions only: float32 sums differ in their last
bits between processors. Make one there first, from the tree to compare with.
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # read when numpy is imported
os.environ["COLUMNS"] = "100"  # how wide argparse writes

import argparse  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from importlib import metadata  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from behaviour_parts import described_error, flat  # noqa: E402

PARTS = ("training", "calls", "refusals", "unlearning", "names")
RESULT = Path(__file__).parent / "results" / "behaviour.json"
SHOWN = 160  # characters of a value that is printed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record")
    parser.add_argument("--against", type=Path, metavar="FILE", help="print every difference")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; default: all")
    arguments = parser.parse_args()
    if arguments.out is None and arguments.against is None:
        parser.error("Expected --out or --against, got neither.")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # Opacus's notices about empty draws
    parts = arguments.part or PARTS
    found = {"made with": versions(), **{part: recorded(part) for part in parts}}
    if arguments.out is not None:
        text = json.dumps(found, indent=0, ensure_ascii=False, allow_nan=False, sort_keys=True)
        arguments.out.write_text(f"{text}\n", encoding="utf-8")
    if arguments.against is None:
        return 0
    old = json.loads(arguments.against.read_text(encoding="utf-8"))
    for name, version in old["made with"].items():
        if found["made with"].get(name) != version:
            print(f"note: made with {name} {version}, here {found['made with'].get(name)}")
    return compared({part: old.get(part, {}) for part in parts}, {p: found[p] for p in parts})


def recorded(part: str) -> Any:
    start = time.perf_counter()
    try:
        found = importlib.import_module(f"behaviour_{part}").record()
    except Exception as error:  # a public name that went away: recorded like any other error
        found = {"error": described_error(error)}
    print(f"{part}: {len(flat(found))} values in {time.perf_counter() - start:.0f} s", flush=True)
    return json.loads(json.dumps(found))  # as it will be read


def versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in ("torch", "opacus", "numpy", "scipy")}
    return {
        **found, "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }  # fmt: skip


def compared(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print every difference by its path, then how many there are of each kind."""
    before, after = flat(old), flat(new)
    kinds: Counter[str] = Counter()
    for path in sorted(before.keys() | after.keys()):
        one, other = (shown(values, path) for values in (before, after))
        if path not in before or path not in after or before[path] != after[path]:
            print(f"{path}\n  old: {one}\n  new: {other}")
            kinds[f"{path.split('/')[0]}: {path.split('/')[-1]}"] += 1
    for kind, count in kinds.most_common():
        print(f"{count:6d}  {kind}")
    print(f"{sum(kinds.values())} differences in {len(before.keys() | after.keys())} values")
    return 1 if kinds else 0


def shown(values: dict[str, Any], path: str) -> str:
    if path not in values:
        return "absent"
    text = json.dumps(values[path], ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


if __name__ == "__main__":
    sys.exit(main())
