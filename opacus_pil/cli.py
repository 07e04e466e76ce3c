# PYTHON_ARGCOMPLETE_OK
"""The command line: arguments in, exit code out. Computes nothing itself.

Exit codes: 0 done, 1 a certificate that does not hold or a training that is not what it claims, 2 a
wrong argument or an unusable file (one line says which), 3 a certificate that holds and does not
have the ids asked for, or a check without power, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import __version__
from . import _validate as check
from .commands.account import add_account_command
from .commands.audit import add_audit_command
from .commands.check import add_check_command, parted
from .commands.forget import add_forget_command, add_plan_command
from .commands.ledger import add_ledger_command
from .commands.report import add_report_command
from .commands.requests import add_requests_command
from .errors import OpacusPilError

_EPILOG = """completion in bash or zsh (extra `cli`):
  eval "$(register-python-argcomplete opacus-pil)"

Each command's --help shows an example.
"""

_DEMO_EPILOG = """example:
  opacus-pil demo --dataset mnist5k --out out --seed 1

The folder gets report.html (open it in a browser), summary.json, ledger.parquet and model.pt.
They hold per-instance privacy losses, which are private data: mode 0600, and do not publish them.
"""

_VERIFY_EPILOG = """example:
  opacus-pil verify certificate.json --model unlearned.pt --ids 3 17
  opacus-pil verify certificate.json --signed-by issuer.pub
  opacus-pil verify certificate.json --sign issuer

One line per check, then what the certificate says and assumes, then the verdict. Exit code 0 if it
holds, 1 if it does not, 2 if a file is unusable, 3 if it holds and an id asked for is not in it.
Every number is computed again from the recorded constants, and every word comes from this program.
What it cannot see: without a signature anybody may have written the file, with numbers that agree
with each other. Whether the constants are those of the run, and the assumptions true, is for
whoever ran it to show. --sign signs a certificate that holds; see docs/signing.md.
"""

_KEY_EPILOG = """example:
  opacus-pil key --out issuer

Writes issuer, the private key that signs (mode 0600: keep it where certificates are made, with a
copy that is not), and issuer.pub, which may be given to everybody. Nothing is overwritten.
"""

_STUDY_EPILOG = """example:
  opacus-pil study --dataset digits --quick --out study --jobs 2

