"""The privacy filter against adaptive mechanisms solved by quadrature, and against adversaries."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from opacus_pil.accounting import (
    DEFAULT_ORDERS,
    PerInstanceAccountant,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)
from opacus_pil.errors import LedgerError

ORDERS = [1.5, 2.0, 4.0, 9.0]
EDGES = [-math.inf, -0.5, 0.8, math.inf]  # what of an output the next step depends on
QUADRATURE = 1e-8  # relative, far above scipy's own error estimate for these smooth integrands


def empty_step(accountant, *, noise_multiplier=1.0, sample_rate=0.1, **extra):
    accountant.step(
        indices=[], sensitivities=[], noise_multiplier=noise_multiplier, sample_rate=sample_rate,
        guarantee="bound", **extra,
    )  # fmt: skip


def partial_moment(order, *, shift, rate, forward, low, high):
    """E over outputs in [low, high] of the density ratio's power, in units of the noise."""

    def integrand(t):
        ratio = (1.0 - rate) + rate * math.exp(shift * t - shift * shift / 2.0)
        power = ratio**order if forward else ratio ** (1.0 - order)
        return power * math.exp(-t * t / 2.0) / math.sqrt(2.0 * math.pi)

    # ratio^order·φ peaks between 0 and order·shift; 12 standard deviations beyond hold the rest.
    reach = 12.0 + order * shift
    return quad(integrand, max(low, -reach), min(high, reach), limit=200, epsabs=1e-13)[0]


def adaptive_moment(accountant, policy, order, *, forward, seen=()):
    """E_Q[(dP/dQ)^order] (forward) of three filtered steps, each chosen by what was released.

    P is the law with instance 0, Q without it. `policy` maps the bins of the earlier outputs to
    (cap, noise_multiplier, sample_rate): predictable, as the filter's theorem asks.
    """
    if len(seen) == 3:
        return 1.0
    cap, noise, rate = policy[seen]
    branch = accountant.copy()
    branch.set_caps([cap])
    enforced = float(branch.caps_for(noise_multiplier=noise, sample_rate=rate)[0])
    empty_step(branch, noise_multiplier=noise, sample_rate=rate)
    return sum(
        partial_moment(
            order, shift=enforced / noise, rate=rate, forward=forward, low=low, high=high
        )
        * adaptive_moment(branch, policy, order, forward=forward, seen=(*seen, place))
        for place, (low, high) in enumerate(itertools.pairwise(EDGES))
    )


def random_policy(generator):
    pasts = [(), *((i,) for i in range(3)), *((i, j) for i in range(3) for j in range(3))]
    return {
        past: (
            float(generator.choice([1.0, generator.random()])),
            float(generator.choice([0.4, 0.7, 1.0, 2.0])),
            float(generator.choice([0.05, 0.3, 1.0])),
        )
        for past in pasts
    }


@settings(max_examples=15)
@given(seed=st.integers(0, 100_000))
@pytest.mark.parametrize("forward", [True, False])
def test_adaptive_mechanisms_stay_within_the_budget_in_both_directions(forward, seed):
    generator = np.random.default_rng(seed)
    order = float(generator.choice(ORDERS))
    budget = float(generator.choice([0.05, 0.5, 3.0]))
    accountant = PerInstanceAccountant(1, orders=[order], caps=[1.0], budget=[budget])
    moment = adaptive_moment(accountant, random_policy(generator), order, forward=forward)
    assert math.log(moment) / (order - 1.0) <= budget * (1.0 + QUADRATURE)


def test_the_budget_is_reached_and_the_step_after_it_is_not_taken():
    # Full batches with N(0, 1): each step costs 2·1²/2 = 1 at order 2, and a moment of e. Two of
    # the three fit into a budget of 2 and a few roundings.
    accountant = PerInstanceAccountant(1, orders=[2.0], caps=[1.0], budget=[2.0 * (1 + 1e-12)])
    pasts = [(), *((i,) for i in range(3)), *((i, j) for i in range(3) for j in range(3))]
    moment = adaptive_moment(accountant, dict.fromkeys(pasts, (1.0, 1.0, 1.0)), 2.0, forward=True)
    assert math.log(moment) == pytest.approx(2.0, rel=QUADRATURE)


