"""Docstrings name what is there; those of the mathematics say what is bounded, and whence."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import opacus_pil
from opacus_pil import accounting, certificates
from opacus_pil.accounting import pld

FUNCTIONS = [
    *(getattr(accounting, name) for name in dir(accounting)),
    *(getattr(certificates, name) for name in dir(certificates)),
    pld.tight_epsilon,
    pld.tight_group_epsilon,
]
FUNCTIONS = [thing for thing in FUNCTIONS if inspect.isfunction(thing)]
CLASSES = [
    thing
    for room in (accounting, certificates)
    for thing in (getattr(room, name) for name in dir(room))
    if inspect.isclass(thing)
]


def _sections(doc: str) -> set[str]:
    return set(
        re.findall(r"^(?:    )?(\w[\w ]*?)(?: \(.*?\))?:(?: |$)", inspect.cleandoc(doc), re.M)
    )


def _methods() -> Iterator[tuple[type, str]]:
    for owner in CLASSES:
        for name, value in inspect.getmembers(owner):
            plain = inspect.isfunction(value) or inspect.ismethod(value)
            if plain and not name.startswith("_"):
                yield owner, name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_function_states_guarantee_arguments_result_errors_edges_and_source(function) -> None:
    doc = inspect.getdoc(function) or ""
    found = _sections(doc)
    wanted = {"Guarantee", "Args", "Returns", "Raises", "Edge cases", "Source"}
    assert wanted <= found, f"{function.__name__} lacks {sorted(wanted - found)}"
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^\s+{name}:", doc, re.M), f"{function.__name__} does not explain {name}"


@pytest.mark.parametrize("owner", CLASSES, ids=lambda c: c.__name__)
def test_a_class_states_what_it_is_and_explains_its_fields(owner) -> None:
    doc = inspect.getdoc(owner) or ""
    assert {"Guarantee", "Attributes"} & _sections(doc), owner.__name__
    for name in inspect.signature(owner).parameters:
        if not name.startswith("_"):
            assert re.search(rf"\b{name}\b", doc), f"{owner.__name__} does not explain {name}"


@pytest.mark.parametrize(("owner", "name"), list(_methods()))
def test_a_method_explains_its_arguments(owner, name) -> None:
    doc = inspect.getdoc(getattr(owner, name)) or ""
    assert doc.splitlines()[0].endswith("."), f"{owner.__name__}.{name} has no first sentence"
    if owner.__name__.endswith("Certificate") and name in ("rdp", "epsilon", "steps_for"):
        return  # explained once, in certificates/certificate.py
    if re.search(r"Args: as `|explains the other arguments", doc):
        return  # says where
    for parameter in inspect.signature(getattr(owner, name)).parameters:
        if parameter not in ("self", "cls"):
            assert re.search(rf"\b{parameter}\b", doc), (
                f"{owner.__name__}.{name} does not explain {parameter}"
            )


# --- the whole package: no docstring names an attribute or argument that is not there -------------

ROOT = Path(opacus_pil.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)


def _own_things(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield classes, functions and methods that a module defines, with their names."""
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            yield name, thing
            for inner, member in vars(thing).items():
                member = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if inspect.isfunction(member):
                    yield f"{name}.{inner}", member
        elif inspect.isfunction(inspect.unwrap(thing)):
            yield name, inspect.unwrap(thing)


def _entries(thing: Any, title: str) -> list[str] | None:
    """Return the names that a section explains, or None without that section."""
    doc = inspect.cleandoc(thing.__doc__ or "") + "\n"
    found = re.search(rf"^{title}:\n((?:(?: +\S.*)?\n)*)", doc, re.M)
    if found is None:
        return None
    names = r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \(.*?\))?:(?: |$)"
    return [
        name.strip(" *")
        for line in re.findall(names, found.group(1), re.M)
        for name in line.split(",")
    ]


def _attributes(owner: type) -> set[str]:
    """Return what instances have: fields, properties, methods, what a method assigns to self."""
    names = set(dir(owner))
    for kind in owner.__mro__:
        if kind.__module__.split(".")[0] in (opacus_pil.__name__, __name__.split(".")[0]):
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
            names |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and getattr(node.value, "id", None) == "self"
            }
    if dataclasses.is_dataclass(owner):
        names |= {field.name for field in dataclasses.fields(owner)}
    return names


def _complaints(name: str, thing: Any) -> list[str]:
    """Say what a docstring names that is not there, and which public field it leaves out."""
    found = []
    arguments = _entries(thing, "Args")
    if arguments is not None:
        known = inspect.signature(thing).parameters
        found += [f"{name} has no argument {each}" for each in arguments if each not in known]
    attributes = _entries(thing, "Attributes")
    if attributes is not None and inspect.isclass(thing):
        known_names = _attributes(thing)
        found += [f"{name} has no attribute {e}" for e in attributes if e not in known_names]
        if dataclasses.is_dataclass(thing):
            told = {e for kind in thing.__mro__ for e in _entries(kind, "Attributes") or []}
            found += [
                f"{name} does not explain its field {field.name}"
                for field in dataclasses.fields(thing)
                if not field.name.startswith("_") and field.name not in told
            ]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_name_only_arguments_and_attributes_that_are_there(name: str) -> None:
    module = importlib.import_module(name)
    assert [c for own, thing in _own_things(module) for c in _complaints(own, thing)] == []


EVALUATION = [name for name in MODULES if name.startswith("opacus_pil.evaluation.")]


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_explains_every_argument(name: str) -> None:
    for own, thing in _own_things(importlib.import_module(name)):
        told = _entries(thing, "Args") if inspect.isfunction(thing) else None
        for parameter in inspect.signature(thing).parameters if told is not None else ():
            assert parameter in {"self", "cls", *told}, f"{own} does not explain {parameter}"


@pytest.mark.parametrize("name", EVALUATION)
def test_a_record_that_evaluation_mentions_has_the_attribute_it_is_said_to_have(name: str) -> None:
    """`Record, whose .part`, where the record is one of that module's names."""
    module = importlib.import_module(name)
    for own, thing in _own_things(module):
        doc = " ".join((thing.__doc__ or "").split())
        for record, part in re.findall(r"\b([A-Z]\w+), (?:whose|with) `\.(\w+)`", doc):
            owner = vars(module).get(record)
            assert owner is None or part in _attributes(owner), f"{own}: {record} has no .{part}"


@dataclasses.dataclass
class _Record:
    """A record.

    Attributes:
        kept, gone: Two at once.
        doubled: A property.
    """

    kept: int
    forgotten: int

    @property
    def doubled(self) -> int:
        return 2 * self.kept


def test_the_checker_finds_what_is_not_there_and_what_is_not_said() -> None:
    assert _complaints("R", _Record) == [
        "R has no attribute gone",
        "R does not explain its field forgotten",
    ]

    def scaled(x: float) -> float:
        """Return something.

        Args:
            x: A number.
            y (int): Another,
                which is not there: at all.
        """
        return x

    assert _complaints("f", scaled) == ["f has no argument y"]
