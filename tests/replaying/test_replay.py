"""replay: the account of a training that somebody else ran, against hand charges and our engine."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from opacus_pil import LedgerError, PerInstancePrivacyEngine, UnsupportedError, replay
from opacus_pil.accounting import PerInstanceAccountant, compose_per_instance
from tests.replaying.elsewhere import (
    BOUND,
    NOISE,
    RATE,
    ROWS,
    data,
    described,
    make_model,
    norms,
    trained,
)

ONE = {"orders": [2.0, 8.0, 16.0], "levels": 2048}  # few orders: tables take the time


@pytest.fixture(scope="module")
def run():
    return trained()


def by_hand(levels_of_steps, **options):
    """Charge norms / C, capped at 1, step by step."""
    accountant = PerInstanceAccountant(ROWS, **{**ONE, **options})
    for found in levels_of_steps:
        if found is not None:
            accountant.observe_all(np.minimum(found / BOUND, 1.0))
        accountant.step(
            indices=[], sensitivities=[], noise_multiplier=NOISE, sample_rate=RATE
        )  # fmt: skip
    return accountant.rdp()


def close_above(found, exact):
    """A level up (a few per mille of the norm, more of D at high orders), and never below."""
    assert (found >= exact * (1.0 - 1e-12)).all()
    assert (found <= exact * 1.05 + 1e-12).all()


def test_weights_before_every_step_give_the_sum_of_each_steps_own_charge(run):
    account = replay(run, **described(**ONE))
    close_above(account.rdp(), by_hand([norms(run[t]) for t in range(5)]))
    assert account.guarantee == "estimate"
    assert account.steps == 5
    assert any("nobody watched" in reason for reason in account.reasons)


def test_it_agrees_with_our_engine_that_measures_everyone_at_every_step():
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy="full", **ONE)
    run = trained(engine=engine)
    close_above(replay(run, **described(**ONE)).rdp(), engine.per_instance.rdp())


def test_a_gap_is_charged_at_the_larger_of_both_neighbours(run):
    account = replay({t: run[t] for t in (0, 2, 5)}, **described(**ONE))
    at = {t: norms(run[t]) for t in (0, 2, 5)}
    first, second = np.maximum(at[0], at[2]), np.maximum(at[2], at[5])
    close_above(account.rdp(), by_hand([at[0], first, at[2], second, second]))
    assert any("larger norm" in r and "3 of 5" in r for r in account.reasons)


def test_steps_before_the_first_checkpoint_are_charged_the_worst_case_unless_asked(run):
    late = {3: run[3]}
    account = replay(late, **described(**ONE))
    close_above(account.rdp(), by_hand([None, None, None, norms(run[3]), None]))
    ranked = replay(late, **described(before_first="as_first", **ONE))
    close_above(ranked.rdp(), by_hand([norms(run[3])] * 5))
    assert any("larger early on" in reason for reason in ranked.reasons)


def test_one_checkpoint_without_a_step_is_where_training_ended(run):
    alone = replay(run[5], **described(before_first="as_first", **ONE))
    named = replay({5: run[5]}, **described(before_first="as_first", **ONE))
    np.testing.assert_array_equal(alone.rdp(), named.rdp())


def test_nobody_is_charged_above_the_worst_case(run):
    for kept in (run, {0: run[0]}, {5: run[5]}):
        account = replay(kept, **described(max_grad_norm=0.01, **ONE))
        assert (account.rdp() <= account.worst_case_rdp()).all()


def test_every_form_of_the_same_checkpoints_gives_the_same_account(run, tmp_path):
    exact = replay(run, **described(**ONE)).rdp()
    plain = {t: {k.removeprefix("_module."): v for k, v in w.items()} for t, w in run.items()}
    twice = {t: {f"module.{k}": v for k, v in w.items()} for t, w in run.items()}
    inside = {t: {"epoch": t, "state_dict": w} for t, w in plain.items()}
    for kept in (plain, twice, inside):
        np.testing.assert_array_equal(replay(kept, **described(**ONE)).rdp(), exact)
    files = {}
    for t, w in run.items():
        files[t] = tmp_path / f"weights{t}.pth"
        torch.save(w, files[t])
    np.testing.assert_array_equal(replay(files, **described(**ONE)).rdp(), exact)


@pytest.mark.parametrize("ours", [False, True])
def test_checkpoints_of_an_engine_say_their_own_steps(run, tmp_path, ours):
    own = {"engine": PerInstancePrivacyEngine(accountant="rdp")} if ours else {}
    kept = trained(save=tmp_path, **own)
    options = described(**ONE)
    del options["steps"]
    account = replay(tmp_path, **options)
    assert account.steps == 5
    late = {t: kept[t] for t in range(1, 6)}
    np.testing.assert_array_equal(account.rdp(), replay(late, **described(**ONE)).rdp())
    files = sorted(tmp_path.glob("*.pt"))
    np.testing.assert_array_equal(replay(files, **options).rdp(), account.rdp())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"noise_multiplier": 2.0}, "counted it \\(1.0 for 1 steps\\)|counted it \\(1.0 for 5"),
        ({"sample_rate": 0.5}, "sample_rate as the accountant"),
        ({"steps": 4}, "to be of a run of 4 steps, got 5"),
    ],
)
def test_a_ledger_in_the_file_that_says_otherwise_is_not_passed_over(tmp_path, changed, says):
    trained(save=tmp_path)
    with pytest.raises(ValueError, match=says):
        replay(tmp_path, **described(**ONE, **changed))


def test_more_steps_than_the_checkpoints_counted_are_charged_and_said(tmp_path):
    trained(save=tmp_path)
    with pytest.warns(UserWarning, match=r"counted 5 steps, and steps=9 were described: pass ste"):
        account = replay(tmp_path, **described(**{**ONE, "steps": 9}))
    assert account.steps == 9
    assert any("3 of 9" in r and "pass steps=5 if training ended" in r for r in account.reasons)


def test_schedules_are_charged_step_by_step(run):
    noises = [1.0, 1.0, 2.0, 2.0, 4.0]
    account = replay(run, **described(**{**ONE, "noise_multiplier": noises}))
    twin = PerInstanceAccountant(ROWS, **ONE)
    for t, noise in enumerate(noises):
        twin.observe_all(np.minimum(norms(run[t]) / BOUND, 1.0))
        twin.step(indices=[], sensitivities=[], noise_multiplier=noise, sample_rate=RATE)
    close_above(account.rdp(), twin.rdp())
    with pytest.raises(ValueError, match="one for each of 5 steps, got 2"):
        replay(run, **described(noise_multiplier=[1.0, 1.0]))


def test_layers_clipped_one_by_one_are_measured_so(run):
    bounds = [0.5, 0.5, 1.0, 1.0]
    account = replay({0: run[0]}, **described(**{**ONE, "max_grad_norm": bounds, "steps": 1}))
    module = make_model()
    module.load_state_dict({k.removeprefix("_module."): v for k, v in run[0].items()})
    exact = []
    for inputs, target in data():
        module.zero_grad()
        nn.functional.cross_entropy(module(inputs[None]), target[None]).backward()
        layers = [
            min(p.grad.norm().item(), b) for p, b in zip(module.parameters(), bounds, strict=True)
        ]
        exact.append(np.linalg.norm(layers) / np.linalg.norm(bounds))
    twin = PerInstanceAccountant(ROWS, **ONE)
    twin.observe_all(np.minimum(exact, 1.0))
    twin.step(indices=[], sensitivities=[], noise_multiplier=NOISE, sample_rate=RATE)
    close_above(account.rdp(), twin.rdp())


class Records(Dataset):
    """Batches that are no pairs, as in text."""

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        inputs, target = data()[row]
        return {"pixels": inputs, "label": int(target)}


def test_a_loss_of_ones_own_and_a_collate_are_those_of_training(run):
    def loss_of(module, batch):
        return nn.functional.cross_entropy(
            module(batch["pixels"]), batch["label"], reduction="none"
        )

    options = described(**ONE, dataset=Records(), criterion=None, loss_of=loss_of)
    np.testing.assert_allclose(
        replay(run, **options).rdp(), replay(run, **described(**ONE)).rdp(), rtol=1e-9
    )
    with pytest.raises(UnsupportedError, match="loss_of"):
        replay(run, **described(**ONE, dataset=Records()))
    with pytest.raises(ValueError, match="criterion or loss_of"):
        replay(run, **described(criterion=None))


# --- several runs ---------------------------------------------------------------------------------


def test_two_independent_runs_are_an_expectation_bound_as_the_theorem_gives_it():
    runs = [trained(seed) for seed in (1, 2)]
    full = described(sample_rate=1.0, noise_multiplier=8.0, orders=[4.0], levels=4096)
    account = replay(runs, **full)
    assert account.guarantee == "expectation_bound"
    assert any("confidence 0.95" in reason for reason in account.reasons)
    sensitivities = np.array(
        [[np.minimum(norms(kept[t]) / BOUND, 1.0) for t in range(5)] for kept in runs]
    )
    exact = np.moveaxis(sensitivities, -1, 0)  # (instances, runs, steps); rate 1: α·s²/(2z²)
    found = [
        compose_per_instance(
            lambda order: order * exact**2 / 128.0, order=4.0, direction=direction,
            worst_case_rdp=lambda order: order / 128.0 * np.ones(5),
        )
        for direction in ("with_without", "without_with")
    ]  # fmt: skip
    upper = [result.upper_confidence(0.95, simultaneous=2) for result in found]
    close_above(account.rdp()[:, 0], np.max(upper, axis=0))
    means = replay(runs, **{**full, "confidence": None})
    assert means.guarantee == "estimate"
    close_above(means.rdp()[:, 0], np.max([result.rdp for result in found], axis=0))
    assert (means.rdp() <= account.rdp()).all()


def test_a_gap_in_several_runs_is_charged_the_worst_case():
    runs = [trained(seed) for seed in (1, 2)]
    full = described(sample_rate=1.0, noise_multiplier=8.0, orders=[4.0], confidence=None)
    whole = replay(runs, **full)
    gaps = replay([{t: w for t, w in kept.items() if t != 2} for kept in runs], **full)
    assert (gaps.rdp() > whole.rdp()).all()
    assert any("2 of 10 steps" in reason for reason in gaps.reasons)


def test_the_same_run_twice_is_refused():
    kept = trained()
    with pytest.raises(ValueError, match="the same run twice"):
        replay([kept, kept], **described())
    other = trained(1)
    with pytest.raises(ValueError, match="Train again with other coins"):
        replay([kept, {**other, 5: kept[4]}], **described())


def test_a_run_whose_weights_were_touched_is_still_one_run():
    kept = trained()
    touched = {t: {k: v * (1.0 + 1e-6) for k, v in w.items()} for t, w in kept.items()}
    full = described(sample_rate=1.0, noise_multiplier=8.0, orders=[4.0], levels=64)
    account = replay([kept, touched], **full)
    assert account.guarantee == "estimate"
    assert any("same divergences at every step" in reason for reason in account.reasons)


def test_runs_may_start_from_the_same_weights():
    runs = [trained(seed) for seed in (1, 2)]
    runs[1][0] = runs[0][0]
    full = described(sample_rate=1.0, noise_multiplier=8.0, orders=[4.0])
    assert replay(runs, **full).guarantee == "expectation_bound"


# --- what does not fit ----------------------------------------------------------------------------


def test_what_does_not_fit_is_named_with_its_cure(run, tmp_path):
    with pytest.raises(ValueError, match="another number of classes"):
        replay(run, **described(module=lambda: make_model(classes=7)))
    with pytest.raises(ValueError, match=r"2 names missing and 2 foreign ones.*no '3\.weight'"):
        replay(run, **described(module=lambda: nn.Sequential(*make_model()[:2], nn.Tanh(),
                                                              nn.Linear(6, 10))))  # fmt: skip
    broken = {name: value.clone() for name, value in run[3].items()}
    broken["_module.2.bias"][1] = torch.nan
    with pytest.raises(ValueError, match=r"'2\.bias' with 1 of 10 not finite"):
        replay({0: run[0], 3: broken}, **described())
    with pytest.raises(ValueError, match="after how many steps"):
        replay([run[0], run[3]], **described())
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    counted = {"module_state_dict": run[3],
               "privacy_accountant_state_dict": {"history": [(1.0, RATE, 3)]}}  # fmt: skip
    for file in files:
        torch.save(counted, file)
    with pytest.raises(ValueError, match="both after 3 steps"):
        replay(files, **described())
    with pytest.raises(ValueError, match="to be of a run of 4 steps"):
        replay(run, **described(steps=4))
    with pytest.raises(ValueError, match="Pass steps="):
        replay({0: run[0]}, **described(steps=None))
    with pytest.raises(FileNotFoundError):
        replay(tmp_path / "no.pt", **described())
    torch.save(make_model(), tmp_path / "object.pt")
    with pytest.raises(LedgerError, match="cannot be read safely"):
        replay(tmp_path / "object.pt", **described())
    with pytest.raises(LedgerError, match="without any tensor"):
        replay({"epoch": 3}, **described())
    mixing = nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 10))
    with pytest.raises(UnsupportedError, match="BatchNorm"):
        replay(mixing.state_dict(), **described(module=mixing))


def test_dropout_is_said():
    module = nn.Sequential(nn.Linear(64, 6), nn.Dropout(0.5), nn.Linear(6, 10))
    account = replay({0: module.state_dict()}, **described(module=module, steps=1, **ONE))
    assert any("dropout" in reason for reason in account.reasons)


# --- a pass that was stopped ----------------------------------------------------------------------


class Stopping(Dataset):
    """Counts reads, and is interrupted at one."""

    def __init__(self, at=None):
        self.reads, self._at = 0, at

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        self.reads += 1
        if self.reads == self._at:
            raise KeyboardInterrupt
        return data()[row]


def test_a_stopped_pass_goes_on_and_comes_to_the_same(run, tmp_path):
    kept, folder = {t: run[t] for t in (0, 2, 5)}, tmp_path / "norms"
    exact = replay(kept, **described(**ONE)).rdp()
    stopping = Stopping(at=ROWS + 40)  # within the second checkpoint
    with pytest.raises(KeyboardInterrupt):
        replay(kept, **described(**ONE, dataset=stopping, work_dir=folder))
    again = Stopping()
    account = replay(kept, **described(**ONE, dataset=again, work_dir=folder))
    np.testing.assert_array_equal(account.rdp(), exact)
    assert again.reads < 2.5 * ROWS  # the first checkpoint was not measured again
    assert all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())


def test_kept_norms_of_another_training_are_not_believed(run, tmp_path):
    kept = {0: run[0]}
    replay(kept, **described(**ONE, work_dir=tmp_path))
    other = torch.utils.data.TensorDataset(data().tensors[0] * 3.0, data().tensors[1])
    with pytest.raises(LedgerError, match="another data set, loss, collate"):
        replay(kept, **described(**ONE, work_dir=tmp_path, dataset=other))
    fewer = torch.utils.data.Subset(data(), range(50))
    with pytest.raises(LedgerError, match="norms of 50 rows, got 90"):
        replay(kept, **described(**ONE, work_dir=tmp_path, dataset=fewer))


def test_levels_are_kept_for_a_tight_epsilon(run):
    account = replay(run, **described(history=True))
    tight = account.tight_epsilon([0], delta=1e-3)
    assert tight.guarantee == "estimate"
    assert 0.0 < tight.epsilon[0] <= account.get_epsilon(1e-3, indices=[0]).epsilon[0] * 1.001
