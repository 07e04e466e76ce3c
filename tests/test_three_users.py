"""What three users type, as they type it, and the same from the shell.

An Opacus user with a script, a data-protection engineer with last month's model, and somebody who
must delete a patient from a certified head (its run is `unlearning/test_patients.py`, the shell's
twin `commands/test_deletions.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_pil.cli import main

pytestmark = pytest.mark.slow  # each trains a model

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from opacus_pil import PerInstancePrivacyEngine as PrivacyEngine

torch.manual_seed(0)
x = torch.randn(120, 6)
train, val = (TensorDataset(part, (part[:, 0] > 0).long()) for part in (x[:80], x[80:]))
ids = [f"customer-{k}" for k in range(80)]
engine = PrivacyEngine(instance_ids=ids)
model, criterion = nn.Linear(6, 2), nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
loader = DataLoader(train, batch_size=16)
model, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0,
    max_grad_norm=1.0, criterion=criterion,
)
for _ in range(4):
    for inputs, targets in loader:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()

def trained():
    return engine
"""


def test_an_opacus_user_asks_who_is_exposed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exposure_script.py").write_text(SCRIPT)
    names: dict = {}
    exec(compile(SCRIPT, "script", "exec"), names)
    engine, val = names["engine"], names["val"]
    spent = engine.get_per_instance_epsilon(1e-4)
    print(spent)
    assert "80 instances" in capsys.readouterr().out
    table = spent.top(10)
    assert table["instance_id"].str.startswith("customer-").all()
    assert spent.plot().axes
    engine.write_report("report.html", delta=1e-4, test=val)
    assert table["instance_id"][0] in Path("report.html").read_text(encoding="utf-8")
    # The shell's twins: a page, and the top of a ledger.
    engine.per_instance.to_parquet("ledger.parquet", delta=1e-4)
    assert main(["report", "exposure_script:trained", "--delta", "1e-4", "--out", "p.html"]) == 0
    capsys.readouterr()
    assert main(["ledger", "ledger.parquet", "--top", "10", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["epsilon"] for row in rows] == pytest.approx(table["epsilon"].tolist())


AUDITED = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def make_model():
    return nn.Linear(6, 2)

def training_data():
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] > 0).long())
"""


def test_an_engineer_audits_last_months_model(tmp_path: Path, monkeypatch, capsys) -> None:
    from opacus import PrivacyEngine

    from opacus_pil import audit

    monkeypatch.chdir(tmp_path)
    (tmp_path / "last_month.py").write_text(AUDITED)
    names: dict = {}
    exec(compile(AUDITED, "last_month", "exec"), names)
    make_model, data = names["make_model"], names["training_data"]()
    torch.manual_seed(1)
    model, criterion = make_model(), nn.CrossEntropyLoss()
    torch.save(model.state_dict(), "0.pt")
    private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(data, batch_size=16), noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    for _ in range(4):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(private(inputs), targets).backward()
            optimizer.step()
    torch.save(private.state_dict(), "20.pt")
    people = [f"person-{k}" for k in range(80)]
    found = audit(
        make_model, checkpoints={0: "0.pt", 20: "20.pt"}, dataset=data, noise_multiplier=1.0,
        max_grad_norm=1.0, sample_rate=0.2, steps=20, delta=1e-4, criterion=criterion,
        instance_ids=people, exposed=1,
    )  # fmt: skip
    assert found.verdict
    assert found.upper.top(1)["instance_id"][0].startswith("person-")
    engine = found.unlearning_engine(
        lambda module: torch.optim.SGD(module.parameters(), lr=0.5), training_steps=20,
        batch_size=16, instance_ids=people, progress=False,
    )  # fmt: skip
    table = engine.options(people[:2], epsilon=1.0, delta=1e-4)
    assert table.best is None  # nothing of ours trained it: nothing is certified
    assert {one.status for one in table} <= {"no claim", "not possible", "retrain instead"}
    result = engine.unlearn(engine.plan(people[:2], steps=2, method="finetuning"))
    found.write_report("regulator.html", results=[result])
    page = Path("regulator.html").read_text(encoding="utf-8")
    assert "no claim" in page
    # The shell's twin, from one description.
    (tmp_path / "run.toml").write_text(
        'module = "last_month:make_model"\ndataset = "last_month:training_data"\n'
        'criterion = "torch.nn:CrossEntropyLoss"\ncheckpoints = {0 = "0.pt", 20 = "20.pt"}\n'
        "noise_multiplier = 1.0\nmax_grad_norm = 1.0\nsample_rate = 0.2\nsteps = 20\n"
        "delta = 1e-4\n"
    )
    capsys.readouterr()
    assert main(["account", "run.toml", "--json", "--quiet"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["worst_case_epsilon"] == pytest.approx(found.worst_case_epsilon)
