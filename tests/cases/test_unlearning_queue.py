"""B5, C10, C12: rows in a queue are people; they stay the same people, and go by their names."""

import contextlib
import json
import shutil
import sqlite3

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from opacus_pil.certificates import read_certificate, read_key, verify_certificate
from opacus_pil.cli import main
from opacus_pil.errors import LedgerError, OpacusPilError
from opacus_pil.files.model_hash import model_hash
from opacus_pil.unlearning import RequestQueue
from opacus_pil.unlearning.planning import Planning
from opacus_pil.unlearning.requests import serving
from opacus_pil.unlearning.requests.server import Server

from .unlearning_models import DELTA, LANGEVIN, SIZE, classes, logistic, network, train

NAMES = [f"person {row}" for row in range(SIZE)]


def reordered(dataset, order):
    return TensorDataset(*(tensor[order] for tensor in dataset.tensors))


def engine(folder, *, order=None, steps=6, ids=None, **options):
    """As a process would build it: on these rows in this order, trained or not."""
    torch.manual_seed(0)
    dataset = classes() if order is None else reordered(classes(), order)
    given = {} if ids is None else {"instance_ids": ids}
    trained = network(dataset=dataset, steps=steps, **given, **options)
    return trained.unlearning(requests=folder)


# --- B5: the same people in another row order -----------------------------------------------------


def backwards():
    return torch.arange(SIZE).flip(0)


def two_swapped():
    order = torch.arange(SIZE)
    order[[3, 4]] = order[[4, 3]]
    return order


def rotated():
    return torch.arange(SIZE).roll(1)


@pytest.mark.parametrize("order", [backwards, two_swapped, rotated])
@pytest.mark.parametrize(("served", "steps"), [(False, 6), (True, 0)])
def test_a_queue_is_not_reopened_on_rows_in_another_order(order, served, steps, tmp_path):
    first = engine(tmp_path / "requests")
    first.submit([3], request_id="ada")
    if served:
        first.serve(steps=2)
    with pytest.raises(LedgerError, match="another order"):
        engine(tmp_path / "requests", order=order(), steps=steps)
    again = engine(tmp_path / "requests", steps=steps)  # the rows as they were
    assert again.requests.get("ada").state == ("done" if served else "queued")


def test_other_contents_are_not_served_either(tmp_path):
    first = engine(tmp_path / "requests")
    first.submit([3], request_id="ada")
    first.dataset.tensors[0][5].mul_(2.0)
    with pytest.raises(LedgerError, match="other contents"):
        first.serve(steps=2)
    assert first.requests.get("ada").state == "queued"


def test_data_that_change_while_a_batch_is_served_leave_nobody_running(tmp_path, monkeypatch):
    first = engine(tmp_path / "requests")
    first.submit([3], request_id="ada")
    check = serving.require_runnable

    def changed(state, plan, **options):
        state.data.dataset.tensors[0][5].mul_(2.0)
        return check(state, plan, **options)

    monkeypatch.setattr(serving, "require_runnable", changed)
    with pytest.raises(LedgerError, match="other contents"):
        first.serve(steps=2)
    assert first.requests.get("ada").state == "planned"
    assert [e.state for e in first.requests.events("ada")] == [
        "queued", "planned", "running", "planned"
    ]  # fmt: skip
    assert first.forgotten == frozenset()
    monkeypatch.undo()
    first.dataset.tensors[0][5].div_(2.0)
    assert first.serve()[0].state == "done"


def test_an_engines_state_belongs_to_its_data():
    state = _unlearned().state_dict()
    torch.manual_seed(0)
    other = network(dataset=reordered(classes(), backwards()), steps=0).unlearning()
    with pytest.raises(LedgerError, match="another order"):
        other.load_state_dict(state)
    same = network(steps=0).unlearning()
    same.load_state_dict(state)
    assert same.forgotten == {3}


def _unlearned():
    unlearning = network().unlearning()
    unlearning.unlearn(unlearning.plan([3], steps=2), seed=0)
    return unlearning


class Unreadable(Dataset):
    def __init__(self, inner):
        self._rows = lambda: inner

    def __len__(self):
        return SIZE

    def __getitem__(self, row):
        return self._rows()[row]


