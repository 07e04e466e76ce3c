"""Serving the queue: batches, failures, two servers, a reader beside, and what is left behind."""

import contextlib
import math
import sqlite3
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn as nn

from opacus_pil.certificates import (
    ContractionCertificate,
    NoisyFineTuningCertificate,
    read_certificate,
    verify_certificate,
)
from opacus_pil.errors import LedgerError
from opacus_pil.files.container import load_state
from opacus_pil.files.model_hash import model_hash
from opacus_pil.unlearning import run, saved_state, state
from opacus_pil.unlearning.planning import Planning
from opacus_pil.unlearning.requests import RequestQueue, serving

from . import kill_target
from .kill_target import SIZE, blank_engine, trained_engine
from .processes import CONTEXT
from .runs import DELTA, logistic_run, network_run, three_classes


@pytest.fixture
def dataset():
    return three_classes(SIZE)


@pytest.fixture
def engine(dataset, tmp_path):
    return trained_engine(dataset, requests=tmp_path / "requests")


def snapshot(engine):
    """Everything that serving may change, in the engine and in its folder."""
    state = engine.state_dict()
    folder = engine.requests.folder
    with contextlib.closing(sqlite3.connect(folder / "requests.db")) as db:
        rows = [line for line in db.iterdump() if '"served"' not in line]  # who looked in last
    return {"state": state, "database": rows, "states": sorted(folder.glob("state-*"))}


def assert_unchanged(engine, before):
    now = snapshot(engine)
    assert now["database"] == before["database"]
    assert now["states"] == before["states"]
    assert_same_state(now["state"], before["state"])


def assert_same_state(first, second):
    assert model_hash(first["module"]) == model_hash(second["module"])
    assert {k: v for k, v in first.items() if k not in ("module", "ledgers")} == {
        k: v for k, v in second.items() if k not in ("module", "ledgers")
    }
    ledgers = [state["ledgers"]["per_instance"]["ledger"] for state in (first, second)]
    for key, value in ledgers[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, ledgers[1][key]), key
        else:
            assert str(value) == str(ledgers[1][key]), key


# --- batches --------------------------------------------------------------------------------------


def test_requests_are_batched_and_an_instance_is_forgotten_once(engine):
    engine.submit([3, 7], request_id="ada")
    engine.submit([7, 9], request_id="bob")
    charged = engine._state.ledger.steps
    done = engine.serve(steps=6)
    assert [request.request_id for request in done] == ["ada", "bob"]
    assert engine.forgotten == {3, 7, 9}
    assert engine._state.ledger.steps == charged + 6  # one run for both
    for request in done:
        assert request.state == "done"
        assert request.result["steps"] == 6
        assert request.result["rows_in_batch"] == 3
        assert request.result["status"] == "predicted"
        assert request.result["epsilon"] is None  # nothing is claimed
        assert request.result["certificate"] is None
    assert engine.serve(steps=6) == []


def test_one_after_the_other_and_rows_that_were_forgotten_before(engine):
    engine.submit([3, 7], request_id="ada")
    engine.submit([7], request_id="bob")
    engine.submit([7, 9], request_id="cyd")
    charged = engine._state.ledger.steps
    ada, bob, cyd = engine.serve(steps=4, max_batch=1)
    assert engine._state.ledger.steps == charged + 8  # nothing is run for bob
    assert [r.result["rows_in_batch"] for r in (ada, bob, cyd)] == [2, 0, 1]
    assert bob.result["status"] == "forgotten before"
    assert bob.result["steps"] == 0
    assert "epsilon" not in bob.result
    assert len({r.result["state_file"] for r in (ada, bob, cyd)}) == 2
    assert engine.forgotten == {3, 7, 9}


def test_the_same_seed_gives_the_same_model_and_another_another(dataset, tmp_path):
    def served(name, seed):
        engine = trained_engine(dataset, requests=tmp_path / name)
        engine.submit([3], request_id="ada")
        torch.seed()  # must not matter: dropout draws from a run's own seed
        engine.serve(steps=5, seed=seed)
        return model_hash(engine.module)

    first = served("a", 1)
    assert served("b", 1) == first
    assert served("c", 2) != first


