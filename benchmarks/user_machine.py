"""Is a number of the package ever below the truth, whatever a user does? Thousands of random users.

A hypothesis machine plays them (`tests/user_machine`): it draws, steps, reuses, skips, changes
settings, saves and loads, between any two calls, with a model whose exact divergence it computes by
itself. A sequence with a finding is printed and gives exit code 1.

    python benchmarks/user_machine.py
    python benchmarks/user_machine.py --sequences 300 --start tests   # those of the test
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import argparse
import json
import platform
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from tests.user_machine.runs import play, summary
from tests.user_machine.troubles import twin

PART = 125  # sequences of one seed, at least


def part(start: int | None, sequences: int) -> tuple[Counter[Any], list[str], list[float]]:
    """Play the sequences of one seed; return what was counted, found and measured."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    machine = twin(collect=True)
    play(machine, sequences=sequences, start=start)
    return machine.tally, machine.found, machine.ratios


def run(sequences: int, start: int | None, processes: int) -> dict[str, Any]:
    whole = twin(collect=True)
    began = time.perf_counter()
    size = sequences if start is None else PART
    starts = [None] if start is None else [start + k for k in range(-(-sequences // PART))]
    with ProcessPoolExecutor(max_workers=processes) as pool, tqdm(total=len(starts)) as progress:
        for tally, found, ratios in pool.map(part, starts, [size] * len(starts)):
            for words in found:
                progress.write(words, file=sys.stderr)
            whole.tally.update(tally)
            whole.found.extend(found)
            whole.ratios.extend(ratios)
            progress.update()
    return {**summary(whole), "seconds": time.perf_counter() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--start", default="0", help="first seed, or 'tests'")
    default = Path(__file__).parent / "results" / "user_machine.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    arguments = parser.parse_args()
    start = None if arguments.start == "tests" else int(arguments.start)
    found = run(arguments.sequences, start, arguments.processes)
    found["versions"] = {name: version(name) for name in ("torch", "opacus", "hypothesis")}
    found["python"] = platform.python_version()
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    for name, value in found.items():
        if not isinstance(value, dict | list):
            print(f"{name:45s} {value}")
    return int(bool(found["violations"]))


if __name__ == "__main__":
    sys.exit(main())
