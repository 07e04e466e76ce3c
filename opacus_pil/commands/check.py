"""`opacus-pil check`: a training script, unmodified, in this process, audited while it trains.

Runs the script as `python script.py ARGS` would and passes its output on; what it prints about ε
is shown beside what was measured. Computes nothing itself.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..atomic_file import require_folder
from ..errors import OpacusPilError

EPILOG = """example:
  opacus-pil check --delta 1e-5 train.py -- --epochs 3

The script runs in this process as it is, with the arguments after --. Every private optimizer that
Opacus makes is watched. Exit code 0: consistent; 1: red flag; 2: the script or an argument failed;
3: no power, or nothing private ran. A correct script is a red flag once in a thousand runs. Nothing
here proves privacy: a script may do anything that is not looked at.
"""

_SPEAKS_OF_EPSILON = re.compile(r"ε|\beps(ilon)?\b", re.IGNORECASE)
_CODES = {"consistent": 0, "red flag": 1, "no power": 3}


def add_check_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "check",
        help="a training script of yours: is what it claims what it does",
        description="Run a training script that uses Opacus, unmodified, and audit what it trains.",
        usage="opacus-pil check [options] SCRIPT [-- ARGS ...]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.set_defaults(arguments=[])
    parser.add_argument("--delta", type=float, default=1e-5, help="of the claim (default: 1e-5)")
    parser.add_argument(
        "--canaries", type=int, default=1000, metavar="N", help="0: none (default: 1000)"
    )
    parser.add_argument(
        "--shared-generator",
        action="store_true",
        help="canary noise from the training's own stream: it keeps its law, not its bits",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the canaries (default: from the system)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there, too")
    parser.add_argument("--quiet", action="store_true", help="do not pass the script's output on")
    parser.set_defaults(run=run)


def parted(values: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our own arguments, and after -- those of the script, which argparse must not see."""
    whole = list(values)
    if whole[:1] != ["check"] or "--" not in whole:
        return whole, []
    place = whole.index("--")
    return whole[:place], whole[place + 1 :]


def run(arguments: argparse.Namespace) -> int:
    """Check a script; return the exit code."""
    if arguments.json is not None:
        require_folder(arguments.json)
    result = check_script(
        arguments.script,
        arguments=arguments.arguments,
        quiet=arguments.quiet,
        delta=arguments.delta,
        canaries=arguments.canaries,
        shared_generator=arguments.shared_generator,
        seed=arguments.seed,
    )
    print(result)
    if arguments.json is not None:
        Path(arguments.json).write_text(
            json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return _CODES[result.verdict]


def check_script(
    script: str | Path, *, arguments: Sequence[str] = (), quiet: bool = False, **settings: Any
) -> Any:
    """Run a script in this process and return what was found.

    Args:
        script: A Python file.
        arguments: Its command line.
        quiet: Keep its output to ourselves.
        settings: Of `opacus_pil.auditing.watch`.

    Returns:
        ScriptCheck.

    Raises:
        OpacusPilError: The script failed, or ended with an exit code that is not 0.
        ValueError: There is no such file.
    """
    from ..auditing.watching import watch

    path = Path(script)
    if not path.is_file():
        raise ValueError(f"Expected script to be a Python file, got {str(path)!r}. Check the path.")
    output = _Tee(None if quiet else sys.stdout)
    with watch(**settings) as watching:
        try:
            with _as_main(path, arguments, output):
                _run(path)
        finally:  # also if the error that ends the script is one that the result explains
            watching.printed = tuple(output.lines())
    return watching.result


def _run(path: Path) -> None:
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise OpacusPilError(
                f"Expected {path.name} to end well, got exit code {stop.code!r}. Run it alone "
                "first."
            ) from stop
    except Exception as error:
        raise OpacusPilError(
            f"Expected {path.name} to end well, got {type(error).__name__}: {error}. Run it alone "
            "first."
        ) from error


@contextmanager
def _as_main(path: Path, arguments: Sequence[str], output: _Tee) -> Iterator[None]:
    """Let a script see its own arguments and folder, as if Python had been started with it."""
    kept = sys.argv, list(sys.path), sys.stdout
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    sys.stdout = output
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.stdout = kept


class _Tee(io.TextIOBase):
    """Passes text on and keeps the lines that speak of ε."""

    def __init__(self, further: Any) -> None:
        self._further = further
        self._rest = ""
        self._kept: list[str] = []

    def write(self, text: str) -> int:
        """Take in text."""
        if self._further is not None:
            self._further.write(text)
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if _SPEAKS_OF_EPSILON.search(line):
                self._kept = [*self._kept, line.strip()][-20:]
        return len(text)

    def flush(self) -> None:
        """Pass text on now."""
        if self._further is not None:
            self._further.flush()

    def lines(self) -> list[str]:
        """Return the last lines that speak of ε."""
        self.write("\n")
        return self._kept
