"""Pages under docs/ run as they are printed."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.accounting.shown import rounded_up
from opacus_pil.cli import main
from opacus_pil.datasets import load
from opacus_pil.errors import LedgerError
from tests.site_pages import DOCS, generated

# Each trains something; the page about heads also unlearns it.
pytestmark = pytest.mark.slow

NAMED = re.compile(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', flags=re.M | re.S)
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.M | re.S)


def files(page: str) -> dict[str, str]:
    """Return the files that a page shows whole, by name."""
    return dict(NAMED.findall((DOCS / page).read_text(encoding="utf-8")))


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """Run a page's blocks in order; return the names they leave and what they printed.

    Blocks that are files (`title=`) are written first, and can be imported.
    """
    text = generated.filled((DOCS / page).read_text(encoding="utf-8"))
    blocks = BLOCK.findall(text)
    assert blocks
    monkeypatch.chdir(folder)  # for what it writes
    monkeypatch.syspath_prepend(folder)
    for name, content in files(page).items():
        Path(name).write_text(content, encoding="utf-8")
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    names: dict[str, Any] = {}
    code = "import torch\ntorch.manual_seed(0)\n" + "\n".join(blocks)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, page, "exec"), names)
    return names, printed.getvalue()


def shell(page: str) -> list[list[str]]:
    """Return the arguments of every `opacus-pil` command that a page shows in a shell."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "opacus-pil"]


def readme_training(*, epochs: int, **options: Any) -> PerInstancePrivacyEngine:
    """Train as the README's first example does, and return the engine."""
    torch.manual_seed(0)
    digits = load("digits")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    engine = PerInstancePrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.25),
        data_loader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(digits.images, digits.labels), batch_size=64
        ),
        noise_multiplier=1.0, max_grad_norm=4.0, criterion=torch.nn.CrossEntropyLoss(), **options,
    )  # fmt: skip
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return engine


def two_worst_cases(engine: PerInstancePrivacyEngine) -> tuple[float, float]:
    """Return Opacus's ε and the worst case beside the per-instance values, at δ = 0.001."""
    return engine.get_epsilon(1e-3), float(engine.get_per_instance_epsilon(1e-3).worst_case)


def test_the_two_worst_cases_are_those_on_the_page_about_numbers() -> None:
    text = (DOCS / "numbers.md").read_text(encoding="utf-8")
    for epochs, named in ((1, "1 epoch"), (5, "5 epochs, as it stands there"), (20, "20 epochs")):
        opacus, ours = two_worst_cases(readme_training(epochs=epochs))
        assert f"| {named} | {rounded_up(opacus)} | {rounded_up(ours)} |" in text
        assert 1.1 <= ours / opacus <= 1.5  # "10 to 30 %", "half as much again"


@pytest.mark.filterwarnings("ignore:.*poisson_sampling=False.*")  # what the page speaks of
def test_without_poisson_sampling_opacus_claims_what_the_page_about_numbers_says() -> None:
    text = (DOCS / "numbers.md").read_text(encoding="utf-8")
    engine = readme_training(epochs=5, poisson_sampling=False)
    opacus, ours = two_worst_cases(engine)
    assert f"still says {rounded_up(opacus)} at" in text
    assert f"in every batch, is {rounded_up(ours)} (" in text
    spent = engine.get_per_instance_epsilon(1e-3)
    assert spent.guarantee == "output_specific"
    assert np.median(spent.epsilon) > 5
    assert max(spent.epsilon) > 9


def test_the_page_about_heads_ends_with_a_verified_certificate(tmp_path, monkeypatch) -> None:
    names, printed = run("certified_heads.md", tmp_path, monkeypatch)
    assert "langevin" in printed
    assert names["report"].holds
    assert names["report"].covers
    assert names["engine"].per_instance.guarantee == "bound"
    # "most patients above 10, the worst above 20"
    spent = names["engine"].get_per_instance_epsilon(1e-3).epsilon
    assert np.median(spent) > 10
    assert max(spent) > 20
    assert names["shorter"].noise_burst > 1
    assert names["shorter"].epsilon <= 1
    (command,) = shell("certified_heads.md")
    assert main(command) == 0  # the files have the names that the page says


def test_the_page_for_opacus_users_does_what_it_says(tmp_path, monkeypatch) -> None:
    names, _ = run("opacus_user.md", tmp_path, monkeypatch)
    assert names["bound"].guarantee == "bound"
    # "Some share the worst case"
    spent = names["spent"]
    assert spent.guarantee == "estimate"
    assert 0 < spent.ties < len(spent)
    assert (tmp_path / "run.pt").stat().st_mode & 0o777 == 0o600
    assert names["theirs"].guarantee == "bound"
    assert len(names["theirs"]) == 599
    assert "image-0017" in Path("report.html").read_text(encoding="utf-8")
    assert "image-0017" not in Path("report-public.html").read_text(encoding="utf-8")
    # and from the shell, by a function `engine()` in my_run.py
    monkeypatch.setitem(sys.modules, "my_run", SimpleNamespace(engine=lambda: names["resumed"]))
    for command in shell("opacus_user.md"):
        Path(command[command.index("--out") + 1]).unlink()
        assert main(command) == 0


