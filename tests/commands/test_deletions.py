"""plan, forget, requests and ledger, as they are typed."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

from opacus_pil.certificates import read_certificate, verify_certificate
from opacus_pil.cli import main
from opacus_pil.commands.deletion import DEFAULT_METHOD
from opacus_pil.unlearning import UnlearningEngine

RUN = """
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine

SIZE = 40

def trained():
    torch.manual_seed(0)
    x = torch.randn(SIZE, 5)
    x = x / x.norm(dim=1, keepdim=True)
    data = TensorDataset(x, (x[:, :1] > 0).float())
    module = torch.nn.Linear(5, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=7.0, weight_decay=5e-3)
    names = [f"patient-{k:03}" for k in range(SIZE)]
    engine = PerInstancePrivacyEngine(
        norm_policy="capped", caps=np.linspace(0.05, 1.0, SIZE), instance_ids=names
    )
    criterion = torch.nn.BCEWithLogitsLoss()
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=optimizer, data_loader=DataLoader(data, batch_size=SIZE),
        noise_multiplier=1.0, max_grad_norm=1.0, criterion=criterion,
    )
    for _ in range(60):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
    return engine, module, optimizer, data

def unlearning(**options):
    engine, module, optimizer, data = trained()
    return UnlearningEngine(
        module, optimizer=optimizer, dataset=data, privacy_engine=engine, feature_norm=1.0,
        progress=False, **options,
    )

def queued():
    return unlearning(requests="requests")

def retrainable():
    def made():
        module = torch.nn.Linear(5, 1, bias=False)
        return module, torch.optim.SGD(module.parameters(), lr=7.0, weight_decay=5e-3)

    return unlearning(requests="requests", make_model=made)

def nothing():
    return 3

def privacy():
    return trained()[0]

def neighbourly():
    import my_neighbour
    return my_neighbour.engine()

def costly():
    raise ZeroDivisionError("the training ran")
