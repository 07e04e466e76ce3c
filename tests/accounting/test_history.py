"""The history of levels: sets and loss distributions over a run, against sums step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pil.accounting import PerInstanceAccountant, group_rdp
from opacus_pil.accounting.forget_set import coarsened
from opacus_pil.accounting.history import JointSteps
from opacus_pil.accounting.pld import tight_epsilon
from opacus_pil.certificates.gaussian import gaussian_epsilon
from opacus_pil.errors import LedgerError

ORDERS = [1.5, 2.0, 8.0]
SUMS = 1e-10  # prefix sums and direct sums round differently


def random_run(accountant, *, steps, seed):
    """Charge a run with every kind of move; return the sensitivities charged at each step."""
    generator = np.random.default_rng(seed)
    size, charged = accountant.num_instances, []
    for _ in range(steps):
        kernel = {
            "noise_multiplier": float(generator.choice([0.8, 1.5])),
            "sample_rate": float(generator.choice([0.1, 0.4])),
        }
        event = generator.random()
        if event < 0.1:
            accountant.observe_all(generator.random(size))
        elif event < 0.15 and accountant.active.sum() > 3:
            accountant.forget([generator.choice(np.flatnonzero(accountant.active))])
        if generator.random() < 0.1:
            accountant.step(indices=None, sensitivities=None, **kernel)
            now = np.where(accountant.active, accountant.levels[-1], 0.0)
        else:
            present = np.flatnonzero(accountant.active)
            rows = present[generator.random(len(present)) < 0.4]
            values = generator.choice([0.0, 1.0, *generator.random(2)], size=len(rows))
            accountant.step(indices=rows, sensitivities=values, **kernel)
            now = accountant.sensitivities
        charged.append((now, kernel))
    return charged


@given(seed=st.integers(0, 10_000))
def test_a_set_of_one_has_the_loss_of_its_instance(seed):
    accountant = PerInstanceAccountant(6, orders=ORDERS, levels=16, history=True)
    random_run(accountant, steps=15, seed=seed)
    together = np.array([accountant.group_rdp([row]) for row in range(6)])
    np.testing.assert_allclose(together, accountant.rdp(), rtol=SUMS, atol=SUMS)


@pytest.mark.parametrize("seed", range(4))
def test_a_set_pays_the_joint_bound_of_every_step(seed):
    accountant = PerInstanceAccountant(8, orders=ORDERS, levels=32, history=True)
    charged = random_run(accountant, steps=12, seed=seed)
    members = [5, 0, 3]
    naive = sum(group_rdp(now[members], **kernel, orders=ORDERS) for now, kernel in charged)
    found = accountant.group_rdp(members)
    np.testing.assert_allclose(found, naive, rtol=SUMS)
    assert (found >= naive * (1 - 1e-14)).all()
    assert (found >= accountant.rdp(members).max(axis=0) * (1 - SUMS)).all()


def test_full_batches_add_up_the_norms_of_the_members():
    # q = 1: order·(Σ norms)²/(2z²) per step, with the norms of that very step.
    accountant = PerInstanceAccountant(2, orders=ORDERS, levels=4, history=True)
    grid = accountant.levels
    for pair in [(grid[1], grid[3]), (grid[3], grid[1]), (grid[2], grid[0])]:
        accountant.step(indices=[0, 1], sensitivities=pair, noise_multiplier=2.0, sample_rate=1.0)
    sums = 2 * (grid[1] + grid[3]) ** 2 + grid[2] ** 2
    np.testing.assert_allclose(accountant.group_rdp([0, 1]), np.array(ORDERS) * sums / 8, rtol=SUMS)


def test_caps_and_budgets_are_in_the_history_too():
    accountant = PerInstanceAccountant(
        2, orders=[2.0], caps=[0.5, 1.0], budget=[[10.0], [0.02]], history=True
    )
    kernel = {"noise_multiplier": 1.0, "sample_rate": 0.1}
    for _ in range(5):
        accountant.step(indices=[], sensitivities=[], **kernel, guarantee="bound")
    both = group_rdp(
        accountant.levels[[accountant.levels.searchsorted(0.5), -1]], **kernel, orders=[2.0]
    )
    first_step = np.array(both)
    alone = accountant.spent_rdp([0])[0]
    assert accountant.spent_rdp([1])[0] > 0  # one step, then left out
    expected = first_step + alone * 4 / 5
    np.testing.assert_allclose(accountant.group_rdp([0, 1]), expected, rtol=SUMS)


class TestCoarsening:
    """Fewer joint states charge more, and the same number of steps."""

    @given(seed=st.integers(0, 10_000), states=st.integers(1, 6))
    def test_charges_never_fall(self, seed, states):
        generator = np.random.default_rng(seed)
        runs = [
            JointSteps(
                generator.choice([0.0, 1e-4, 0.5, 1.0, *generator.random(2)], size=3),
                float(generator.choice([1.0, 2.0])), 0.2, int(generator.integers(1, 9)),
            )
            for _ in range(12)
        ]  # fmt: skip
        coarse = coarsened(runs, states=states)
        kernels = {run.noise_multiplier for run in runs}
        assert len(coarse) <= states * len(kernels)
        assert sum(run.count for run in coarse) == sum(run.count for run in runs)

        def total(steps):
            return sum(
                step.count
                * group_rdp(
                    step.sensitivities, noise_multiplier=step.noise_multiplier,
                    sample_rate=step.sample_rate, orders=ORDERS,
                )
                for step in steps
            )  # fmt: skip

        assert (total(coarse) >= total(runs) * (1 - 1e-9)).all()  # group_rdp is good to 1e-9

    def test_many_states_cost_little(self):
        generator = np.random.default_rng(0)
        base, now, runs = np.exp(generator.uniform(-5, 0, size=30)), np.ones(30), []
        for _ in range(300):  # norms last seen: each step one member in twenty has a new one
            drawn = generator.random(30) < 0.05
            fresh = np.minimum(base * np.exp(0.5 * generator.standard_normal(30)), 1.0)
            now = np.where(drawn, fresh, now)
            runs.append(JointSteps(now, 1.0, 0.05, 1))
        distinct = coarsened(runs, states=1000)
        assert len(distinct) > 200
        coarse = coarsened(runs, states=128)
        # Full batches pay (Σ norms)²: a measure of what merging adds, without any quadrature.
        exact, paid = (
            sum(step.count * step.sensitivities.sum() ** 2 for step in steps)
            for steps in (runs, coarse)
        )
        assert exact <= paid <= 1.2 * exact  # measured: 1.1


class TestLossDistributions:
    """A tight ε from the history."""

    def test_full_batches_have_the_exact_gaussian_epsilon(self):
        accountant = PerInstanceAccountant(3, levels=4, history=True)
        grid, mu_single, mu_pair = accountant.levels, 0.0, 0.0
        for values in [(1.0, grid[2], 0.0), (grid[2], 1.0, 0.0), (1.0, 1.0, 1.0)]:
            for _ in range(3):
                accountant.step(
                    indices=[0, 1, 2], sensitivities=values, noise_multiplier=4.0, sample_rate=1.0,
                    guarantee="output_specific",
                )  # fmt: skip
                mu_single += values[0] ** 2 / 16
                mu_pair += (values[0] + values[1]) ** 2 / 16
        for members, squared in [([0], mu_single), ([0, 1], mu_pair)]:
            exact = gaussian_epsilon(np.sqrt(squared), delta=1e-5)
            found = accountant.tight_epsilon(members, delta=1e-5)
            assert found.guarantee == "output_specific"
            assert exact <= found.epsilon[0] <= exact * 1.01  # losses on a grid of 1e-3
            assert np.isnan(found.order[0])

    def test_it_is_below_the_rdp_epsilon_of_the_same_run(self):
        accountant = PerInstanceAccountant(2, history=True)
        for sensitivity in [0.3, 0.7, 0.2]:
            for _ in range(20):
                accountant.step(
                    indices=[0], sensitivities=[sensitivity], noise_multiplier=1.0, sample_rate=0.1
                )
        rdp = accountant.get_epsilon(1e-5, indices=[0]).epsilon[0]
        tight = accountant.tight_epsilon([0], delta=1e-5)
        assert tight.epsilon[0] < 0.99 * rdp
        assert tight.guarantee == "estimate"

    def test_it_equals_the_composition_of_the_worst_case(self):
        accountant = PerInstanceAccountant(2, history=True)
        for _ in range(30):
            accountant.step(
                indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.1,
                guarantee="bound",
            )  # fmt: skip
        found = accountant.tight_epsilon([1], delta=1e-5)
        assert found.guarantee == "bound"
        assert found.epsilon[0] == tight_epsilon([(1.0, 1.0, 0.1, 30)], delta=1e-5)

    def test_under_a_budget_it_is_output_specific(self):
        accountant = PerInstanceAccountant(1, budget=(3.0, 1e-5), history=True)
        accountant.step(
            indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.1, guarantee="bound"
        )
        assert accountant.guarantee == "bound"
        assert accountant.tight_epsilon([0], delta=1e-5).guarantee == "output_specific"


def test_nobody_lost_anything_together():
    accountant = PerInstanceAccountant(3, orders=ORDERS, history=True)
    np.testing.assert_array_equal(accountant.group_rdp([0, 1]), 0.0)  # no steps yet
    random_run(accountant, steps=3, seed=0)
    np.testing.assert_array_equal(accountant.group_rdp([]), 0.0)
    assert accountant.tight_epsilon([], delta=1e-5).epsilon[0] == 0.0


def test_without_a_history_sets_are_refused():
    accountant = PerInstanceAccountant(3)
    with pytest.raises(ValueError, match="history=True"):
        accountant.group_rdp([0, 1])
    with pytest.raises(ValueError, match="history=True"):
        accountant.tight_epsilon([0], delta=1e-5)


@pytest.mark.parametrize("indices", [[0, 0], [7], [-1]])
def test_members_are_checked(indices):
    with pytest.raises(ValueError, match="indices"):
        PerInstanceAccountant(3, history=True).group_rdp(indices)


class TestSavedForm:
    """The history survives saving, loading and joining."""

    @staticmethod
    def used(seed=3):
        accountant = PerInstanceAccountant(6, orders=ORDERS, levels=32, history=True)
        random_run(accountant, steps=15, seed=seed)
        return accountant

    def test_a_loaded_history_goes_on(self):
        first = self.used()
        second = PerInstanceAccountant(6, orders=ORDERS, levels=32)
        second.load_state_dict(first.state_dict())
        for accountant in (first, second):
            random_run(accountant, steps=4, seed=8)
        np.testing.assert_array_equal(first.group_rdp([0, 4]), second.group_rdp([0, 4]))

    def test_a_saved_history_is_a_copy(self):
        first = self.used()
        state = first.state_dict()
        before = first.group_rdp([0, 4])
        state["history"]["level"][:] = 0
        np.testing.assert_array_equal(first.group_rdp([0, 4]), before)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("level", [40]),
            ("row", [-1]),
            ("step", [999]),
            ("kernels", [(1.0, 2.0, True, 15)]),
            ("kernels", [(1.0, 0.1, True, 14)]),
            ("kernels", 3),
        ],
    )
    def test_a_damaged_history_is_refused(self, key, value):
        accountant = self.used()
        state = accountant.state_dict()
        if key != "kernels":
            changed = state["history"][key].copy()
            changed[-1:] = value
            value = changed
        state["history"][key] = value
        with pytest.raises(LedgerError, match="history"):
            accountant.load_state_dict(state)
        del state["history"][key]
        with pytest.raises(LedgerError, match="history"):
            accountant.load_state_dict(state)

    def test_a_history_that_ends_on_other_levels_is_refused(self):
        accountant = self.used()
        state = accountant.state_dict()
        state["history"]["level"] = np.zeros_like(state["history"]["level"])
        with pytest.raises(LedgerError, match="ledger's levels"):
            accountant.load_state_dict(state)

    def test_a_ledger_without_its_history_is_refused(self):
        plain = PerInstanceAccountant(6, orders=ORDERS, levels=32)
        keeper = PerInstanceAccountant(6, orders=ORDERS, levels=32, history=True)
        keeper.load_state_dict(plain.state_dict())  # no step yet: nothing is missing
        keeper = PerInstanceAccountant(6, orders=ORDERS, levels=32, history=True)
        random_run(plain, steps=2, seed=0)
        with pytest.raises(LedgerError, match="history of its 2 steps"):
            keeper.load_state_dict(plain.state_dict())

    def test_merged_shards_equal_one_accountant(self):
        whole = PerInstanceAccountant(6, orders=ORDERS, levels=32, history=True)
        ids = [np.array([0, 2, 4]), np.array([1, 3, 5])]
        shards = [
            PerInstanceAccountant(3, orders=ORDERS, levels=32, history=True, instance_ids=part)
            for part in ids
        ]
        generator = np.random.default_rng(0)
        for _ in range(5):
            values = generator.random(6)
            kernel = {"noise_multiplier": 1.0, "sample_rate": 0.1}
            whole.step(indices=np.arange(6), sensitivities=values, **kernel)
            for part, shard in zip(ids, shards, strict=True):
                shard.step(indices=np.arange(3), sensitivities=values[part], **kernel)
        shards[1].merge(shards[0])
        for members in ([0, 1], [5], [2, 3, 4]):
            np.testing.assert_array_equal(shards[1].group_rdp(members), whole.group_rdp(members))
