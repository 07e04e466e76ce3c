import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opacus_pil import CertificateError
from opacus_pil.certificates import (
    ContractionCertificate,
    PoissonContractionCertificate,
    best_of,
)
from opacus_pil.certificates.step_search import smallest_steps


class Counted:
    """ε of a number of steps, and how often it was asked for."""

    def __init__(self, values):
        self.values, self.asked = values, 0

    def __call__(self, steps):
        self.asked += 1
        return self.values[steps]


def found(values, target):
    epsilon_at = Counted(values)
    steps = smallest_steps(epsilon_at, target=target, at_once=values[0], high=len(values) - 1)
    # plain bisection after 15 looks
    assert epsilon_at.asked <= 15 + math.ceil(math.log2(len(values)))
    return steps


VALUES = st.one_of(
    st.floats(0.0, 1e6),
    st.sampled_from([0.0, 1e-300, 1.0, math.nextafter(1.0, 2.0), 1e300, math.inf]),
)


TARGETS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-9, 1e3))


@given(st.lists(VALUES, min_size=2, max_size=300), TARGETS)
@settings(max_examples=300)
def test_any_function_is_at_most_the_target_there_and_above_it_just_before(values, target):
    if not (values[0] > target >= values[-1]):
        values = [math.inf, *values, 0.0]
    steps = found(values, target)
    assert values[steps] <= target < values[steps - 1]


@given(st.lists(VALUES, min_size=2, max_size=300), TARGETS)
def test_of_a_function_that_does_not_grow_it_is_the_smallest(values, target):
    values = [math.inf, *sorted(values, reverse=True), 0.0]
    first = next(k for k, value in enumerate(values) if value <= target)  # one after the other
    assert found(values, target) == first


def test_a_target_missed_by_one_ulp_is_missed():
    above = math.nextafter(1000.0, math.inf)  # whose logarithm is the same
    assert math.log(above) == math.log(1000.0)
    assert found([2000.0, above, above, above, 1000.0, 0.0], 1000.0) == 4


@pytest.mark.parametrize("ripple", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("high", [100, 10_000, 1_000_000])
def test_curves_of_certificates_take_few_looks(ripple, high):
    rate = 7.0 / high  # to ten at once, 1 in the first third
    steps = np.arange(high + 1)
    epsilon = 10.0 * np.exp(-rate * steps) * (1.0 + ripple * np.sin(steps))
    k = found(epsilon, 1.0)
    assert epsilon[k] <= 1.0 < epsilon[k - 1]
    if ripple == 0.0:
        counted = Counted(epsilon)
        smallest_steps(counted, target=1.0, at_once=10.0, high=high)
        assert counted.asked <= 5  # a first look, a secant beyond, a secant within, both sides


# --- the search of a certificate ------------------------------------------------------------------

OURS = PoissonContractionCertificate((1.0, 0.5), 0.1, 1.0, 20, 0.5, 0.1, 0.2, 10.0, 99)
EVERYWHERE = ContractionCertificate(0.95, 1.0, shifts=(0.05,) * 20)


@pytest.mark.parametrize("certificate", [OURS, EVERYWHERE, best_of([OURS, EVERYWHERE])])
def test_a_search_tells_of_each_look_and_finds_the_same(certificate):
    goal = {"epsilon": 0.01, "delta": 1e-3, "max_steps": 200}
    looks = []
    steps = certificate.steps_for(**goal, on_probe=lambda *look: looks.append(look))
    assert steps == certificate.steps_for(**goal)
    every = [certificate.epsilon(delta=1e-3, steps=k) for k in range(steps + 1)]
    assert steps == next(k for k, value in enumerate(every) if value <= 0.01)
    assert steps in [k for k, _ in looks]
    for k, epsilon in looks:
        assert epsilon >= certificate.epsilon(delta=1e-3, steps=k) * (1.0 - 1e-12)


def test_what_is_not_reached_is_told_with_the_best():
    with pytest.raises(CertificateError, match=r"the best is epsilon=.* at K=30 steps") as raised:
        OURS.steps_for(epsilon=1e-9, delta=1e-3, max_steps=30)
    best = OURS.epsilon(delta=1e-3, steps=30)
    assert f"epsilon={best:.6g}" in str(raised.value)


def test_steps_of_a_target_of_zero_are_found():
    falls = [OURS.epsilon(delta=0.5, steps=k) for k in (0, 1)]
    assert falls == [0.0, 0.0]  # δ alone covers it
    assert OURS.steps_for(epsilon=0.0, delta=0.5) == 0
    later = OURS.steps_for(epsilon=0.0, delta=2e-3)
    assert OURS.epsilon(delta=2e-3, steps=later) == 0.0 < OURS.epsilon(delta=2e-3, steps=later - 1)
    assert all(
        more >= less
        for more, less in itertools.pairwise(OURS.epsilon(delta=2e-3, steps=k) for k in range(9))
    )
