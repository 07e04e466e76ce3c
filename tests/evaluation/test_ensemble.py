"""Sweeps lose nothing, repeat nothing that is finished, and compute the same bits either way."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import random
import signal
import stat
import time

import numpy as np
import pytest
import torch
import torch.nn as nn

from opacus_pil.evaluation.ensemble import retrained_ensemble, run_trials, trial_key
from opacus_pil.files.container import save_state
from tests.evaluation.sweeps import configs, sweep_in_own_group, tiny_trial


def sweep(folder, count=4, trial=tiny_trial, **changes):
    return run_trials(
        trial, **{"configs": configs(count), "folder": folder, "progress": False, **changes}
    )


def files(folder):
    """What identifies each finished trial's file: content, inode and time of writing."""
    return {
        path.parent.name: (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("*/result.pt")
    }


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a["weights"]["w"], b["weights"]["w"]) and a["metrics"] == b["metrics"]
        for a, b in zip(left, right, strict=True)
    )


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_depends_on_every_value_and_on_no_order():
    base = trial_key({"a": 1, "b": [1, 2]}, fingerprint={"n": 3})
    assert base == trial_key({"b": np.array([1, 2]), "a": np.int64(1)}, fingerprint={"n": 3})
    others = [
        trial_key({"a": 2, "b": [1, 2]}, fingerprint={"n": 3}),
        trial_key({"a": 1, "b": [2, 1]}, fingerprint={"n": 3}),
        trial_key({"a": 1, "b": [1, 2]}, fingerprint={"n": 4}),
        trial_key({"a": 1, "b": [1, 2], "c": None}, fingerprint={"n": 3}),
        trial_key({"a": 1}, fingerprint={"b": [1, 2], "n": 3}),
    ]
    assert len({base, *others}) == 6


def test_a_key_refuses_what_has_no_canonical_form():
    with pytest.raises(ValueError, match="JSON compliant"):
        trial_key({"noise": math.nan}, fingerprint={})
    with pytest.raises(TypeError, match="plain types and arrays, got Linear"):
        trial_key({"model": nn.Linear(1, 1)}, fingerprint={})


# --- sweeps ---------------------------------------------------------------------------------------


def test_finished_trials_are_read_and_not_computed_again(tmp_path):
    calls = []

    def counting(config):
        calls.append(config["seed"])
        return tiny_trial(config)

    first = sweep(tmp_path, 3, trial=counting)
    before = files(tmp_path)
    assert same(sweep(tmp_path, 5, trial=counting)[:3], first)
    assert calls == [0, 1, 2, 3, 4]
    assert {key: files(tmp_path)[key] for key in before} == before


def test_files_are_readable_by_the_owner_only(tmp_path):
    sweep(tmp_path / "trials", 1)
    found = sorted((tmp_path / "trials").rglob("*"))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in found]
    assert modes == [0o700, 0o600]  # the trial's folder, its file
    assert stat.S_IMODE((tmp_path / "trials").stat().st_mode) == 0o700


def test_equal_configurations_share_one_trial(tmp_path):
    twice = sweep(tmp_path, configs=[*configs(1), *configs(1)])
    assert same(twice[:1], twice[1:])
    assert len(files(tmp_path)) == 1


def test_results_depend_neither_on_order_nor_on_the_global_generator(tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = sweep(tmp_path / "one")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    backwards = sweep(tmp_path / "backwards", configs=configs(4)[::-1])[::-1]
    assert same(one, backwards)  # other processes: see the kills below


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another trial's"])
def test_a_damaged_trial_is_computed_again(tmp_path, damage):
    first = sweep(tmp_path)
    path, other = sorted(tmp_path.glob("*/result.pt"))[:2]
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(other.read_bytes())
    before = files(tmp_path)
    assert same(sweep(tmp_path), first)
    after = files(tmp_path)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {path.parent.name}


def test_a_failing_trial_names_itself_and_leaves_the_finished_ones(tmp_path):
    def fails(config):
        if config["seed"] == 2:
            raise ValueError("diverged")
        return tiny_trial(config)

    with pytest.raises(ValueError, match="diverged") as caught:
        sweep(tmp_path, trial=fails)
    assert caught.value.__notes__ == [f"in trial {trial_key(configs(3)[2], fingerprint={})}"]
    assert len(files(tmp_path)) == 2
    assert len(sweep(tmp_path)) == 4


def test_a_second_sweep_that_removes_our_unfinished_file_does_no_harm(tmp_path):
    """Two sweeps, one folder: the other one finishes our trial while we write it."""
    inner = tmp_path / "folder"

    def overtaken(config):
        if not list(inner.glob("*/result.pt")):
            run_trials(tiny_trial, configs=[config], folder=inner, progress=False)
        return tiny_trial(config)

    assert same(sweep(inner, 1, trial=overtaken), sweep(tmp_path / "alone", 1))
    assert not list(inner.glob("*/.*"))


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    key = trial_key(configs(1)[0], fingerprint={})
    (tmp_path / key).mkdir()
    (tmp_path / key / ".result.pt.abc").write_bytes(b"half")
    sweep(tmp_path, 1)
    assert [path.name for path in (tmp_path / key).iterdir()] == ["result.pt"]


def test_wrong_arguments_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="n_jobs"):
        sweep(tmp_path / "a", n_jobs=0)
    with pytest.raises(TypeError, match="n_jobs"):
        sweep(tmp_path / "a", n_jobs=1.5)
    with pytest.raises(ValueError, match="JSON compliant"):
        sweep(tmp_path / "a", configs=[{"noise": math.inf}])
    assert not (tmp_path / "a").exists()


