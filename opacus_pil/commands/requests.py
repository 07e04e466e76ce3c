"""`opacus-pil requests`: the queue of deletions, from the shell.

Arguments in, words out. The queue is `unlearning.requests`.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..accounting.shown import rounded_up
from .deletion import add_engine, add_goal, add_instances, engine_of, goal_of, instances_of
from .files import beside

EPILOG = """example:
  opacus-pil requests submit my_run:unlearning --request case-1 --ids patient-017
  opacus-pil requests serve my_run:unlearning --epsilon 1 --delta 1e-5 --method langevin
  opacus-pil requests list requests/
  opacus-pil requests status requests/ case-1
  opacus-pil verify requests/certificate-1.json --model requests/model.pt

submit and serve take the engine (a function of yours that builds it with requests=folder); list and
status read the folder alone, also while somebody serves. The function has to load the deployed
model (load_checkpoint): a folder belongs to one model, and one that is trained anew is refused.
serve leaves model.pt in the folder, the weights after the last request, and a certificate for each
run; the last certificate is about model.pt. Interrupted at any moment, nothing is lost: the same
command goes on. Exit code 0: done; 1: a request failed; 2: a wrong argument; 130:
interrupted.
"""


def add_requests_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "requests",
        help="a durable queue of deletion requests: submit, serve, list, status",
        description="Submit and serve deletion requests, and see where they stand.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    submit = actions.add_parser("submit", help="put a request into the queue")
    add_engine(submit)
    submit.add_argument("--request", required=True, metavar="NAME", help="its name")
    add_instances(submit)
    submit.set_defaults(run=run_submit)
    serve = actions.add_parser("serve", help="serve all that wait")
    add_engine(serve)
    add_goal(serve)
    serve.set_defaults(run=run_serve)
    listed = actions.add_parser("list", help="all requests of a folder")
    listed.add_argument("folder", metavar="FOLDER", help="of the queue")
    listed.add_argument("--state", help="queued, planned, running, done or failed")
    listed.set_defaults(run=run_list)
    status = actions.add_parser("status", help="counts, or the log of one request")
    status.add_argument("folder", metavar="FOLDER", help="of the queue")
    status.add_argument("request", nargs="?", metavar="NAME", help="one request")
    status.set_defaults(run=run_status)
    for action in (submit, serve, listed, status):
        action.add_argument("--json", action="store_true", help="print as JSON")


@beside
def run_submit(arguments: argparse.Namespace) -> int:
    """Submit a request; return the exit code."""
    engine = engine_of(arguments)
    found = engine.submit(**instances_of(arguments, engine), request_id=arguments.request)
    _show([found], as_json=arguments.json)
    return 0


@beside
def run_serve(arguments: argparse.Namespace) -> int:
    """Serve what waits; return the exit code."""
    engine = engine_of(arguments)
    try:
        served = engine.serve(**goal_of(arguments))
    except KeyboardInterrupt:
        print("opacus-pil: interrupted; the same command goes on", file=sys.stderr)
        return 130
    _show(served, as_json=arguments.json)
    if not arguments.json and any(one.state == "done" for one in served):
        print(f"The model after the last request is {served.model}.")
    return 1 if any(one.state == "failed" for one in served) else 0


def run_list(arguments: argparse.Namespace) -> int:
    """List requests; return the exit code."""
    _show(_queue(arguments).requests(state=arguments.state), as_json=arguments.json)
    return 0


def run_status(arguments: argparse.Namespace) -> int:
    """Say where the queue, or one request, stands; return the exit code."""
    queue = _queue(arguments)
    if arguments.request is None:
        counts = queue.status()
        lines = "\n".join(f"{state:8} {count}" for state, count in counts.items())
        print(json.dumps(counts, indent=1) if arguments.json else lines)
        return 0
    found = queue.get(arguments.request)
    if arguments.json:
        _show([found], as_json=True)
        return 0
    _show([found], as_json=False)
    for event in queue.events(arguments.request):
        print(f"  {event.time}  {event.state:8} {event.note}")
    return 0


def _queue(arguments: argparse.Namespace) -> Any:
    from pathlib import Path

    from ..unlearning import RequestQueue

    if not Path(arguments.folder).is_dir():
        raise FileNotFoundError(f"Expected the folder of a queue, got {arguments.folder}: none.")
    return RequestQueue(arguments.folder)


def _show(requests: Any, *, as_json: bool) -> None:
    plain = [
        {
            "request": one.request_id, "state": one.state, "ids": list(one.ids),
            "result": None if one.result is None else dict(one.result),
        }
        for one in requests
    ]  # fmt: skip
    if as_json:
        print(json.dumps(plain, indent=1))
        return
    for one in plain:
        words = ", ".join(part for part in _parts(one["state"], one["result"] or {}) if part)
        print(f"{one['request']:20} {one['state']:8} {len(one['ids'])} instances  {words}".rstrip())
    if not plain:
        print("no request")


def _parts(state: str, result: dict[str, Any]) -> list[str]:
    if state == "done" and result.get("status") == "retrain instead":
        return ["retrained without the rows", _steps(result)]  # what the plan said, done
    parts = [result.get("status"), _steps(result), result.get("reason")]
    return [str(part) for part in parts if part]


def _steps(result: dict[str, Any]) -> str:
    if "steps" not in result:
        return ""
    epsilon = result.get("epsilon")
    proved = "" if epsilon is None else f", ε = {rounded_up(epsilon, digits=4)}"
    return f"{result['steps']} steps{proved}"