@given(seed=st.integers(0, 100_000))
def test_no_sequence_of_steps_leaves_anyone_above_the_budget(seed):
    generator = np.random.default_rng(seed)
    size = 6
    budget = generator.choice([0.1, 1.0, 5.0, np.inf], size=(size, len(ORDERS)))
    budget[:, 0] = 0.7  # finite somewhere for everyone
    accountant = PerInstanceAccountant(
        size, orders=ORDERS, levels=64, caps=generator.random(size), budget=budget
    )
    spent = np.zeros((size, len(ORDERS)))
    for _ in range(25):
        kernel = {
            "noise_multiplier": float(
                generator.choice([0.0, 0.3, 1.0, 5.0], p=[0.05, 0.25, 0.4, 0.3])
            ),
            "sample_rate": float(generator.choice([0.0, 0.01, 0.3, 1.0])),
        }
        if generator.random() < 0.5:
            accountant.set_caps(generator.choice([0.0, 1.0, *generator.random(3)], size=size))
        enforced = accountant.caps_for(**kernel)
        rows = np.flatnonzero(generator.random(size) < 0.5)
        accountant.step(indices=rows, sensitivities=enforced[rows], **kernel, guarantee="bound")
        with np.errstate(invalid="ignore"):
            spent += sampled_gaussian_rdp(enforced, **kernel, orders=ORDERS)
        assert (spent <= budget).all()
        realised = accountant.spent_rdp()
        assert (realised >= spent * (1 - 1e-12)).all()  # sums of a few floats
        assert (realised <= budget).all()
    assert accountant.guarantee == "bound"
    np.testing.assert_array_equal(accountant.rdp()[:, 0], np.minimum(0.7, budget.min(axis=1)))


@pytest.mark.parametrize(
    ("multiple", "steps"), [(3.5, 3), (3.0 * (1 + 1e-12), 3), (3.0 * (1 - 1e-12), 2), (0.999, 0)]
)
def test_the_step_that_would_exceed_the_budget_is_not_taken(multiple, steps):
    cost = float(
        sampled_gaussian_rdp([1.0], noise_multiplier=1.0, sample_rate=0.1, orders=[2.0])[0, 0]
    )
    accountant = PerInstanceAccountant(2, orders=[2.0], budget=[multiple * cost])
    taken = 0
    for _ in range(6):
        taken += int(accountant.caps_for(noise_multiplier=1.0, sample_rate=0.1)[0] > 0)
        empty_step(accountant)
    assert taken == steps
    np.testing.assert_allclose(accountant.spent_rdp(), steps * cost, rtol=1e-12)
    np.testing.assert_array_equal(accountant.active, [False, False])
    np.testing.assert_array_equal(accountant.caps, [0.0, 0.0])
    np.testing.assert_array_equal(accountant.sensitivities, [0.0, 0.0])


def test_what_was_spent_does_not_creep_above_the_budget_when_noise_changes_for_long():
    # Every change of noise adds an ulp to what prefix sums may be off by. The budget here is what
    # one step costs, to the last few ulps, and the instance is left out of everything that follows.
    probe = PerInstanceAccountant(1, orders=[2.0])
    empty_step(probe)
    budget = float(probe.rdp()[0, 0]) * (1.0 + 1e-14)
    accountant = PerInstanceAccountant(1, orders=[2.0], budget=[budget])
    empty_step(accountant)
    for step in range(300):
        empty_step(accountant, noise_multiplier=1.0 + step / 1000)
    assert 0.9 * budget < accountant.spent_rdp()[0, 0] <= budget