def test_a_batch_is_planned_once_and_its_model_read_twice(engine, monkeypatch):
    """Before it is planned and after it has run; every other check compares what was read then.

    And once before the first model is put on disk, to be served from by whoever comes.
    """
    called = Counter()

    def counted(name, function):
        def call(*arguments, **options):
            called[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(Planning, "plan", counted("plan", Planning.plan))
    for module in (state, run, saved_state):
        monkeypatch.setattr(module, "model_hash", counted("hash", model_hash))
    for number in range(3):
        engine.submit([number, number + 10], request_id=str(number))
    before = model_hash(engine.module)
    assert len(engine.serve(steps=2, max_batch=1)) == 3
    assert called == {"plan": 3, "hash": 1 + 6}
    assert engine._state.model_hash == model_hash(engine.module) != before


# --- what cannot be served ------------------------------------------------------------------------


def test_weights_that_somebody_moved_are_not_served(engine):
    engine.submit([3], request_id="ada")
    with torch.no_grad():
        next(engine.module.parameters()).add_(1.0)
    with pytest.raises(LedgerError, match="got other weights"):
        engine.serve(steps=2)
    assert engine.requests.get("ada").state == "queued"
    assert engine.forgotten == frozenset()


def test_who_has_no_plan_fails_with_the_reason_and_the_others_go_on(tmp_path):
    run = logistic_run(steps=60)
    engine = run.unlearning(requests=tmp_path / "requests")
    goal = {"epsilon": 1.2, "delta": DELTA, "method": "langevin", "max_steps": 100, "step_grid": 1}
    caps = run.engine.per_instance.caps
    light = np.argsort(caps)[:2]
    heavy = np.argsort(caps)[-30:]
    engine.submit(light[:1], request_id="light")
    engine.submit(heavy, request_id="heavy")
    engine.submit(light[1:], request_id="other")
    results = {request.request_id: request for request in engine.serve(**goal)}
    assert results["heavy"].state == "failed"
    assert "retrain instead" in results["heavy"].result["reason"]
    assert [results[name].state for name in ("light", "other")] == ["done", "done"]
    assert engine.forgotten == set(light.tolist())
    with pytest.raises(ValueError, match="other ones"):
        engine.submit(heavy[:1], request_id="heavy")
    assert engine.submit(heavy, request_id="heavy").state == "failed"  # stays so
    again = engine.submit(heavy, request_id="heavy, again")
    assert again.state == "queued"
    assert engine.serve(steps=3, method="langevin")[0].state == "done"


def test_rows_that_the_data_set_does_not_have_and_all_of_them(engine):
    before = snapshot(engine)
    for rows, message in (
        ([SIZE], f"forget in .0, {SIZE - 1}."),
        ([-1], "forget in"),
        (range(SIZE), "leaves something"),
        ([], "at least one row"),
        ([2, 2], "without repetition"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(rows, request_id="x")
    assert_unchanged(engine, before)
    # A process without the model cannot know: the server finds out, and goes on with the others.
    queue = RequestQueue(engine.requests.folder)
    queue.submit("outside", [3, SIZE])
    queue.submit("ada", [3])
    queue.submit("everyone", range(SIZE))
    queue.submit("the others", range(5, SIZE))
    queue.submit("the rest", range(5))
    results = {request.request_id: request for request in engine.serve(steps=2)}
    assert "which the data set does not have" in results["outside"].result["reason"]
    assert "Delete the model" in results["everyone"].result["reason"]
    assert "Delete the model" in results["the rest"].result["reason"]
    assert [results[name].state for name in ("ada", "the others")] == ["done", "done"]
    assert engine.forgotten == {3, *range(5, SIZE)}


def test_arguments_that_make_no_plan_cost_nobody_anything(engine):
    engine.submit([3], request_id="ada")
    engine.serve(steps=1)
    engine.submit([4], request_id="bob")
    before = snapshot(engine)
    for arguments in ({}, {"steps": 3, "epsilon": 1.0}, {"steps": -1}, {"steps": 2, "method": "x"}):
        with pytest.raises(ValueError, match="Expected"):
            engine.serve(**arguments)
        assert_unchanged(engine, before)
    with pytest.raises(ValueError, match="max_batch"):
        engine.serve(steps=1, max_batch=0)
    assert engine.serve(steps=1)[0].state == "done"


def test_numpy_numbers_make_the_same_goal(engine):
    engine.submit([3], request_id="ada")
    assert engine.serve(steps=np.int64(3), step_grid=np.int32(1))[0].result["steps"] == 3


def test_retraining_is_served_where_the_engine_can_retrain(dataset, tmp_path):
    def make_model():
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        return module, torch.optim.SGD(module.parameters(), lr=0.5)

    engine = trained_engine(dataset, requests=tmp_path / "a")
    engine.submit([3], request_id="ada")
    before = snapshot(engine)
    with pytest.raises(ValueError, match="make_model"):
        engine.serve(method="retraining")
    assert_unchanged(engine, before)
    engine = trained_engine(dataset, requests=tmp_path / "b", make_model=make_model)
    engine.submit([3], request_id="ada")
    (ada,) = engine.serve(method="retraining", seed=1)
    assert ada.state == "done"
    assert ada.result["epsilon"] is None
    assert ada.result["method"] == "retraining"
    assert engine.forgotten == {3}


def test_an_engine_with_a_queue_is_served_and_not_run_past_it(engine):
    with pytest.raises(ValueError, match="submit and serve"):
        engine.unlearn(engine.plan([3], steps=2))
    plain = network_run().unlearning()
    for call in (
        lambda: plain.submit([1], request_id="x"), lambda: plain.serve(steps=1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="requests=folder"):
            call()


def test_a_failing_run_changes_nothing_and_is_run_again(engine, monkeypatch):
    """A full disk, an interrupt, a row that cannot be read: the engine is the one served before."""
    engine.submit([3], request_id="ada")
    engine.serve(steps=2, seed=1)
    engine.submit([4], request_id="bob")
    before = engine.state_dict()
    served = engine.requests.state_file
    with monkeypatch.context() as broken:

        def full(path, data):
            raise OSError("no space left")

        broken.setattr(serving, "write_atomic", full)
        with pytest.raises(OSError, match="no space left"):
            engine.serve(steps=2, seed=1)
    assert_same_state(engine.state_dict(), before)
    assert engine.requests.state_file == served
    assert engine.requests.get("bob").state == "running"
    (bob,) = engine.serve(steps=99, seed=2)  # as it was planned, whatever is asked for now
    assert bob.result["steps"] == 2


def test_a_database_that_is_locked_at_the_commit_leaves_the_engine_as_served(engine, monkeypatch):
    engine.serve(steps=1)
    engine.submit([4], request_id="bob")
    before = engine.state_dict()
    write = serving._write_state

    def write_and_lock(*arguments):
        name = write(*arguments)
        stack.enter_context(contextlib.closing(
            sqlite3.connect(engine.requests.folder / "requests.db", isolation_level=None)
        )).execute("BEGIN IMMEDIATE")  # fmt: skip
        return name

    engine.requests._database._timeout = 0.0
    with contextlib.ExitStack() as stack, monkeypatch.context() as locked:
        locked.setattr(serving, "_write_state", write_and_lock)
        with pytest.raises(LedgerError, match="another process has locked"):
            engine.serve(steps=3)
        assert_same_state(engine.state_dict(), before)
    assert engine.serve(steps=3)[0].state == "done"
    assert len(list(engine.requests.folder.glob("state-*"))) == 1  # the orphan is gone


# --- certified ------------------------------------------------------------------------------------


def test_noisy_fine_tuning_is_served_by_its_certificate(tmp_path):
    certificate = NoisyFineTuningCertificate(1.5, 0.5, 0.1, 0.2, [3.0, 2.0, 4.0])
    engine = network_run().unlearning(requests=tmp_path / "requests")
    engine.submit([3, 7], request_id="ada")
    (ada,) = engine.serve(
        steps=3, delta=DELTA, method="noisy_finetuning", certificate=certificate, seed=1
    )
    assert ada.result["status"] == "certified"
    assert ada.result["epsilon"] == certificate.epsilon(delta=DELTA, steps=3)
    record = read_certificate(engine.requests.folder / ada.result["certificate_file"])
    assert record.certificate == certificate
    assert verify_certificate(record, model_sha256=model_hash(engine.module)).holds
    with pytest.raises(TypeError, match="one forget set"):
        engine.serve(steps=3, delta=DELTA, certificate=ContractionCertificate(0.9, 1.0))


def test_certified_requests_carry_a_certificate_that_counts_all_before_them(tmp_path):
    run = logistic_run(steps=60)
    goal = {"epsilon": 2.0, "delta": DELTA, "method": "langevin", "max_steps": 10_000}
    engine = run.unlearning(requests=tmp_path / "requests")
    engine.submit([0], request_id="ada")
    engine.submit([5], request_id="bob")
    first = model_hash(engine.module)
    ada, bob = engine.serve(**goal, max_batch=1, seed=1)

    # Another way to the same numbers: the engine alone, plan by plan.
    alone = logistic_run(steps=60).unlearning()
    for request, rows in ((ada, [0]), (bob, [5])):
        plan = alone.plan(rows, **goal)
        alone.unlearn(plan, seed=1 + rows[0])  # the noise of a seed hides once
        assert request.result["status"] == "certified"
        assert request.result["steps"] == plan.steps
        assert request.result["epsilon"] == plan.epsilon <= 2.0
        assert request.result["delta"] == DELTA
        assert request.result["adaptive"].startswith("not covered")
    records = [
        read_certificate(engine.requests.folder / request.result["certificate_file"])
        for request in (ada, bob)
    ]
    assert [record.earlier_requests for record in records] == [0, 1]
    assert records[0].model_before == first
    assert records[0].model_after == records[1].model_before
    assert records[1].model_after == model_hash(engine.module)
    assert verify_certificate(records[0]).holds
    assert verify_certificate(records[1], model_sha256=model_hash(engine.module)).holds
    assert math.isfinite(records[1].epsilon)


# --- other processes ------------------------------------------------------------------------------


def test_a_new_process_goes_on_with_the_served_model_not_the_trained_one(engine, dataset):
    engine.submit([3, 7], request_id="ada")
    engine.serve(steps=6, seed=1)
    other = blank_engine(dataset, requests=engine.requests.folder)
    assert_same_state(other.state_dict(), engine.state_dict())
    assert other.forgotten == {3, 7}
    # Both go on to the same bits, and the first one notices that the second one served.
    other.submit([9], request_id="bob")
    other.serve(steps=3, seed=1)
    assert engine.serve(steps=3) == []
    assert_same_state(other.state_dict(), engine.state_dict())


def test_a_state_is_safe_to_load_and_fits_its_own_engine_only(engine, dataset, tmp_path):
    engine.submit([3], request_id="ada")
    engine.serve(steps=2)
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = blank_engine(dataset)
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), engine.state_dict())

    before = other.state_dict()
    trained = trained_engine(dataset)
    trained._state.training_steps += 1
    damaged = dict(state["module"])
    del damaged["0.bias"]
    groups = [{**state["param_groups"][0], "params": [0]}]
    for target, changes, message in (
        (other, {"num_instances": SIZE + 1}, "num_instances"),
        (other, {"kernel": {**state["kernel"], "noise_multiplier": 2.0}}, "kernel"),
        (other, {"optimizer": "Adam"}, "optimizer"),
        (other, {"module": damaged}, "this module and optimizer"),
        (other, {"param_groups": groups}, "this module and optimizer"),
        (trained, {}, "another training"),
    ):
        with pytest.raises(LedgerError, match=message):
            target.load_state_dict({**state, **changes})
    with pytest.raises(LedgerError, match="keys"):
        other.load_state_dict({})
    assert_same_state(other.state_dict(), before)


def test_a_served_state_that_is_gone_or_damaged_is_not_replaced_by_the_trained_one(engine, dataset):
    engine.submit([3], request_id="ada")
    engine.serve(steps=2)
    path = engine.requests.state_file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(LedgerError, match=r"checksum|whole"):
        blank_engine(dataset, requests=engine.requests.folder)
    path.unlink()
    with pytest.raises(LedgerError, match="got no file"):
        blank_engine(dataset, requests=engine.requests.folder)


def test_two_servers_on_one_queue_run_each_request_once(engine, dataset):
    folder = engine.requests.folder
    engine.serve(steps=1)
    for number in range(8):
        engine.submit([number], request_id=f"request {number}")
    servers = [
        CONTEXT.Process(target=kill_target.serve, args=(folder, dataset, None, 1)) for _ in range(2)
    ]
    for server in servers:
        server.start()
    seen = set()  # what a reader beside them sees: never half of a change
    while any(server.is_alive() for server in servers):
        status = RequestQueue(folder).status()
        assert sum(status.values()) == 8
        assert status["planned"] + status["running"] <= 1
        seen |= {state for state, count in status.items() if count}
        time.sleep(0.01)
    for server in servers:
        server.join()
        assert server.exitcode == 0
    assert {"queued", "running", "done"} <= seen
    for number in range(8):
        log = [event.state for event in engine.requests.events(f"request {number}")]
        assert log == ["queued", "planned", "running", "done"]
    final = load_state(engine.requests.state_file, kind="served model")
    assert final["forgotten"] == list(range(8))
    assert final["requests_served"] == 8


# --- what is left ---------------------------------------------------------------------------------


def test_nothing_that_was_computed_with_a_forgotten_instance_is_left(dataset, tmp_path):
    run = network_run(momentum=0.9)
    engine = run.unlearning(requests=tmp_path / "requests")
    engine.serve(steps=1)
    (trained,) = engine.requests.folder.glob("state-*")
    charges = run.engine.account.charger
    assert np.isfinite(charges.norms.seen[3])
    engine.submit([3], request_id="ada")
    engine.serve(steps=4, checkpoint_every=2)
    left = {path.name for path in engine.requests.folder.iterdir()}
    assert left == {"requests.db", "serving.lock", "model.pt", engine.requests.state_file.name}
    assert not trained.exists()
    assert not engine._state.optimizer.state  # no momentum
    state = load_state(engine.requests.state_file, kind="served model")
    assert "state" not in state
    assert np.isinf(run.engine.account.charger.norms.seen[3])  # what was measured of it is gone
    ledger = run.engine.per_instance
    assert ledger.forgotten[3]
    assert not ledger.active[3]
    assert ledger.forgotten.sum() == 1
    with contextlib.closing(sqlite3.connect(engine.requests.folder / "requests.db")) as db:
        assert db.execute("SELECT seed FROM batches").fetchall() == [(None,)]
