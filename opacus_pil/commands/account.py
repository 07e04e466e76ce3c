"""`opacus-pil account`: a training that was run elsewhere, described once, accounted for everyone.

Arguments in, words out. What is measured and charged is `replaying`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import _validate as check
from ..accounting.shown import quantiles_above, rounded_up
from .files import new_file

_EXAMPLE = """module = "train:make_model"
dataset = "train:training_data"
criterion = "torch.nn:CrossEntropyLoss"
checkpoints = "checkpoints/*.pt"
noise_multiplier = 1.0
max_grad_norm = 1.0
batch_size = 64
steps = 280
delta = 1e-5"""

EPILOG = """example:
  opacus-pil account run.toml --out ledger.parquet

run.toml describes the training once, for every command:

  {example}

Names like "train:make_model" are objects of your own code, beside the file or installed, and are
run. In place of a file, "train:describe" may be a function that returns the same names. Of one run
the result is an estimate; two or more independent runs (a list of lists of checkpoints) give an
expectation_bound. The ledger is private data: mode 0600, and do not publish it. Exit code 0: done;
2: a wrong argument or a file that does not fit, in one line.
"""


def add_account_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "account",
        help="a training of yours that Opacus ran: what each instance lost, from its checkpoints",
        description="Account for every instance of a training from the checkpoints it left.",
        epilog=EPILOG.format(example="\n  ".join(_EXAMPLE.splitlines())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("description", metavar="RUN", help="a TOML file, or module:callable")
    parser.add_argument("--out", metavar="FILE", help="write the ledger (Parquet) there")
    parser.add_argument("--delta", type=float, help="default: the description's, else 1/rows")
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="of several runs (default: 0.95)"
    )
    parser.add_argument(
        "--work", metavar="DIR", help="keep norms there: the same command goes on after a kill"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the ledger")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Account for a described training; return the exit code."""
    from ..replaying import described_run, replay
    from ..replaying.described_run import importable

    if arguments.delta is not None:
        check.delta(arguments.delta)
    out = None if arguments.out is None else new_file(arguments.out, force=arguments.force)
    described = described_run(arguments.description)
    delta = arguments.delta if arguments.delta is not None else described.get("delta")
    if delta is not None:
        check.delta(delta)
    with importable(described.base):
        training = described.training()
        rows = len(training["dataset"])
        delta = 1.0 / rows if delta is None else delta
        accountant = replay(
            module=described["module"], confidence=arguments.confidence, work_dir=arguments.work,
            progress=not arguments.quiet, **training,
        )  # fmt: skip
    spent = accountant.get_epsilon(delta)
    summary = {
        "rows": rows,
        "steps": accountant.steps,
        "delta": delta,
        "worst_case_epsilon": accountant.worst_case_epsilon(delta),
        "per_instance_epsilon": _spread(spent.epsilon),
        "guarantee": spent.guarantee,
        "reasons": list(spent.reasons),
    }
    if out is not None:
        accountant.to_parquet(out, delta=delta)
    print(json.dumps(summary, indent=1) if arguments.json else _words(summary, out))
    return 0


def _spread(values: Any) -> dict[str, float]:
    names = ("min", "q10", "median", "q90", "max")
    return dict(zip(names, quantiles_above(values, [0.0, 0.1, 0.5, 0.9, 1.0]), strict=True))


def _words(summary: dict[str, Any], out: Path | None) -> str:
    spread = "  ".join(
        f"{k} {rounded_up(v, digits=4)}" for k, v in summary["per_instance_epsilon"].items()
    )
    lines = [
        f"{summary['rows']} instances, {summary['steps']} noisy steps, "
        f"δ = {rounded_up(summary['delta'])}",
        f"  worst case    ε = {rounded_up(summary['worst_case_epsilon'], digits=4)}",
        f"  per instance  {spread}",
        f"  label         {summary['guarantee']}",
        *(f"    - {reason}" for reason in summary["reasons"]),
    ]
    if out is not None:
        lines.append(f"Written to {out} (private: mode 0600).")
    return "\n".join(lines)