class TestEpsilonDelta:
    """Budgets given as (ε, δ)."""

    @pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.2])
    @pytest.mark.parametrize("epsilon", [0.3, 2.0, 50.0])
    def test_the_reported_epsilon_is_the_budget(self, epsilon, delta):
        accountant = PerInstanceAccountant(3, caps=[0.1, 0.5, 1.0], budget=(epsilon, delta))
        for _ in range(3):
            found = accountant.get_epsilon(delta)
            assert found.guarantee == "bound"
            assert (found.epsilon <= epsilon).all()
            np.testing.assert_allclose(found.epsilon, epsilon, rtol=1e-12)
            empty_step(accountant)

    def test_each_instance_has_its_own(self):
        epsilon = np.array([0.5, 1.0, 8.0])
        accountant = PerInstanceAccountant(3, budget=(epsilon, 1e-5))
        counts = np.zeros(3)
        for _ in range(400):
            counts += accountant.caps_for(noise_multiplier=2.0, sample_rate=0.05) > 0
            empty_step(accountant, noise_multiplier=2.0, sample_rate=0.05)
        np.testing.assert_allclose(accountant.get_epsilon(1e-5).epsilon, epsilon, rtol=1e-12)
        assert counts[0] < counts[1] < counts[2]

    @pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.02), (3.0, 1.0), (2.0, 0.3)])
    def test_the_order_bears_the_most_steps_of_all_orders(self, noise, rate):
        caps, epsilon, delta = np.array([0.05, 0.3, 1.0]), 3.0, 1e-5
        accountant = PerInstanceAccountant(3, caps=caps, budget=(epsilon, delta))
        empty_step(accountant, noise_multiplier=noise, sample_rate=rate)
        chosen = accountant.get_epsilon(delta).order
        orders = np.array(DEFAULT_ORDERS)
        charged = accountant.sensitivities
        cost = sampled_gaussian_rdp(
            charged, noise_multiplier=noise, sample_rate=rate, orders=orders
        )
        term = np.log1p(-1 / orders) - (np.log(delta) + np.log(orders)) / (orders - 1)
        bearable = np.where(epsilon - term > 0, (epsilon - term) / cost, 0.0)
        np.testing.assert_array_equal(chosen, orders[bearable.argmax(axis=1)])

    def test_steps_without_sampling_or_noise_do_not_choose_the_order(self):
        first, second = (PerInstanceAccountant(2, budget=(2.0, 1e-5)) for _ in range(2))
        empty_step(first, sample_rate=0.0)
        for accountant in (first, second):
            empty_step(accountant, sample_rate=0.01)
        np.testing.assert_array_equal(first.get_epsilon(1e-5).order, second.get_epsilon(1e-5).order)

    def test_whoever_pays_nothing_at_first_gets_the_order_of_the_worst_case(self):
        accountant = PerInstanceAccountant(2, caps=[0.0, 1.0], budget=(2.0, 1e-5))
        empty_step(accountant, sample_rate=0.01)
        orders = accountant.get_epsilon(1e-5).order
        assert orders[0] == orders[1]

    def test_realised_epsilon_never_exceeds_the_budget(self):
        accountant = PerInstanceAccountant(1, budget=(2.0, 1e-5))
        for _ in range(2000):
            empty_step(accountant, sample_rate=0.02)
        spent, _ = rdp_to_epsilon(accountant.spent_rdp(), orders=DEFAULT_ORDERS, delta=1e-5)
        # One order is tested, ε is read at the best of all orders; the last step is not affordable.
        assert 1.9 < spent[0] <= 2.0


def test_without_noise_everyone_with_a_cap_is_left_out_and_pays_nothing():
    accountant = PerInstanceAccountant(2, orders=ORDERS, caps=[1.0, 0.0], budget=(5.0, 1e-5))
    empty_step(accountant, noise_multiplier=0.0)
    np.testing.assert_array_equal(accountant.spent_rdp(), 0.0)
    assert np.isfinite(accountant.get_epsilon(1e-5).epsilon).all()
    assert not accountant.active[0]
    assert accountant.active[1]  # a cap of 0 can be borne by any budget


def test_an_unlimited_instance_takes_part_in_everything():
    budget = np.array([[0.1], [np.inf]])
    accountant = PerInstanceAccountant(2, orders=[2.0], budget=budget)
    for _ in range(50):
        empty_step(accountant)
    np.testing.assert_array_equal(accountant.active, [False, True])
    np.testing.assert_array_equal(accountant.get_epsilon(1e-5).epsilon[1], np.inf)


