"""model.pt in a folder of requests: the model served last, and never beside a foreign certificate.

A server is stopped before and after each of its lasting operations, as a kill would; what lies in
the folder then, and after the next server, is read from the files alone.
"""

import contextlib
import os
import shutil
import stat

import pytest
import torch

from opacus_pil.certificates import (
    read_certificate,
    verify_certificate,
)
from opacus_pil.cli import main
from opacus_pil.errors import CertificateError
from opacus_pil.files.container import load_state
from opacus_pil.files.model_hash import model_file_hash, model_hash
from opacus_pil.unlearning.requests import RequestQueue, serving
from opacus_pil.unlearning.requests.database import RequestDatabase
from opacus_pil.unlearning.requests.server import Server

from .kill_target import SIZE, blank_engine, trained_engine
from .runs import NOISY_GOAL, three_classes


@pytest.fixture(scope="module")
def dataset():
    return three_classes(SIZE)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "requests"


@pytest.fixture
def engine(dataset, folder):
    engine = trained_engine(dataset, requests=folder)
    engine.submit([3, 7], request_id="ada")
    return engine


def certificates(folder):
    """Number of the batch -> the model that its certificate is about."""
    return {
        int(path.stem.split("-")[1]): read_certificate(path).model_after
        for path in folder.glob("certificate-*.json")
    }


def states(folder):
    """Name of each state in the folder -> its model."""
    return {
        path.name: model_hash(load_state(path, kind="served model")["module"])
        for path in folder.glob("state-*.pt")
    }


def assert_about_models_that_are_here(folder):
    """Whatever was killed when: each certificate is of a model of this folder."""
    queue, found = RequestQueue(folder), certificates(folder)
    done = {r.result["batch"] for r in queue.requests(state="done")}
    kept = states(folder)
    served = None if queue.state_file is None else kept[queue.state_file.name]
    last = max(done, default=0)
    if done:
        assert found[last] == served  # certified: the served one
    for number, model in found.items():
        if number > last:  # of a run that is not done: beside its own model
            assert model == model_file_hash(folder / "model.pt")
        else:
            assert model in queue.belonging.models
    if (folder / "model.pt").exists():
        assert stat.S_IMODE((folder / "model.pt").stat().st_mode) == 0o600
        assert model_file_hash(folder / "model.pt") in kept.values()
        if not queue.requests(state="running"):
            assert model_file_hash(folder / "model.pt") == served
    assert done == set() or (folder / "model.pt").exists()


# --- what is there --------------------------------------------------------------------------------


def test_the_model_served_last_is_a_plain_file_that_its_certificate_is_about(engine, folder):
    assert not (folder / "model.pt").exists()  # nothing was served yet
    (ada,) = engine.serve(**NOISY_GOAL)
    assert ada.result["status"] == "certified"
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert weights.keys() == engine.module.state_dict().keys()
    assert model_hash(weights) == model_hash(engine.module)
    record = read_certificate(folder / ada.result["certificate_file"])
    assert verify_certificate(record, model_sha256=model_file_hash(folder / "model.pt")).holds
    assert_about_models_that_are_here(folder)
    engine.submit([9], request_id="bob")
    (bob,) = engine.serve(**NOISY_GOAL)
    second = folder / bob.result["certificate_file"]
    assert main(["verify", str(second), "--model", str(folder / "model.pt")]) == 0
    first = folder / ada.result["certificate_file"]  # the model of then is deleted
    assert main(["verify", str(first), "--model", str(folder / "model.pt")]) == 1
    assert_about_models_that_are_here(folder)


def test_a_file_that_is_missing_damaged_or_old_is_written_again(engine, folder):
    engine.serve(**NOISY_GOAL)
    path, expected = folder / "model.pt", model_hash(engine.module)
    for spoil in (
        path.unlink, lambda: path.write_bytes(b"no model"),
        lambda: torch.save({"weight": torch.zeros(1)}, path),
    ):  # fmt: skip
        spoil()
        assert engine.serve(**NOISY_GOAL) == []
        assert model_file_hash(path) == expected
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.stat()
    assert engine.serve(**NOISY_GOAL) == []
    assert path.stat().st_mtime_ns == before.st_mtime_ns  # else it is left alone


