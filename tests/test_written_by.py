"""Files that earlier commits wrote are read for ever, and say what they said then.

Each folder of `written_by` holds files and `expected.json`, which was written with them from the
objects themselves. They are never written again; `make.py` beside them says how they were made.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opacus_pil.accounting import PerInstanceAccountant
from opacus_pil.certificates import read_certificate, read_key, verify_certificate
from opacus_pil.certificates.sentences import OWN
from opacus_pil.files.ledger_table import LedgerTable
from opacus_pil.files.model_hash import model_hash
from opacus_pil.unlearning import CertifiedPlan, RequestQueue
from tests.written_by.readings import (
    ORDERS,
    Logistic,
    Training,
    hexes,
    of_accountant,
    of_training,
    weights,
)

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "written_by").glob("*/make.py"))
EXPECTED = {
    folder: json.loads((folder / "expected.json").read_text(encoding="utf-8")) for folder in FOLDERS
}
CHECKPOINTS = [(f, name) for f, read in EXPECTED.items() for name in read["checkpoints"]]
CERTIFICATES = [(f, name) for f, read in EXPECTED.items() for name in read["certificates"]]
GOAL = {
    "epsilon": 0.25, "delta": 1e-2, "method": "langevin", "max_steps": 500, "step_grid": 1
}  # fmt: skip

# Steps that repeat one kernel are kept as a count and one table, which is computed anew when a
# ledger is loaded: exp and log of another processor or numpy differ in the last digits, and a sum
# over 12 steps and a quadrature by less than a thousand of them.
LAST_DIGITS = 1e-12
FLOATS = ("epsilon", "spent", "worst_case", "group", "opacus_epsilon")
LABELS = ("label", "realised_label")


def same_label(found: str, written: str) -> bool:
    """Whether a label that is read may stand for the one that was written: old labels are kept."""
    return found == written


def assert_same(found: dict[str, Any], written: dict[str, Any]) -> None:
    """Hold what was read against what was written, entry by entry."""
    for name, value in found.items():
        if name in LABELS:
            assert same_label(value, written[name]), name
        elif name in FLOATS:
            np.testing.assert_allclose(
                floats(value), floats(written[name]), rtol=LAST_DIGITS, err_msg=name
            )
        else:  # stored as it is: to the bit
            assert value == written[name], name


def floats(values: list[str]) -> list[float]:
    return [float.fromhex(value) for value in values]


@pytest.fixture(autouse=True)
def _the_generators_stay_as_they_are() -> Iterator[None]:
    """A checkpoint brings the states of all global generators."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "name"), CHECKPOINTS, ids=lambda v: getattr(v, "name", v))
def test_a_checkpoint_brings_back_both_ledgers_and_the_rest_of_the_pass(folder, name):
    written = EXPECTED[folder]["checkpoints"][name]
    training = Training(written["policy"], mode=written["mode"], middle=written["middle"])
    rest = training.load(folder / name)
    assert rest["steps"] == written["steps"]
    assert_same(of_training(training), written)
    assert training.left() == written["left"]
    training.step(*next(iter(training.loader)))  # and the training goes on
    assert training.engine.per_instance.steps == written["steps"] + 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_weights_and_ledgers_are_read_without_the_optimizer(folder):
    name = "checkpoint-capped-hooks.pt"
    written = EXPECTED[folder]["checkpoints"][name]
    training = Training("capped")
    with pytest.warns(UserWarning, match="optimizer"):
        training.engine.load_checkpoint(path=folder / name, module=training.wrapped)
    assert weights(training.module) == written["weights"]
    assert_same(of_accountant(training.engine.per_instance), written)


# --- ledgers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["accountant.pt", "accountant-text-ids.pt"])
def test_a_ledger_is_read(folder, name):
    written = EXPECTED[folder][name]
    arrays = name == "accountant.pt"  # numpy's, which torch unpickles only if told to
    ids = None if arrays else written["ids"]
    accountant = PerInstanceAccountant(8, orders=ORDERS, levels=16, history=True, instance_ids=ids)
    accountant.load_state_dict(torch.load(folder / name, weights_only=not arrays))
    assert_same(of_accountant(accountant), written)
    accountant.step(
        indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.25, guarantee="estimate"
    )
    assert accountant.steps == written["steps"] + 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_ledger_table_is_read(folder):
    written = EXPECTED[folder]["ledger.parquet"]
    table = LedgerTable(folder / "ledger.parquet")
    assert sorted(table.columns) == sorted(written["columns"])
    assert len(table) == len(written["ids"])
    for number, name in enumerate(written["ids"]):
        (row,) = table.instance(name).to_dict("records")
        assert float(row["epsilon"]).hex() == written["epsilon"][number]
        assert row["forgotten"] == written["forgotten"][number]
        assert same_label(row["guarantee"], written["label"])
    highest = max(floats(written["epsilon"]))
    assert table.top(1)["epsilon"].tolist() == [highest]
    assert table.quantiles(by="label")["instances"].sum() == len(table)


