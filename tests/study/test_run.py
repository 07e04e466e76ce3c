"""The command in its smallest form: what it writes, that it goes on, what it refuses."""

from __future__ import annotations

import json
import stat

import pytest

from opacus_pil.cli import main
from opacus_pil.study import run, run_study
from opacus_pil.study.settings import study_settings
from opacus_pil.study.words import CLAIMS

pytestmark = pytest.mark.slow  # a study on a small scale: it trains dozens of models

ARGUMENTS = ["study", "--dataset", "digits", "--model", "mlp", "--quick", "--seed", "1"]


@pytest.fixture(scope="module")
def smallest():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run, "study_settings", lambda name, *, model, form: study_settings(
                name, model=model, form={"quick": "smallest"}.get(form, form)
            )
        )  # fmt: skip
        yield


@pytest.fixture(scope="module")
def study(smallest, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return out


def test_all_files_are_there_and_readable_by_the_owner_only(study):
    assert sorted(p.name for p in study.iterdir()) == [
        "figures", "report.html", "study.json", "trials"
    ]  # fmt: skip
    assert {p.stem for p in (study / "figures").iterdir()} == {
        "time", "gap", "scores", "tops", "barriers", "certified"
    }  # fmt: skip
    for path in study.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_every_claim_has_a_verdict_with_its_numbers(study):
    summary = json.loads((study / "study.json").read_text())
    assert {row["claim"] for row in summary["verdicts"]} == set(CLAIMS)
    assert {row["reproduced"] for row in summary["verdicts"]} <= {"yes", "no", "undecided"}
    assert all(row["numbers"] for row in summary["verdicts"])
    assert [c["name"] for c in summary["conditions"]] == ["sgld", "sgd"]
    for condition in summary["conditions"]:
        assert condition["guarantee"] == "estimate"  # nothing here is a bound
        assert len(condition["trainings"]) == 2
        for training in condition["trainings"]:
            assert training["guarantee"] == "estimate"
            assert any("median" in reason for reason in training["reasons"]["clipped privacy loss"])
            assert {one["size"] for one in training["forget_sets"]} == {10}
    for row in summary["certified"]["logistic, 3 against 8"]["rows"]:
        if row["certified"] and row["steps_worst_case"] is not None:
            assert row["steps"] <= row["steps_worst_case"]


def test_the_report_loads_nothing_and_says_that_it_is_private(study):
    page = (study / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("<script") == 1  # the family's own, which loads nothing
    assert "private" in page.lower()
    assert page.count("data:image/png;base64,") == 6


def test_the_same_command_goes_on_and_trains_nothing_again(study, capsys):
    before = {p: p.stat().st_mtime_ns for p in (study / "trials").rglob("result.pt")}
    first = (study / "study.json").read_bytes()
    lost = sorted(before, key=lambda path: path.stat().st_size)[len(before) // 2]
    lost.unlink()
    assert main([*ARGUMENTS, "--out", str(study), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    after = {p: p.stat().st_mtime_ns for p in (study / "trials").rglob("result.pt")}
    assert {p for p in before if after[p] != before[p]} == {lost}
    assert (study / "study.json").read_bytes() == first  # the lost one came out the same


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--dataset", "cifar10"], "cifar10"),
        (["--model", "transformer"], "transformer"),
        (["--jobs", "0"], "jobs"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_wrong_arguments_are_one_line_and_no_file(arguments, word, tmp_path, capsys):
    assert main(["study", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert word in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(FileExistsError, match="other files"):
        run_study(dataset="digits", out=tmp_path)
    with pytest.raises(FileExistsError, match="got the file"):
        run_study(dataset="digits", out=tmp_path / "a")
