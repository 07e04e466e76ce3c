"""The accountant against naive sums, closed forms, Opacus, and against its own promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant

from opacus_pil.accounting import (
    DEFAULT_ORDERS,
    PerInstanceAccountant,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)
from opacus_pil.errors import LedgerError

ORDERS = [1.5, 2.0, 8.0, 1500.0]
FLOAT64_SUMS = 1e-12  # a few hundred float64 roundings on positive sums


def empty_step(accountant, *, noise_multiplier=1.0, sample_rate=0.1, **extra):
    accountant.step(
        indices=[],
        sensitivities=[],
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        **extra,
    )


def random_run(accountant, *, steps, seed, noises=(1.0,), rates=(0.1,)):
    """Charge random batches; return the exact sensitivity of every instance at every step."""
    generator = np.random.default_rng(seed)
    size = accountant.num_instances
    current, history = np.ones(size), []
    for _ in range(steps):
        rows = np.flatnonzero(generator.random(size) < 0.4)
        current[rows] = generator.choice([0.0, 1.0, *generator.random(3)], size=len(rows))
        noise, rate = float(generator.choice(noises)), float(generator.choice(rates))
        accountant.step(
            indices=rows, sensitivities=current[rows], noise_multiplier=noise, sample_rate=rate
        )
        history.append((current.copy(), noise, rate))
    return history


def naive(history, round_up=lambda s: s):
    return sum(
        sampled_gaussian_rdp(round_up(s), noise_multiplier=z, sample_rate=q, orders=ORDERS)
        for s, z, q in history
    )


@pytest.mark.parametrize(
    ("noises", "rates"), [((1.0,), (0.1,)), ((0.7, 1.0, 3.0), (0.05, 0.1)), ((1.0,), (1.0,))]
)
def test_prefix_sums_equal_the_naive_sum_over_steps(noises, rates):
    accountant = PerInstanceAccountant(30, orders=ORDERS, levels=64)
    history = random_run(accountant, steps=40, seed=0, noises=noises, rates=rates)
    levels = accountant.levels
    expected = naive(history, lambda s: levels[np.searchsorted(levels, s, side="left")])
    found = accountant.rdp()
    assert (found >= expected * (1 - FLOAT64_SUMS)).all()
    # Offsets carry the absolute error of S, the same for every instance.
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12 * expected.max())


@given(seed=st.integers(0, 10_000))
def test_a_total_is_never_below_the_exact_sum(seed):
    accountant = PerInstanceAccountant(8, orders=ORDERS, levels=16)
    history = random_run(accountant, steps=12, seed=seed, noises=(0.5, 2.0), rates=(0.01, 0.3))
    assert (accountant.rdp() >= naive(history) * (1 - FLOAT64_SUMS)).all()


def test_more_levels_round_up_by_less():
    coarse = PerInstanceAccountant(20, orders=ORDERS, levels=16)
    fine = PerInstanceAccountant(20, orders=ORDERS, levels=4096)
    history = random_run(coarse, steps=20, seed=3)
    random_run(fine, steps=20, seed=3)
    assert (fine.rdp() <= coarse.rdp() * (1 + 1e-9)).all()
    exact = naive(history)
    # Divergences grow at most like exp(alpha s^2 / z^2): one level of 4096 is a factor 1.0017 in s.
    np.testing.assert_allclose(fine.rdp()[:, :3], exact[:, :3], rtol=0.05)


def test_sensitivities_of_one_give_the_rdp_accountant_of_opacus():
    orders = [1.5, 2.0, 4.0, 16.0, 63.0]
    accountant = PerInstanceAccountant(5, orders=orders)
    opacus = RDPAccountant()
    for noise, rate, count in [(1.0, 0.02, 50), (0.8, 0.02, 20), (1.0, 0.05, 1)]:
        for _ in range(count):
            empty_step(accountant, noise_multiplier=noise, sample_rate=rate, guarantee="bound")
            opacus.step(noise_multiplier=noise, sample_rate=rate)
    from opacus.accountants.analysis import rdp as analysis

    theirs = sum(
        analysis.compute_rdp(q=q, noise_multiplier=z, steps=n, orders=orders)
        for z, q, n in opacus.history
    )
    np.testing.assert_allclose(accountant.rdp()[0], theirs, rtol=1e-8)  # Opacus's own accuracy
    assert accountant.guarantee == "bound"
    np.testing.assert_array_equal(accountant.rdp()[0], accountant.worst_case_rdp())


def test_full_batch_total_is_the_closed_form():
    accountant = PerInstanceAccountant(2, orders=ORDERS, levels=512)
    sensitivity = float(accountant.levels[300])  # on the grid: no rounding up
    for _ in range(7):
        accountant.step(
            indices=[0], sensitivities=[sensitivity], noise_multiplier=2.0, sample_rate=1.0
        )
    expected = 7 * np.array(ORDERS) * sensitivity**2 / (2 * 2.0**2)
    np.testing.assert_allclose(accountant.rdp([0])[0], expected, rtol=1e-8)
    assert (accountant.rdp([0])[0] >= expected).all()


@given(seed=st.integers(0, 10_000), levels=st.integers(2, 40))
def test_no_instance_exceeds_the_worst_case(seed, levels):
    accountant = PerInstanceAccountant(8, orders=ORDERS, levels=levels)
    random_run(accountant, steps=10, seed=seed, noises=(0.4, 1.0))
    assert (accountant.rdp() <= accountant.worst_case_rdp()).all()
    assert (accountant.get_epsilon(1e-5).epsilon <= accountant.worst_case_epsilon(1e-5)).all()


def test_rounding_never_lifts_an_instance_above_the_worst_case():
    accountant = PerInstanceAccountant(1, orders=ORDERS)
    empty_step(accountant)  # at the worst case in every step
    for _ in range(50):  # each move adds its rounding error to what was charged
        accountant.observe_all([0.5])
        accountant.observe_all([1.0])
    assert (accountant.rdp()[0] <= accountant.worst_case_rdp()).all()


def test_levels_round_up_and_keep_zero_and_one_exact():
    accountant = PerInstanceAccountant(6, orders=ORDERS)
    given_values = np.array([0.0, 1e-9, 0.001, 0.3, np.nextafter(1.0, 0.0), 1.0])
    accountant.observe_all(given_values)
    charged = accountant.sensitivities
    assert (charged >= given_values).all()
    assert charged[0] == 0.0
    assert charged[-1] == charged[-2] == 1.0
    assert charged[1] == charged[2] == accountant.levels[1]
    assert charged[3] <= 0.3 * 1.007  # three decades over 1022 steps: a factor 1.0068


def test_zero_sensitivity_costs_nothing_and_nobody_goes_below_zero_after_a_jump():
    accountant = PerInstanceAccountant(2, orders=ORDERS, levels=64)
    accountant.observe_all([0.0, 0.0])
    for _ in range(1000):
        empty_step(accountant, noise_multiplier=0.5, sample_rate=0.5)
    assert (accountant.rdp() == 0.0).all()
    # S of the top level is large by now; the 1e-3 charge below must not drown in its rounding.
    for sensitivity in (1.0, 1e-3, 1.0, 1e-3):
        accountant.step(
            indices=[0],
            sensitivities=[sensitivity],
            noise_multiplier=1e4 if sensitivity == 1.0 else 1.0,
            sample_rate=1e-3,
        )
    low = accountant.rdp([0])
    exact = 2 * sampled_gaussian_rdp(
        np.array([1e-3]), noise_multiplier=1.0, sample_rate=1e-3, orders=ORDERS
    )
    assert (low >= exact).all()


def test_a_step_without_noise_is_infinite_for_whoever_took_part_and_stays_so():
    accountant = PerInstanceAccountant(3, orders=ORDERS)
    accountant.step(indices=[0, 1], sensitivities=[0.0, 0.2], noise_multiplier=1.0, sample_rate=0.1)
    empty_step(accountant, noise_multiplier=0.0)
    accountant.step(indices=[1, 2], sensitivities=[0.0, 0.0], noise_multiplier=1.0, sample_rate=0.1)
    found = accountant.rdp()
    assert np.isfinite(found[0]).all()
    assert np.isinf(found[1:]).all()
    assert np.isinf(accountant.worst_case_rdp()).all()
    assert accountant.get_epsilon(1e-5).epsilon[1] == np.inf


def test_an_unattributed_step_charges_everyone_the_worst_and_leaves_levels():
    accountant = PerInstanceAccountant(3, orders=ORDERS)
    accountant.observe_all([0.0, 0.1, 0.5])
    before = accountant.sensitivities
    accountant.step(indices=None, sensitivities=None, noise_multiplier=1.0, sample_rate=0.2)
    worst = sampled_gaussian_rdp(
        np.array([1.0]), noise_multiplier=1.0, sample_rate=0.2, orders=ORDERS
    )
    np.testing.assert_allclose(accountant.rdp(), np.repeat(worst, 3, axis=0), rtol=FLOAT64_SUMS)
    np.testing.assert_array_equal(accountant.sensitivities, before)
    assert accountant.unattributed_steps == 1


def test_caps_are_charged_whatever_was_observed_and_give_a_bound():
    accountant = PerInstanceAccountant(3, orders=ORDERS, caps=[0.25, 0.5, 0.0])
    for _ in range(4):
        accountant.step(
            indices=[0, 1],
            sensitivities=[0.01, 0.5],
            noise_multiplier=1.0,
            sample_rate=0.1,
            guarantee="bound",
        )
    exact = 4 * sampled_gaussian_rdp(
        np.array([0.25, 0.5, 0.0]), noise_multiplier=1.0, sample_rate=0.1, orders=ORDERS
    )
    assert (accountant.rdp() >= exact).all()
    np.testing.assert_allclose(accountant.rdp()[:, :3], exact[:, :3], rtol=0.05)
    assert accountant.guarantee == "bound"


class TestLabels:
    """No label claims more than the levels can carry."""

    def test_the_weakest_step_decides(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS)
        empty_step(accountant, guarantee="bound")
        accountant.observe_all([0.1, 0.2])
        empty_step(accountant, guarantee="output_specific")
        assert accountant.guarantee == "output_specific"
        empty_step(accountant)
        assert accountant.guarantee == "estimate"
        assert accountant.get_epsilon(0.1).guarantee == "estimate"

    def test_last_seen_levels_are_an_estimate_only(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS)
        with pytest.raises(ValueError, match="at most 'estimate'"):
            accountant.step(
                indices=[0],
                sensitivities=[0.1],
                noise_multiplier=1.0,
                sample_rate=0.1,
                guarantee="bound",
            )
        assert accountant.steps == 0
        assert (accountant.sensitivities == 1.0).all()

    def test_a_full_pass_counts_for_its_own_step_only(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS)
        accountant.observe_all([0.1, 0.2])
        with pytest.raises(ValueError, match="at most 'output_specific'"):
            empty_step(accountant, guarantee="bound")
        empty_step(accountant, guarantee="output_specific")
        with pytest.raises(ValueError, match="at most 'estimate'"):
            empty_step(accountant, guarantee="output_specific")

    def test_a_batch_of_everyone_is_a_full_pass(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS)
        accountant.step(
            indices=[1, 0],
            sensitivities=[0.1, 0.2],
            noise_multiplier=1.0,
            sample_rate=1.0,
            guarantee="output_specific",
        )
        assert accountant.guarantee == "output_specific"

    def test_caps_changed_after_a_bound_are_refused(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS, caps=[0.5, 0.5])
        empty_step(accountant, guarantee="bound")
        with pytest.raises(ValueError, match="fixed before the run"):
            accountant.set_caps([0.1, 0.1])
        np.testing.assert_array_equal(accountant.caps, [0.5, 0.5])

    def test_caps_chosen_during_the_run_are_output_specific(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS)
        empty_step(accountant, guarantee="output_specific")
        accountant.set_caps([0.1, 0.2])
        with pytest.raises(ValueError, match="at most 'output_specific'"):
            empty_step(accountant, guarantee="bound")
        empty_step(accountant, guarantee="output_specific")

    def test_an_expectation_is_not_a_step_label(self):
        with pytest.raises(ValueError, match="guarantee"):
            empty_step(PerInstanceAccountant(1), guarantee="expectation_bound")


def test_forgotten_instances_pay_no_more_and_stay_readable():
    accountant = PerInstanceAccountant(3, orders=ORDERS)
    random_run(accountant, steps=5, seed=1)
    before = accountant.rdp()
    accountant.forget([1])
    empty_step(accountant)
    accountant.step(indices=None, sensitivities=None, noise_multiplier=1.0, sample_rate=0.1)
    after = accountant.rdp()
    np.testing.assert_allclose(after[1], before[1], rtol=1e-12)
    assert (after[1] >= before[1]).all()
    assert (after[[0, 2]] > before[[0, 2]]).all()
    np.testing.assert_array_equal(accountant.active, [True, False, True])
    with pytest.raises(ValueError, match="forgotten"):
        accountant.step(indices=[1], sensitivities=[0.1], noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(ValueError, match="forgotten"):
        accountant.forget([1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise_multiplier": -1.0}, r"noise_multiplier .*got noise_multiplier=-1.0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier"),
        ({"sample_rate": 1.2}, r"sample_rate in \[0, 1\], got sample_rate=1.2"),
        ({"sensitivities": [0.1, float("nan")]}, "1 of 2 outside .*row 1"),
        ({"sensitivities": [0.1, -0.1]}, "sensitivities .*row 1"),
        ({"sensitivities": [0.1, 1.5]}, "raise max_sensitivity"),
        ({"sensitivities": [0.1]}, r"one entry per entry of indices \(2\)"),
        ({"indices": [0, 9]}, r"indices in \[0, 3\]"),
        ({"indices": [2, 2]}, "index 2 2 times"),
        ({"guarantee": "certain"}, "one of bound"),
    ],
)
def test_a_refused_step_leaves_no_trace(change, words):
    accountant = PerInstanceAccountant(4, orders=ORDERS)
    random_run(accountant, steps=3, seed=2)
    before = accountant.state_dict()
    good = {
        "indices": [0, 1],
        "sensitivities": [0.1, 0.2],
        "noise_multiplier": 1.0,
        "sample_rate": 0.1,
    }
    with pytest.raises(ValueError, match=words):
        accountant.step(**{**good, **change})
    after = accountant.state_dict()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_instances": 0}, "num_instances"),
        ({"num_instances": 3, "orders": [1.0]}, "orders"),
        ({"num_instances": 3, "levels": 1}, "levels"),
        ({"num_instances": 3, "caps": [0.1, 0.2]}, "caps"),
        ({"num_instances": 3, "caps": [0.1, 0.2, 1.2]}, "caps .*row 2"),
        ({"num_instances": 3, "max_sensitivity": 0.5}, "max_sensitivity"),
        ({"num_instances": 3, "instance_ids": [1, 1, 2]}, "instance_ids"),
    ],
)
def test_construction_names_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=words):
        PerInstanceAccountant(**arguments)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_delta_must_be_a_probability_strictly_inside(delta):
    with pytest.raises(ValueError, match="delta"):
        PerInstanceAccountant(2).get_epsilon(delta)


def test_max_sensitivity_above_one_is_a_level_and_the_start():
    accountant = PerInstanceAccountant(2, orders=ORDERS, max_sensitivity=3.0, levels=100)
    assert accountant.levels[-1] == 3.0
    assert 1.0 in accountant.levels
    assert (np.diff(accountant.levels) > 0).all()
    assert (accountant.sensitivities == 3.0).all()


class TestLedger:
    """What is saved comes back; what does not fit is refused and changes nothing."""

    @staticmethod
    def used(seed=5, **extra):
        accountant = PerInstanceAccountant(12, orders=ORDERS, levels=32, **extra)
        random_run(accountant, steps=9, seed=seed, noises=(0.5, 1.0))
        return accountant

    def test_a_loaded_ledger_goes_on_bit_for_bit(self):
        first = self.used()
        second = PerInstanceAccountant(12, orders=ORDERS, levels=32)
        second.load_state_dict(first.state_dict())
        for accountant in (first, second):
            random_run(accountant, steps=4, seed=6)
        np.testing.assert_array_equal(first.rdp(), second.rdp())
        assert first.steps == second.steps == 13

    def test_a_state_is_a_copy(self):
        accountant = self.used()
        state, before = accountant.state_dict(), accountant.rdp()
        state["offset"] += 1.0
        np.testing.assert_array_equal(accountant.rdp(), before)
        other = PerInstanceAccountant(12, orders=ORDERS, levels=32)
        saved = accountant.state_dict()
        other.load_state_dict(saved)
        random_run(other, steps=2, seed=0)
        np.testing.assert_array_equal(saved["offset"], accountant.state_dict()["offset"])

    def test_a_copy_is_independent(self):
        accountant = self.used()
        before = accountant.rdp()
        random_run(accountant.copy(), steps=2, seed=0)
        np.testing.assert_array_equal(accountant.rdp(), before)

    @pytest.mark.parametrize(
        "other",
        [
            PerInstanceAccountant(13, orders=ORDERS, levels=32),
            PerInstanceAccountant(12, orders=[2.0], levels=32),
            PerInstanceAccountant(12, orders=ORDERS, levels=33),
            PerInstanceAccountant(12, orders=ORDERS, levels=32, instance_ids=range(1, 13)),
        ],
    )
    def test_a_ledger_of_something_else_is_refused(self, other):
        before = other.state_dict()
        with pytest.raises(LedgerError, match="Expected a ledger"):
            other.load_state_dict(self.used().state_dict())
        for key, value in before.items():
            np.testing.assert_array_equal(other.state_dict()[key], value)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("version", 99),
            ("offset", np.zeros((3, 4))),
            ("offset", np.full((12, 4), np.nan)),
            ("level", np.full(12, 40, dtype=np.uint16)),
            ("guarantee", "certain"),
            ("steps", -1),
            ("base", "text"),
        ],
    )
    def test_a_damaged_ledger_is_refused(self, key, value):
        accountant = self.used()
        state = {**accountant.state_dict(), key: value}
        with pytest.raises(LedgerError):
            accountant.load_state_dict(state)
        del state[key]
        with pytest.raises(LedgerError, match=key):
            accountant.load_state_dict(state)

    def test_merged_shards_equal_one_accountant(self):
        whole = PerInstanceAccountant(6, orders=ORDERS, levels=32)
        ids = [np.array([0, 2, 4]), np.array([1, 3, 5])]
        shards = [
            PerInstanceAccountant(3, orders=ORDERS, levels=32, instance_ids=part) for part in ids
        ]
        generator = np.random.default_rng(0)
        for _ in range(5):
            values = generator.random(6)
            kernel = {"noise_multiplier": 1.0, "sample_rate": 0.1}
            whole.step(indices=np.arange(6), sensitivities=values, **kernel)
            for part, shard in zip(ids, shards, strict=True):
                shard.step(indices=np.arange(3), sensitivities=values[part], **kernel)
        shards[1].merge(shards[0])
        np.testing.assert_array_equal(shards[1].rdp(), whole.rdp())
        np.testing.assert_array_equal(shards[1].instance_ids, np.arange(6))
        with pytest.raises(LedgerError, match="distinct"):
            shards[1].merge(shards[0])

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("last", [False, True])
    def test_a_step_that_one_shard_could_not_attribute_charges_that_shard_alone(self, first, last):
        ids = [np.array([0, 2, 4]), np.array([1, 3, 5])]
        shards = [
            PerInstanceAccountant(3, orders=ORDERS, levels=32, instance_ids=part) for part in ids
        ]
        generator = np.random.default_rng(1)
        for step in range(5):
            kernel = {"noise_multiplier": 1.0 + (step == 3), "sample_rate": 0.1}
            for number, shard in enumerate(shards):
                if number == 1 and step in (1, 4 if last else 2):
                    shard.step(indices=None, sensitivities=None, **kernel)
                    continue
                values = generator.random(3) * 0.5
                shard.step(indices=np.arange(3), sensitivities=values, **kernel)
        own = np.empty((6, len(ORDERS)))
        for part, shard in zip(ids, shards, strict=True):
            own[part] = shard.rdp()
        worst = shards[0].worst_case_rdp()
        shards[first].merge(shards[1 - first])
        found = shards[first].rdp()
        assert (found >= own * (1 - 1e-15)).all()  # rounded up once more, by some ulps of the sums
        np.testing.assert_allclose(found, own, rtol=1e-11)
        assert (found[[0, 2, 4]] < 0.9 * worst).all()  # the other shard does not pay for it
        assert shards[first].unattributed_steps == 2
        # Charges go on from there.
        shards[first].step(
            indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.1,
        )  # fmt: skip
        assert (shards[first].rdp() > found).all()

    def test_shards_with_other_steps_are_refused(self):
        first = PerInstanceAccountant(2, orders=ORDERS, instance_ids=["a", "b"])
        second = PerInstanceAccountant(1, orders=ORDERS, instance_ids=["c"])
        empty_step(first)
        with pytest.raises(LedgerError, match="same steps"):
            first.merge(second)
        assert first.num_instances == 2


def test_the_dataframe_has_one_labelled_row_per_instance():
    accountant = PerInstanceAccountant(4, orders=ORDERS, instance_ids=["a", "b", "c", "d"])
    random_run(accountant, steps=3, seed=0)
    frame = accountant.to_dataframe(delta=1e-3)
    assert frame["instance_id"].tolist() == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(frame["epsilon"], accountant.get_epsilon(1e-3).epsilon)
    assert set(frame["guarantee"]) == {"estimate"}


def test_epsilon_of_a_selection_keeps_order_and_repetition():
    accountant = PerInstanceAccountant(5)
    random_run(accountant, steps=3, seed=0)
    everyone = accountant.get_epsilon(1e-3)
    some = accountant.get_epsilon(1e-3, indices=[3, 0, 3])
    np.testing.assert_array_equal(some.epsilon, everyone.epsilon[[3, 0, 3]])
    expected, _ = rdp_to_epsilon(accountant.rdp(), orders=DEFAULT_ORDERS, delta=1e-3)
    np.testing.assert_array_equal(everyone.epsilon, expected)


class TestFixedBatches:
    """`participate`: no sampling, so only who is in the batch pays."""

    @staticmethod
    def charge(accountant, rows, values, noise=2.0, **extra):
        accountant.participate(indices=rows, sensitivities=values, noise_multiplier=noise, **extra)

    def test_a_batch_costs_its_members_the_gaussian_mechanism(self):
        accountant = PerInstanceAccountant(4, orders=ORDERS, levels=64, history=True)
        grid = accountant.levels
        self.charge(accountant, [0, 1], grid[[10, 63]])
        self.charge(accountant, [1, 2], grid[[20, 30]])
        squares = np.array([grid[10] ** 2, 1.0 + grid[20] ** 2, grid[30] ** 2, 0.0])
        expected = np.outer(squares, np.array(ORDERS)) / (2 * 2.0**2)
        found = accountant.rdp()
        assert (found >= expected * (1 - FLOAT64_SUMS)).all()
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        assert (found[3] == 0.0).all()
        assert accountant.guarantee == "output_specific"
        # Together they pay for the sum of their norms, where they are in one batch.
        pair = grid[10] + 1.0
        np.testing.assert_allclose(
            accountant.group_rdp([0, 1]),
            np.array(ORDERS) * (pair**2 + grid[20] ** 2) / 8,
            rtol=1e-10,
        )

    def test_sampled_steps_afterwards_know_nothing_about_anybody(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS)
        self.charge(accountant, [0], [0.1])
        before = accountant.rdp()
        empty_step(accountant)
        worst = sampled_gaussian_rdp([1.0], noise_multiplier=1.0, sample_rate=0.1, orders=ORDERS)
        np.testing.assert_allclose(
            accountant.rdp() - before, np.repeat(worst, 2, axis=0), rtol=1e-9
        )
        assert accountant.guarantee == "estimate"

    def test_unknown_rows_charge_everyone(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS)
        self.charge(accountant, None, None)
        np.testing.assert_allclose(accountant.rdp(), np.tile(np.array(ORDERS) / 8, (2, 1)))
        assert accountant.unattributed_steps == 1

    def test_no_more_than_output_specific_may_be_claimed(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS)
        with pytest.raises(ValueError, match="output_specific, estimate"):
            self.charge(accountant, [0], [0.1], guarantee="bound")
        self.charge(accountant, [0], [0.1], guarantee="estimate")
        assert accountant.guarantee == "estimate"

    def test_without_noise_the_members_lose_everything(self):
        accountant = PerInstanceAccountant(3, orders=ORDERS)
        self.charge(accountant, [0, 1], [0.3, 0.0], noise=0.0)
        assert np.isinf(accountant.rdp()[0]).all()
        assert (accountant.rdp()[1:] == 0.0).all()

    def test_caps_and_budgets_are_for_sampled_batches(self):
        accountant = PerInstanceAccountant(2, orders=ORDERS, budget=(5.0, 1e-2))
        before = accountant.state_dict()
        with pytest.raises(ValueError, match="without caps or budget"):
            self.charge(accountant, [0], [0.1])
        np.testing.assert_array_equal(accountant.state_dict()["offset"], before["offset"])
        assert accountant.steps == 0

    def test_it_goes_on_after_saving(self):
        first = PerInstanceAccountant(3, orders=ORDERS)
        self.charge(first, [0, 2], [0.3, 0.9])
        second = PerInstanceAccountant(3, orders=ORDERS)
        second.load_state_dict(first.state_dict())
        for accountant in (first, second):
            self.charge(accountant, [1], [0.5])
        np.testing.assert_array_equal(first.rdp(), second.rdp())