@pytest.mark.parametrize("ids", [list(reversed(NAMES)), NAMES[1:] + NAMES[:1], None])
def test_ids_in_another_order_are_noticed_where_the_data_cannot_be_read(ids, tmp_path):
    def built(names):
        torch.manual_seed(0)
        given = {} if names is None else {"instance_ids": names}
        return network(dataset=Unreadable(classes()), **given).unlearning(
            requests=tmp_path / "requests"
        )

    built(NAMES).submit(["person 3"], request_id="ada")
    with pytest.raises(LedgerError, match="instance_ids"):
        built(ids)


# --- C12: own ids ---------------------------------------------------------------------------------


def test_text_ids_go_through_the_queue_into_the_certificate_and_its_verification(tmp_path, capsys):
    folder = tmp_path / "requests"
    unlearning = logistic(instance_ids=NAMES).unlearning(requests=folder)
    request = unlearning.submit(["person 7", "person 3"], request_id="ada")
    assert request.rows == (3, 7)
    assert request.ids == ("person 3", "person 7")
    (ada,) = unlearning.serve(**{**LANGEVIN, "epsilon": 1.0})
    assert ada.ids == ("person 3", "person 7")
    assert ada.result["status"] == "certified"
    path = folder / ada.result["certificate_file"]
    report = verify_certificate(
        read_certificate(path), key=read_key(f"{path}.key"), ids=["person 3", "person 7"],
        model_sha256=model_hash(unlearning.module),
    )  # fmt: skip
    assert report.holds, report
    assert report.covers is True
    assert main(["verify", str(path), "--ids", "person 3", "person 7"]) == 0
    assert main(["verify", str(path), "--ids", "person 4"]) == 3
    capsys.readouterr()


@pytest.mark.parametrize("ids", [NAMES, np.arange(100, 100 + SIZE), np.array(NAMES, dtype=object)])
def test_every_call_takes_ids_and_rows_by_name(ids, tmp_path):
    unlearning = engine(tmp_path / "requests", ids=ids, policy="worst_case", history=True)
    one, other = list(ids)[2], list(ids)[5]
    by_ids, by_rows = unlearning.plan([other, one], steps=2), unlearning.plan(rows=[2, 5], steps=2)
    assert by_ids.forget_set.tolist() == by_rows.forget_set.tolist() == [2, 5]
    assert by_ids.ids == by_rows.ids == (one, other)
    assert all(type(name) in (int, str) for name in by_ids.ids)
    mask = np.isin(np.arange(SIZE), [2, 5])
    assert unlearning.plan(mask, steps=2).ids == by_ids.ids
    assert unlearning.mean_log_loss([one]) == unlearning.mean_log_loss(rows=[2])
    assert unlearning.submit([one], request_id="a").rows == (2,)
    assert unlearning.submit(rows=[5], request_id="b").ids == (other,)
    for wrong in ([2], ["nobody"]):
        with pytest.raises(ValueError, match="that nobody has"):
            unlearning.plan(wrong, steps=2)
        with pytest.raises(ValueError, match="that nobody has"):
            unlearning.submit(wrong, request_id="c")
    for both in ({}, {"forget": [one], "rows": [2]}):
        with pytest.raises(TypeError, match="forget or rows="):
            unlearning.plan(both.pop("forget", None), steps=2, **both)
    assert {r.state for r in unlearning.serve(steps=2)} == {"done"}
    assert [r.ids for r in unlearning.requests.requests()] == [(one,), (other,)]


def test_ids_of_an_engine_without_a_ledger():
    trained = network()
    unlearning = trained.unlearning(
        privacy_engine=None, instance_ids=NAMES, training_steps=6, batch_size=8
    )
    plan = unlearning.plan(["person 4"], steps=1, method="finetuning")
    assert plan.forget_set.tolist() == [4]
    assert unlearning.unlearn(plan).plan.ids == ("person 4",)
    with pytest.raises(ValueError, match="person 4"):
        unlearning.plan(["person 4"], steps=1, method="finetuning")
    with pytest.raises(ValueError, match="PerInstancePrivacyEngine"):
        trained.unlearning(instance_ids=NAMES)
    with pytest.raises(ValueError, match="one id per row"):
        trained.unlearning(
            privacy_engine=None, instance_ids=NAMES[1:], training_steps=6, batch_size=8
        )