def test_whoever_was_left_out_stays_out():
    accountant = PerInstanceAccountant(2, orders=[2.0], caps=[1.0, 0.2], budget=[0.01])
    expensive = {"noise_multiplier": 1.0, "sample_rate": 0.3}
    np.testing.assert_array_equal(accountant.caps_for(**expensive), [0.0, 0.2])
    np.testing.assert_array_equal(accountant.caps, [1.0, 0.2])  # asking changes nothing
    empty_step(accountant, **expensive)
    cheap = {"noise_multiplier": 1e3, "sample_rate": 0.3}
    accountant.set_caps([0.5, 0.5])
    np.testing.assert_array_equal(accountant.caps_for(**cheap), [0.0, 0.5])
    before = accountant.spent_rdp([0])
    empty_step(accountant, **cheap)
    np.testing.assert_array_equal(accountant.spent_rdp([0]), before)


def test_a_cheaper_step_is_open_to_whoever_cannot_bear_another_expensive_one():
    accountant = PerInstanceAccountant(1, orders=[2.0], budget=[1.5])
    empty_step(accountant, noise_multiplier=1.0, sample_rate=1.0)  # costs 1
    assert not accountant.active[0]
    assert accountant.caps_for(noise_multiplier=10.0, sample_rate=1.0)[0] == 1.0
    empty_step(accountant, noise_multiplier=10.0, sample_rate=1.0)
    assert accountant.active[0]
    np.testing.assert_allclose(accountant.spent_rdp(), 1.01, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"indices": None, "sensitivities": None}, "indices under a budget"),
        ({"indices": [0], "sensitivities": [1.0]}, r"cap 0\).*caps_for"),
        ({"indices": [1], "sensitivities": [0.2]}, "above"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"guarantee": "certain"}, "guarantee"),
    ],
)
def test_a_refused_step_leaves_no_trace(change, words):
    accountant = PerInstanceAccountant(2, orders=ORDERS, caps=[1.0, 0.1], budget=(1.0, 1e-3))
    empty_step(accountant, noise_multiplier=5.0)
    before = accountant.state_dict()
    good = {"indices": [], "sensitivities": [], "noise_multiplier": 0.1, "sample_rate": 1.0}
    with pytest.raises(ValueError, match=words):
        accountant.step(**{**good, **change})
    after = accountant.state_dict()
    for key, value in before.items():
        if key == "privacy_filter":
            for name in value:
                np.testing.assert_array_equal(after[key][name], value[name])
        else:
            np.testing.assert_array_equal(after[key], value)


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ((1.0, 1e-5, 3.0), ValueError, "epsilon, delta"),
        ((1.0, 0.0), ValueError, "delta"),
        ((-1.0, 1e-5), ValueError, "epsilon of the budget"),
        (([1.0, 2.0], 1e-5), ValueError, "instances"),
        ((0.0, 1e-5), ValueError, "above 0 at some order"),
        (([1.0, 1.0, 1e-9], 1e-5), ValueError, "larger orders"),
        ([1.0, 2.0], ValueError, r"4 orders.*got shape \(2,\)"),
        (3.0, ValueError, "shape"),
        ([np.inf] * 4, ValueError, "finite at some order"),
        ([1.0, 1.0, -1.0, 1.0], ValueError, "budget"),
        ([1.0, 1.0, np.nan, 1.0], ValueError, "NaN"),
        ("much", TypeError, "budget"),
    ],
)
def test_a_budget_that_is_none_is_refused(budget, error, words):
    with pytest.raises(error, match=words):
        PerInstanceAccountant(3, orders=ORDERS, budget=budget)


def test_a_full_pass_is_refused_under_a_budget():
    accountant = PerInstanceAccountant(2, budget=(1.0, 1e-5))
    with pytest.raises(ValueError, match="set_caps"):
        accountant.observe_all([0.1, 0.1])


def test_a_budget_speaks_for_lower_orders_and_is_silent_about_higher_ones():
    budget = [np.inf, 0.5, 2.0, np.inf]
    accountant = PerInstanceAccountant(1, orders=ORDERS, budget=budget)
    np.testing.assert_array_equal(accountant.rdp()[0], [0.5, 0.5, 2.0, np.inf])
    falling = PerInstanceAccountant(1, orders=ORDERS[::-1], budget=budget[::-1])
    np.testing.assert_array_equal(falling.rdp()[0], [np.inf, 2.0, 0.5, 0.5])


