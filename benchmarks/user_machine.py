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
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from tests.user_machine.runs import play, summary
from tests.user_machine.troubles import twin

PART = 250  # sequences of one seed


def run(sequences: int, start: int | None) -> dict[str, Any]:
    machine = twin(collect=True)
    began = time.perf_counter()
    if start is None:
        play(machine, sequences=sequences)
    else:
        with tqdm(total=sequences) as progress:
            while machine.tally["sequences"] < sequences:
                before = machine.tally["sequences"]
                size = min(PART, sequences - before)
                play(machine, sequences=size, start=start)
                start += 1
                progress.update(machine.tally["sequences"] - before)
    return {**summary(machine), "seconds": time.perf_counter() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=5000)
    parser.add_argument("--start", default="0", help="first seed, or 'tests'")
    default = Path(__file__).parent / "results" / "user_machine.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = None if arguments.start == "tests" else int(arguments.start)
    found = run(arguments.sequences, start)
    found["versions"] = {name: version(name) for name in ("torch", "opacus", "hypothesis")}
    found["python"] = platform.python_version()
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    for name, value in found.items():
        if not isinstance(value, dict | list):
            print(f"{name:45s} {value}")
    for words in found["violations"]:
        print(words, file=sys.stderr)
    return int(bool(found["violations"]))


if __name__ == "__main__":
    sys.exit(main())
