"""How far does one call travel through the house? Calls from one of our files into another.

Counts every call whose caller and callee lie in two different files of the package (by
`sys.setprofile`), for

    make_private   one training made private, its first batch not drawn yet
    request        a deletion request from `submit` to its certificate file, one step of unlearning

The mathematics (`accounting/`, `certificates/`: numbers in, numbers out) and the wording of checks
(`_validate.py`) are counted apart, and so are the files visited: merging files would lower the
moves and raise nothing else. Also: how many plans were made and how often a model was hashed.

    python benchmarks/moves.py
    python benchmarks/moves.py --list make_private
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import opacus_pil
from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine

ROOT = Path(opacus_pil.__file__).parent
APART = ("accounting/", "certificates/", "_validate.py")
SIZE = 24


class Journey:
    """Calls between files while a function runs."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, str, str]] = []
        self.files: set[str] = set()
        self.called: Counter[tuple[str, str]] = Counter()

    def follow(self, function: Callable[[], Any]) -> Journey:
        sys.setprofile(self._see)
        try:
            function()
        finally:
            sys.setprofile(None)
        return self

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        here = _place(frame)
        if event != "call" or here is None:
            return
        self.files.add(here)
        self.called[here, frame.f_code.co_name] += 1
        there = None if frame.f_back is None else _place(frame.f_back)
        if there not in (None, here):
            self.moves.append((there, here, frame.f_code.co_name))

    def counted(self) -> dict[str, Any]:
        apart = [m for m in self.moves if m[1].startswith(APART) or m[0].startswith(APART)]
        return {
            "moves": len(self.moves) - len(apart),
            "moves into mathematics and checks": len(apart),
            "files": len(self.files),
        }

    def touching(self, room: str) -> int:
        """Moves that are counted and begin or end in a room; the others are what it set off."""
        ends = [m[:2] for m in self.moves if not any(e.startswith(APART) for e in m[:2])]
        return sum(one.startswith(room) or other.startswith(room) for one, other in ends)


def _place(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None


def logistic() -> tuple[nn.Module, torch.optim.Optimizer, TensorDataset]:
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(SIZE, 4), dim=1)
    module = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, weight_decay=0.05)
    return module, optimizer, TensorDataset(x, (x[:, :1] > 0).float())


def made_private() -> tuple[Callable[[], Any], dict[str, Any]]:
    module, optimizer, data = logistic()
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=np.full(SIZE, 0.5))
    held: dict[str, Any] = {"engine": engine, "module": module, "plain": optimizer, "data": data}

    def make() -> None:
        held["made"] = engine.make_private(
            module=module, optimizer=optimizer, data_loader=DataLoader(data, batch_size=SIZE),
            noise_multiplier=2.0, max_grad_norm=1.0, criterion=nn.BCEWithLogitsLoss(),
        )  # fmt: skip

    return make, held


def request(folder: Path) -> Callable[[], Any]:
    make, held = made_private()
    make()
    wrapped, optimizer, loader = held["made"]
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(wrapped(x), y).backward()
            optimizer.step()
    unlearning = UnlearningEngine(
        wrapped, optimizer=optimizer, dataset=held["data"], criterion=nn.BCEWithLogitsLoss(),
        privacy_engine=held["engine"], feature_norm=1.0, requests=folder, progress=False,
    )  # fmt: skip

    def serve() -> None:
        unlearning.submit([3], request_id="case-1")
        done = unlearning.serve(steps=1, delta=1e-2, method="langevin")
        assert done[0].state == "done", done[0].result

    return serve


def main() -> None:
    parser = argparse.ArgumentParser(description="Count calls between files of the package.")
    parser.add_argument("--list", choices=("make_private", "request"), help="show every move")
    default = Path(__file__).parent / "results" / "moves.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made, _ = made_private()
        for name, function in (
            ("make_private", made), ("request", request(Path(folder) / "requests"))
        ):  # fmt: skip
            journey = Journey().follow(function)
            found[name] = journey.counted()
            if name == "request":
                found[name] |= {
                    "of these from or into unlearning": journey.touching("unlearning/"),
                    "plans made": journey.called["unlearning/planning.py", "plan"],
                    "models hashed": journey.called["files/model_hash.py", "model_hash"],
                }
            print(f"{name}: " + ", ".join(f"{v} {k}" for k, v in found[name].items()))
            if options.list == name:
                for there, here, what in journey.moves:
                    apart = "  (apart)" if here.startswith(APART) else ""
                    print(f"  {there} -> {here} {what}{apart}")
            print("  files: " + " ".join(sorted(journey.files)))
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
