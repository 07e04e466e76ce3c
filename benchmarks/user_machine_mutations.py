"""Does the machine of `user_machine.py` see it if a single check of the package is broken?

Each mutation is one replacement of text in a scratch copy of the package; the sequences of the test
are then played until the first finding. A replacement whose text is gone stops the script.

    python benchmarks/user_machine_mutations.py
    python benchmarks/user_machine_mutations.py --only "reuse is not noticed"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SEQUENCES = 250  # those of tests/test_user_machine.py

_PLAY = """
import sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
import opacus_pil
assert opacus_pil.__file__.startswith(sys.argv[1]), opacus_pil.__file__
from tests.user_machine.machine import Found
from tests.user_machine.troubles import twin
from tests.user_machine.runs import play
machine = twin(first=True)
try:
    play(machine, sequences=int(sys.argv[2]))
    print("none", machine.tally["sequences"])
except Found as found:
    print("found", machine.tally["sequences"], str(found).splitlines()[0])
"""


class Mutation(NamedTuple):
    """One broken check: what it is, where, and the text before and after."""

    name: str
    file: str
    old: str
    new: str


_NOT_DRAWN = (
    "        \"a step's batch was not the one that the private loader had just handed out (a batch "
    'used "\n        "twice, or one from elsewhere), so that nothing says at which rate it was '
    'drawn",\n'
)

MUTATIONS = (
    Mutation(
        "reuse and foreign batches are not noticed", "capture/recorder.py",
        "if any(c.foreign for c in captures):", "if False:",
    ),
    Mutation(
        "foreign batches keep their label and are amplified", "training/evidence.py",
        '        "batch_not_drawn", "estimate",\n' + _NOT_DRAWN + "        unamplified=True, ",
        '        "batch_not_drawn", "bound",\n' + _NOT_DRAWN + "        ",
    ),
    Mutation(
        "per-layer clipping is charged by the optimizer's max_grad_norm", "capture/norms.py",
        "max_grad_norm=math.hypot(*bounds),", "max_grad_norm=float(self.max_grad_norm),",
    ),
    Mutation(
        "noise is read at the hook, after the user's own", "step_accounting.py",
        "        record = self.recorder.take(max_grad_norm=self.clip_bound)\n",
        "        self._opacus_hook(optimizer)\n"
        "        record = self.recorder.take(max_grad_norm=self.clip_bound)\n"
        "        record = replace(record, noise_std=optimizer.noise_std())\n",
    ),
    Mutation(
        "skipped draws are no fact", "capture/recorder.py", "        if skipped:\n",
        "        if False:\n",
    ),
    Mutation(
        "draws skipped last in a pass are no fact", "capture/indices.py",
        "if owner in self._trained and self.skipped", "if False and self.skipped",
    ),
    Mutation(
        "parameters outside the clipped norm are no fact (ghost)", "capture/ghost.py",
        "if unclipped and self._clipped:", "if False:",
    ),
    Mutation(
        "caps may be set with a batch in hand", "recording_engine.py",
        "if any(training.in_hand for training in self._accountings):", "if False:",
    ),
    Mutation(
        "a file loaded into a copy lowers the live ledger", "resuming_engine.py",
        "        if mine or not self.per_instance.steps:\n", "        if True:\n",
    ),
    Mutation(
        "noise may change between clip and step under a budget", "step_accounting.py",
        "        if self._clipped_at != self.coming_kernel():\n", "        if False:\n",
    ),
    Mutation(
        "noised gradients may be changed before the model moves", "capture/norms.py",
        "and not recorder.untouched():", "and False:",
    ),
    Mutation(
        "steps of the plain optimizer are not seen", "capture/norms.py",
        "            recorder.unnoised_step()\n", "            pass\n",
    ),
    Mutation(
        "noise that Opacus did not add is taken for its own", "capture/recorder.py",
        "            noise_std=std,\n", "            noise_std=1.0 if std is None else std,\n",
    ),
    Mutation(
        "the clipped gradient may change before the step (ghost)", "capture/ghost.py",
        "            if touched:\n", "            if False:\n",
    ),
    Mutation(
        "several gradients of a row are no fact", "capture/recorder.py",
        'facts.append(Fact("rows_not_once"))', "pass",
    ),
    Mutation(
        "every collate function is taken to keep the order", "capture/collate.py",
        'return getattr(collate, "wrapped_collator_fn", collate) is default_collate',
        "return True",
    ),
    Mutation(
        "a full pass takes rows as its collate function gives them", "capture/sweep.py",
        "    if keeps_order(join):\n", "    if True:\n",
    ),
    Mutation(
        "sensitivities are rounded down", "accounting/levels.py",
        'sensitivities, side="left")', 'sensitivities, side="right") - 1',
    ),
    Mutation(
        "rows clipped to a cap are charged half of it", "norm_policy.py",
        "        self.accountant.set_caps(caps)\n", "        self.accountant.set_caps(caps / 2)\n",
    ),
    Mutation(
        "several draws in one step are charged as one", "step_accounting.py",
        "batches = max(optimizer.accumulated_iterations, record.draws)", "batches = 1",
    ),
    Mutation(
        "a loss that is not the named one is not looked for", "training/probe.py",
        "        if not due or not self.task.named or not parameters:\n", "        if True:\n",
    ),
    Mutation(
        "a budget is tested for the step before", "accounting/accountant.py",
        "self._leave_out(privacy_filter, caps)", "pass",
    ),
)  # fmt: skip


def broken_copy(folder: Path, mutation: Mutation) -> None:
    """Copy the package and the machine, and break one check.

    Raises:
        RuntimeError: The text to be replaced is not there just once.
    """
    for name in ("opacus_pil", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "opacus_pil" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise RuntimeError(
            f"Expected the text of {mutation.name!r} once in {mutation.file}, got it "
            f"{text.count(mutation.old)} times. Bring the mutation up to date."
        )
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def judge(mutation: Mutation, sequences: int) -> dict[str, Any]:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        broken_copy(Path(folder), mutation)
        done = subprocess.run(
            [sys.executable, "-c", _PLAY, folder, str(sequences)],
            cwd=folder, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    words = done.stdout.strip().split(" ", 2)
    if done.returncode or words[0] not in ("found", "none"):
        raise RuntimeError(f"{mutation.name}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    return {
        "mutation": mutation.name,
        "file": mutation.file,
        "found": words[0] == "found",
        "sequences": int(words[1]),
        "finding": words[2] if len(words) > 2 else "",
        "seconds": time.perf_counter() - began,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results" / "user_machine_mutations.json"
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--only", choices=[m.name for m in MUTATIONS], help="this mutation alone")
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    arguments = parser.parse_args()
    rows = []
    for mutation in MUTATIONS:
        if arguments.only in (None, mutation.name):
            rows.append(judge(mutation, arguments.sequences))
            row = rows[-1]
            print(
                f"{row['mutation']:65s} {'found' if row['found'] else 'MISSED':7s} "
                f"{row['sequences']:4d}  {row['finding'][:110]}",
                flush=True,
            )
    if arguments.only is None:
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        arguments.out.write_text(text, encoding="utf-8")
    return int(not all(row["found"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
