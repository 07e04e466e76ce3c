"""Does the machine of `user_machine.py` see it if a single check of the package is broken?

Each mutation is one replacement of text in a scratch copy of the package; sequences with the one
kind of trouble that shows it are then played until the first finding, at most as many as the test
has of all kinds. A replacement whose text is gone stops the script.

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
SEQUENCES = 200  # of each mutation, at most

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
machine = twin(first=True, only=sys.argv[3])
try:
    play(machine, sequences=int(sys.argv[2]))
    print("none", machine.tally["sequences"])
except Found as found:
    print("found", machine.tally["sequences"], str(found).splitlines()[0])
"""


class Mutation(NamedTuple):
    """One broken check: what it is, the trouble that shows it, where, the text before and after."""

    name: str
    trouble: str  # "none": what every user does
    file: str
    old: str
    new: str
    elsewhere: str = ""  # the test that finds it for certain, where the machine needs luck


_NOT_DRAWN = (
    "        \"a step's batch was not the one that the private loader had just handed out (a batch "
    'used "\n        "twice, or one from elsewhere), so that nothing says at which rate it was '
    'drawn",\n'
)

MUTATIONS = (
    Mutation(
        "reuse and foreign batches are not noticed", "reuse", "capture/recorder.py",
        "if any(c.foreign for c in captures):", "if False:",
    ),
    Mutation(
        "foreign batches keep their label and are amplified", "foreign", "training/evidence.py",
        '        "batch_not_drawn", "estimate",\n' + _NOT_DRAWN + "        unamplified=True, ",
        '        "batch_not_drawn", "bound",\n' + _NOT_DRAWN + "        ",
    ),
    Mutation(
        "per-layer clipping is charged by the optimizer's max_grad_norm", "one bound",
        "capture/norms.py",
        "max_grad_norm=math.hypot(*bounds),", "max_grad_norm=float(self.max_grad_norm),",
    ),
    Mutation(
        "noise is read at the hook, after the user's own", "none", "training/training.py",
        "        record = self.recorder.take(max_grad_norm=self.clip_bound)\n",
        "        self._opacus_hook(optimizer)\n"
        "        record = self.recorder.take(max_grad_norm=self.clip_bound)\n"
        "        record = replace(record, noise_std=optimizer.noise_std())\n",
    ),
    Mutation(
        "skipped draws are no fact", "skip", "capture/recorder.py", "        if skipped:\n",
        "        if False:\n",
    ),
    Mutation(
        "draws skipped last in a pass are no fact", "skip", "capture/tracker.py",
        "if self.skipped and self.skipped_at_end(stepped):", "if False:",
    ),
    Mutation(
        "parameters outside the clipped norm are no fact (ghost)", "spare", "capture/ghost.py",
        "if unclipped and self._clipped:", "if False:",
    ),
    Mutation(
        "caps may be set with a batch in hand", "caps in hand", "privacy_engine.py",
        "if any(training.in_hand for training in self.trainings):", "if False:",
    ),
    Mutation(
        "a file loaded into a copy lowers the live ledger", "none", "training/checkpoint.py",
        "    if mine or not steps:\n", "    if True:\n",
        "tests/cases/test_ledgers.py",
    ),
    Mutation(
        "noise may change between clip and step under a budget", "none", "training/training.py",
        "        if self._clipped_at != (*self.coming_kernel(), self._charger.moment):\n",
        "        if False:\n",
        "tests/test_user_machine_finds.py",
    ),
    Mutation(
        "noised gradients may be changed before the model moves", "hook", "capture/plain_step.py",
        "and not recorder.untouched():", "and False:",
    ),
    Mutation(
        "steps of the plain optimizer are not seen", "plain step", "capture/plain_step.py",
        "            recorder.unnoised_step()\n", "            pass\n",
    ),
    Mutation(
        "noise that Opacus did not add is taken for its own", "noise", "capture/recorder.py",
        "            noise_std=std,\n", "            noise_std=1.0 if std is None else std,\n",
    ),
    Mutation(
        "the clipped gradient may change before the step (ghost)", "clip grad", "capture/ghost.py",
        "            if touched:\n", "            if False:\n",
    ),
    Mutation(
        "several gradients of a row are no fact", "rows", "capture/recorder.py",
        'max(len(drawn), 1)), 1)\n            facts.append(Fact("rows_not_once"))',
        "max(len(drawn), 1)), 1)",
    ),
    Mutation(
        "every collate function is taken to keep the order", "none", "capture/collate.py",
        "return unwrapped(collate) is default_collate", "return True",
        "tests/capture/test_collate.py",
    ),
    Mutation(
        "a full pass takes rows as its collate function gives them", "none", "capture/sweep.py",
        "    if keeps_order(join):\n", "    if True:\n",
        "tests/test_user_machine_finds.py",
    ),
    Mutation(
        "sensitivities are rounded down", "none", "accounting/levels.py",
        'sensitivities, side="left")', 'sensitivities, side="right") - 1',
    ),
    Mutation(
        "rows clipped to a cap are charged half of it", "none", "training/charger.py",
        "        self.accountant.set_caps(caps)\n", "        self.accountant.set_caps(caps / 2)\n",
    ),
    Mutation(
        "several draws in one step move the sum by one clip bound", "none", "training/training.py",
        "multiplicity = max(record.draws, record.copies)", "multiplicity = record.copies",
    ),
    Mutation(
        "a loss that is not the named one is not looked for", "none", "training/probe.py",
        "if due(self._steps) and self.task.named and parameters:", "if False:",
    ),
    Mutation(
        "a budget is tested for the step before", "none", "accounting/charging.py",
        "        state.leave_out(privacy_filter, caps)\n", "        pass\n",
        "tests/accounting/test_filter.py",
    ),
    Mutation(
        "noise may be the same at two steps", "seed", "capture/norms.py",
        "if self.recorder.noise_seen.again(self._noise_mark()):", "if False:",
    ),
    Mutation(
        "batches may be drawn by the same coins", "seed", "capture/recorder.py",
        "if self.tracker.coins_repeated:", "if False:",
    ),
    Mutation(
        "the noisy sum may be divided by the batch's size", "divisor", "training/training.py",
        'if divisor != named and self.kernel.loss_reduction == "mean":', "if False:",
    ),
    Mutation(
        "a sampler that draws more often is not charged for it", "rate", "training/training.py",
        "return max(self._sample_rate, self.tracker.rate)", "return self._sample_rate",
    ),
    Mutation(
        "single norms are compared, the sum is not", "none", "training/probe.py",
        "                self._compare_sums(asked, record, formed)\n", "                pass\n",
    ),
    Mutation(
        "sums of layers clipped one by one are not compared", "none", "training/probe.py",
        "if own is None or own.shape[1] != len(sums):", "if True:",
        "tests/test_user_machine_finds.py",
    ),
    Mutation(
        "the sum is compared, single norms are not", "none", "training/probe.py",
        "random = not self._compare(asked, record, clipped_norm, moved)", "pass",
        "tests/training/test_probe.py",
    ),
    Mutation(
        "rows alone are compared with the step, not with each other", "none", "training/probe.py",
        "                self._together(asked, inner, record)\n", "                pass\n",
        "tests/cases/test_whose_loss.py",
    ),
    Mutation(
        "what a collate function does to rows is no fact", "none", "training/step.py",
        "    if not record.order.apart:\n", "    if False:\n",
        "tests/cases/test_which_rows.py",
    ),
    Mutation(
        "several losses of a row are taken for one (ghost)", "none", "capture/ghost.py",
        "            if any(shape != tuple(owner.shape) for shape in shapes):\n",
        "            if False:\n",
        "tests/capture/test_ghost.py",
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
            [sys.executable, "-c", _PLAY, folder, str(sequences), mutation.trouble],
            cwd=folder, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    words = done.stdout.strip().split(" ", 2)
    if done.returncode or words[0] not in ("found", "none"):
        raise RuntimeError(f"{mutation.name}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    return {
        "mutation": mutation.name,
        "trouble": mutation.trouble,
        "file": mutation.file,
        "found": words[0] == "found",
        "sequences": int(words[1]),
        "finding": words[2] if len(words) > 2 else "",
        "found elsewhere": mutation.elsewhere,
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
    return int(not all(row["found"] or row["found elsewhere"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
