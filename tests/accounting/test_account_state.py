"""An account as one state and functions of it: what changes it, and what does not."""

import inspect
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pil.accounting import PerInstanceAccountant, charging, readings
from opacus_pil.accounting.account_state import MOST_REASONS, AccountState
from opacus_pil.accounting.levels import LevelGrid

ORDERS = [1.5, 2.0, 8.0]
KERNEL = {"noise_multiplier": 1.0, "sample_rate": 0.1}
KINDS = {
    "levels": {},
    "history": {"history": True},
    "caps": {"caps": [0.1, 0.5, 1.0, 0.2]},
    "budget": {"budget": [[np.inf, limit, np.inf] for limit in (9.0, 9.0, 0.03, 9.0)]},
}
PUBLIC = [
    (room, name)
    for room in (charging, readings)
    for name, function in inspect.getmembers(room, inspect.isfunction)
    if function.__module__ == room.__name__ and not name.startswith("_")
]


def used(kind):
    made = PerInstanceAccountant(4, orders=ORDERS, levels=16, **KINDS[kind])
    for values in ([0.1, 0.05], [0.02, 0.0], [0.1, 0.1]):
        made.step(indices=[0, 3], sensitivities=values, **KERNEL)
    made.forget([1])
    return made


def assert_same(found, expected):
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            np.testing.assert_array_equal(found[key], value)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_read_changes_nothing(kind):
    accountant = used(kind)
    before = accountant.state_dict()
    for name, value in inspect.getmembers(PerInstanceAccountant):
        if isinstance(value, property):
            getattr(accountant, name)
    accountant.rdp(), accountant.spent_rdp([2]), accountant.worst_case_rdp()
    accountant.get_epsilon(1e-3), accountant.worst_case_epsilon(1e-3)
    accountant.caps_for(**KERNEL), accountant.to_dataframe()
    if accountant.keeps_history:
        accountant.group_rdp([0, 2]), accountant.tight_epsilon([0], delta=1e-3)
    assert_same(accountant.state_dict(), before)


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        ("levels", "participate", {"indices": [0], "sensitivities": [2.0], "noise_multiplier": 1}),
        ("caps", "participate", {"indices": [0], "sensitivities": [0.1], "noise_multiplier": 1}),
        ("budget", "step", {"indices": None, "sensitivities": None, **KERNEL}),
        ("caps", "step", {"indices": [0], "sensitivities": [0.9], **KERNEL}),
        ("levels", "observe_all", {"sensitivities": [0.1, 0.1, 0.1]}),
        ("caps", "observe_all", {"sensitivities": [0.1] * 4}),
        ("budget", "set_caps", {"caps": [0.1, 0.1, 0.1, 1.1]}),
        ("levels", "forget", {"indices": [0, 1]}),
        ("levels", "weaken", {"guarantee": "bound", "reason": "none"}),
        ("budget", "lose_everything", {"indices": [0]}),
        ("levels", "lose_everything", {"indices": [0, 9]}),
    ],
)
def test_a_refused_call_changes_nothing(kind, name, arguments):
    accountant = used(kind)
    before = accountant.state_dict()
    with pytest.raises(ValueError, match="Expected"):
        getattr(accountant, name)(**arguments)
    assert_same(accountant.state_dict(), before)


@pytest.mark.parametrize(
    ("room", "name"), PUBLIC, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_function_of_a_state_has_its_name_at_the_accountant(room, name):
    function, method = getattr(room, name), getattr(PerInstanceAccountant, name)
    if isinstance(method, property):
        assert method.fget.__annotations__["return"] == function.__annotations__["return"]
        return
    first, *others = inspect.signature(function).parameters.values()
    own, *rest = inspect.signature(method).parameters.values()
    assert (first.name, own.name, rest) == ("state", "self", others)
    assert method.__doc__ == function.__doc__
    assert pickle.loads(pickle.dumps(method)) is method  # found under its public name


@given(seed=st.integers(0, 10_000))
def test_the_number_present_is_counted_right_whatever_happens(seed):
    generator = np.random.default_rng(seed)
    accountant = PerInstanceAccountant(6, orders=[2.0], levels=8)
    for _ in range(6):
        rows = np.flatnonzero(~accountant.forgotten)
        some = rows[generator.random(len(rows)) < 0.5]
        accountant.step(indices=some, sensitivities=generator.random(len(some)), **KERNEL)
        if generator.random() < 0.5:
            accountant.forget(some[:1])
        if generator.random() < 0.3:
            accountant.load_state_dict(accountant.state_dict())
        present = np.flatnonzero(~accountant.forgotten)
        # A batch of whoever is left is a full pass; one row less, or a wrong count, is not.
        whole = {"indices": present, "sensitivities": np.full(len(present), 0.5), **KERNEL}
        if len(present):
            accountant.step(**whole, guarantee="output_specific")
        if len(present) > 1:
            less = {**whole, "indices": present[1:], "sensitivities": whole["sensitivities"][1:]}
            with pytest.raises(ValueError, match="'estimate'"):
                accountant.step(**less, guarantee="output_specific")


class TestState:
    """The state alone, as charging and readings use it."""

    @staticmethod
    def state(size=3, **extra):
        grid = LevelGrid(8, max_sensitivity=1.0, orders=np.array(ORDERS))
        given = {"privacy_filter": None, "history": True, "folder": None, **extra}
        return AccountState.unspent(grid, instance_ids=np.arange(size), **given)

    def test_on_the_highest_level_a_step_costs_the_same_attributed_or_not(self):
        states = [self.state(), self.state()]
        for attributed, state in zip((True, False), states, strict=True):
            state.charge(state.grid.rdp(**KERNEL), (1.0, 0.1), attributed=attributed)
        # Prefix sums that were flushed are rounded up by one ulp more.
        np.testing.assert_allclose(*(readings.rdp(state) for state in states), rtol=1e-15)
        assert [state.unattributed for state in states] == [0, 1]

    def test_what_is_adopted_from_a_ledger_is_what_was_saved(self):
        state, other = self.state(), self.state()
        charging.step(state, indices=[0, 2], sensitivities=[0.2, 0.0], **KERNEL)
        charging.forget(state, [1])
        other.adopt(state.to_ledger())
        assert_same(other.to_ledger().to_dict(), state.to_ledger().to_dict())
        assert other.num_present == state.num_present == 2
        np.testing.assert_array_equal(readings.rdp(other), readings.rdp(state))

    def test_reasons_are_counted_once_a_step_and_so_many_only(self):
        state = self.state()
        state.count_reasons(["a", "a", "b"])
        state.count_reasons(["a"])
        assert state.reasons == {"a": 2, "b": 1}
        state.count_reasons(str(number) for number in range(2 * MOST_REASONS))
        state.count_reasons(["b"])  # known ones are counted further on
        assert (len(state.reasons), state.reasons["b"]) == (MOST_REASONS, 2)


def test_a_set_with_a_member_that_lost_everything_has_lost_everything():
    accountant = used("history")  # whose history tells finite steps only
    accountant.lose_everything([0])
    assert np.isinf(accountant.group_rdp([0, 2])).all()
    assert accountant.tight_epsilon([0, 2], delta=1e-3).epsilon.tolist() == [np.inf]
    assert np.isfinite(accountant.group_rdp([1, 2])).all()
