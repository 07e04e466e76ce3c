"""Every public function of the mathematics says what it bounds, in which units, and whence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest

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
        return  # explained once, in certificates/record.py
    if re.search(r"Args: as `|explains the other arguments", doc):
        return  # says where
    for parameter in inspect.signature(getattr(owner, name)).parameters:
        if parameter not in ("self", "cls"):
            assert re.search(rf"\b{parameter}\b", doc), (
                f"{owner.__name__}.{name} does not explain {parameter}"
            )
