"""A folder of requests belongs to one model: no other one submits to it or is served from it."""

import contextlib
import sqlite3

import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_pil.errors import LedgerError
from opacus_pil.files.model_hash import model_hash
from opacus_pil.unlearning.requests import RequestQueue

from .kill_target import SIZE, blank_engine, engine_of, private_run
from .runs import three_classes


@pytest.fixture
def dataset():
    return three_classes(SIZE)


def trained_anew(dataset, *, seed, **options):
    """What a function gives that trains at each call: other noise, another model."""
    private, criterion, (module, optimizer, loader) = private_run(dataset)
    torch.manual_seed(seed)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
    return engine_of(dataset, private, criterion, (module, optimizer, loader), **options)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "requests"


def everything(folder):
    with contextlib.closing(sqlite3.connect(folder / "requests.db")) as db:
        rows = [line for line in db.iterdump() if '"served"' not in line]  # who looked in last
    return rows, sorted(path.name for path in folder.glob("*.pt"))


def without_models(folder):
    """As a folder of an earlier release, which kept no hash of a model."""
    with contextlib.closing(sqlite3.connect(folder / "requests.db")) as db:
        db.execute("DROP TABLE models")
        db.commit()


def test_another_model_than_the_one_submitted_to_is_not_served(dataset, folder):
    first = trained_anew(dataset, seed=1, requests=folder)
    first.submit([3], request_id="ada")
    before = everything(folder)
    with pytest.raises(LedgerError) as refused:
        trained_anew(dataset, seed=2, requests=folder)
    assert everything(folder) == before
    message = str(refused.value)
    assert model_hash(first.module)[:12] in message  # whose folder it is
    assert model_hash(trained_anew(dataset, seed=2).module)[:12] in message
    assert str(folder) in message
    assert "load_checkpoint" in message
    assert "another folder" in message  # where the other one is the deployed one
    again = trained_anew(dataset, seed=1, requests=folder)  # bit for bit the one of before
    assert again.serve(steps=2)[0].state == "done"


def test_an_engine_that_was_there_before_the_first_request_is_refused_too(dataset, folder):
    """Both were built on an empty folder: the first to submit says whose it is."""
    one = trained_anew(dataset, seed=1, requests=folder)
    other = trained_anew(dataset, seed=2, requests=folder)
    one.submit([3], request_id="ada")
    before = everything(folder)
    for call in (lambda: other.submit([4], request_id="bob"), lambda: other.serve(steps=2)):
        with pytest.raises(LedgerError, match="belongs to model"):
            call()
        assert everything(folder) == before
    assert one.serve(steps=2)[0].state == "done"


def let_ada_be_first(one, monkeypatch):
    """Commit her request on `one` after bob's engine looked at the folder, before it writes."""
    submit = RequestQueue.submit

    def late(self, request_id, rows, **options):
        if request_id == "bob":
            one.submit([3], request_id="ada")
        return submit(self, request_id, rows, **options)

    monkeypatch.setattr(RequestQueue, "submit", late)


def test_two_that_submit_at_once_are_told_apart_in_the_transaction(dataset, folder, monkeypatch):
    one = trained_anew(dataset, seed=1, requests=folder)
    other = trained_anew(dataset, seed=2, requests=folder)
    let_ada_be_first(one, monkeypatch)
    with pytest.raises(LedgerError, match="belongs to model"):
        other.submit([4], request_id="bob")
    assert [r.request_id for r in RequestQueue(folder).requests()] == ["ada"]


def test_two_data_sets_that_submit_at_once_are_told_apart_too(dataset, folder, monkeypatch):
    one = trained_anew(dataset, seed=1, requests=folder)
    flipped = TensorDataset(*(tensor.flip(0) for tensor in dataset.tensors))
    other = trained_anew(flipped, seed=1, requests=folder)
    let_ada_be_first(one, monkeypatch)
    with pytest.raises(LedgerError, match="another order") as refused:
        other.submit([4], request_id="bob")
    assert str(folder) in str(refused.value)
    assert [r.request_id for r in RequestQueue(folder).requests()] == ["ada"]


def test_a_served_folder_is_not_taken_for_that_of_a_later_training(dataset, folder):
    """Trained again next month: what was served before is another model than that one."""
    first = trained_anew(dataset, seed=1, requests=folder)
    first.submit([3], request_id="ada")
    first.serve(steps=2)
    before = everything(folder)
    with pytest.raises(LedgerError, match="belongs to model") as refused:
        trained_anew(dataset, seed=2, requests=folder)
    assert model_hash(first.module)[:12] in str(refused.value)  # the one served last
    assert everything(folder) == before
    for engine in (  # the trained one, and the architecture alone: both go on with what was served
        trained_anew(dataset, seed=1, requests=folder), blank_engine(dataset, requests=folder),
    ):  # fmt: skip
        assert model_hash(engine.module) == model_hash(first.module)
    engine.submit([4], request_id="bob")
    assert engine.serve(steps=2)[0].state == "done"
    first.submit([5], request_id="cyd")  # behind by a run, and still the folder's
    assert first.serve(steps=2)[0].state == "done"
    assert first.forgotten == {3, 4, 5}


