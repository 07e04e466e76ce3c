"""Does Opacus's own test suite pass with our engine in the place of Opacus's?

Runs tests that the installed opacus package ships twice, each in a process of its own:

    opacus   as they are
    ours     with `opacus.PrivacyEngine` replaced by `PerInstancePrivacyEngine`, nothing else

Prints passed / failed / skipped per file, and every test that passes in the first run and not in
the second.

    python benchmarks/opacus_suite.py
    python benchmarks/opacus_suite.py --files privacy_engine_validation_test --examples 5

Both runs draw the same examples where Opacus's tests use hypothesis (derandomised). Their number is
what Opacus's own runs have, hypothesis's 100, unless --examples says another, for a first look: one
example per test has hidden 15 failures. Two of the files import torchvision. Where it is missing,
install the release that belongs to your torch, without its dependencies, into an environment of its
own:

    pip install --no-deps torchvision==0.28.0        # torch 2.13.0

Its compiled operators need not load: no test uses them, and the module that registers them is left
out where it cannot be imported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

FILES = (
    "privacy_engine_test",
    "privacy_engine_validation_test",
    "batch_memory_manager_test",
    "gradient_accumulation_test",
    "accountants_test",
    "dpdataloader_test",
)
RUNS = ("opacus", "ours")
OUTCOMES = ("passed", "failed", "skipped")
# The worst thing that happened in any phase of a test is its outcome.
SEVERITY = {"passed": 0, "skipped": 1, "failed": 2}


class Outcomes:
    """A pytest plugin that replaces the engine and keeps each test's outcome and reason."""

    def __init__(self, replacement: type | None, *, out: Path) -> None:
        import opacus

        self.out = out
        self.original = opacus.PrivacyEngine
        self.replacement = replacement
        self.found: dict[str, dict[str, str]] = {}
        self._names: dict[str, str] = {}
        if replacement is not None:
            opacus.PrivacyEngine = replacement  # what test modules import from here on

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Name tests after their files; replace what test modules had imported before."""
        for item in items:
            file, test = item.module.__name__.split(".")[-1], item.nodeid.split("::", 1)[1]
            self._names[item.nodeid] = f"{file}::{test}"
        if self.replacement is None:
            return
        for name, module in list(sys.modules.items()):
            if name.startswith("opacus.tests"):
                for key, value in list(vars(module).items()):
                    if value is self.original:
                        setattr(module, key, self.replacement)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported counts as one failed test."""
        if report.failed:
            self._keep(report, name=f"{Path(str(report.fspath)).stem}::import")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the outcome of setup, call and teardown."""
        self._keep(report, name=self._names[report.nodeid])

    def _keep(self, report: Any, *, name: str) -> None:
        outcome = str(report.outcome)
        before = self.found.get(name, {"outcome": "passed"})["outcome"]
        if name not in self.found or SEVERITY[outcome] > SEVERITY[before]:
            self.found[name] = {"outcome": outcome, "reason": _reason(report)}
            self.out.write_text(json.dumps(self.found))  # a run cut short says what it got to


def _reason(report: Any) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr).strip().splitlines()[-1]
    return str(text).strip().splitlines()[0]


def without_operators() -> None:
    """Let torchvision be imported where its compiled operators do not fit this torch."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        name = "torchvision._meta_registrations"
        sys.modules[name] = types.ModuleType(name)
        importlib.import_module("torchvision")


def replacement(run: str) -> type | None:
    """Return the engine that stands in for Opacus's in one of the RUNS."""
    if run == "opacus":
        return None
    from opacus_pil import PerInstancePrivacyEngine

    return PerInstancePrivacyEngine


def run_here(options: argparse.Namespace) -> int:
    """Run the files in this process with one engine; write outcomes as JSON."""
    import hypothesis
    import pytest
    import torch

    torch.set_num_threads(1)
    try:
        without_operators()
    except ModuleNotFoundError:
        print("torchvision is missing: the files that import it fail in both runs. See --help.")
    # Opacus's tests leave the number of examples to the profile. Without shrinking: one failing
    # example is enough to know, and a smaller one costs dozens of trainings.
    hypothesis.settings.register_profile(
        "suite", max_examples=options.examples, derandomize=True, database=None, deadline=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )  # fmt: skip
    hypothesis.settings.load_profile("suite")
    plugin = Outcomes(replacement(options.engine), out=options.out)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # whatever tests write or read beside them
        arguments = [
            "--pyargs", *(f"opacus.tests.{name}" for name in options.files), "-q", "--tb=short",
            "-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider",
            *(["-k", options.only] if options.only else []),
        ]  # fmt: skip
        status = pytest.main(arguments, plugins=[plugin])
        os.chdir("/")
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in spent)
    Path(f"{options.out}.seconds").write_text(str(seconds))
    return 0 if status in (0, 1, 2) else int(status)


