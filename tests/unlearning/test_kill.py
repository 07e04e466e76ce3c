"""Fifty kills of a server and fifty of a run with checkpoints: nothing lost or repeated, same bits.

Half of the kills come at random times, half at the lasting operations that `kill_target` counts.
"""

import shutil
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_pil.files.container import load_state
from opacus_pil.files.model_hash import model_file_hash, model_hash
from opacus_pil.unlearning.requests import RequestQueue

from . import kill_target
from .kill_target import SIZE, trained_engine
from .processes import CONTEXT

pytestmark = pytest.mark.slow  # kills and restarts servers, many times

REQUESTS = {"ada": [3, 7], "bob": [7, 9], "cyd": [1], "dan": [20, 21, 22], "eve": [3, 20]}


def start(target, *arguments):
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def run_to_the_end(target, *arguments):
    """Return how long it took, the start of the process that all are forked from aside."""
    start(time.sleep, 0.0).join()
    begin = time.monotonic()
    process = start(target, *arguments)
    process.join(120.0)
    assert process.exitcode == 0
    return time.monotonic() - begin


def killed(random, target, *arguments, seconds, operations):
    """Start a process and kill it within so much; return whether that was before its end."""
    if random.random() < 0.5:
        process = start(target, *arguments, int(random.integers(2 * operations)))
    else:
        process = start(target, *arguments)
        time.sleep(random.uniform(0.0, seconds))
        process.kill()
    process.join(120.0)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def assert_equal(first, second):
    """Compare nested states bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8))
    else:
        assert first == second


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with queued requests and the trained model, as every killed server finds it."""
    folder = tmp_path_factory.mktemp("kill") / "requests"
    torch.manual_seed(1)
    x = torch.randn(SIZE, 4)
    dataset = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    engine = trained_engine(dataset, requests=folder)
    assert engine.serve(steps=kill_target.STEPS) == []  # records the state to start from
    for request_id, rows in REQUESTS.items():
        engine.submit(rows, request_id=request_id)
    return folder, dataset, engine.state_dict()


def served(folder):
    queue = RequestQueue(folder)
    return load_state(queue.state_file, kind="served model")


def finished(folder):
    """What is done, and that nothing was lost or done twice on the way."""
    queue = RequestQueue(folder)
    requests = {request.request_id: request for request in queue.requests()}
    assert {name: list(request.rows) for name, request in requests.items()} == REQUESTS
    done = {name: request for name, request in requests.items() if request.state == "done"}
    for name in requests:
        log = [event.state for event in queue.events(name)]
        assert log.count("queued") == 1
        assert log.count("planned") <= 1
        assert log.count("done") == (name in done)
        assert "failed" not in log
    served(folder)  # the state that is served is whole, whenever the kill came
    return done


def test_killed_servers_lose_nothing_and_repeat_nothing(trained, tmp_path):
    template, dataset, _ = trained
    shutil.copytree(template, tmp_path / "whole")
    duration = run_to_the_end(kill_target.serve, tmp_path / "whole", dataset)
    expected = served(tmp_path / "whole")
    assert finished(tmp_path / "whole").keys() == REQUESTS.keys()

    random = np.random.default_rng(0)
    kills = rounds = 0
    while kills < 50:
        rounds += 1
        folder = tmp_path / f"round {rounds}"
        shutil.copytree(template, folder)
        done = {}
        for _ in range(8):
            # A batch has about 30 lasting operations, a serving three batches.
            where = {"seconds": duration / 2, "operations": 30}
            if not killed(random, kill_target.serve, folder, dataset, **where):
                break
            kills += 1
            now = finished(folder)
            assert {name: now[name] for name in done} == done  # done is done
            done = now
        run_to_the_end(kill_target.serve, folder, dataset)
        now = finished(folder)
        assert {name: now[name] for name in done} == done
        assert now.keys() == REQUESTS.keys()
        assert_equal(served(folder), expected)
        left = {path.name for path in folder.iterdir()}
        left -= {"requests.db", "serving.lock", "model.pt"}
        assert model_file_hash(folder / "model.pt") == model_hash(expected["module"])
        assert left == {RequestQueue(folder).state_file.name}  # nothing computed with F is left


def test_killed_runs_go_on_to_the_same_bits(trained, tmp_path):
    _, dataset, state = trained

    def folder(name):
        (tmp_path / name / "run").mkdir(parents=True)
        return tmp_path / name / "run"

    def result(folder):
        return torch.load(folder.parent / "result.pt", weights_only=True)

    whole = folder("whole")
    duration = run_to_the_end(kill_target.unlearn, whole, dataset, state)
    expected = result(whole)
    random = np.random.default_rng(1)
    kills = rounds = 0
    while kills < 50:
        rounds += 1
        place = folder(f"round {rounds}")
        for _ in range(8):
            where = {"seconds": duration, "operations": 9}
            if not killed(random, kill_target.unlearn, place, dataset, state, **where):
                break
            kills += 1
        else:
            run_to_the_end(kill_target.unlearn, place, dataset, state)
        assert_equal(result(place), expected)
        assert list(place.iterdir()) == []
