"""`opacus-pil audit`: a model that is trained already, described once, audited as far as it can be.

Arguments in, words and two files out. What is measured is `auditing.audit`.
"""

from __future__ import annotations

import argparse
from typing import Any

from .. import _validate as check
from .files import new_file, new_folder

EPILOG = """example:
  opacus-pil audit run.toml --out audit

run.toml is what `opacus-pil account --help` shows, with rows that the same random split left out
and nobody used:

  held_out = "train:held_out"
  split = "random"

The folder gets audit.json (docs/audit.md) and audit.html, both private: mode 0600. Exit code 0:
consistent; 1: red flag; 2: a wrong argument or a file that does not fit; 3: no power. Nothing here
proves privacy.
"""

_CODES = {"consistent": 0, "red flag": 1, "no power": 3}


def add_audit_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "audit",
        help="a trained model of yours: claim, exposure, lower bounds, verdict, report",
        description="Audit a model that Opacus trained, from its checkpoints and data.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("description", metavar="RUN", help="a TOML file, or module:callable")
    parser.add_argument("--out", default="audit", metavar="DIR", help="default: audit")
    parser.add_argument("--delta", type=float, help="default: the description's")
    parser.add_argument(
        "--seed", type=int, help="of the pairs (default: the description's, else 0)"
    )
    parser.add_argument("--work", metavar="DIR", help="keep norms there, to go on after a kill")
    parser.add_argument(
        "--per-record", action="store_true", help="put ids, scores and ε of records into the files"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the files in DIR")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Audit a described training; return the exit code."""
    from ..auditing.audit import audit
    from ..replaying import described_run
    from ..replaying.described_run import importable

    if arguments.delta is not None:
        check.delta(arguments.delta)
    folder = new_folder(arguments.out)
    names = ("audit.json", "audit.html")
    if folder.exists():
        for name in names:
            new_file(folder / name, force=arguments.force)
    described = described_run(arguments.description)
    delta = arguments.delta if arguments.delta is not None else described.get("delta")
    if delta is None:
        raise ValueError(
            f"Expected delta in {described.name} or by --delta, got none. It belongs to the claim."
        )
    check.delta(delta)
    seed = arguments.seed if arguments.seed is not None else described.get("seed", 0)
    with importable(described.base):
        found = audit(
            described["module"], delta=delta, held_out=described.get("held_out"),
            split=described.get("split"), seed=seed, per_record=arguments.per_record,
            work_dir=arguments.work, progress=not arguments.quiet, **described.training(),
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        found.write_json(folder / names[0])
        found.write_report(folder / names[1])
    if not arguments.quiet:
        print(found)
        print(f"\nWritten to {folder} (private: mode 0600).")
    return _CODES[found.verdict]