def test_what_was_served_without_a_certificate_is_there_too(engine, folder):
    engine.serve(steps=2)
    assert model_file_hash(folder / "model.pt") == model_hash(engine.module)


def test_a_batch_that_failed_after_a_killed_try_leaves_the_model_of_before(
    engine, folder, dataset, monkeypatch
):
    """The try had written its model and certificate; neither stays when nothing was forgotten."""
    engine.serve(**NOISY_GOAL)
    engine.submit([9], request_id="bob")
    served = model_hash(engine.module)

    def dies(*_, **__):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Server, "finish", dies)
        with pytest.raises(Stopped):
            blank_engine(dataset, requests=folder).serve(**NOISY_GOAL, seed=1)
    assert_about_models_that_are_here(folder)
    assert 2 in certificates(folder)
    assert model_file_hash(folder / "model.pt") == certificates(folder)[2] != served

    def refuses(*_, **__):
        raise CertificateError("Expected another world, got this one. Wait.")

    with monkeypatch.context() as patch:
        patch.setattr(serving, "require_runnable", refuses)
        (bob,) = blank_engine(dataset, requests=folder).serve(**NOISY_GOAL)
    assert bob.state == "failed"
    assert sorted(certificates(folder)) == [1]
    assert not (folder / "certificate-2.json.key").exists()
    assert model_file_hash(folder / "model.pt") == served
    assert_about_models_that_are_here(folder)


# --- kills ----------------------------------------------------------------------------------------


class Stopped(BaseException):
    """In place of a kill: nothing of ours catches it."""


@contextlib.contextmanager
def stopped(number):
    """Stop before (even) or after (odd) the lasting operation `number // 2`; count all of them."""
    left, dead = number // 2, False
    seen = []

    @contextlib.contextmanager
    def operation(name):
        nonlocal left, dead
        if dead:  # what a killed process does not do any more, such as tidying up
            raise Stopped
        seen.append(name)
        mine, left = left == 0, left - 1
        if mine and number % 2 == 0:
            dead = True
            raise Stopped
        try:
            yield
        finally:  # also after one that failed
            if mine:
                dead = True
                raise Stopped

    def watched(name, function):
        def call(*arguments, **options):
            with operation(name):
                return function(*arguments, **options)

        return call

    writing = RequestDatabase.writing

    @contextlib.contextmanager
    def committed(self):
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(writing(self))
            yield connection
            with operation("commit"):
                stack.pop_all().close()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, watched(name, getattr(os, name)))
        patch.setattr(RequestDatabase, "writing", committed)
        yield seen


@pytest.mark.parametrize(
    "every",
    [13, pytest.param(1, marks=pytest.mark.slow)],  # each point: two servings, a hundred times
)
def test_wherever_a_server_is_killed_a_certificate_is_about_a_model_of_the_folder(
    every, dataset, tmp_path
):
    engine = trained_engine(dataset, requests=tmp_path / "queued")
    engine.submit([3, 7], request_id="ada")
    engine.submit([9], request_id="bob")

    def begun(name):
        return shutil.copytree(tmp_path / "queued", tmp_path / name)

    def serve(folder):
        engine = trained_engine(dataset, requests=folder)
        return engine.serve(**NOISY_GOAL, max_batch=1, seed=5)

    whole = begun("whole")
    with stopped(10**6) as operations:
        serve(whole)
    expected = model_file_hash(whole / "model.pt"), certificates(whole)
    assert {"fsync", "replace", "commit", "unlink"} <= set(operations)
    for number in range(0, 2 * len(operations), every):
        folder = begun(f"{number}")
        with stopped(number), pytest.raises(Stopped):
            serve(folder)
        assert_about_models_that_are_here(folder)
        serve(folder)
        assert_about_models_that_are_here(folder)
        assert (model_file_hash(folder / "model.pt"), certificates(folder)) == expected
        assert [one.state for one in RequestQueue(folder).requests()] == ["done", "done"]
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
