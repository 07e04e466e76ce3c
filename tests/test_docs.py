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
