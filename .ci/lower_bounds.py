"""Print constraints that hold every requirement of pyproject.toml to its lower bound.

Knows how this pyproject.toml writes requirements, `name>=version`, and fails on anything else. The
linter and the type checker are held to constraints.txt: what they find is not about what users
install.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def lower_bounds(text: str) -> dict[str, str]:
    """Return the lowest version of each distribution that the package or an extra requires.

    Args:
        text: Of pyproject.toml.

    Raises:
        ValueError: A requirement without a lower bound.
    """
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"].values()
    found: dict[str, str] = {}
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        if requirement.startswith(f"{project['name']}["):
            continue  # an extra in an extra
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)(,<[\d.]+)?", requirement)
        if match is None:
            raise ValueError(
                f"Expected requirements 'name>=version', got {requirement!r}. Name the lowest."
            )
        found[match[1]] = match[2]
    return found


def checkers(text: str) -> dict[str, str]:
    """Return the versions of the linter and the type checker in constraints.txt."""
    return dict(re.findall(r"^(ruff|mypy)==(.+)$", text, flags=re.M))


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    pyproject = (root / "pyproject.toml").read_text(encoding="utf-8")
    pinned = (root / "constraints.txt").read_text(encoding="utf-8")
    for name, version in {**lower_bounds(pyproject), **checkers(pinned)}.items():
        print(f"{name}=={version}")
