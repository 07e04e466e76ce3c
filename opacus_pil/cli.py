"""The command line: arguments in, exit code out. Computes nothing itself.

Exit codes: 0 done, 1 a certificate that does not hold, 2 a wrong argument or an unusable file (one
line says which), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from . import __version__
from .errors import OpacusPilError

_DEMO_EPILOG = """example:
  opacus-pil demo --dataset mnist5k --out out --seed 1

The folder gets report.html (open it in a browser), summary.json, ledger.parquet and model.pt.
They hold per-instance privacy losses, which are private data: mode 0600, and do not publish them.
"""

_VERIFY_EPILOG = """example:
  opacus-pil verify certificate.json --model unlearned.pt --ids 3 17

One line per check; exit code 0 if all hold, 1 if one does not, 2 if a file is unusable. Every
number is computed again from the recorded constants. What this cannot see: there is no signature,
so whoever may write the file may write another one whose numbers agree with each other. Whether the
constants are those of the run, and the assumptions true, is for whoever ran it to show.
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
    _verify_command(commands)
    return parser


def _verify_command(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="whether a certificate of unlearning holds",
        description="Recompute every number of a certificate file from its constants.",
        epilog=_VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("certificate", metavar="CERT", help="the certificate file")
    verify.add_argument(
        "--model", metavar="FILE", help="state_dict that should be the unlearned model's"
    )
    verify.add_argument(
        "--ids", nargs="+", metavar="ID", help="instances that should be among the forgotten ones"
    )
    verify.add_argument("--key", metavar="FILE", help="key of the hashed ids (default: CERT.key)")
    verify.set_defaults(run=_verify)


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


def _verify(arguments: argparse.Namespace) -> int:
    from .certificates import read_certificate, read_key, verify_certificate

    record = read_certificate(arguments.certificate)
    key_path = arguments.key
    if key_path is None and arguments.ids and record.ids_hashed:
        key_path = f"{arguments.certificate}.key"
    model = None
    if arguments.model is not None:
        from .unlearning.model_hash import model_file_hash  # needs torch

        model = model_file_hash(arguments.model)
    report = verify_certificate(
        record,
        model_sha256=model,
        key=None if key_path is None else read_key(key_path),
        ids=arguments.ids,
    )
    print(report)
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
