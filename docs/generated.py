"""Pages and tables of the site that are made from what they speak of, when the site is built.

Knows the table of labels, the sentences of certificates, the façades of the rooms, the commands,
the notebooks and the changelog; mkdocs calls `on_files` and `on_page_markdown`. Knows no formula,
and writes nothing into the repository: what is generated cannot be out of date.
"""

from __future__ import annotations

import ast
import contextlib
import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from opacus_pil import cli
from opacus_pil.accounting.best_guess import best_guess
from opacus_pil.certificates import sentences
from opacus_pil.training import evidence

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "opacus_pil"

# Rooms with a page of the reference, in the order of the navigation.
ROOMS = (
    "unlearning",
    "heads",
    "exposure",
    "auditing",
    "replaying",
    "evaluation",
    "accounting",
    "certificates",
    "plots",
    "sklearn",
)

# Modules without a façade, each for a framework of its own.
FRAMEWORKS = ("huggingface", "lightning", "tensorboard", "scalars")


def exported(facade: Path) -> dict[str, str]:
    """Return what a façade exports, name -> module it comes from, in the order of its lines.

    A façade says what is public by `from .module import Name as Name`; nothing is imported.
    """
    found = {}
    for node in ast.walk(ast.parse(facade.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                if alias.asname == alias.name:
                    found[alias.name] = str(node.module)
    return found


def documented(package: str, names: dict[str, str]) -> str:
    """Return what asks mkdocstrings for each name, by the module where it is defined.

    A façade's own path will not do: where a function is called as its module is
    (`replaying.replay`), that is the module.
    """
    return "\n\n".join(f"::: {package}.{module}.{name}" for name, module in names.items())


def room_page(room: str) -> str:
    """Return the page of the reference about one room: its docstring, then all that it exports."""
    package = f"opacus_pil.{room}"
    names = exported(PACKAGE / room / "__init__.py")
    return (
        f"# {room}\n\n::: {package}\n    options:\n      members: false\n"
        "      show_root_heading: false\n      show_root_toc_entry: false\n\n"
        f"`from {package} import …`\n\n{documented(package, names)}\n"
    )


def frameworks_page() -> str:
    """Return the page of the reference about other people's loops: all that is public there."""
    modules = "\n\n".join(f"::: opacus_pil.integrations.{name}" for name in FRAMEWORKS)
    return f"# integrations\n\n[How to use them](../integrations.md).\n\n{modules}\n"


def front_page() -> str:
    """Return the page about `opacus_pil` itself; what a room documents is linked, not repeated."""
    names = exported(PACKAGE / "__init__.py")
    homes = {
        name: (room, f"opacus_pil.{room}.{module}.{name}")
        for room in ROOMS
        for name, module in exported(PACKAGE / room / "__init__.py").items()
    }
    here = {name: module for name, module in names.items() if name not in homes}
    elsewhere = {name: homes[name] for name in names if name in homes}
    named = [f"| [`{name}`][{path}] | in `{room}` |" for name, (room, path) in elsewhere.items()]
    rooms = [f"| [`{room}`]({room}.md) | `import opacus_pil.{room}` |" for room in ROOMS]
    lines = [
        "# opacus_pil",
        "",
        "`from opacus_pil import …`; `__version__` is the release, as text.",
        "",
        "| documented elsewhere | |",
        "|---|---|",
        *named,
        *rooms,
        "",
        documented("opacus_pil", here),
        "",
    ]
    return "\n".join(lines)


def notebook_page(text: str) -> str:
    """Return a notebook's cells as Markdown; the notebooks are stored without output."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


# {name:format} in a sentence, after `_plain`
_NUMBER = re.compile(r"\\\{((?:\w|\\_)+):[^}]*\}")


def help_of(*command: str) -> str:
    """Return what `opacus-pil COMMAND --help` prints, 90 columns wide."""
    before, out = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "90"  # argparse looks there
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            cli.main([*command, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return out.getvalue()


def command_pages(*command: str) -> Iterator[tuple[str, str]]:
    """Yield each command and its help, a command before its actions."""
    text = help_of(*command)
    yield " ".join(("opacus-pil", *command)), text
    for action in _actions(text):
        yield from command_pages(*command, action)


def _actions(text: str) -> list[str]:
    """Return the commands that a help lists: in braces, or in a list of its own."""
    braces = re.search(r"\{([\w,-]+)\}\s+\.\.\.", text)
    if braces:
        return braces[1].split(",")
    listed = re.search(r"^\w+:\n  [A-Z]+\n((?:    .*\n)+)", text, flags=re.M)
    return re.findall(r"^    (\w+)", listed[1], flags=re.M) if listed else []


def commands_page() -> str:
    """Return the page about the commands: what each prints for --help."""
    sections = [f"## {name}\n\n```text\n{text.strip()}\n```" for name, text in command_pages()]
    return "# Commands\n\nWhat `--help` says.\n\n" + "\n\n".join(sections) + "\n"


def _plain(words: str) -> str:
    """Return words of the code as Markdown that shows exactly them."""
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(words, quote=False))


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def policy_table() -> str:
    """Return the best label that each norm policy can have, and why not a stronger one."""
    return _table(
        ("`norm_policy`", "at best", "why not more"),
        (
            (f"`{policy}`", f"`{label}`", _plain(why) or "it is the strongest")
            for policy, (label, why) in evidence.BEST.items()
        ),
    )


def _consequences(finding: evidence.Finding) -> str:
    """Return what follows from a finding beside the label, from its flags."""
    told = (
        (finding.unbounded, "everybody is charged infinitely"),
        (finding.unamplified, "charged as if everybody had been in the batch"),
        (finding.breaks_caps, "with caps or budgets the step is refused"),
        (finding.certifiable, "certificates may still rest on it"),
        (finding.chosen, "a setting of yours, hence no warning"),
    )
    return "; ".join(words for holds, words in told if holds) or "the label falls, no more"


def finding_table() -> str:
    """Return every row of the table of evidence, in its order."""
    return _table(
        ("what was seen, or not", "code", "label left", "concerns", "what else follows"),
        (
            (
                _plain(finding.words.replace("{detail}", "…")),
                f"`{finding.code}`",
                f"`{finding.leaves}`",
                ", ".join(f"`{p}`" for p in finding.policies) if finding.policies else "all",
                _consequences(finding),
            )
            for finding in evidence.table()
        ),
    )


def sentence_table(table: dict[str, str]) -> str:
    """Return sentences of certificates with the names of their numbers in place of these."""
    return _table(
        ("assumption", "code"),
        (
            (_NUMBER.sub(r"<var>\1</var>", _plain(words)), f"`{code}`")
            for code, words in table.items()
        ),
    )


def guess_table(delta: float = 1e-5) -> str:
    """Return what ε allows the best guesser, rounded up.

    Of the best guess whether a coin let a record in.
    """
    rows = []
    for epsilon in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0):
        factor = math.ceil(math.exp(epsilon) * 100) / 100
        right = math.ceil(best_guess(epsilon, delta=delta) * 1e4) / 100
        rows.append((f"{epsilon:g}", f"{right:.2f} %", f"a factor of {factor:,.2f}"))
    header = (
        "ε",
        "the best guess is right at most",
        "whatever may be seen gets more likely by at most, δ aside",
    )
    return _table(header, rows)


def readme(section: str) -> str:
    """Return a section of the README, with its pages under docs/ as links."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n## {section}\n")
    if not found:
        raise PluginError(f"Expected a section of README.md, got {section!r}.")
    return re.sub(r"`docs/(\w+\.md)`", r"[\1](\1)", rest.partition("\n## ")[0].strip())


def readme_block(language: str, number: int) -> str:
    """Return a block of code of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n.*?^```$", text, flags=re.M | re.S)[number]


# `<!-- generated: NAME -->` on a page is replaced by one of these.
TABLES: dict[str, Callable[[], str]] = {
    "README example 1": lambda: readme_block("python", 0),
    "README example 2": lambda: readme_block("python", 1),
    "README commands": lambda: f"{readme_block('bash', 0)}\n{readme_block('bash', 1)}",
    "README What is guaranteed and what is not": lambda: readme(
        "What is guaranteed and what is not"
    ),
    "README References": lambda: readme("References"),
    "guesses": guess_table,
    "policies": policy_table,
    "findings": finding_table,
    "assumptions of every certificate": lambda: sentence_table(sentences.OWN),
    "assumptions of a context": lambda: sentence_table(sentences.CONTEXT),
}


def filled(markdown: str) -> str:
    """Return a page with its marks replaced by tables.

    Raises:
        PluginError: A mark that no table belongs to.
    """

    def table(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise PluginError(
                f"Expected a generated table to be one of {', '.join(TABLES)}, got {found[1]!r}."
            )
        return TABLES[found[1]]()

    return re.sub(r"<!-- generated: (.+?) -->", table, markdown)


def pages() -> dict[str, str]:
    """Return every page that has no file of its own: name -> Markdown."""
    found = {"changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
    found["commands.md"] = commands_page()
    found["api/opacus_pil.md"] = front_page()
    found["api/integrations.md"] = frameworks_page()
    for room in ROOMS:
        found[f"api/{room}.md"] = room_page(room)
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        text = notebook.read_text(encoding="utf-8")
        found[f"tutorials/{notebook.stem}.md"] = notebook_page(text)
    return found


def on_files(files: Files, *, config: Any) -> Files:
    """Add the generated pages to those that mkdocs found."""
    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the generated tables."""
    return filled(markdown)
