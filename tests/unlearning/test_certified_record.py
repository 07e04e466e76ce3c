"""From a certified run to a file that verifies; nothing else can become one."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from opacus_pil import CertificateError
from opacus_pil.certificates import (
    CertificateRecord,
    verify_certificate,
    write_certificate,
)
from opacus_pil.cli import main
from opacus_pil.unlearning.certified_record import certified_record
from opacus_pil.unlearning.model_hash import model_hash
from tests.unlearning.runs import DELTA, logistic_run, network_run


@dataclasses.dataclass
class Served:
    plan: object
    record: CertificateRecord
    before: dict
    after: dict


@pytest.fixture(scope="module")
def served() -> Served:
    run = logistic_run()
    unlearning = run.unlearning()
    before = {name: value.clone() for name, value in unlearning.module.state_dict().items()}
    plan = unlearning.plan([3, 5], epsilon=2.0, delta=DELTA, method="langevin")
    result = unlearning.unlearn(plan, seed=1)
    record = result.record(instance_ids=[f"user {n}" for n in range(48)])
    return Served(plan, record, before, result.module.state_dict())


@pytest.fixture
def files(served, tmp_path):
    write_certificate(served.record, path=tmp_path / "cert.json")
    torch.save(served.after, tmp_path / "after.pt")
    torch.save(served.before, tmp_path / "before.pt")
    return tmp_path


def test_the_record_says_what_was_run(served) -> None:
    record, plan = served.record, served.plan
    assert (record.epsilon, record.steps, record.delta) == (plan.epsilon, plan.steps, plan.delta)
    assert record.epsilon <= record.target_epsilon == 2.0
    assert record.training_steps == 300
    assert record.certificate == plan.certificate
    assert (record.method, record.direction) == ("langevin", "both")
    assert set(record.software) == {"opacus_pil", "python", "torch", "opacus", "numpy", "scipy"}
    assert record.software["torch"] == torch.__version__
    assert record.model_before == model_hash(served.before)
    assert verify_certificate(
        record, model_sha256=model_hash(served.after), key=record.key, ids=["user 3", "user 5"]
    ).holds


def test_a_second_request_verifies_too() -> None:
    run = logistic_run()
    unlearning = run.unlearning()
    for rows in ([3], [5, 7]):
        plan = unlearning.plan(rows, epsilon=0.5, delta=DELTA, method="langevin")
        record = unlearning.unlearn(plan, seed=1).record(plain_ids=True)
    assert record.forgotten == (5, 7)
    assert record.earlier_requests == 1
    assert len(record.certificate.shifts) > record.training_steps == 300
    assert verify_certificate(record).holds


def test_a_run_without_a_claim_cannot_become_a_certificate() -> None:
    run = network_run()
    unlearning = run.unlearning()
    plan = unlearning.plan([3], steps=1)
    result = unlearning.unlearn(plan)
    for thing in (plan, result, None):
        with pytest.raises(TypeError, match="Nothing is proved about such a run"):
            certified_record(thing, before="0" * 64, after="0" * 64)
    with pytest.raises(TypeError, match="got PredictedPlan"):
        result.record(plain_ids=True)


def test_a_plan_with_a_smaller_number_cannot_be_written(served) -> None:
    plan = dataclasses.replace(served.plan, epsilon=served.plan.epsilon / 2)
    with pytest.raises(CertificateError, match="Expected epsilon between"):
        certified_record(plan, before="0" * 64, after="0" * 64)
    with pytest.raises(CertificateError, match="says nothing"):
        dataclasses.replace(served.plan, epsilon=float("inf"))
    with pytest.raises(ValueError, match="model_before"):
        certified_record(served.plan, before="x", after="0" * 64)
    with pytest.raises(ValueError, match="instance_ids"):
        certified_record(served.plan, before="0" * 64, after="0" * 64, instance_ids=np.arange(5))


# --- the command ----------------------------------------------------------------------------------


def verify(capsys, *arguments):
    code = main(["verify", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_true_certificate_exits_with_0(files, capsys) -> None:
    code, out, err = verify(
        capsys, files / "cert.json", "--model", files / "after.pt", "--ids", "user 3"
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    names = [
        "checksum", "constants", "assumptions", "direction", "epsilon", "target", "run",
        "forgotten", "ids", "model",
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", name] for name in names]
    assert lines[-1] == "The certificate holds."


def test_what_was_not_given_is_said_not_passed(files, capsys) -> None:
    code, out, _ = verify(capsys, files / "cert.json")
    assert code == 0
    assert re.search(r"^--   ids ", out, re.M)
    assert re.search(r"^--   model ", out, re.M)


@pytest.mark.parametrize(
    "arguments", [["--model", "before.pt"], ["--ids", "user 4"], ["--ids", "user 3", "9"]]
)
def test_another_model_or_instance_exits_with_1(arguments, files, capsys) -> None:
    paths = [files / a if a.endswith(".pt") else a for a in arguments]
    code, out, err = verify(capsys, files / "cert.json", *paths)
    assert (code, err) == (1, "")
    assert len(re.findall("^FAIL", out, re.M)) == 1
    assert out.endswith("The certificate does NOT hold.\n")


def test_an_edited_number_exits_with_1(files, capsys) -> None:
    path = files / "cert.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["epsilon"] /= 2
    path.write_text(json.dumps(content), encoding="utf-8")
    code, out, _ = verify(capsys, path)
    assert code == 1
    assert re.search(r"^FAIL checksum", out, re.M)
    assert re.search(r"^FAIL epsilon", out, re.M)


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.json"], ["after.pt"], ["."],
        ["cert.json", "--model", "cert.json"], ["cert.json", "--model", "missing.pt"],
        ["cert.json", "--key", "cert.json"], ["cert.json", "--key", "missing", "--ids", "a"],
    ],
)  # fmt: skip
def test_an_unusable_file_exits_with_2_in_one_line(arguments, files, capsys) -> None:
    head, *rest = arguments
    rest = [files / a if a[0] != "-" and a != "a" else a for a in rest]
    code, out, err = verify(capsys, files / head, *rest)
    assert (code, out) == (2, "")
    assert err.startswith("opacus-pil: error: ")
    assert err.count("\n") == 1


def test_help_shows_a_command_and_says_what_it_cannot_see(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["verify", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "opacus-pil verify certificate.json --model unlearned.pt --ids 3 17" in text
    assert "there is no signature" in text


def test_verifying_without_a_model_needs_no_torch(files) -> None:
    code = (
        "import sys; from opacus_pil.cli import main\n"
        f"code = main(['verify', {str(files / 'cert.json')!r}])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
