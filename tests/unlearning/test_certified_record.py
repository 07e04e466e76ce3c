"""From a certified run to a file that verifies; nothing else can become one."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opacus_pil import CertificateError
from opacus_pil.accounting.shown import rounded_up
from opacus_pil.certificates import (
    CertificateRecord,
    verify_certificate,
    write_certificate,
)
from opacus_pil.certificates.certificate_record import FIELDS, VERSION
from opacus_pil.cli import main
from opacus_pil.files.model_hash import model_hash
from opacus_pil.unlearning.result import certified_record
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
        # A seed of its own: the noise of the first run is in the model already.
        record = unlearning.unlearn(plan, seed=len(rows)).record(plain_ids=True)
    assert record.forgotten == (5, 7)
    assert record.earlier_requests == 1
    assert len(record.certificate.shifts) > record.training_steps == 300
    assert verify_certificate(record).holds


def test_what_the_engine_knows_of_earlier_requests_is_held_against_the_constants() -> None:
    unlearning = logistic_run(steps=60).unlearning()
    goal = {"epsilon": 2.0, "delta": DELTA, "method": "langevin", "max_steps": 10_000}
    first = unlearning.plan([3], **goal)
    unlearning.unlearn(first, seed=1)
    plan = unlearning.plan([5, 7], **goal)
    hashes = {"before": "0" * 64, "after": "1" * 64}
    record = certified_record(plan, **hashes, earlier_steps=first.steps, earlier_forgotten=1)
    assert (record.earlier_steps, record.earlier_forgotten) == (first.steps, 1)
    assert certified_record(plan, **hashes).earlier_steps == first.steps  # read off the constants
    for wrong in ({"earlier_steps": first.steps + 1}, {"earlier_forgotten": 2}):
        with pytest.raises(CertificateError, match="Expected the certificate of this run"):
            certified_record(plan, **hashes, **wrong)


def test_a_run_without_a_claim_cannot_become_a_certificate() -> None:
    run = network_run()
    unlearning = run.unlearning()
    plan = unlearning.plan([3], steps=1)
    result = unlearning.unlearn(plan)
    for thing in (plan, result, None):
        with pytest.raises(TypeError, match="Nothing is proved about such a run"):
            certified_record(thing, before="0" * 64, after="1" * 64)
    with pytest.raises(TypeError, match="got PredictedPlan"):
        result.record(plain_ids=True)


def test_a_plan_with_a_smaller_number_cannot_be_written(served) -> None:
    plan = dataclasses.replace(served.plan, epsilon=served.plan.epsilon / 2)
    with pytest.raises(CertificateError, match="Expected epsilon between"):
        certified_record(plan, before="0" * 64, after="1" * 64)
    with pytest.raises(CertificateError, match="says nothing"):
        dataclasses.replace(served.plan, epsilon=float("inf"))
    with pytest.raises(ValueError, match="model_before"):
        certified_record(served.plan, before="x", after="0" * 64)
    named = np.array([f"user {n}" for n in range(47)] + [47], dtype=object)
    record = certified_record(
        served.plan, before="0" * 64, after="1" * 64, instance_ids=named, plain_ids=True
    )
    assert record.forgotten == ("user 3", "user 5")
    with pytest.raises(ValueError, match="instance_ids"):
        certified_record(served.plan, before="0" * 64, after="1" * 64, instance_ids=np.arange(5))


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
        "forgotten", "key", "ids", "model",
    ]  # fmt: skip
    asked = len(names)
    assert [line.split()[:2] for line in lines[:asked]] == [["ok", name] for name in names]
    assert lines[asked].split()[:4] == ["--", "signature", "nobody", "signed"]
    assert lines[-1] == "The certificate holds."


def test_what_it_says_is_printed_in_generated_words(files, served, capsys) -> None:
    _, out, _ = verify(capsys, files / "cert.json")
    assert "Forgotten: 2 instances, named by keyed hashes." in out
    assert "Before: 300 steps of training, and no earlier request." in out
    shown = rounded_up(served.record.epsilon, digits=10)
    assert f"epsilon = {shown} at delta = 0.01; asked for was 2." in out
    for sentence in served.plan.certificate.assumptions:
        assert f"  - {sentence}" in out.splitlines()
    code, out, _ = verify(capsys, files / "cert.json", "--json")
    told = json.loads(out)
    assert code == 0
    assert [a["sentence"] for a in told["assumptions"]] == [*served.plan.certificate.assumptions]


def test_what_was_not_given_is_said_not_passed(files, capsys) -> None:
    code, out, _ = verify(capsys, files / "cert.json")
    assert code == 0
    assert re.search(r"^--   ids ", out, re.M)
    assert re.search(r"^--   model ", out, re.M)
    assert re.search(r"^ok   key ", out, re.M)  # it lies beside the certificate
    (files / "cert.json.key").unlink()
    code, out, _ = verify(capsys, files / "cert.json")
    assert code == 0
    assert re.search(r"^--   key ", out, re.M)


@pytest.mark.parametrize("ids", [["user 4"], ["user 3", "9"], ["\x1b[2J"]])
def test_an_id_that_is_not_in_it_exits_with_3_and_the_certificate_holds(ids, files, capsys) -> None:
    code, out, err = verify(capsys, files / "cert.json", "--ids", *ids)
    assert (code, err) == (3, "")
    assert "FAIL" not in out
    assert out.endswith(f"The certificate holds; this id is not in it: {ids[-1]!r}.\n")
    assert "\x1b" not in out
    code, out, _ = verify(capsys, files / "cert.json", "--json", "--ids", *ids)
    assert code == 3
    assert (json.loads(out)["holds"], json.loads(out)["covers"]) == (True, False)


def test_a_broken_certificate_that_does_not_have_the_id_exits_with_1(files, capsys) -> None:
    path = files / "cert.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "steps": content["steps"] + 1}), encoding="utf-8")
    code, out, _ = verify(capsys, path, "--ids", "user 4")
    assert code == 1
    assert out.endswith("The certificate does NOT hold.\n")


def test_another_model_exits_with_1(files, capsys) -> None:
    code, out, err = verify(capsys, files / "cert.json", "--model", files / "before.pt")
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
        ["cert.json", "--signed-by", "missing"], ["cert.json", "--signed-by", "cert.json"],
        ["cert.json", "--sign", "missing"], ["cert.json", "--sign", "cert.json"],
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
    assert "without a signature anybody may have written the file" in text
    assert "3 if it holds and an id asked for is not in it" in text


def test_verifying_without_a_model_needs_no_torch(files) -> None:
    code = (
        "import sys; from opacus_pil.cli import main\n"
        f"code = main(['verify', {str(files / 'cert.json')!r}])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


# --- signatures -----------------------------------------------------------------------------------


@pytest.fixture
def issuer(files):
    assert main(["key", "--out", str(files / "issuer")]) == 0
    return files / "issuer"


def test_a_certificate_is_signed_if_it_holds_and_says_by_whom(files, issuer, capsys) -> None:
    path, public = files / "cert.json", f"{issuer}.pub"
    capsys.readouterr()
    code, out, _ = verify(capsys, path, "--signed-by", public)
    assert code == 1  # nobody did
    assert "nobody signed it: anybody may have written this file" in out
    code, _, err = verify(capsys, path, "--sign", issuer)
    assert code == 0
    assert err.startswith(f"{path}: signed by the key ")
    code, out, err = verify(capsys, path, "--signed-by", public, "--ids", "user 3")
    assert (code, err) == (0, "")
    assert re.search(r"^ok   signature ", out, re.M)
    code, out, _ = verify(capsys, path)
    assert code == 0
    assert re.search(r"^--   signature .*whose that is was not asked", out, re.M)
    assert main(["key", "--out", str(files / "other")]) == 0
    capsys.readouterr()
    code, out, _ = verify(capsys, path, "--signed-by", files / "other.pub")
    assert code == 1
    assert re.search(r"^FAIL signature .*by another key", out, re.M)


def test_what_does_not_hold_is_not_signed(files, issuer, capsys) -> None:
    path = files / "cert.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "epsilon": content["epsilon"] / 2}), encoding="utf-8")
    before = path.read_bytes()
    code, _, err = verify(capsys, path, "--sign", issuer)
    assert code == 1
    assert err == f"{path}: not signed\n"
    assert path.read_bytes() == before


DOCS = (Path(__file__).parents[2] / "docs" / "signing.md").read_text(encoding="utf-8")


def test_the_documented_commands_run(files, served, capsys, monkeypatch) -> None:
    monkeypatch.chdir(files)
    (files / "cert.json").rename("certificate.json")
    (files / "cert.json.key").rename("certificate.json.key")
    (files / "after.pt").rename("unlearned.pt")
    blocks = re.findall(r"^```bash\n(.*?)^```$", DOCS, flags=re.M | re.S)
    text = "\n".join(reversed(blocks))  # the one that makes the key comes second
    lines = [line.split("#")[0].split() for line in text.splitlines() if line]
    commands = [line[1:] for line in lines if line[0] == "opacus-pil"]
    assert [command[0] for command in commands] == ["key", "verify", "verify", "verify"]
    codes = [main(["user 3" if a in ("3", "17") else a for a in c]) for c in commands]
    assert codes == [0, 0, 0, 0], capsys.readouterr().out


def test_the_documentation_says_what_holds_each_field() -> None:
    table = DOCS[DOCS.index("| field | held by |") :]
    named = {name for row in table.splitlines() if row.startswith("|")
             for name in re.findall(r"`(\w+)`", row.split("|")[1])}  # fmt: skip
    assert named >= {"format", "version", *FIELDS[VERSION]}