# --- oracles --------------------------------------------------------------------------------------


def train(rows, seed):
    module = nn.Linear(1, 1)  # from the trial's own global generator
    with torch.no_grad():
        module.bias.fill_(float(rows.sum() + seed))
    return module


def ensemble(folder, **changes):
    arguments = {
        "num_instances": 6, "forget_set": [4, 1], "seeds": [0, 3], "folder": folder,
        "config": {"model": "linear"}, "progress": False,
    }  # fmt: skip
    return retrained_ensemble(train, **{**arguments, **changes})


def test_oracles_are_trained_on_the_others_only(tmp_path):
    oracles = ensemble(tmp_path, measure=lambda module: {"bias": module.bias.item()})
    assert [oracle.seed for oracle in oracles] == [0, 3]
    retained = 0 + 2 + 3 + 5  # rows 1 and 4 are left out
    for oracle in oracles:
        assert float(oracle.weights["bias"]) == retained + oracle.seed
        assert oracle.metrics == {"bias": float(oracle.weights["bias"])}
    again = ensemble(tmp_path, forget_set=[1, 4])  # the same set in another order
    for old, new in zip(oracles, again, strict=True):
        assert torch.equal(old.weights["weight"], new.weights["weight"])
        assert new.metrics == old.metrics  # read, not measured


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": []},
        {"seeds": [1, 1]},
        {"forget_set": []},
        {"forget_set": range(6)},
        {"forget_set": [6]},
        {"forget_set": [1, 1]},
    ],
)
def test_impossible_ensembles_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="Expected"):
        ensemble(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


# --- kills ----------------------------------------------------------------------------------------

KILLS, OF_THEM_WITH_WORKERS, TRIALS = 50, 1, 60


def killed_sweep(context, folder, *, n_jobs, wait):
    """Start a sweep in its own process group, wait as told, and kill the whole group."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(
        target=sweep_in_own_group, args=(str(folder), TRIALS, n_jobs, there), daemon=False
    )
    process.start()
    there.close()
    assert here.recv()  # it has its own group and is about to sweep
    wait(process)
    with contextlib.suppress(ProcessLookupError):  # it was done before
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


@pytest.mark.slow  # fifty processes
def test_fifty_kills_lose_nothing_and_repeat_nothing(tmp_path):
    straight = sweep(tmp_path / "straight", TRIALS)
    context = multiprocessing.get_context("forkserver")
    # Loaded once, in the server: each of the processes below is a fork of it.
    context.set_forkserver_preload(["opacus_pil.evaluation.ensemble", "pytest"])
    chance = random.Random(0)
    folder = tmp_path / "killed"
    known, amid = {}, 0

    def short(process):
        time.sleep(chance.uniform(0.0, 0.03))

    def until_a_worker_has_finished_one(process):
        count = len(list(folder.glob("*/result.pt")))
        while process.is_alive() and len(list(folder.glob("*/result.pt"))) == count:
            time.sleep(0.002)

    for number in range(KILLS):
        workers = number < OF_THEM_WITH_WORKERS  # starting them takes seconds
        code = killed_sweep(
            context, folder,
            n_jobs=2 if workers else 1,
            wait=until_a_worker_has_finished_one if workers else short,
        )  # fmt: skip
        now = files(folder)
        assert {key: now[key] for key in known} == known  # content, inode, time of writing
        known = now
        amid += code == -signal.SIGKILL and len(now) < TRIALS
    assert amid >= KILLS // 2  # or the kills came too late to mean anything
    assert same(sweep(folder, TRIALS), straight)
    now = files(folder)
    assert {key: now[key] for key in known} == known
    assert len(now) == TRIALS
    assert not list(folder.glob("*/.*"))  # nor is there litter


def test_what_a_writer_left_that_was_killed_after_its_result_is_swept_by_the_next_sweep(tmp_path):
    folder = tmp_path / "sweep"
    first = sweep(folder, 2)
    done = next(folder.glob("*/result.pt"))
    litter = done.parent / ".result.pt.killed"
    litter.write_bytes(b"half of it")
    assert same(sweep(folder, 2), first)
    assert not litter.exists()


def test_a_result_that_is_not_ours_is_refused(tmp_path):
    key = trial_key(configs(1)[0], fingerprint={})
    (tmp_path / key).mkdir()
    save_state(tmp_path / key / "result.pt", {"config": "x", "result": {}}, kind="something else")
    assert "weights" in sweep(tmp_path, 1)[0]
