"""The command line: arguments in, exit code out. Computes nothing itself.

Exit codes: 0 done, 2 a wrong argument or an unusable file (one line says which), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from . import __version__
from .errors import OpacusPilError

_DEMO_EPILOG = """example:
  opacus-pil demo --dataset mnist5k --out out --seed 1

The folder gets report.html (open it in a browser), summary.json, ledger.parquet and model.pt.
They hold per-instance privacy losses, which are private data: mode 0600, and do not publish them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (OpacusPilError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"opacus-pil: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("opacus-pil: interrupted; nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opacus-pil",
        description="Per-instance privacy losses and certified unlearning for Opacus.",
    )
    parser.add_argument("--version", action="version", version=f"opacus-pil {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    demo = commands.add_parser(
        "demo",
        help="the main job from end to end on real images, without network",
        description="Train with per-instance accounting, unlearn easy, random and hard instances, "
        "and compare with retraining.",
        epilog=_DEMO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--dataset", default="digits", help="digits or mnist5k (default: digits)")
    demo.add_argument("--out", default="out", metavar="DIR", help="new folder (default: out)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    demo.add_argument(
        "--oracles", type=int, default=2, metavar="N", help="retrained models per set (default: 2)"
    )
    demo.add_argument("--quiet", action="store_true", help="no progress bars, no table")
    demo.add_argument("--force", action="store_true", help="overwrite the files in DIR")
    demo.set_defaults(run=_demo)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    try:  # only this command needs torch, plots and data sets
        from .demo import run_demo
        from .demo.table import as_text
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Expected the demo extra, got no module {error.name!r}. "
            'Run pip install "opacus-pil[demo]".'
        ) from error
    with warnings.catch_warnings():
        # Two notices of Opacus and torch at every training; neither is about the demo's numbers.
        for notice in ("Secure RNG turned off", "Full backward hook is firing"):
            warnings.filterwarnings("ignore", message=notice)
        outcome = run_demo(
            dataset=arguments.dataset,
            out=arguments.out,
            seed=arguments.seed,
            oracles=arguments.oracles,
            progress=not arguments.quiet,
            force=arguments.force,
        )
    if not arguments.quiet:
        print(as_text(outcome.summary))
        print(f"\nWritten to {outcome.folder} in {outcome.seconds:.0f} s (private: mode 0600).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