def run_apart(
    options: argparse.Namespace,
) -> tuple[dict[str, dict[str, dict[str, str]]], dict[str, float]]:
    """Run the files in a process per engine, all at the same time.

    Returns:
        Each run's outcomes, and its seconds of processor time.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for run in RUNS:
            command = [
                sys.executable, __file__, "--engine", run, "--examples", str(options.examples),
                "--out", f"{folder}/{run}.json", "--only", options.only, "--files", *options.files,
            ]  # fmt: skip
            with open(f"{folder}/{run}.log", "w") as log:
                running[run] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        found, seconds = {}, {}
        end = time.monotonic() + options.timeout
        try:
            for run, process in running.items():
                try:
                    status = process.wait(timeout=max(end - time.monotonic(), 0.0))
                except subprocess.TimeoutExpired:
                    print(f"The run {run!r} was cut short: see --timeout.")
                    process.kill()
                    status = 0
                log_text = Path(f"{folder}/{run}.log").read_text()
                if options.verbose:
                    print(f"--- {run}\n{log_text}")
                elif "torchvision is missing" in log_text and run == RUNS[0]:
                    print(log_text.splitlines()[0])
                out = Path(f"{folder}/{run}.json")
                if status or not out.exists():
                    raise SystemExit(f"The run {run!r} broke off:\n{log_text}")
                found[run] = json.loads(out.read_text())
                seconds[run] = float(Path(f"{out}.seconds").read_text())
        finally:
            for process in running.values():
                process.kill()
        return found, seconds


def counts(outcomes: dict[str, dict[str, str]], file: str) -> dict[str, int]:
    found = Counter(v["outcome"] for k, v in outcomes.items() if k.split("::")[0] == file)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def only_there(there: dict[str, dict[str, str]], here: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the reasons of tests that passed there and not here."""
    passed = (name for name, found in there.items() if found["outcome"] == "passed")
    missing = {"outcome": "failed", "reason": "was not run"}
    second = ((name, here.get(name, missing)) for name in passed)
    return {name: found["reason"] for name, found in second if found["outcome"] != "passed"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", nargs="+", default=list(FILES), help="of opacus/tests")
    parser.add_argument("--only", default="", help="pytest's -k expression, for both runs")
    parser.add_argument("--examples", type=int, default=100, help="per hypothesis test")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for all")
    parser.add_argument("--verbose", action="store_true", help="show pytest's own output")
    parser.add_argument("--engine", choices=RUNS, help=argparse.SUPPRESS)
    default = Path(__file__).parent / "results" / "opacus_suite.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    if options.engine:
        raise SystemExit(run_here(options))

    start = time.monotonic()
    found, seconds = run_apart(options)
    minutes = (time.monotonic() - start) / 60
    rows = {file: {run: counts(found[run], file) for run in RUNS} for file in options.files}
    print(f"{'':32}" + "".join(f"{run:^24}" for run in RUNS))
    print(f"{'':32}" + len(RUNS) * " passed  failed  skipped")
    for file, row in rows.items():
        numbers = [row[run][outcome] for run in RUNS for outcome in OUTCOMES]
        print(f"{file:32}" + "".join(f"{number:>8}" for number in numbers))
    ratio = seconds["ours"] / seconds["opacus"]
    print(f"{minutes:.0f} minutes; processor time of ours / Opacus's: {ratio:.2f}")
    lost = {run: only_there(found["opacus"], found[run]) for run in RUNS[1:]}
    for run, tests in lost.items():
        print(f"\n{len(tests)} tests pass with Opacus's engine and not in the run {run!r}.")
        for reason, number in Counter(tests.values()).most_common():
            print(f"\n{number} x {reason}")
            for name in sorted(n for n, r in tests.items() if r == reason):
                print(f"    {name}")
    import opacus
    import torch

    report = {
        "torch": torch.__version__, "opacus": opacus.__version__, "examples": options.examples,
        "only": options.only, "processor_seconds": seconds, "files": rows,
        "passed_only_with_opacus": lost,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