def test_a_record_names_the_ids_of_the_engine():
    unlearning = network(instance_ids=NAMES).unlearning()
    result = unlearning.unlearn(unlearning.plan(["person 9"], steps=2, delta=DELTA))
    content = result.record(plain_ids=True).content()
    assert content["forgotten"] == ["person 9"]
    rows = network().unlearning()
    result = rows.unlearn(rows.plan([9], steps=2, delta=DELTA))
    assert result.record(plain_ids=True).content()["forgotten"] == [9]


def test_ids_in_a_plan_cannot_be_edited():
    from dataclasses import replace

    unlearning = network(instance_ids=NAMES).unlearning()
    plan = unlearning.plan(["person 9"], steps=2, delta=DELTA)
    with pytest.raises(ValueError, match="in the plan too"):
        unlearning.unlearn(replace(plan, ids=("person 1",)))


def test_a_queue_of_an_earlier_release_is_read_and_gets_ids(tmp_path):
    folder = tmp_path / "requests"
    RequestQueue(folder).submit("old", [1, 2])
    with contextlib.closing(sqlite3.connect(folder / "requests.db")) as db:
        db.execute("DROP TABLE instance_ids")
        db.execute("DROP TABLE data_set")
        db.commit()
    queue = RequestQueue(folder)
    assert queue.get("old").ids == (1, 2)
    assert queue.data is None
    unlearning = engine(folder, ids=NAMES)
    assert unlearning.submit(["person 4"], request_id="new").ids == ("person 4",)
    assert [r.ids for r in queue.requests()] == [(1, 2), ("person 4",)]
    json.dumps(queue.data)
    with pytest.raises(LedgerError, match="another order"):
        engine(folder, order=backwards(), ids=NAMES)


# --- C10: nothing half-done -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Per-instance losses")
@pytest.mark.parametrize("goal", [{"steps": 2}, {"steps": 2, "delta": DELTA}, LANGEVIN])
def test_requests_of_a_training_that_cannot_be_run_again_wait(goal, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(SIZE, 5)
    x = x / x.norm(dim=1, keepdim=True)
    criterion = nn.BCEWithLogitsLoss()

    def backward(step, wrapped, batch):
        criterion(wrapped(batch[0]).squeeze(1), batch[1]).backward()

    trained = train(
        nn.Linear(5, 1), TensorDataset(x, (x[:, 0] > 0).float()), criterion=criterion,
        backward=backward, batch_size=SIZE,
    )  # fmt: skip
    trained.arguments["feature_norm"] = 1.0
    unlearning = trained.unlearning(requests=tmp_path / "requests")
    unlearning.submit([3], request_id="ada")
    with pytest.raises(OpacusPilError, match="loss_of"):
        unlearning.serve(**goal)
    assert unlearning.requests.get("ada").state == "queued"

    def loss_of(module, batch):
        outputs = module(batch[0]).squeeze(1)
        return nn.BCEWithLogitsLoss(reduction="none")(outputs, batch[1])

    cured = trained.unlearning(
        requests=tmp_path / "requests", criterion=None, loss_of=loss_of, feature_norm=None
    )
    (ada,) = cured.serve(steps=2)
    assert ada.state == "done"


def test_a_refusal_after_planning_fails_the_request_and_the_next_one_goes_on(tmp_path, monkeypatch):
    from opacus_pil.errors import CertificateError

    unlearning = engine(tmp_path / "requests")
    unlearning.submit([3], request_id="ada")
    unlearning.submit([4], request_id="bob")
    planned, calls = Planning.plan, []

    def refuses(self):
        calls.append(self)
        if len(calls) == 2:  # whoever takes over a batch plans it again before it runs
            raise CertificateError("Expected another world, got this one. Wait.")
        return planned(self)

    with monkeypatch.context() as dying:
        dying.setattr(Planning, "plan", refuses)
        dying.setattr(Server, "run", lambda self, batch: 1 / 0)  # ends between plan and run
        with pytest.raises(ZeroDivisionError):
            unlearning.serve(steps=2, max_batch=1)
        assert unlearning.requests.get("ada").state == "planned"
    monkeypatch.setattr(Planning, "plan", refuses)
    ada, bob = unlearning.serve(steps=2, max_batch=1)
    assert (ada.state, ada.result["reason"]) == (
        "failed", "Expected another world, got this one. Wait.",
    )  # fmt: skip
    assert bob.state == "done"
    assert "running" not in [e.state for e in unlearning.requests.events("ada")]
    shutil.rmtree(tmp_path / "requests")
