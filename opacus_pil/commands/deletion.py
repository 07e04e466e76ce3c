"""What the commands about deletions share: who is to be forgotten, by which engine, to which goal.

Knows arguments; plans and runs nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DEFAULT_METHOD = "dp_sgd"  # as of UnlearningEngine.plan and .serve
ENGINE_HELP = "module:callable of yours that returns an UnlearningEngine"


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the engine."""
    parser.add_argument("engine", metavar="ENGINE", help=ENGINE_HELP)


def add_instances(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments that say who is to be forgotten."""
    who = parser.add_mutually_exclusive_group(required=required)
    who.add_argument("--ids", nargs="+", metavar="ID", help="instances by their ids")
    who.add_argument("--rows", nargs="+", type=int, metavar="ROW", help="rows of the data set")


def add_goal(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a goal."""
    parser.add_argument("--epsilon", type=float, help="target of a certified plan")
    parser.add_argument("--delta", type=float, help="its δ")
    parser.add_argument(
        "--method", default=DEFAULT_METHOD,
        help="as in Python (default: dp_sgd, the training's own steps, certified by what training "
        "alone gave away; langevin where contraction is proved; plan --options shows all)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="run exactly so many")
    parser.add_argument("--max-steps", type=int, help="most steps worth running")


def engine_of(arguments: argparse.Namespace) -> Any:
    """Return the engine that is named; its module is looked for in the working folder first.

    Raises:
        ValueError: There is none, or what is named returns something else.
    """
    from ..replaying.described_run import resolved
    from ..unlearning import UnlearningEngine

    made = resolved(arguments.engine, base=Path.cwd(), name="ENGINE")
    engine = made() if callable(made) and not isinstance(made, UnlearningEngine) else made
    if not isinstance(engine, UnlearningEngine):
        raise ValueError(
            f"Expected {arguments.engine!r} to return an UnlearningEngine, got "
            f"{type(engine).__name__}. Let the function build the engine and return it."
        )
    return engine


def instances_of(arguments: argparse.Namespace, engine: Any) -> dict[str, Any]:
    """Return who is to be forgotten, as `plan` takes it."""
    if arguments.rows is None and arguments.ids is None:
        raise ValueError("Expected --ids or --rows, got none. Say who is to be forgotten.")
    if arguments.rows is not None:
        return {"rows": arguments.rows}
    ids = engine.instance_ids
    if ids.grouped:
        first = next(iter(ids.members))
        return {"forget": [int(o) if isinstance(first, int) else o for o in arguments.ids]}
    if not ids.given:
        raise ValueError("Expected --rows, since this engine has no instance ids, got --ids.")
    known = ids.of([0])[0]
    return {"forget": [int(one) if isinstance(known, int) else one for one in arguments.ids]}


def goal_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the goal, as `plan` takes it; what was not given is left out."""
    given = {
        "epsilon": arguments.epsilon, "delta": arguments.delta, "steps": arguments.steps,
        "max_steps": arguments.max_steps,
    }  # fmt: skip
    return {
        "method": arguments.method,
        **{name: value for name, value in given.items() if value is not None},
    }