def test_an_untrained_engine_submits_and_is_not_served_from(dataset, folder):
    """It holds nothing that anybody deployed: it says nothing about whose folder this is."""
    blank = blank_engine(dataset, requests=folder)
    blank.submit([3], request_id="ada")
    with pytest.raises(LedgerError, match=r"0 steps.*load_checkpoint"):
        blank.serve(steps=2)
    assert not list(folder.glob("*.pt"))
    engine = trained_anew(dataset, seed=1, requests=folder)
    blank.submit([4], request_id="bob")
    engine.submit([5], request_id="cyd")
    blank.submit([6], request_id="dan")
    with pytest.raises(LedgerError, match="belongs to model"):
        blank.serve(steps=2)
    assert [one.state for one in engine.serve(steps=2)] == ["done"] * 4
    assert blank.serve(steps=2) == []
    assert model_hash(blank.module) == model_hash(engine.module)


def test_an_engine_that_loaded_another_state_is_not_served_from(dataset, folder):
    """Neither somebody else's, nor the folder's own of before: who was forgotten would be back."""
    engine = trained_anew(dataset, seed=1, requests=folder)
    trained = engine.state_dict()
    engine.submit([3], request_id="ada")
    engine.serve(steps=2)
    served = engine.state_dict()
    engine.submit([4], request_id="bob")
    before = everything(folder)
    for state in (trained, trained_anew(dataset, seed=2).state_dict()):
        engine.load_state_dict(state)
        with pytest.raises(LedgerError, match="belongs to model"):
            engine.serve(steps=2)
        assert everything(folder) == before
    engine.load_state_dict(served)
    assert engine.serve(steps=2)[0].state == "done"


def test_weights_that_moved_before_the_first_serving_are_not_put_on_disk(dataset, folder):
    """A next process would have gone on with them, and would have seen nothing wrong."""
    engine = trained_anew(dataset, seed=1, requests=folder)
    engine.submit([3], request_id="ada")
    with torch.no_grad():
        next(engine.module.parameters()).add_(1.0)
    before = everything(folder)
    with pytest.raises(LedgerError, match="got other weights"):
        engine.serve(steps=2)
    assert everything(folder) == before


@pytest.mark.parametrize("served", [False, True])
def test_a_folder_of_an_earlier_release_goes_on_and_gets_the_hash(dataset, folder, served):
    engine = trained_anew(dataset, seed=1, requests=folder)
    engine.submit([3], request_id="ada")
    if served:
        engine.serve(steps=2)
    without_models(folder)
    again = trained_anew(dataset, seed=1, requests=folder)
    again.submit([4], request_id="bob")
    again.serve(steps=2)
    with pytest.raises(LedgerError, match="belongs to model"):
        trained_anew(dataset, seed=2, requests=folder)


def test_a_folder_that_an_earlier_release_served_in_between_goes_on(dataset, folder):
    engine = trained_anew(dataset, seed=1, requests=folder)
    engine.submit([3], request_id="ada")
    engine.serve(steps=2)
    with contextlib.closing(sqlite3.connect(folder / "requests.db")) as db:
        db.execute("DELETE FROM models WHERE position = (SELECT max(position) FROM models)")
        db.commit()
    engine = blank_engine(dataset, requests=folder)
    engine.submit([4], request_id="bob")
    assert engine.serve(steps=2)[0].state == "done"


def test_a_queue_without_an_engine_takes_the_model_that_serves_first(dataset, folder):
    RequestQueue(folder).submit("ada", [3])
    assert trained_anew(dataset, seed=1, requests=folder).serve(steps=2)[0].state == "done"
    with pytest.raises(LedgerError, match="belongs to model"):
        trained_anew(dataset, seed=2, requests=folder)


def test_a_run_that_was_killed_is_finished_on_its_own_model_only(dataset, folder, monkeypatch):
    from opacus_pil.unlearning.requests.serving import Serving

    engine = trained_anew(dataset, seed=1, requests=folder)
    engine.submit([3], request_id="ada")
    with monkeypatch.context() as dying:
        dying.setattr(Serving, "_run", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.serve(steps=2)
    assert RequestQueue(folder).get("ada").state == "running"
    before = everything(folder)
    with pytest.raises(LedgerError, match="belongs to model"):
        trained_anew(dataset, seed=2, requests=folder)
    assert everything(folder) == before
    assert blank_engine(dataset, requests=folder).serve()[0].state == "done"
