"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import opacus_pil

ROOT = Path(opacus_pil.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)
# Modules whose examples a reader meets first; the list keeps this file from testing nothing.
WITH_EXAMPLES = ("opacus_pil.accounting.rdp", "opacus_pil.datasets", "opacus_pil.accounting.shown")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    if name in WITH_EXAMPLES:
        assert result.attempted > 0


def test_modules_with_examples_are_found() -> None:
    assert set(WITH_EXAMPLES) <= set(MODULES)
