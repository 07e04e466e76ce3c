"""What the package offers by name: signatures of the façades, members of their classes, commands.

Public names only. A class's bases inside the package are its own business; those outside are not.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from typing import Any

from behaviour_parts import described_error, plain, plain_text

FACADES = (
    "opacus_pil",
    "opacus_pil.accounting",
    "opacus_pil.certificates",
    "opacus_pil.unlearning",
    "opacus_pil.evaluation",
    "opacus_pil.errors",
)
# Documented by name, and not reached through a façade.
SINGLE = {
    "opacus_pil.files.ledger_table": ("LedgerTable",),
    "opacus_pil.accounting.pld": ("tight_epsilon", "tight_group_epsilon"),
    "opacus_pil.files.model_hash": ("model_hash", "model_file_hash"),
    "opacus_pil.datasets": None,
    "opacus_pil.plots": None,
    "opacus_pil.report": None,
    "opacus_pil.demo": None,
    "opacus_pil.study": None,
}
COMMANDS = ([], ["demo"], ["verify"], ["study"])


def signature(thing: Any) -> str:
    try:
        return plain_text(inspect.signature(thing))
    except (TypeError, ValueError) as error:
        return f"none: {type(error).__name__}"


def described(thing: Any) -> Any:
    if inspect.isclass(thing):
        return {
            "signature": signature(thing),
            "is a": [f"{b.__module__}.{b.__qualname__}" for b in thing.__mro__ if not ours(b)],
            "members": {
                name: member(thing, name) for name in sorted(dir(thing)) if name[0] != "_"
            },
        }  # fmt: skip
    if callable(thing):
        return signature(thing)
    return plain(thing)


def member(owner: type, name: str) -> str:
    found = inspect.getattr_static(owner, name)
    if isinstance(found, property):
        return "property" + signature(found.fget).partition(")")[2]
    kind = "static " if isinstance(found, staticmethod) else ""
    kind = "class " if isinstance(found, classmethod) else kind
    value = getattr(owner, name)
    return kind + (signature(value) if callable(value) else type(value).__name__)


def ours(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "opacus_pil"


def public(module: Any) -> list[str]:
    """Return the names a module offers: those it lists, or its own without an underscore."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    return [
        name for name in sorted(dir(module))
        if name[0] != "_" and not inspect.ismodule(value := getattr(module, name))
        and (ours(value) or isinstance(value, tuple | str | float))
    ]  # fmt: skip


def facade(name: str, names: tuple[str, ...] | None) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return {"error": described_error(error)}
    found: dict[str, Any] = {}
    for item in names or public(module):
        try:
            found[item] = described(getattr(module, item))
        except Exception as error:  # a name that went away must not hide the others
            found[item] = {"error": described_error(error)}
    return found


def helped(words: list[str]) -> Any:
    from opacus_pil.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([*words, "--help"])
        except SystemExit as end:
            return {"code": end.code, "text": said.getvalue().splitlines()}
    return {"text": said.getvalue().splitlines()}


def record() -> dict[str, Any]:
    names = {name: facade(name, None) for name in FACADES}
    names |= {name: facade(name, wanted) for name, wanted in SINGLE.items()}
    return {"names": names, "commands": {" ".join(w) or "(none)": helped(w) for w in COMMANDS}}
