"""The README is true: its examples run, and its commands are the ones that CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_house import ROOMS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    'pip install -c constraints.txt -e ".[demo]" && opacus-pil demo',
    'pip install -c constraints.txt -e ".[dev]"  && pytest',
]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.M | re.S)


@pytest.mark.slow  # trains and unlearns as a reader would
def test_python_examples_run_in_order(tmp_path: Path) -> None:
    blocks = _blocks("python")
    assert len(blocks) >= 2
    # Output is piped, not a terminal, so progress bars stay silent; warnings would be seen.
    code = "import torch\ntorch.manual_seed(0)\n" + "\n".join([blocks[0], _SHOWN, *blocks[1:]])
    done = subprocess.run(
        [sys.executable, "-W", "error", *_EXPECTED_WARNINGS, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind
    # What the comments in the examples promise.
    assert "estimate" in done.stdout
    assert "predicted" in done.stdout
    assert "epsilon           none: no certificate is claimed" in done.stdout


# The first example shows somebody exposed, as the sentence below it says.
_SHOWN = """
assert 10 <= spent.top(1)["tied"][0] <= 60
assert abs(spent.worst_case - 2.16) < 0.005
assert sorted(spent.epsilon)[len(spent) // 2] <= 0.7 * spent.worst_case
assert spent.top(10)["norm"].notna().all()
"""
# Said by Opacus and torch at every ordinary training (reasons in pyproject.toml).
_EXPECTED_WARNINGS = [
    "-W", "ignore:Secure RNG turned off",
    "-W", "ignore:Full backward hook is firing when gradients are computed with respect to",
]  # fmt: skip


def test_first_example_is_short() -> None:
    lines = _blocks("python")[0].splitlines()
    assert len([x for x in lines if x and not x.startswith(("import ", "from "))]) <= 16


def test_commands_are_printed_exactly_and_alone() -> None:
    installs = [block for block in _blocks("bash") if block.startswith("pip install")]
    assert installs == [f"{command}\n" for command in COMMANDS]


def test_ci_runs_the_commands_that_the_readme_prints() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    assert "pip install" in script
    assert not any(command in script for command in COMMANDS)  # read, not copied


def test_readme_is_one_sitting() -> None:
    assert len(TEXT.splitlines()) <= 120


def test_every_room_is_named_once_from_the_ground_up() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = contributing.partition("## One line per room")[2].partition("## ")[0]
    lines = re.findall(r"^- (`[^—]+`) — \S", section, flags=re.M)
    named = [name for line in lines for name in re.findall(r"`([^`]+)`", line)]
    rooms = [name.removesuffix(".py").removesuffix("/") for name in named]
    assert rooms == list(ROOMS)
    assert all((ROOT / "opacus_pil" / name).exists() for name in named)


def test_every_tutorial_is_named_and_exists() -> None:
    named = set(re.findall(r"`(tutorials/[^`]+\.ipynb)`", TEXT))
    assert named == {f"tutorials/{p.name}" for p in (ROOT / "tutorials").glob("*.ipynb")}


@pytest.mark.parametrize("label", ["bound", "expectation_bound", "output_specific", "estimate"])
def test_every_label_is_explained(label: str) -> None:
    assert re.search(rf"^\| `{label}` \| .+ \| .+ \|$", TEXT, flags=re.M)


def test_sections_come_in_the_agreed_order() -> None:
    assert re.findall(r"^## (.+)$", TEXT, flags=re.M) == [
        "What is guaranteed and what is not",
        "Install",
        "Tutorials",
        "References",
        "How to cite",
    ]


def test_version_in_the_changelog_is_the_package_version() -> None:
    import opacus_pil

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{opacus_pil.__version__}]" in changelog
