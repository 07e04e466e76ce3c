"""Caps per output: what is enforced is what is charged, in one process, in parts, over files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pil import (
    BatchMemoryManager,
    LedgerError,
    PerInstancePrivacyEngine,
    UnsupportedError,
)
from opacus_pil.heads import OneVsRestLoss
from tests.heads.models import (
    CLASSES,
    ORDERS,
    SIZE,
    WIDTH,
    Heads,
    binary,
    bounded,
    frozen,
    head,
    raw,
)
from tests.heads.models import linear as one_linear

BOUNDS = [0.2, 0.05, 0.4]
FLOAT32 = 1e-5  # sums of some twenty float32 gradients


def some_caps(seed: int = 0) -> np.ndarray:
    caps = np.random.default_rng(seed).uniform(0.0, 1.0, (SIZE, CLASSES))
    caps[0], caps[1, 1] = 0.0, 0.0
    return caps


def moves(caps: np.ndarray) -> np.ndarray:
    """Most that each row moves the sum by, in units of the noise on it."""
    return np.linalg.norm(caps * BOUNDS, axis=1) / np.linalg.norm(BOUNDS) / 2.0


# --- the charge -----------------------------------------------------------------------------------


def test_a_step_charges_the_length_of_all_caps_of_a_row_together():
    caps = some_caps()
    made = Heads(caps=caps, bounds=BOUNDS).run(3)
    assert made.label == "bound"
    exact = 3 * np.array(ORDERS) / 2.0 * moves(caps)[:, None] ** 2  # every row is in every batch
    found = made.engine.per_instance.rdp()
    assert (found >= exact).all()
    assert not found[0].any()  # caps of zero everywhere
    # Levels are a few per cent apart, and are rounded up.
    np.testing.assert_allclose(found[2:], exact[2:], rtol=0.1, atol=1e-3)
    assert (found <= 3 * np.array(ORDERS) / 8.0 * (1 + 1e-12)).all()  # the worst case at z = 2


def test_no_row_moves_the_noised_sum_by_more_than_it_is_charged():
    caps = some_caps()

    def sums(rows):
        data = torch.utils.data.TensorDataset(*(t[rows] for t in bounded().tensors))
        made = Heads(data=data, caps=caps[rows], bounds=BOUNDS)
        for p in made.plain.parameters():
            nn.init.ones_(p)
        made.run(1)
        return torch.cat([p.summed_grad.flatten() for p in made.plain.parameters()]).double()

    whole = sums(list(range(SIZE)))
    closest = 0.0
    for row in range(SIZE):
        shift = float((whole - sums([k for k in range(SIZE) if k != row])).norm())
        most = float(np.linalg.norm(caps[row] * BOUNDS))
        assert shift <= most + FLOAT32
        closest = max(closest, shift / most if most else 0.0)
    assert closest > 0.95  # the charge is met


def test_one_cap_per_instance_is_that_cap_for_each_output():
    one = np.random.default_rng(1).uniform(0.0, 1.0, SIZE)
    first = Heads(caps=one, bounds=BOUNDS).run(2)
    second = Heads(caps=np.repeat(one[:, None], CLASSES, axis=1), bounds=BOUNDS).run(2)
    assert torch.equal(first.weights, second.weights)
    assert np.array_equal(first.engine.per_instance.rdp(), second.engine.per_instance.rdp())
    np.testing.assert_allclose(
        first.engine.per_instance.caps, one, rtol=1e-5  # raised by what clipping rounds
    )  # fmt: skip


def test_caps_of_one_train_what_opacus_trains_and_charge_the_worst_case():
    capped = Heads(caps=np.ones((SIZE, CLASSES)), bounds=BOUNDS).run(3)
    worst = Heads(policy="worst_case", bounds=BOUNDS).run(3)
    assert torch.equal(capped.weights, worst.weights)
    ours, theirs = capped.engine.per_instance.rdp(), worst.engine.per_instance.rdp()
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert (ours >= theirs).all()


def test_a_head_with_one_output_is_clipped_as_flat_clipping_clips_it():
    caps = np.random.default_rng(2).uniform(0.0, 1.0, SIZE)
    data, loss = binary(bounded()), nn.BCEWithLogitsLoss()
    made = {
        kind: Heads(module, data=data, criterion=loss, caps=caps, clipping=kind, bounds=bound)
        for kind, module, bound in (
            ("per_layer", head(1), [0.3]), ("flat", one_linear(), 0.3),
        )
    }  # fmt: skip
    for one in made.values():
        one.run(3)
    torch.testing.assert_close(made["per_layer"].weights, made["flat"].weights)
    ours, flat = (one.engine.per_instance.rdp() for one in made.values())
    np.testing.assert_allclose(ours, flat, rtol=0.1)  # a level apart where a root rounds


def test_poisson_batches_in_parts_are_the_batches_in_one():
    caps, found = some_caps(), []
    for physical in (None, 2):
        made = Heads(caps=caps, bounds=BOUNDS, batch=8)
        if physical is None:
            made.run(3)
        else:
            with BatchMemoryManager(
                data_loader=made.loader, max_physical_batch_size=2, optimizer=made.optimizer
            ) as parts:
                for batch in parts:
                    made.step(*batch)
        assert made.engine.per_instance.steps == 3
        found.append((made.weights, made.engine.per_instance.rdp()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=FLOAT32, atol=1e-6)
    assert np.array_equal(found[0][1], found[1][1])


def test_a_budget_is_spent_by_all_outputs_together_and_then_the_row_is_out():
    caps = some_caps()
    budget = np.array(ORDERS) / 8.0 * 4.5 * 0.3  # 4.5 steps of a row that moves by sqrt(.3)
    made = Heads(caps=caps, bounds=BOUNDS, settings={"budget": budget})
    made.run(12)
    ledger = made.engine.per_instance
    assert made.label == "bound"
    assert (ledger.spent_rdp() <= budget * (1 + 1e-12)).all()
    dropped = ~ledger.active
    assert 0 < dropped.sum() < SIZE
    # Whoever still takes part could pay for all steps; whoever is out could not.
    asked = 12 * np.array(ORDERS)[0] / 2.0 * moves(caps) ** 2
    assert asked[~dropped].max() <= budget[0]
    assert asked[dropped].min() >= 0.9 * budget[0]  # levels are rounded up
    in_force = made.engine.account.caps_in_force(np.flatnonzero(dropped), noise=2.0, rate=1.0)
    assert in_force.shape == (dropped.sum(), CLASSES)
    assert not in_force.any()


def test_a_ledger_with_smaller_caps_has_the_last_word():
    """Each output gives up the same share: the row is charged less, and moves as much less."""
    caps = some_caps()
    made = Heads(caps=caps, bounds=BOUNDS)
    made.engine.per_instance.set_caps(0.25 * made.engine.per_instance.caps)
    for p in made.plain.parameters():
        nn.init.ones_(p)
    made.run(1)
    in_force = made.engine.account.caps_in_force(np.arange(SIZE), noise=2.0, rate=1.0)
    np.testing.assert_allclose(in_force, 0.25 * caps, rtol=1e-5)  # raised by what clipping rounds
    most = 0.25 * np.sum(caps * BOUNDS, axis=0)
    moved = [float(p.summed_grad.norm()) for p in made.plain.parameters()]
    assert (np.array(moved) <= most * (1 + 1e-5)).all()


# --- what cannot be enforced ----------------------------------------------------------------------


def untouched(module: nn.Module) -> bool:
    return not hasattr(module, "autograd_grad_sample_hooks")


@pytest.mark.parametrize(
    "caps",
    [
        np.ones((SIZE, CLASSES + 1)), np.ones((SIZE - 1, CLASSES)), np.ones((CLASSES, SIZE)),
        np.ones((SIZE, CLASSES, 1)), np.full((SIZE, CLASSES), np.nan), 2.0 * np.ones(SIZE),
    ],
)  # fmt: skip
def test_caps_of_another_shape_are_refused_before_anything_changes(caps):
    module = head()
    with pytest.raises(ValueError, match="caps"):
        Heads(module, caps=caps, bounds=BOUNDS)
    assert untouched(module)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reverse": True, "bounds": BOUNDS}, "in their order"),
        ({"module": frozen(nn.Linear(WIDTH + 1, CLASSES)), "data": raw()}, "for\n?.*OneVsRest"),
        ({"module": frozen(head()).requires_grad_(True), "data": raw()}, "OneVsRest"),
    ],
)
def test_which_cap_is_whose_must_be_known(options, words):
    module = options.pop("module", None) or head()
    with pytest.raises(UnsupportedError, match=words):
        Heads(module, **options)
    assert untouched(module)


def test_outputs_that_share_weights_are_not_apart():
    module = head()
    module.outputs[1].weight = module.outputs[0].weight
    with pytest.raises(UnsupportedError, match="Which cap is whose"):
        Heads(module, bounds=[1.0, 1.0])


def test_caps_per_output_are_refused_with_flat_clipping():
    module = head()
    with pytest.raises(ValueError, match="clipping='per_layer'"):
        Heads(module, caps=some_caps(), clipping="flat")
    assert untouched(module)


def exchanged(made: Heads) -> None:
    made.optimizer.max_grad_norms = [0.1, 0.1, 0.44]


def frozen_output(made: Heads) -> None:
    next(made.plain.parameters()).requires_grad_(False)


@pytest.mark.parametrize("meddle", [exchanged, frozen_output])
def test_other_bounds_than_are_charged_for_are_refused_and_nothing_moves(meddle):
    """A cap of 1 on an output of a larger share would move the sum by more than is charged."""
    made = Heads(caps=np.tile([0.0, 0.0, 1.0], (SIZE, 1)), bounds=BOUNDS).run(1)
    meddle(made)
    before = made.weights
    with pytest.raises(UnsupportedError, match="which caps were charged for"):
        made.run(1)
    assert torch.equal(made.weights, before)
    assert made.engine.per_instance.steps == 1


def test_without_caps_other_bounds_are_charged_as_they_are():
    """The worst case is that of the bounds in force; noise that did not follow costs more."""
    same, other = (Heads(policy="worst_case", bounds=BOUNDS).run(1) for _ in range(2))
    other.optimizer.max_grad_norms = [2.0 * b for b in BOUNDS]
    with pytest.warns(UserWarning, match="scaled to"):
        other.run(1)
    same.run(1)
    first = Heads(policy="worst_case", bounds=BOUNDS).run(1).engine.per_instance.rdp()
    grown = [made.engine.per_instance.rdp() - first for made in (same, other)]
    np.testing.assert_allclose(grown[1], 4.0 * grown[0], rtol=1e-9)


@pytest.mark.parametrize("policy", ["worst_case", "last_seen", "full"])
def test_a_gradient_that_is_infinite_in_one_output_is_seen_without_caps(policy):
    """Its norm was hidden by the clamp: charged as the clip bound, while the sum was NaN."""
    made = Heads(policy=policy, bounds=BOUNDS).run(1)
    made.data.tensors[0][3] = torch.inf
    with pytest.warns(UserWarning, match="not finite"):
        made.run(1)
    assert np.isinf(made.engine.per_instance.rdp()[3]).all()
    assert made.engine.get_epsilon(1e-2) == math.inf


# --- files, forks ---------------------------------------------------------------------------------


def saved(tmp_path, **options):
    def save(step, made):
        if step == 2:  # in the middle of a pass
            made.engine.save_checkpoint(
                path=tmp_path / "c", module=made.module, optimizer=made.optimizer
            )

    return Heads(caps=some_caps(), bounds=BOUNDS, batch=8, **options).run(2, after=save)


def loaded(tmp_path, made):
    made.engine.load_checkpoint(
        path=tmp_path / "c", module=made.module, optimizer=made.optimizer
    )  # fmt: skip
    return made


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    saved(tmp_path)
    whole = Heads(caps=some_caps(), bounds=BOUNDS, batch=8).run(6)
    resumed = loaded(tmp_path, Heads(caps=some_caps(), bounds=BOUNDS, batch=8, seed=9)).run(4)
    assert torch.equal(resumed.weights, whole.weights)
    assert np.array_equal(resumed.engine.per_instance.rdp(), whole.engine.per_instance.rdp())
    assert np.array_equal(resumed.engine.account.caps, some_caps())
    assert resumed.label == "bound"


def another_split() -> np.ndarray:
    """Caps that move all outputs together by as much, in other outputs."""
    weights = np.array(BOUNDS)
    joint = np.linalg.norm(some_caps() * weights, axis=1)
    return np.repeat((joint / np.linalg.norm(weights))[:, None], CLASSES, axis=1)


@pytest.mark.parametrize("caps", [another_split(), another_split()[:, 0], np.ones((SIZE, CLASSES))])
def test_a_ledger_of_another_split_over_outputs_is_refused_and_nothing_changes(caps, tmp_path):
    """The ledger is the same number for number; certificates count which output."""
    saved(tmp_path)
    made = Heads(caps=caps, bounds=BOUNDS, batch=8, seed=9).run(1)
    before, ledger = made.weights, made.engine.per_instance.rdp()
    with pytest.raises(LedgerError, match="caps per output"):
        loaded(tmp_path, made)
    assert torch.equal(made.weights, before)
    assert np.array_equal(made.engine.per_instance.rdp(), ledger)
    assert np.array_equal(
        made.engine.account.caps, np.broadcast_to(caps.reshape(SIZE, -1), (SIZE, CLASSES))
    )


def test_a_ledger_of_flat_caps_is_refused_under_caps_per_output(tmp_path):
    flat = Heads(caps=np.ones(SIZE), clipping="flat", batch=8).run(1)
    flat.engine.save_checkpoint(path=tmp_path / "c", module=flat.module, optimizer=flat.optimizer)
    with pytest.raises(LedgerError):
        loaded(tmp_path, Heads(caps=some_caps(), bounds=BOUNDS, batch=8))


def test_a_fork_clips_to_the_same_caps_and_is_adopted():
    made = Heads(caps=some_caps(), bounds=BOUNDS, batch=8).run(2)
    fork = made.engine.fork()
    rows = np.arange(1, SIZE)
    module = head()
    wrapped, optimizer, loader = fork.make_private_on(
        rows, module=module, dataset=made.data, steps=3,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )  # fmt: skip
    assert optimizer.max_grad_norms == BOUNDS
    for inputs, targets in loader:
        optimizer.zero_grad()
        OneVsRestLoss()(wrapped(inputs), targets).backward()
        optimizer.step()
    assert np.array_equal(fork.account.caps, some_caps())
    assert fork.per_instance.guarantee == "bound"
    assert (fork.per_instance.steps, made.engine.per_instance.steps) == (5, 2)
    made.engine.adopt(fork)
    assert made.engine.per_instance.steps == 5
    assert np.array_equal(made.engine.per_instance.rdp(), fork.per_instance.rdp())
    assert np.array_equal(made.engine.account.caps, some_caps())


def test_caps_that_are_changed_under_a_budget_are_clipped_to_from_then_on():
    made = Heads(caps=some_caps(), bounds=BOUNDS, settings={"budget": (8.0, 1e-2)}).run(1)
    made.engine.set_caps(np.zeros((SIZE, CLASSES)))
    before = made.engine.per_instance.spent_rdp()
    with pytest.raises(ValueError, match="shape"):
        made.engine.set_caps(np.ones((SIZE, 2)))
    made.run(1)
    assert not torch.cat([p.summed_grad for p in made.plain.parameters()]).any()
    assert np.array_equal(made.engine.per_instance.spent_rdp(), before)


def test_an_engine_goes_on_with_the_clip_bounds_that_its_caps_are_in_units_of():
    made = Heads(caps=some_caps(), bounds=BOUNDS).run(1)
    with pytest.raises(UnsupportedError, match="in whose units caps are"):
        Heads(engine=made.engine, data=made.data, bounds=[1.0] * CLASSES)
    again = Heads(engine=made.engine, data=made.data, bounds=BOUNDS, seed=5).run(1)
    assert again.engine.per_instance.steps == 2


def test_somebody_elses_training_is_clipped_to_caps_per_output_too():
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader

    module, data, caps = head(), bounded(), some_caps()
    made = PrivacyEngine().make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(data, batch_size=SIZE), noise_multiplier=2.0, max_grad_norm=BOUNDS,
        clipping="per_layer",
    )  # fmt: skip
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=caps, orders=ORDERS, levels=256)
    engine.attach(module=made[0], optimizer=made[1], data_loader=made[2], criterion=OneVsRestLoss())
    for inputs, targets in made[2]:
        made[1].zero_grad()
        OneVsRestLoss()(made[0](inputs), targets).backward()
        made[1].step()
    expected = Heads(caps=caps, bounds=BOUNDS).run(1).engine.per_instance
    assert engine.per_instance.guarantee == "bound"
    assert np.array_equal(engine.per_instance.rdp(), expected.rdp())