def test_the_page_about_deletions_serves_both_requests(tmp_path, monkeypatch) -> None:
    names, printed = run("deletion_requests.md", tmp_path, monkeypatch)
    assert [request.state for request in names["served"]] == ["done", "done"]
    assert set(names["unlearning"].forgotten) == {7, 42, 43}
    assert re.search(r"^dp_sgd +not possible", printed, flags=re.M)  # at this ε, as it says
    assert "langevin: 14 of 15 met" in printed
    left = {re.sub("-[0-9a-f]{32}", "-…", path.name) for path in Path("requests").iterdir()}
    assert {"requests.db", "state-….pt", "model.pt"} <= left
    assert not [name for name in left if name.startswith("certificate")]  # as it says
    assert "person-0100" in Path("deletion.html").read_text(encoding="utf-8")
    assert "person-0042" in Path("deletions.html").read_text(encoding="utf-8")
    public = Path("deletions-public.html").read_text(encoding="utf-8")
    assert "person-" not in public
    assert "Constants only." in public
    assert names["engine"].per_instance.guarantee == "bound"  # trained on without them
    with pytest.raises(LedgerError):
        names["unlearning"].plan(["person-0100"], steps=5)


def test_the_page_about_deletions_says_what_its_example_lacks(tmp_path, monkeypatch) -> None:
    blocks = BLOCK.findall((DOCS / "deletion_requests.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "deletion_requests.md", "exec"), {})  # trains, leaves run.pt
    names: dict[str, Any] = {}
    exec(compile(files("deletion_requests.md")["my_run.py"], "my_run.py", "exec"), names)
    engine, model, optimizer = names["deployed"]()
    needs = UnlearningEngine(
        model, optimizer=optimizer, dataset=names["data"], criterion=names["criterion"],
        privacy_engine=engine, feature_norm=10.0, progress=False,
    ).requirements("langevin")  # fmt: skip
    assert len(needs) == 28
    (missing,) = needs.missing
    assert missing.condition.startswith("clip bounds that no gradient reaches (6.94")


def test_the_page_about_deletions_serves_from_the_shell(tmp_path, monkeypatch, capsys) -> None:
    run("deletion_requests.md", tmp_path, monkeypatch)
    for command in shell("deletion_requests.md"):
        if "requests-head/certificate-1.json" not in command:  # of the page about heads
            # 1: the plan is to train again, as the page says.
            assert main(command) == (1 if command[0] == "plan" else 0), command
    printed = capsys.readouterr().out
    assert re.search("case-3 .*done", printed)
    assert "0 steps" in printed
    assert "The certificate holds." in printed
    assert Path("report.html").exists()


def test_the_page_for_auditors_finds_a_correct_training_consistent(
    tmp_path, monkeypatch, capsys
) -> None:
    with monkeypatch.context() as patch:  # `python train.py`
        patch.chdir(tmp_path)
        exec(compile(files("auditor.md")["train.py"], "train.py", "exec"), {"__name__": "__main__"})
    names, _ = run("auditor.md", tmp_path, monkeypatch)
    assert names["check"].verdict == "consistent"
    assert 0 < names["bound"].epsilon <= names["bound"].ceiling
    assert names["found"].verdict == "no power"
    assert Path("audit.html").exists()
    codes = [main(command) for command in shell("auditor.md")]
    assert codes == [0, 3]  # an account; no power, as the page says
    assert "897 pairs" in capsys.readouterr().out
    assert Path("audit/audit.html").exists()


def test_the_page_for_researchers_compares_with_retraining(tmp_path, monkeypatch) -> None:
    names, printed = run("researcher.md", tmp_path, monkeypatch)
    assert names["spent"].guarantee == "output_specific"
    assert set(names["gaps"]) == {"forget", "retain", "test"}
    assert "value=nan" not in printed  # a ranking, not 1,200 ties


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # Lightning's wish
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # of Lightning's own use of torch
@pytest.mark.filterwarnings("ignore:.*The number of training batches.*")  # six: fewer than logs
def test_the_page_about_integrations_runs_and_verifies_what_it_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)  # where certificate and log are written
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n".join(blocks), "docs", "exec"), names)
    assert names["exposed"].guarantee == "bound"
    assert names["done"].steps <= 50
    assert (tmp_path / "patient-117.json").exists()
    assert names["engine"].per_instance.steps == 5
    assert names["lightning_engine"].per_instance.guarantee == "output_specific"
    assert list((tmp_path / "runs" / "one").iterdir())
    assert "'epsilon'" in printed.getvalue()
