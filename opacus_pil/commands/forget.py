"""`opacus-pil plan` and `opacus-pil forget`: what a deletion takes, and the deletion itself.

Arguments in, words and files out. What is planned and run is `unlearning`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..accounting.shown import rounded_up
from ..atomic_file import require_folder
from ..errors import OpacusPilError
from .deletion import add_engine, add_goal, add_instances, engine_of, goal_of, instances_of
from .files import beside, new_folder

_PLAN_EPILOG = """example:
  opacus-pil plan my_run:unlearning --ids patient-017 --epsilon 1 --delta 1e-5 --options
  opacus-pil plan my_run:unlearning --ids patient-017 --epsilon 1 --delta 1e-5 --method langevin
  opacus-pil plan my_run:unlearning --requirements langevin

my_run.py has a function that builds the UnlearningEngine of your model; it is run. Nothing is
changed. Exit code 0: certified or predicted; 1: retrain instead, or requirements that are not met;
2: a wrong argument, in one line. Steps are private: they show how much the forget set weighs.
"""

_FORGET_EPILOG = """example:
  opacus-pil forget my_run:unlearning --ids patient-017 --epsilon 1 --delta 1e-5 \\
    --method langevin --out forgotten

The folder gets model.pt (the unlearned weights), engine.pt (ledgers and phases, for the next
request), certificate.json with its key where the plan is certified, plan.txt and, with the extra
`report`, deletion.html and public.html, the page of which may be shown. Private: mode 0600.
Interrupted, the same command goes on where it was; a deletion is done when model.pt is there.
Exit code as in plan.
"""


def add_plan_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "plan",
        help="what forgetting some instances takes, and whether anything is proved",
        description="Say what a deletion takes, before anything runs.",
        epilog=_PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine(parser)
    add_instances(parser, required=False)
    add_goal(parser)
    parser.add_argument("--options", action="store_true", help="a table of all methods instead")
    parser.add_argument(
        "--requirements", metavar="METHOD", help="everything that a method needs, met or not"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run_plan)


def add_forget_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "forget",
        help="forget some instances, and file the certificate if there is one",
        description="Run a deletion of some instances.",
        epilog=_FORGET_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine(parser)
    add_instances(parser)
    add_goal(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run_forget)


@beside
def run_plan(arguments: argparse.Namespace) -> int:
    """Plan; return the exit code."""
    engine = engine_of(arguments)
    if arguments.requirements is not None:
        needs = engine.requirements(arguments.requirements)
        _print(needs, [vars(one) for one in needs], as_json=arguments.json)
        return 0 if needs.met else 1
    who, goal = instances_of(arguments, engine), goal_of(arguments)
    if arguments.options:
        if arguments.epsilon is None or arguments.delta is None:
            raise ValueError("Expected --epsilon and --delta with --options, got one or none.")
        table = engine.options(
            **who, epsilon=arguments.epsilon, delta=arguments.delta, max_steps=arguments.max_steps
        )
        _print(table, json.loads(table.to_dataframe().to_json(orient="records")),
               as_json=arguments.json)  # fmt: skip
        return 0 if table.best is not None else 1
    plan = engine.plan(**who, **goal)
    _print(plan, _plain(plan), as_json=arguments.json)
    return _point_at_others() if _out_of_reach(plan) else 0


@beside
def run_forget(arguments: argparse.Namespace) -> int:
    """Plan, run and file; return the exit code."""
    from ..certificates import write_certificate
    from ..files.container import save_state, save_weights, write_atomic

    out = new_folder(arguments.out)
    require_folder(out)
    if (out / "model.pt").exists():
        raise OpacusPilError(f"Expected a folder without model.pt, got a deletion done in {out}.")
    engine = engine_of(arguments)
    plan = engine.plan(**instances_of(arguments, engine), **goal_of(arguments))
    if _out_of_reach(plan):
        print(plan)
        return _point_at_others()
    say = (lambda _: None) if arguments.quiet else print
    say(str(plan))
    out.mkdir(mode=0o700, exist_ok=True)  # nothing is left behind where there is no plan to run
    try:
        result = engine.unlearn(plan, checkpoint_dir=out, checkpoint_every=10)
    except KeyboardInterrupt:
        print(
            f"opacus-pil: interrupted; the run is kept in {out}, the same command goes on",
            file=sys.stderr,
        )
        return 130
    write_atomic(out / "plan.txt", f"{plan}\n".encode())
    save_state(out / "engine.pt", engine.state_dict(), kind="unlearning engine")
    if result.certificate is not None:
        write_certificate(result.record(), path=out / "certificate.json", overwrite=True)
    _write_pages(result, out)
    # Last: it says that everything else is there.
    save_weights(out / "model.pt", result.module.state_dict())
    proved = "no claim"
    if result.epsilon is not None:
        proved = f"ε = {rounded_up(result.epsilon, digits=4)} certified"
    say(f"{result.steps} steps, {proved}. Written to {out} (private: mode 0600).")
    return 0


def _write_pages(result: Any, out: Path) -> None:
    try:
        result.write_report(out / "deletion.html")
        result.write_report(out / "public.html", public=True)
    except ImportError as error:  # an optional extra: a deletion does not wait for it
        print(f"opacus-pil: no page was written: {error}", file=sys.stderr)


def _out_of_reach(plan: Any) -> bool:
    return bool(plan.status == "retrain instead")


def _point_at_others() -> int:
    print(
        "opacus-pil: `opacus-pil plan … --options` shows what other methods reach", file=sys.stderr
    )
    return 1


def _print(words: Any, plain: Any, *, as_json: bool) -> None:
    print(json.dumps(plain, indent=1) if as_json else words)


def _plain(plan: Any) -> dict[str, Any]:
    """Return what a plan says as JSON values."""
    return {
        "status": plan.status, "method": plan.method, "ids": list(plan.ids), "steps": plan.steps,
        "steps_retrain": plan.steps_retrain, "cost": plan.cost, "reason": plan.reason,
        "reasons": list(plan.reasons), "epsilon": getattr(plan, "epsilon", None),
        "delta": getattr(plan, "delta", None),
        "steps_worst_case": getattr(plan, "steps_worst_case", None),
        "assumptions": list(getattr(getattr(plan, "certificate", None), "assumptions", ())),
    }  # fmt: skip
