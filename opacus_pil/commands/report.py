"""`opacus-pil report`: a page about a training, from the engine that a function of yours returns.

Arguments in, a file out. What is on the page is `report`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import _validate as check
from .files import beside, new_file

EPILOG = """example:
  opacus-pil report my_run:engine --delta 1e-5 --out report.html

my_run.py has a function that returns your trained PerInstancePrivacyEngine (built anew and with
load_checkpoint, say); it is run. The page is one file that loads nothing; it holds per-instance
values, which are private data: mode 0600. --public leaves constants only. Exit code 0: done; 2: a
wrong argument, in one line, before your function is called.
"""


def add_report_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "report",
        help="a page about a training: who is exposed, what is proved, what is not",
        description="Write the report of a training.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "engine", metavar="ENGINE",
        help="module:callable of yours that returns a PerInstancePrivacyEngine",
    )  # fmt: skip
    parser.add_argument("--delta", type=float, required=True, help="δ of every ε on the page")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page")
    parser.add_argument("--public", action="store_true", help="constants only")
    parser.add_argument("--force", action="store_true", help="overwrite the page")
    parser.set_defaults(run=run)


@beside
def run(arguments: argparse.Namespace) -> int:
    """Write the page; return the exit code."""
    from ..privacy_engine import PerInstancePrivacyEngine
    from ..replaying.described_run import require_findable, resolved

    base = Path.cwd()
    require_findable(arguments.engine, base=base, name="ENGINE")
    check.delta(arguments.delta)
    out = new_file(arguments.out, force=arguments.force)
    made = resolved(arguments.engine, base=base, name="ENGINE")
    engine = made() if callable(made) else made
    if not isinstance(engine, PerInstancePrivacyEngine):
        raise ValueError(
            f"Expected {arguments.engine!r} to return a PerInstancePrivacyEngine, got "
            f"{type(engine).__name__}."
        )
    engine.write_report(out, delta=arguments.delta, public=arguments.public)
    print(f"Written to {out} (private: mode 0600).")
    return 0
