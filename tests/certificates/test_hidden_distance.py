import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from opacus_pil.certificates import ContractionCertificate
from opacus_pil.certificates.batch_laws import Law
from opacus_pil.certificates.hidden_distance import LARGEST, HiddenDistance

SQUARES = np.array([0.0, 1e-12, 1e-4, 0.3, 1.0, 40.0, 1e5, 1e20])
RANDOM = Law(np.array([0.7, 0.95, 1.3]), np.array([0.3, 0.6, 0.1]))


@pytest.mark.parametrize("c", [0.3, 0.9, 1.0, 1.2])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_one_factor_is_the_hull_of_a_distance(c, steps):
    exact = SQUARES / (c ** (-2.0 * np.arange(1, steps + 1))).sum()
    ours = HiddenDistance(Law(np.array([c]), np.ones(1))).at(SQUARES, steps=steps)
    assert (exact * (1.0 - 1e-14) <= ours).all()  # the closed form's own rounding
    # a line from 0 is interpolated without error: steps' roundings, and a hidden part is split
    # between nodes, 26 % apart in the distance's square
    assert (ours <= exact * (1.0 + 1e-9) + steps * 1e-11).all()


def test_one_step_hides_all_of_it():
    exact = [math.log(RANDOM.weights @ np.exp(RANDOM.values**2 * v)) for v in SQUARES[:6]]
    ours = HiddenDistance(RANDOM).at(SQUARES[:6], steps=1)
    assert (np.array(exact) * (1.0 - 1e-14) <= ours).all()
    assert ours[:5] == pytest.approx(exact[:5], rel=0.02, abs=1e-10)  # convex between nodes


@pytest.mark.parametrize("square", [1e-3, 0.3, 2.0])
def test_two_steps_are_the_dynamic_programme(square):
    def after(x):  # log E exp of all that is left, hidden at once
        return math.log(RANDOM.weights @ np.exp((RANDOM.values * x) ** 2))

    def hidden(x):
        return minimize_scalar(lambda y: (x - y) ** 2 + after(y), bounds=(0.0, x)).fun

    distances = RANDOM.values * math.sqrt(square)
    exact = math.log(RANDOM.weights @ np.exp([hidden(x) for x in distances]))
    ours = HiddenDistance(RANDOM).at(np.array([square]), steps=2)[0]
    assert exact * (1.0 - 1e-6) <= ours <= exact * 1.02  # the minimiser's error; between nodes


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_it_costs_at_least_the_plans_that_see_the_future(steps):
    for square in (1e-3, 0.5, 5.0):
        exact = -math.inf
        drawn = list(zip(RANDOM.values, RANDOM.weights, strict=True))
        for outcome in itertools.product(drawn, repeat=steps):
            chain = ContractionCertificate(
                [float(c) for c, _ in outcome],
                1.0,
                (0.0,) * steps,
                initial_distance=math.sqrt(square),
                unlearning_contraction=1.0,
            )
            weight = math.prod(p for _, p in outcome)
            exact = np.logaddexp(exact, math.log(weight) + chain.mu(0) ** 2)
        ours = HiddenDistance(RANDOM).at(np.array([square]), steps=steps)[0]
        assert exact * (1.0 - 1e-12) <= ours <= 1.4 * exact  # not to know the future


def test_more_steps_cost_less_and_the_cost_is_convex_in_the_square():
    ours = HiddenDistance(RANDOM)
    squares = np.geomspace(1e-8, LARGEST / 10.0, 400)
    curves = [ours.at(squares, steps=k) for k in (1, 2, 3, 10, 50, 400)]
    for less, more in itertools.pairwise(curves[::-1]):
        assert (less <= more).all()
    for curve in curves:
        slopes = np.diff(curve) / np.diff(squares)
        assert (np.diff(slopes) >= -1e-8 * slopes[1:]).all()  # a difference of rounded values