"""
TARGET = ["--epsilon", "2", "--delta", "0.01"]
GOAL = [*TARGET, "--method", "langevin"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_deletions.py").write_text(RUN)
    (tmp_path / "my_neighbour.py").write_text(
        "def engine():\n    from my_deletions import unlearning\n    return unlearning()\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(list(argv))
    return code, capsys.readouterr().out


def test_a_plan_says_what_it_takes(capsys) -> None:
    code, text = asked(
        capsys, "plan", "my_deletions:unlearning", "--ids", "patient-003", *GOAL, "--max-steps",
        "900", "--json",
    )  # fmt: skip
    plan = json.loads(text)
    assert code == 0
    assert plan["status"] == "certified"
    assert plan["ids"] == ["patient-003"]
    assert plan["epsilon"] <= 2.0
    assert plan["assumptions"]


def test_requirements_and_options_are_tables(capsys) -> None:
    code, text = asked(capsys, "plan", "my_deletions:unlearning", "--requirements", "langevin")
    assert code == 0
    assert "met" in text
    code, text = asked(
        capsys, "plan", "my_deletions:unlearning", "--rows", "3", *TARGET, "--options",
        "--max-steps", "900",
    )  # fmt: skip
    assert code == 0
    assert "noisy_finetuning" in text


def test_forget_leaves_weights_state_plan_and_a_certificate_that_holds(capsys, folder) -> None:
    argv = ["forget", "my_deletions:unlearning", "--ids", "patient-003", *GOAL, "--max-steps",
            "900", "--out", "done"]  # fmt: skip
    code, text = asked(capsys, *argv)
    assert code == 0, text
    assert "certified" in text
    names = {path.name for path in (folder / "done").iterdir()}
    assert {
        "model.pt", "engine.pt", "certificate.json", "plan.txt", "deletion.html", "public.html"
    } <= names  # fmt: skip
    assert all((folder / "done" / name).stat().st_mode & 0o077 == 0 for name in names)
    assert "unlearning.pt" not in names  # the run's own file is gone
    assert verify_certificate(read_certificate(folder / "done" / "certificate.json")).holds
    assert set(torch.load(folder / "done" / "model.pt", weights_only=True)) == {"weight"}
    code = main(argv)
    assert code == 2
    assert "a deletion done" in capsys.readouterr().err


def test_an_interrupted_deletion_goes_on_by_the_same_command(
    capsys, folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opacus_pil.unlearning.run import Run

    taken = Run._step

    def interrupted(self, number):
        found = taken(self, number)
        if self._done == 20:
            raise KeyboardInterrupt
        return found

    argv = ["forget", "my_deletions:unlearning", "--rows", "3", "--delta", "0.01", "--method",
            "langevin", "--steps", "30", "--out", "done"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", interrupted)
        assert main(argv) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (folder / "done" / "unlearning.pt").exists()
    assert not (folder / "done" / "model.pt").exists()
    seen = []

    def counted(self, number):
        seen.append(number)
        return taken(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", counted)
        assert main(argv) == 0
    assert len(seen) == 10


def test_requests_are_submitted_served_listed_and_asked(capsys) -> None:
    who = ["--request", "case-1", "--ids", "patient-003"]
    code, text = asked(capsys, "requests", "submit", "my_deletions:queued", *who)
    assert (code, "queued" in text) == (0, True)
    assert "case-1" in asked(capsys, "requests", "list", "requests", "--state", "queued")[1]
    code, text = asked(
        capsys, "requests", "serve", "my_deletions:queued", *GOAL, "--max-steps", "900", "--json"
    )
    assert code == 0
    (served,) = json.loads(text)
    assert served["state"] == "done"
    assert served["result"]["certificate_file"]
    text = asked(capsys, "requests", "status", "requests", "case-1")[1]
    assert all(state in text for state in ("queued", "running", "done"))
    assert json.loads(asked(capsys, "requests", "status", "requests", "--json")[1])["done"] == 1


def test_what_serve_leaves_is_verified_without_the_engine(capsys) -> None:
    for name, person in (("case-1", "patient-003"), ("case-2", "patient-004")):
        who = ["--request", name, "--ids", person]
        assert main(["requests", "submit", "my_deletions:queued", *who]) == 0
        text = asked(
            capsys, "requests", "serve", "my_deletions:queued", *GOAL, "--max-steps", "900"
        )[1]
        assert "requests/model.pt" in text
    weights = torch.load("requests/model.pt", weights_only=True)
    assert set(weights) == {"weight"}
    last, model = "requests/certificate-2.json", ["--model", "requests/model.pt"]
    assert main(["verify", last, *model, "--ids", "patient-004"]) == 0
    assert main(["verify", "requests/certificate-1.json", *model]) == 1  # the model of before


def test_a_function_that_trains_anew_is_refused_in_one_line(capsys, folder) -> None:
    """The folder keeps which model was submitted to; another would get a certificate of its own."""
    again = RUN.replace("    for _ in range(60):", "    torch.seed()\n    for _ in range(60):")
    assert again != RUN
    (folder / "trains_anew.py").write_text(again)
    assert main(["requests", "submit", "trains_anew:queued", "--request", "a", "--rows", "3"]) == 0
    capsys.readouterr()
    before = asked(capsys, "requests", "status", "requests", "a")[1]
    assert main(["requests", "serve", "trains_anew:queued", *GOAL]) == 2
    error = capsys.readouterr().err
    assert "load_checkpoint" in error
    assert error.count("\n") == 1
    assert asked(capsys, "requests", "status", "requests", "a")[1] == before
    assert not list((folder / "requests").glob("*.json"))


def test_a_ledger_is_asked_for_the_top_for_one_and_by_a_column(capsys) -> None:
    import sys

    sys.path.insert(0, ".")
    try:
        from my_deletions import SIZE, trained  # type: ignore[import-not-found]
    finally:
        sys.path.remove(".")
    engine, *_ = trained()
    group = ["even" if k % 2 == 0 else "odd" for k in range(SIZE)]
    engine.per_instance.to_parquet("ledger.parquet", delta=0.01, columns={"group": group})
    rows = json.loads(asked(capsys, "ledger", "ledger.parquet", "--top", "3", "--json")[1])
    assert [row["instance_id"] for row in rows] == ["patient-039", "patient-038", "patient-037"]
    assert "patient-005" in asked(capsys, "ledger", "ledger.parquet", "--id", "patient-005")[1]
    text = asked(capsys, "ledger", "ledger.parquet", "--by", "group")[1]
    assert "even" in text
    assert "odd" in text
    assert "bound" in asked(capsys, "ledger", "ledger.parquet")[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "my_deletions:nothing", "--rows", "1", *GOAL], "return an UnlearningEngine"),
        (["plan", "my_deletions:unlearning", *GOAL], "--ids or --rows"),
        (["plan", "my_deletions:absent", "--rows", "1", *GOAL], "absent"),
        (["plan", "my_deletions:unlearning", "--ids", "eve", *GOAL], "eve"),
        (["requests", "list", "nowhere"], "nowhere"),
        (["report", "run.toml", "--delta", "0.1", "--out", "x"], "opacus-pil account and"),
        (["report", "my_deletoins:costly", "--delta", "2", "--out", "."], "my_deletoins"),
        (["report", "my_deletions:costly", "--delta", "2", "--out", "x"], "delta in (0, 1)"),
        (["report", "my_deletions:costly", "--delta", "0.1", "--out", "no/x"], "the folder no to"),
        (
            ["report", "my_deletions:costly", "--delta", "0.1", "--out", "my_deletions.py"],
            "Pass --force",
        ),
        (["ledger", "nowhere.parquet"], "nowhere"),
        (["report", "my_deletions:nothing", "--delta", "0.1", "--out", "x"], "PerInstancePrivacy"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_two(capsys, argv, words) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_code_named_on_the_command_line_imports_its_neighbours_whenever_it_likes(capsys) -> None:
    code, text = asked(capsys, "plan", "my_deletions:neighbourly", "--rows", "3", "--steps", "2")
    assert (code, "predicted" in text) == (0, True)


def test_the_default_method_is_python_s() -> None:
    for call in (UnlearningEngine.plan, UnlearningEngine.serve):
        assert inspect.signature(call).parameters["method"].default == DEFAULT_METHOD


def test_a_finished_retraining_reads_as_one(capsys) -> None:
    who = ["--request", "case-1", "--ids", "patient-003"]
    asked(capsys, "requests", "submit", "my_deletions:retrainable", *who)
    served = asked(
        capsys, "requests", "serve", "my_deletions:retrainable", "--method", "retraining"
    )
    for code, text in (served, asked(capsys, "requests", "list", "requests")):
        assert code == 0
        assert "done     1 instances  retrained without the rows, 60 steps" in text
        assert "retrain instead" not in text


def test_where_no_steps_reach_the_target_the_other_methods_are_pointed_at(capsys) -> None:
    argv = ["my_deletions:unlearning", "--rows", "39", "--epsilon", "0.1", "--delta", "0.01"]
    for command in (["plan", *argv], ["forget", *argv, "--out", "done"]):
        assert main(command) == 1
        assert "--options" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--epsilon", "0.001", "--delta", "0.01"], ["--steps", "-1"]])
def test_a_deletion_that_has_no_plan_leaves_no_folder(capsys, folder, argv) -> None:
    code = main(["forget", "my_deletions:unlearning", "--rows", "3", *argv, "--out", "done"])
    assert code in (1, 2)
    assert not (folder / "done").exists()


def test_a_page_is_written_and_not_over_another(capsys, folder) -> None:
    argv = ["report", "my_deletions:privacy", "--delta", "0.01", "--out", "page.html"]
    assert main(argv) == 0
    page = folder / "page.html"
    assert "patient-039" in page.read_text(encoding="utf-8")
    assert page.stat().st_mode & 0o077 == 0
    assert main(argv) == 2
    assert main([*argv, "--public", "--force"]) == 0
    assert "patient-039" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["plan", "forget", "requests", "ledger", "report"])
def test_help_shows_an_example(capsys, command) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"opacus-pil {command}" in capsys.readouterr().out.split("example:")[1]


def test_the_log_is_quiet_until_it_is_asked_for(capsys, caplog) -> None:
    argv = ["forget", "my_deletions:unlearning", "--rows", "3", "--steps", "2", "--method",
            "finetuning"]  # fmt: skip
    assert main([*argv, "--out", "quiet", "--quiet"]) == 0
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "")
    with caplog.at_level("INFO", logger="opacus_pil"):
        assert main(["--log", "info", *argv, "--out", "told", "--quiet"]) == 0
    assert any("forgot 1 instances by finetuning in 2 steps" in one for one in caplog.messages)


def test_words_are_completed_where_the_shell_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    import argcomplete

    seen = []
    monkeypatch.setattr(argcomplete, "autocomplete", seen.append)
    with pytest.raises(SystemExit):
        main(["--help"])
    (parser,) = seen
    assert "requests" in parser.format_help()
