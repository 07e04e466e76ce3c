"""What the tests of the documentation know of it: where it is, and what generates its pages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[1] / "docs"


def _load(name: str) -> ModuleType:
    """Import a file of docs/, which is no package: mkdocs loads these by path, too."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generated = _load("generated")
docstrings = _load("docstrings")
