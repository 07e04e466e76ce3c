"""`opacus-pil account`: a training described in TOML or by a function, and bad descriptions."""

import json
import sys

import numpy as np
import pytest
import torch

from opacus_pil import replay
from opacus_pil.cli import main
from tests.replaying.elsewhere import described, trained

TOML = """module = "tests.replaying.elsewhere:make_model"
dataset = "tests.replaying.elsewhere:data"
criterion = "torch.nn:CrossEntropyLoss"
checkpoints = "run/*.pt"
noise_multiplier = 1.0
max_grad_norm = 4.0
batch_size = 15
delta = 1e-3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    trained(steps=2, save=tmp_path / "run")
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path


def test_a_described_run_is_accounted_as_by_the_function(folder, capsys):
    out = folder / "ledger.parquet"
    assert main(["account", str(folder / "run.toml"), "--out", str(out), "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    account = replay(folder / "run", **described(steps=2))
    spent = account.get_epsilon(1e-3)
    assert found["per_instance_epsilon"]["max"] == spent.epsilon.max()
    assert found["guarantee"] == "estimate"
    assert found["steps"] == 2
    import pandas as pd

    np.testing.assert_allclose(pd.read_parquet(out)["epsilon"], spent.epsilon)
    assert out.stat().st_mode & 0o077 == 0
    assert main(["account", str(folder / "run.toml"), "--out", str(out), "--quiet"]) == 2
    assert "Pass --force" in capsys.readouterr().err


def test_a_function_may_describe_the_run_too(folder, capsys, monkeypatch):
    (folder / "described_here.py").write_text(
        "from tests.replaying.elsewhere import data, make_model\n"
        "from torch.nn import CrossEntropyLoss\n"
        "def describe():\n"
        "    return dict(module=make_model, dataset=data(), criterion=CrossEntropyLoss(),\n"
        "        checkpoints='run/*.pt', noise_multiplier=1.0, max_grad_norm=4.0,\n"
        "        sample_rate=1 / 6)\n"
    )
    monkeypatch.chdir(folder)
    assert main(["account", "described_here:describe", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "label         estimate" in said
    assert "2 noisy steps" in said


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("noise_multiplier = 1.0\n", "", "lacks noise_multiplier. "),
        ("delta", "detla", "unknown name 'detla'. Did you mean 'delta'?"),
        ("batch_size = 15\n", "", "sample_rate or batch_size"),
        ("elsewhere:make_model", "elsewhere:make_modle", "Check the name"),
        ("run/*.pt", "runs/*.pt", "files that match"),
        ("criterion = ", "criterion = = ", "to be TOML"),
        ("batch_size = 15", "batch_size = 16\nsteps = 2", "sample_rate"),
        ("noise_multiplier = 1.0", "noise_multiplier = 0.5", "counted it"),
    ],
)
def test_a_bad_description_is_one_error_with_exit_code_2(folder, capsys, old, new, says):
    path = folder / "run.toml"
    path.write_text(TOML.replace(old, new).replace("\nbatch_size = 16", "\nsample_rate = 0.5"))
    assert main(["account", str(path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "dataset = " not in error  # no whole example


def test_the_rule_for_steps_before_the_first_checkpoint_is_said(folder, capsys):
    text = TOML.replace('"run/*.pt"', '{2 = "run/only.pt"}') + "steps = 2\n"
    next(iter(sorted((folder / "run").glob("*.pt"), reverse=True))).rename(folder / "run/only.pt")
    (folder / "run.toml").write_text(text)
    assert main(["account", str(folder / "run.toml"), "--quiet"]) == 0
    assert "charged the worst case (before_first='worst_case')" in capsys.readouterr().out


def test_a_misspelt_name_that_is_needed_is_told_what_was_meant(folder, capsys):
    path = folder / "run.toml"
    path.write_text(TOML.replace("noise_multiplier", "noise_mulitplier"))
    assert main(["account", str(path), "--quiet"]) == 2
    assert "'noise_mulitplier'. Did you mean 'noise_multiplier'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out", "no/such/ledger.parquet"], "Expected the folder no/such to exist"),
        (["--delta", "0"], "Expected delta in (0, 1)"),
        (["--delta", "5"], "Expected delta in (0, 1)"),
        (["--out", "."], "got a folder"),
    ],
)
def test_what_cannot_be_written_or_said_is_refused_before_code_is_run(
    folder, capsys, monkeypatch, options, says
):
    monkeypatch.chdir(folder)
    (folder / "it_runs.py").write_text("def describe():\n    raise ZeroDivisionError\n")
    assert main(["account", "it_runs:describe", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_description_s_code_imports_its_neighbours_whenever_it_likes(folder, capsys):
    (folder / "neighbour_of_it.py").write_text(
        "from tests.replaying.elsewhere import data, make_model\n"
    )
    (folder / "describes_it.py").write_text(
        "def rows():\n    import neighbour_of_it\n    return neighbour_of_it.data()\n"
        "def model():\n    from neighbour_of_it import make_model\n    return make_model()\n"
    )
    text = TOML.replace("tests.replaying.elsewhere:make_model", "describes_it:model")
    (folder / "run.toml").write_text(text.replace("tests.replaying.elsewhere:data",
                                                  "describes_it:rows"))  # fmt: skip
    before = list(sys.path)
    assert main(["account", str(folder / "run.toml"), "--quiet"]) == 0
    assert sys.path == before


def test_help_shows_a_description_that_works(folder, capsys):
    with pytest.raises(SystemExit):
        main(["account", "--help"])
    said = capsys.readouterr().out
    assert "opacus-pil account run.toml --out ledger.parquet" in said
    assert "expectation_bound" in said


def test_two_runs_in_a_description(tmp_path, capsys):
    for seed in (1, 2):
        for at, weights in trained(seed, steps=2).items():
            torch.save(weights, tmp_path / f"{seed}_{at}.pt")
    run = "{{0 = '{0}_0.pt', 1 = '{0}_1.pt'}}"
    text = TOML.replace('"run/*.pt"', f"[{run.format(1)}, {run.format(2)}]") + "steps = 2\n"
    (tmp_path / "two.toml").write_text(text)
    from opacus_pil.replaying import described_run

    found = described_run(tmp_path / "two.toml").training()
    account = replay(module=described()["module"], **found, orders=[4.0], levels=64)
    assert account.guarantee == "expectation_bound"