# --- unlearning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "name"), CERTIFICATES, ids=lambda v: getattr(v, "name", v))
def test_a_certificate_is_read_and_holds(folder, name):
    written = EXPECTED[folder]["certificates"][name]
    record = read_certificate(folder / name)
    key = read_key(folder / f"{name}.key") if written["hashed"] else None
    report = verify_certificate(
        record, key=key, ids=written["ids"], model_sha256=written["model_after"]
    )
    assert report.holds, report
    unasked = {check.name for check in report.checks if check.passed is None}
    assert unasked == {"signature"} | (set() if written["hashed"] else {"key"}), report
    assert report.covers is True
    for field in ("steps", "method", "direction"):
        assert getattr(record, field) == written[field]
    assert record.certificate_class == type(record.certificate).__name__ == written["class"]
    # The words are generated; some certificates say one more by now: nobody chose after a look.
    told = [one for one in record.assumptions if not one.endswith(OWN["not_adaptive"])]
    assert told == [s for s in written["assumptions"] if not s.endswith(OWN["not_adaptive"])]
    assert hexes([record.epsilon]) == written["epsilon"]
    assert hexes([record.delta]) == written["delta"]
    assert verify_certificate(record, key=key, ids=["somebody else"]).covers is False


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_queue_is_read_and_served_on(folder, tmp_path):
    written = EXPECTED[folder]["requests"]
    requests = tmp_path / "requests"  # git keeps no mode, and serving writes
    shutil.copytree(folder / "requests", requests)
    queue = RequestQueue(requests)
    assert [
        {"id": r.request_id, "rows": list(r.rows), "state": r.state, "result": r.result}
        for r in queue.requests()
    ] == written["requests"]
    assert [[e.request_id, e.state] for e in queue.events()] == written["events"]

    trained = Logistic()  # what a new process has: the architecture, not the model
    engine = trained.unlearning(requests=requests)
    assert sorted(engine.forgotten) == written["rows forgotten"]
    trained.module = engine.module  # type: ignore[assignment]
    assert_same(of_training(trained), written)
    first = read_certificate(requests / "certificate-1.json")
    key = read_key(requests / "certificate-1.json.key")
    assert verify_certificate(first, key=key, ids=written["rows forgotten"]).holds
    assert first.model_after == model_hash(engine.module)

    (bob,) = engine.serve(seed=6, **GOAL)
    assert (bob.request_id, bob.state, bob.result["status"]) == ("bob", "done", "certified")
    second = read_certificate(requests / bob.result["certificate_file"])
    assert second.earlier_requests == 1
    assert second.model_before == first.model_after
    assert verify_certificate(second).holds
    assert sorted(engine.forgotten) == sorted([*written["rows forgotten"], *bob.rows])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_killed_run_goes_on(folder, tmp_path):
    written = EXPECTED[folder]["run"]
    shutil.copy(folder / "run" / "unlearning.pt", tmp_path)
    training = Training("last_seen")
    training.load(folder / "checkpoint-last_seen-hooks.pt")
    engine = training.unlearning()
    plan = engine.plan(written["forget"], steps=written["steps"])
    assert not isinstance(plan, CertifiedPlan)
    seen: list[int] = []
    result = engine.unlearn(
        plan, checkpoint_dir=tmp_path, on_step=lambda step, _: seen.append(step), seed=1
    )
    assert seen == list(range(written["done"] + 1, written["steps"] + 1))  # not from the start
    assert list(result.history[: written["done"] + 1]) == written["history"]
    assert result.steps == written["steps"]
    ledger = training.engine.per_instance
    assert ledger.steps == written["ledger steps"]
    assert same_label(ledger.guarantee, written["label"])
    found = training.engine.get_per_instance_epsilon(1e-5, indices=written["forget"]).epsilon
    np.testing.assert_allclose(  # they pay for no step of the run
        found, floats(written["epsilon of the forgotten"]), rtol=LAST_DIGITS
    )
    assert list(tmp_path.iterdir()) == []
