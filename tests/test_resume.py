"""A training that was killed goes on as if it had not been: weights and ledgers, bit for bit."""

from __future__ import annotations

import copy
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opacus_pil import UnsupportedError
from opacus_pil.training import checkpoint
from tests.training_loop import SIZE, STEPS, Augmented, Loop, differences, same

TRAININGS = {
    "plain": {},
    "augmented": {
        "dataset": Augmented(), "own": True, "dropout": 0.3, "noise_schedule": True,
        "clip_schedule": True,
    },
    "ghost": {"grad_sample_mode": "ghost", "dropout": 0.3},
    "per layer": {"clipping": "per_layer", "max_grad_norm": [3.0] * 6},
    "adaptive": {
        "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.3,
        "max_clipbound": 20.0, "min_clipbound": 0.1, "unclipped_num_std": 5.0,
    },
    "fixed batches": {"poisson_sampling": False, "engine": {"norm_policy": "participation"}},
    "fixed batches, own": {
        "poisson_sampling": False, "engine": {"norm_policy": "participation"}, "own": True,
    },
    "refreshed": {"engine": {"norm_policy": "refresh", "refresh_every": 4, "history": True}},
    "capped": {"engine": {"norm_policy": "capped", "caps": np.linspace(0.2, 1.0, SIZE)}},
    "budget": {"engine": {"norm_policy": "capped", "budget": (4.0, 1e-2)}},
    "workers": {"workers": 2},
    "workers, own": {"workers": 2, "own": True},
    "physical batches": {"physical": 5},
    "physical batches, workers": {"physical": 5, "workers": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    # Steps 5 and 10 end a pass: nothing is left of it.
    options = TRAININGS[name]
    stops = (2, 10) if options.get("workers") else (1, 5, 8)
    whole = Loop(**copy.deepcopy(options)).run().outcome()
    for stop in stops:
        Loop(**copy.deepcopy(options)).run(
            until=stop,
            after=lambda loop, stop=stop: loop.steps == stop and loop.save(tmp_path / "c"),
        )
        resumed = Loop(seed=99, **copy.deepcopy(options)).load(tmp_path / "c").run()
        assert resumed.steps == STEPS
        assert differences(resumed.outcome(), whole) == []


def test_a_checkpoint_of_a_checkpoint_is_the_same_place(tmp_path):
    options = TRAININGS["augmented"]
    whole = Loop(**options).run().outcome()
    Loop(**options).run(after=lambda loop: loop.steps == 7 and loop.save(tmp_path / "a"))
    once = Loop(seed=98, **options).load(tmp_path / "a")
    once.save(tmp_path / "b")  # nothing was handed out in between
    resumed = Loop(seed=99, **options).load(tmp_path / "b").run()
    assert differences(resumed.outcome(), whole) == []


@pytest.mark.parametrize("name", ["plain", "workers", "fixed batches"])
def test_saving_does_not_change_the_training_that_is_saved(name, tmp_path):
    options = TRAININGS[name]
    whole = Loop(**options).run().outcome()
    saving = Loop(**options).run(after=lambda loop: loop.save(tmp_path / "c"))
    assert differences(saving.outcome(), whole) == []


def test_a_pass_that_was_left_or_finished_is_followed_by_a_whole_one(tmp_path):
    whole = Loop()
    whole.run(until=3)  # leaves the pass, as `break` does
    whole.save(tmp_path / "left")
    whole.run(until=8)
    assert (whole.steps, whole.epoch) == (8, 0)
    resumed = Loop(seed=99).load(tmp_path / "left").run(until=8)
    assert differences(resumed.outcome(), whole.outcome()) == []


def test_a_loop_over_next_goes_on_with_the_batches_that_are_left(tmp_path):
    first = Loop()
    batches = iter(first.loader)
    drawn = []

    def step(loop, batch):
        loop.optimizer.zero_grad()
        loop.criterion(loop.wrapped(batch[0]), batch[1]).backward()
        loop.optimizer.step()

    step(first, next(batches))
    step(first, next(batches))
    first.save(tmp_path / "c")
    for batch in batches:
        drawn.append(batch[1])
        step(first, batch)
    second = Loop(seed=99).load(tmp_path / "c")
    again = []
    for batch in second.loader:
        again.append(batch[1])
        step(second, batch)
    assert len(drawn) == 3
    assert same(again, drawn)


def test_caps_that_were_changed_during_the_run_stay_in_force(tmp_path):
    options = {"engine": {"norm_policy": "capped", "budget": (40.0, 1e-2)}}

    def change(loop):
        if loop.steps == 3:
            loop.engine.set_caps(np.linspace(0.1, 0.6, SIZE))
        if loop.steps == 6:
            loop.save(tmp_path / "c")

    whole = Loop(**options).run(after=change).outcome()
    resumed = Loop(seed=99, **options).load(tmp_path / "c").run()
    assert differences(resumed.outcome(), whole) == []


def test_a_refresh_right_after_loading_charges_the_released_count_too(tmp_path):
    options = TRAININGS["adaptive"]
    killed = Loop(**options)
    killed.run(until=4)
    killed.save(tmp_path / "c")
    resumed = Loop(seed=99, **options).load(tmp_path / "c")
    for loop in (killed, resumed):
        loop.engine.refresh_norms()
    assert same(*(loop.engine.per_instance.sensitivities for loop in (resumed, killed)))


# --- every piece of the state is needed -----------------------------------------------------------

PIECES = {
    "module_state_dict": "entries",
    "optimizer_state_dict": "entries",
    "noise_scheduler_state_dict": "entries",
    "grad_clip_scheduler_state_dict": "entries",
    "privacy_accountant_state_dict": "entries",
    "ledger ledger": "state",
    "ledger norms": "state",
    "ledger max_grad_norm": "state",
    "training pass left": "state",
    "training optimizer noise_multiplier": "state",
    "training optimizer max_grad_norm": "state",
    "training generators states": "state",
    "training global_generators torch": "state",
    "training global_generators numpy": "state",
    "training global_generators python": "state",
}


@functools.cache
def uninterrupted_augmented():
    return copy.deepcopy(Loop(**TRAININGS["augmented"]).run().outcome())


@pytest.mark.parametrize("piece", PIECES)
def test_without_any_one_piece_of_the_state_the_training_takes_another_course(
    piece, tmp_path, monkeypatch
):
    options = TRAININGS["augmented"]
    whole = uninterrupted_augmented()
    Loop(**options).run(until=6, after=lambda loop: loop.steps == 6 and loop.save(tmp_path / "c"))
    Loop(seed=99, **options).save(tmp_path / "fresh")
    load = checkpoint.load_entries

    def without_piece(file, **kwargs):
        kept = dict(zip(("entries", "state"), load(file, **kwargs), strict=True))
        fresh = dict(zip(("entries", "state"), load(tmp_path / "fresh", **kwargs), strict=True))
        target, source = kept[PIECES[piece]], fresh[PIECES[piece]]
        *path, last = [piece] if PIECES[piece] == "entries" else piece.split()
        for key in path:
            target, source = target[key], source[key]
        target[last] = source[last]
        return kept["entries"], kept["state"]

    monkeypatch.setattr(checkpoint, "load_entries", without_piece)
    resumed = Loop(seed=99, **options).load(tmp_path / "c").run()
    assert differences(resumed.outcome(), whole) != []


# --- where saving would lose something ------------------------------------------------------------


def test_a_batch_that_was_not_stepped_on_is_pointed_out(tmp_path):
    loop = Loop()
    batches = iter(loop.loader)
    next(batches)
    with pytest.warns(UserWarning, match="1 of the batches handed out were not stepped on"):
        loop.save(tmp_path / "c")


def test_a_sum_of_gradients_that_is_no_step_yet_is_not_saved(tmp_path):
    loop = Loop(physical=5)
    inputs, targets = next(iter(loop.loader))
    loop.criterion(loop.wrapped(inputs), targets).backward()
    loop.optimizer.step()
    with pytest.raises(UnsupportedError, match="between two noisy steps"):
        loop.save(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


# --- a real kill ----------------------------------------------------------------------------------

KILLS = (2, 5, 6, 11, STEPS)


def _train(folder: Path, kill_at: int | None) -> None:
    """Go on from the checkpoint in `folder`, saving at each step; die at `kill_at`."""
    loop = Loop(seed=100 + (kill_at or 0), **TRAININGS["augmented"]).load(folder / "checkpoint")

    def after(loop):
        if loop.steps == kill_at:  # before the step is saved: it is made again
            os.kill(os.getpid(), signal.SIGKILL)
        loop.save(folder / "checkpoint")

    loop.run(after=after)
    torch.save(dict(loop.module.state_dict()), folder / "weights")
    torch.save(torch.as_tensor(loop.engine.per_instance.rdp()), folder / "rdp")


def _main(folder: Path) -> None:
    """Start a process per kill, one after the other, from this one, which computed nothing yet."""
    for kill_at in (*KILLS, None):
        child = os.fork()
        if not child:
            _train(folder, kill_at)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (0 if kill_at is None else -signal.SIGKILL), (kill_at, status)


@pytest.mark.slow  # a process for every kill
def test_killed_at_several_steps_and_resumed_equals_the_uninterrupted_run(tmp_path):
    whole = Loop(**TRAININGS["augmented"])
    whole.save(tmp_path / "checkpoint")
    whole.run()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_resume", str(tmp_path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path / "weights"), dict(whole.module.state_dict()))
    assert np.array_equal(torch.load(tmp_path / "rdp").numpy(), whole.engine.per_instance.rdp())


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in conftest: another number of threads sums in another order
    _main(Path(sys.argv[1]))
