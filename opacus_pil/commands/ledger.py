"""`opacus-pil ledger`: questions to a ledger file of any size.

Arguments in, a table out. What is asked is `files.ledger_table`.
"""

from __future__ import annotations

import argparse
from typing import Any

EPILOG = """example:
  opacus-pil ledger out/ledger.parquet --top 10
  opacus-pil ledger out/ledger.parquet --id patient-017 --json
  opacus-pil ledger out/ledger.parquet --by label

Without a question: quantiles of everyone. Every row carries δ and its label; rows with different
ones are never mixed in one quantile. What is printed is private data. Exit code 0: done; 2: a wrong
argument, no such id, or a file that is no ledger, in one line.
"""


def add_ledger_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "ledger",
        help="who is exposed, from a ledger file: the top, one id, quantiles by a column",
        description="Ask a ledger file that engine, demo or account wrote.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ledger", metavar="LEDGER", help="the Parquet file")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--top", type=int, metavar="N", help="the N most exposed instances")
    question.add_argument("--lowest", type=int, metavar="N", help="the N least exposed ones")
    question.add_argument("--id", metavar="ID", help="one instance")
    question.add_argument("--by", metavar="COLUMN", help="quantiles for each value of a column")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answer; return the exit code."""
    from ..files.ledger_table import LedgerTable

    table = LedgerTable(arguments.ledger)
    if arguments.top is not None or arguments.lowest is not None:
        lowest = arguments.top is None
        found = table.top(arguments.lowest if lowest else arguments.top, lowest=lowest)
    elif arguments.id is not None:
        name = arguments.id
        found = table.instance(name if table.text_ids else _number(name))
    else:
        found = table.quantiles(by=arguments.by)
    if arguments.json:
        print(found.to_json(orient="records", indent=1))
    else:
        print(found.to_string(index=False))
    return 0


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"Expected an integer id in this ledger, got {text!r}.") from error
