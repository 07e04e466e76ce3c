"""Pages under docs/ run as they are printed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_page_about_heads_runs_and_ends_with_a_verified_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "certified_heads.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)  # the queue's folder
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(
            compile("import torch\ntorch.manual_seed(0)\n" + "\n".join(blocks), "docs", "exec"),
            names,
        )
    assert "langevin" in printed.getvalue()
    assert names["report"].holds
    assert names["report"].covers
    assert names["engine"].per_instance.guarantee == "bound"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # Lightning's wish
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # of Lightning's own use of torch
@pytest.mark.filterwarnings("ignore:.*The number of training batches.*")  # six: fewer than logs
def test_the_page_about_integrations_runs_and_verifies_what_it_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)  # where the certificate is written
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n".join(blocks), "docs", "exec"), names)
    assert names["exposed"].guarantee == "bound"
    assert names["done"].steps <= 50
    assert (tmp_path / "patient-117.json").exists()
    assert names["engine"].per_instance.steps == 5
    assert names["lightning_engine"].per_instance.guarantee == "output_specific"
    assert "epsilon" in printed.getvalue()