The folder gets study.json, report.html, figures/ and trials/ (every training, kept when it is
done): after an interruption the same command goes on. Without --quick on mnist5k it takes about an
hour on two cores. All files are private: mode 0600.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    own, of_script = parted(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    _complete(parser)
    arguments = parser.parse_args(own)
    if arguments.log is not None:
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
        logging.getLogger("opacus_pil").setLevel(arguments.log.upper())
    if of_script:
        arguments.arguments = of_script
    try:
        return int(arguments.run(arguments))
    except (OpacusPilError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"opacus-pil: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("opacus-pil: interrupted; nothing was written", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """A parser that names what a misspelt word was meant to be, for its commands too."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(one) for one in action.choices]
        cure = check.did_you_mean(value, choices) or "--help says what each is for."
        raise argparse.ArgumentError(
            action, f"Expected one of {', '.join(choices)}, got {value!r}. {cure}"
        )


def _complete(parser: argparse.ArgumentParser) -> None:
    """Complete words in the shell, where argcomplete is installed and the shell asks for it."""
    try:
        import argcomplete
    except ModuleNotFoundError:
        return  # an optional extra
    argcomplete.autocomplete(parser)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="opacus-pil",
        description="Per-instance privacy losses and certified unlearning for Opacus.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--log", choices=("info", "debug"), help="say on stderr what is done (default: nothing)"
    )
    parser.add_argument("--version", action="version", version=f"opacus-pil {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
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
    _key_command(commands)
    _study_command(commands)
    add_account_command(commands)
    add_audit_command(commands)
    add_check_command(commands)
    add_plan_command(commands)
    add_forget_command(commands)
    add_requests_command(commands)
    add_ledger_command(commands)
    add_report_command(commands)
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
        "--ids", nargs="+", metavar="ID", help="instances to look up among the forgotten ones"
    )
    verify.add_argument("--key", metavar="FILE", help="key of the hashed ids (default: CERT.key)")
    verify.add_argument(
        "--signed-by", metavar="PUB", help="public key that must have signed the certificate"
    )
    verify.add_argument(
        "--sign", metavar="KEY", help="private key: sign the certificate file, if it holds"
    )
    verify.add_argument("--json", action="store_true", help="print the report as JSON")
    verify.set_defaults(run=_verify)


def _key_command(commands: Any) -> None:
    key = commands.add_parser(
        "key",
        help="a new key pair that signs certificates",
        description="Make an Ed25519 key pair for opacus-pil verify --sign and --signed-by.",
        epilog=_KEY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    key.add_argument("--out", required=True, metavar="KEY", help="new file of the private key")
    key.set_defaults(run=_key)


def _study_command(commands: Any) -> None:
    study = commands.add_parser(
        "study",
        help="the paper's claims put to the test on real images, without network",
        description="Train, forget and retrain many times; report which claims about privacy loss "
        "and unlearning reproduce and which do not.",
        epilog=_STUDY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument("--dataset", default="mnist5k", help="mnist5k or digits (default: mnist5k)")
    study.add_argument("--model", default="both", help="cnn, mlp or both (default: both)")
    study.add_argument("--out", default="study", metavar="DIR", help="default: study")
    study.add_argument("--quick", action="store_true", help="a small form, some minutes")
    study.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    study.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    study.add_argument("--quiet", action="store_true", help="no progress bars, no table")
    study.set_defaults(run=_study)


@contextmanager
def _demo_extra() -> Iterator[None]:
    """Word a failing import of what only demo and study need: torch, plots and data sets."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Expected the demo extra, got no module {error.name!r}. "
            'Run pip install "opacus-pil[demo]".'
        ) from error


def _demo(arguments: argparse.Namespace) -> int:
    with _demo_extra():
        from .demo import run_demo
        from .demo.table import as_text
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


def _study(arguments: argparse.Namespace) -> int:
    with _demo_extra():
        from .study import run_study
        from .study.words import as_text
    try:
        outcome = run_study(
            dataset=arguments.dataset,
            model=arguments.model,
            out=arguments.out,
            form="quick" if arguments.quick else "full",
            seed=arguments.seed,
            jobs=arguments.jobs,
            progress=not arguments.quiet,
            say=(lambda _: None) if arguments.quiet else print,
        )
    except KeyboardInterrupt:
        print(
            f"opacus-pil: interrupted; finished trainings are kept in {arguments.out}, the same "
            "command goes on",
            file=sys.stderr,
        )
        return 130
    if not arguments.quiet:
        print(as_text(outcome.summary))
        print(f"\nWritten to {outcome.folder} in {outcome.seconds:.0f} s (private: mode 0600).")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from .certificates import (
        read_certificate,
        read_key,
        read_public_key,
        sign_certificate,
        verify_certificate,
        write_certificate,
    )

    record = read_certificate(arguments.certificate)
    key_path = arguments.key
    if key_path is None:
        beside = Path(f"{arguments.certificate}.key")
        if beside.exists() or (arguments.ids and record.ids_hashed):
            key_path = beside
    model = None
    if arguments.model is not None:
        from .files.model_hash import model_file_hash  # needs torch

        model = model_file_hash(arguments.model)
    asked = arguments.signed_by
    report = verify_certificate(
        record,
        model_sha256=model,
        key=None if key_path is None else read_key(key_path),
        ids=arguments.ids,
        signed_by=None if asked is None else read_public_key(asked),
    )
    signed = None
    if arguments.sign is not None and report.holds:
        signed = sign_certificate(record, key=arguments.sign)
        write_certificate(signed, path=arguments.certificate, overwrite=True)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print(report)
    if arguments.sign is not None:
        by = "not signed" if signed is None else f"signed by the key {signed.signed_by}"
        print(f"{arguments.certificate}: {by}", file=sys.stderr)
    if not report.holds:
        return 1
    return 3 if report.covers is False else 0


def _key(arguments: argparse.Namespace) -> int:
    from .certificates import new_key

    public = new_key(arguments.out)
    print(f"Written: {arguments.out} (private: mode 0600) and {arguments.out}.pub.")
    print(f"The public key is {public}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
