"""`opacus-pil check`: a script that knows nothing of it, its words beside what was measured."""

import json
import sys
from pathlib import Path

import pytest

from opacus_pil.cli import main
from opacus_pil.commands.check import check_script

SCRIPTS = Path(__file__).parent / "scripts"
BROKEN = Path(__file__).parents[2] / "benchmarks" / "audit_scripts" / "digits.py"


@pytest.fixture(autouse=True)
def _nothing_stays():
    """The stub of torchvision must not be what another test imports."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "torchvision":
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")  # Opacus on short runs
@pytest.mark.slow
def test_a_script_like_opacus_own_example_is_consistent(capsys, tmp_path):
    out = tmp_path / "audit.json"
    code = main(
        ["check", str(SCRIPTS / "mnist.py"), "--canaries", "100", "--seed", "1", "--json", str(out),
         "--", "-n", "1", "-b", "100", "--delta", "1e-4"]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.startswith("Train Epoch: 1")
    assert "the script printed\n  | Train Epoch: 1" in said
    assert "conv1.weight" not in said  # tensors are named where something is wrong with them
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["verdict"] == "consistent"
    (training,) = found["trainings"]
    assert training["claim"] == [[1.0, 0.1, 10]]
    assert training["evidence"]["steps"] == 10
    assert {c["name"]: c["state"] for c in training["conformance"]["checks"]}["noise"] == "agrees"


def test_a_broken_script_is_a_red_flag_with_exit_code_1(capsys):
    arguments = ["--canaries", "60", "--seed", "1", "--quiet"]
    script = [str(BROKEN), "--", "--epochs", "1", "--fault", "noise_on_one_layer"]
    code = main(["check", *arguments, *script])
    said = capsys.readouterr().out
    assert code == 1
    assert "RED FLAG" in said
    assert "no noise at all on 3 of 4 tensors (0.bias, 2.weight, 2.bias)" in said
    assert not said.startswith("accuracy")  # --quiet
    assert "| accuracy" in said


def test_a_script_without_private_training_has_no_power_with_exit_code_3(capsys):
    assert main(["check", str(SCRIPTS / "quick.py")]) == 3
    assert "Opacus made no private optimizer" in capsys.readouterr().out


SCRIPT = """
import torch
from opacus import PrivacyEngine
from opacus_pil.datasets import load
from torch.utils.data import DataLoader, TensorDataset

digits = load("digits")
data = TensorDataset(digits.images.flatten(1), digits.labels)
own_loader = DataLoader(data, batch_size=64, shuffle=True)
model = torch.nn.Linear(64, 10)
sgd = torch.optim.SGD(model.parameters(), lr=0.5)
engine = PrivacyEngine()
model, optimizer, private_loader = engine.make_private(
    module=model, optimizer=sgd, data_loader=own_loader, noise_multiplier=1.0, max_grad_norm=1.0
)
for epoch in range(1):
    for x, y in private_loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
print("epsilon next")
print(engine.get_epsilon(1e-5))
"""


@pytest.mark.parametrize(
    ("right", "wrong", "code", "words"),
    [
        ("range(1)", "range(1)", 0, "CONSISTENT"),
        ("in private_loader", "in own_loader", 1, "never iterated while weights moved 29 times"),
        ("optimizer.step()", "sgd.step()", 1, "weights moved 29 times, the ledger counts 0"),
        ("range(1)", "range(0)", 3, "no private optimizer made a step: nothing to audit"),
    ],
    ids=["right", "own loader", "own optimizer", "no step"],
)
def test_what_make_private_returned_must_be_what_is_used(
    right, wrong, code, words, tmp_path, capsys
):
    assert right in SCRIPT
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace(right, wrong), encoding="utf-8")
    assert main(["check", str(script), "--canaries", "60", "--seed", "1"]) == code
    said = capsys.readouterr().out
    assert words in said
    assert "| epsilon next" in said  # also of a script that ended in Opacus's error
    assert ("without a step" in said) == (wrong in ("sgd.step()", "range(0)"))


def test_a_script_that_fails_is_one_line_with_exit_code_2(capsys):
    assert main(["check", str(SCRIPTS / "quick.py"), "--", "--code", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "quick.py to end well, got exit code 3" in error
    assert main(["check", str(SCRIPTS / "no_such_file.py")]) == 2
    assert "to be a Python file" in capsys.readouterr().err


def test_an_error_of_the_script_is_named_and_everything_is_put_back(capsys, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nprint('ε = 1')\nraise KeyError(sys.argv[1])\n")
    before = (list(sys.argv), list(sys.path), sys.stdout)
    assert main(["check", str(script), "--", "own"]) == 2
    assert "got KeyError: 'own'" in capsys.readouterr().err
    assert (list(sys.argv), list(sys.path), sys.stdout) == before


def test_the_script_sees_its_own_arguments_and_folder(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import beside, sys\nassert __name__ == '__main__'\n"
        "print('epsilon', beside.VALUE, sys.argv[1])\n"
    )
    result = check_script(script, arguments=["--x"], quiet=True)
    assert result.printed == ("epsilon 7 --x",)
    del sys.modules["beside"]


def test_help_says_what_exit_codes_mean(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    said = capsys.readouterr().out
    assert "opacus-pil check --delta 1e-5 train.py -- --epochs 3" in said
    assert "once in a thousand" in said