class TestSavedForm:
    """A filter survives saving, loading and joining."""

    @staticmethod
    def used(budget=(1.5, 1e-4), size=4, **extra):
        accountant = PerInstanceAccountant(
            size, orders=ORDERS, caps=np.linspace(0.1, 1.0, size), budget=budget, **extra
        )
        for _ in range(8):
            empty_step(accountant)
        return accountant

    def test_a_loaded_ledger_goes_on_bit_for_bit(self):
        first = self.used()
        second = PerInstanceAccountant(4, orders=ORDERS)
        second.load_state_dict(first.state_dict())
        for accountant in (first, second):
            for _ in range(20):
                empty_step(accountant, noise_multiplier=0.8)
        np.testing.assert_array_equal(first.rdp(), second.rdp())
        np.testing.assert_array_equal(first.spent_rdp(), second.spent_rdp())
        np.testing.assert_array_equal(first.active, second.active)
        assert not first.active.all()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("limits", np.full((4, 1), -1.0)),
            ("limits", np.ones((3, 1))),
            ("columns", np.full((4, 1), 9)),
            ("dropped", np.zeros(2, dtype=bool)),
            ("epsilon", None),
            ("columns", "text"),
        ],
    )
    def test_a_damaged_filter_is_refused(self, key, value):
        accountant = PerInstanceAccountant(4, orders=ORDERS, budget=(1.5, 1e-4))
        state = accountant.state_dict()
        state["privacy_filter"] = {**state["privacy_filter"], key: value}
        with pytest.raises(LedgerError, match="filter"):
            accountant.load_state_dict(state)
        del state["privacy_filter"][key]
        with pytest.raises(LedgerError, match="filter"):
            accountant.load_state_dict(state)

    def test_merged_shards_equal_one_accountant(self):
        caps = np.array([0.2, 1.0, 0.5, 0.9])
        whole = PerInstanceAccountant(4, orders=ORDERS, caps=caps, budget=(1.0, 1e-4))
        ids = [np.array([0, 3]), np.array([1, 2])]
        shards = [
            PerInstanceAccountant(
                2, orders=ORDERS, caps=caps[part], budget=(1.0, 1e-4), instance_ids=part
            )
            for part in ids
        ]
        for accountant in (whole, *shards):
            for _ in range(10):
                empty_step(accountant)
        shards[1].merge(shards[0])
        for accountant in (whole, shards[1]):
            for _ in range(10):
                empty_step(accountant)
        np.testing.assert_array_equal(shards[1].spent_rdp(), whole.spent_rdp())
        np.testing.assert_array_equal(shards[1].active, whole.active)

    def test_shards_with_other_budgets_are_refused(self):
        first = self.used(instance_ids=range(4))
        second = self.used(budget=[1.0] * len(ORDERS), instance_ids=range(4, 8))
        with pytest.raises(LedgerError, match="one kind of budget"):
            first.merge(second)
        third = PerInstanceAccountant(1, orders=ORDERS, caps=[1.0], instance_ids=[9])
        for _ in range(8):
            empty_step(third)
        with pytest.raises(LedgerError, match="privacy_filter"):
            first.merge(third)
        assert first.num_instances == 4


def test_the_dataframe_shows_budget_and_spending():
    accountant = PerInstanceAccountant(2, caps=[0.1, 1.0], budget=(2.0, 1e-5))
    for _ in range(50):
        accountant.step(
            indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.01, guarantee="bound"
        )
    frame = accountant.to_dataframe(delta=1e-5)
    assert set(frame["guarantee"]) == {"bound"}  # the budget holds before the run, ...
    assert set(frame["spent_guarantee"]) == {"output_specific"}  # ... what was spent does not
    assert accountant.realised_guarantee == "output_specific"
    np.testing.assert_allclose(frame["epsilon"], 2.0, rtol=1e-12)
    assert (frame["spent_epsilon"] < frame["epsilon"]).all()
    assert frame["spent_epsilon"][0] < frame["spent_epsilon"][1]
