"""Tutorials run from the first cell to the last, and are stored without output.

Every notebook of the folder is found by itself; a new one needs no line here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

pytestmark = pytest.mark.slow  # starts a kernel and runs whole notebooks

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    (ROOT / "tutorials").glob("*.ipynb"), key=lambda path: int(path.stem.split("_")[0])
)


def _load(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


class _ThisInterpreter(AsyncKernelManager):
    """Starts the kernel with the interpreter of the tests, whatever kernels are installed."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        return [
            sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file,
            *(extra_arguments or []),
        ]  # fmt: skip


def test_tutorials_are_numbered_and_no_number_is_taken_twice() -> None:
    numbers = [int(path.stem.split("_")[0]) for path in NOTEBOOKS]
    assert numbers[:1] == [1]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorial_begins_with_its_number_and_what_its_reader_will_have(path: Path) -> None:
    first = _load(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {path.stem.split('_')[0]}. ")
    assert "at the end" in first.source.lower()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorial_is_stored_without_output(path: Path) -> None:
    notebook = _load(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []
    assert [cell.id for cell in notebook.cells if cell.metadata] == []
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorial_uses_public_names_only(path: Path) -> None:
    code = "\n".join(cell.source for cell in _load(path).cells if cell.cell_type == "code")
    assert "SMOKE_TEST" in code
    assert "._" not in code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, tmp_path: Path) -> None:
    notebook = _load(path)
    beside = tmp_path / "beside"  # where a reader's notebook lies
    beside.mkdir()
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_manager_class=_ThisInterpreter,
        resources={"metadata": {"path": str(beside)}},
    )
    # An environment of its own: nothing is read from or written to the user's Jupyter folders.
    quiet = {
        "SMOKE_TEST": "1",
        "MPLBACKEND": "Agg",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "OMP_NUM_THREADS": "1",
    }
    client.execute(env={**os.environ, **quiet})  # a failing cell or assertion raises here
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []  # no stray warning
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert list(beside.iterdir()) == []  # a tutorial leaves nothing beside itself
