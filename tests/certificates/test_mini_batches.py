import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import binom, norm

from opacus_pil import CertificateError
from opacus_pil.accounting.rdp import DEFAULT_ORDERS
from opacus_pil.certificates import (
    ContractionCertificate,
    PoissonContractionCertificate,
    batch_moments,
    best_of,
    known_batches,
    mini_batches,
)
from opacus_pil.certificates.batch_laws import (
    Law,
    factor_law,
    largest_size,
    spread,
    step_factor,
    sum_law,
)
from opacus_pil.certificates.causal_plan import log_moment

ORDERS = np.array([1.2, 2.0, 5.0, 20.0, 200.0])
KAPPA = ORDERS * (ORDERS - 1.0) / 2.0
GLM = {
    "caps": (0.3, 0.8),
    "max_grad_norm": 0.7,
    "step_size": 0.5,
    "weight_decay": 0.05,
    "feature_norm": 2.0,
    "noise_multiplier": 1.5,
    "expected_batch_size": 8,
    "num_instances": 42,
    "training_steps": 30,
    "sample_rate": 0.2,
}
# 2 forgotten of 6, sizes 0..4; a batch of 3 or 4 expands: factors 0.9, 0.9, 0.9, 1.4, 2.2
SMALL = PoissonContractionCertificate((0.3, 0.5), 0.3, 0.8, 3, 1.0, 0.1, 0.8, 1.0, 4)
# the same without expansion
CALM = dataclasses.replace(SMALL, smoothness=0.4)


def one(value):
    return Law(np.array([value]), np.ones(1))


def enumerated(factors, shifts, *, training, unlearning, noise=1.0):
    """Log E exp(κμ²), each outcome with its own lower hull: plans that see the future."""
    total = np.full(len(ORDERS), -np.inf)
    steps = [
        list(itertools.product(zip(*factors, strict=True), zip(*law, strict=True)))
        for law in [shifts] * training + [((0.0,), (1.0,))] * unlearning
    ]
    for outcome in itertools.product(*steps):
        chain = ContractionCertificate(
            [c for (c, _), _ in outcome],
            noise,
            [s for _, (s, _) in outcome],
            unlearning_contraction=1.0,
        )
        weight = math.prod(p * r for (_, p), (_, r) in outcome)
        total = np.logaddexp(total, math.log(weight) + KAPPA * chain.mu(0) ** 2)
    return total


def pair(law):
    return law.values.tolist(), law.weights.tolist()


@pytest.mark.parametrize("c", [0.5, 0.9, 1.0, 1.1])
@pytest.mark.parametrize("rate", [0.1, 0.6])
@pytest.mark.parametrize("unlearning", [0, 3])
def test_causal_plan_costs_at_least_the_plans_that_see_the_future(c, rate, unlearning):
    factors, shifts = one(c), sum_law(np.array([0.3]), rate)
    ours = log_moment(
        ORDERS, factors=factors, shifts=shifts, training_steps=6, unlearning_steps=unlearning
    )
    exact = enumerated(pair(factors), pair(shifts), training=6, unlearning=unlearning)
    assert (exact <= ours).all()
    # what not knowing the future costs, and interpolation: measured at most 1.19
    assert (ours <= 1.25 * exact).all()


@pytest.mark.parametrize("unlearning", [0, 2])
def test_random_factors_cost_at_least_the_plans_that_see_the_future(unlearning):
    factors = Law(np.array([0.8, 0.9, 1.2]), np.array([0.5, 0.3, 0.2]))
    shifts = sum_law(np.array([0.3]), 0.4)
    ours = log_moment(
        ORDERS, factors=factors, shifts=shifts, training_steps=3, unlearning_steps=unlearning
    )
    exact = enumerated(pair(factors), pair(shifts), training=3, unlearning=unlearning)
    assert (exact <= ours).all()
    assert (ours <= 1.25 * exact).all()  # as above


def test_causal_plan_is_the_dynamic_programme_on_a_fine_grid():
    # By the definition, z and a on one grid. Rounding z down cannot raise the value.
    c, shift, rate, steps, cell = 0.9, 0.4, 0.3, 4, 0.002
    grid = np.arange(0.0, 1.6, cell)
    parts = grid[:, None] - grid[None, :]  # [z', rest]
    for order, kappa in zip(ORDERS[:3], KAPPA[:3], strict=True):
        price = np.where(parts >= 0.0, kappa * parts**2, np.inf)
        value = np.where(grid == 0.0, 0.0, np.inf)
        for _ in range(steps):
            hidden = (price + value[None, :]).min(axis=1)
            drawn, absent = (
                hidden[np.floor((c * grid + s) / cell).astype(int).clip(max=len(grid) - 1)]
                for s in (shift, 0.0)
            )
            value = np.log(rate * np.exp(drawn) + (1.0 - rate) * np.exp(absent))
        ours = log_moment(
            np.array([order]),
            factors=one(c),
            shifts=sum_law(np.array([shift]), rate),
            training_steps=steps,
            unlearning_steps=0,
        )[0]
        assert value[0] <= ours
        # the grid's rounding (4 steps of 0.002 in 0.4 on average halved, squared) and ours
        assert ours <= value[0] * 1.03


def mixture(certificate, steps, *, forget):
    """Means, deviations, probabilities of the linear chain x ← ±c(B)·x + Σ shifts + noise."""
    chains = {(0.0, 0.0): 1.0}  # (mean, variance): probability
    size, scale = certificate.num_retained, certificate.step_size / certificate.expected_batch_size
    for step in range(certificate.training_steps + steps):
        moves = {0.0: 1.0}
        for bound in certificate.gradient_bounds:
            if forget and step < certificate.training_steps:
                moves = _mixed(
                    (move + here * scale * bound, p * q)
                    for move, p in moves.items()
                    for here, q in ((0, 1 - certificate.sample_rate), (1, certificate.sample_rate))
                )
        chains = _mixed(
            (
                (
                    round((slope := 1 - certificate.step_size * certificate.weight_decay
                           - scale * certificate.smoothness * drawn) * mean + move, 12),
                    round(slope**2 * variance + certificate.noise_std**2, 12),
                ),
                p * q * binom.pmf(drawn, size, certificate.sample_rate),
            )
            for (mean, variance), p in chains.items()
            for move, q in moves.items()
            for drawn in range(size + 1)
        )  # fmt: skip
    mean, variance = np.array(list(chains)).T
    return mean, np.sqrt(variance), np.array(list(chains.values()))


def _mixed(outcomes):
    law = {}
    for value, p in outcomes:
        law[value] = law.get(value, 0.0) + p
    return law


@pytest.mark.parametrize("ours", [SMALL, CALM], ids=["expanding", "calm"])
@pytest.mark.parametrize("steps", [0, 1])
def test_bound_holds_on_linear_chains_over_all_batches(ours, steps):
    # Retained losses βθ²/2, forgotten ones linear with the bound as slope, all in one direction.
    ours = dataclasses.replace(ours, training_steps=2)
    grid = np.linspace(-30.0, 30.0, 4_001)
    cell = grid[1] - grid[0]
    logs = []
    for forget in (True, False):
        mean, std, weight = (part[:, None] for part in mixture(ours, steps, forget=forget))
        logs.append(logsumexp(norm.logpdf(grid, mean, std), axis=0, b=weight))
    p, q = np.exp(logs)
    assert p.sum() * cell == pytest.approx(1.0, rel=1e-9)  # the grid holds both laws
    for order in (1.5, 2.0, 4.0):
        bound = ours.rdp([order], steps=steps)[0]
        for first, second in (logs, logs[::-1]):
            terms = order * first + (1.0 - order) * second
            exact = (logsumexp(terms) + np.log(cell)) / (order - 1.0)
            assert 0.001 * bound < exact <= bound  # not vacuous; conditioning hides no batch
    epsilon = ours.epsilon(delta=0.02, steps=steps)
    for first, second in ((p, q), (q, p)):
        assert np.maximum(first - math.exp(epsilon) * second, 0.0).sum() * cell <= 0.02


def test_full_batches_are_the_contraction_certificate():
    full = dataclasses.replace(CALM, sample_rate=1.0, training_steps=40)
    shift = math.fsum(full.gradient_bounds)
    # factor: all 4 retained instances in every batch, |1 − 0.1 − 0.4·4| = 0.7 < 0.9
    chain = ContractionCertificate(0.9, full.noise_std, (shift,) * 40)
    for steps in (0, 5, 50):
        # the factor is rounded up by 4 ulps, the shift by one
        assert full.rdp(ORDERS, steps=steps) == pytest.approx(
            chain.rdp(ORDERS, steps=steps), rel=1e-9
        )
        assert full.epsilon(delta=1e-5, steps=steps) == pytest.approx(
            chain.epsilon(delta=1e-5, steps=steps), rel=1e-9
        )
    sizes = factor_law(np.full(5, 0.9), trials=4, rate=1.0)
    moment = log_moment(
        ORDERS,
        factors=sizes,
        shifts=sum_law(np.array(full.gradient_bounds) / 0.8, 1.0),
        training_steps=40,
        unlearning_steps=5,
    )
    # the plan alone finds the hull up to the interpolation between its nodes
    hull = KAPPA * chain.mu(5) ** 2
    assert (hull <= moment).all()
    assert (moment <= 1.02 * hull).all()


@pytest.mark.parametrize("c", [0.0, 0.3, 0.999, 1.0, 1.0 + 1e-15, 1.5])
def test_unlearning_alone_is_the_hull_of_a_distance(c):
    # one training step that always shifts by 0.7: μ is that of a chain known in advance
    for steps in (0, 1, 7, 10_000):
        ours = log_moment(
            ORDERS,
            factors=one(c),
            shifts=one(0.7),
            training_steps=1,
            unlearning_steps=steps,
        )
        hull = KAPPA * ContractionCertificate(c, 1.0, (0.7,)).mu(steps) ** 2
        assert (hull * (1 - 1e-11) <= ours).all()  # the hull itself is rounded up by 1e-12
        # the first step splits 0.7 between itself and the rest on 256 nodes; κ·(an ulp)² remains
        assert ours == pytest.approx(hull, rel=1e-3, abs=1e-25)


@given(st.floats(0.0, 1.0), st.floats(0.5, 2.0), st.integers(0, 6))
@settings(max_examples=25)
def test_never_above_everyone_in_every_batch(rate, smoothness, steps):
    ours = dataclasses.replace(SMALL, sample_rate=rate, smoothness=smoothness)
    worst = ContractionCertificate(
        max(0.9, abs(0.9 - 4 * smoothness)) + 1e-14, ours.noise_std, (0.8,) * 3
    )
    # both rounded up, the factor 1e-14 above
    assert (ours.rdp(ORDERS, steps=steps) <= worst.rdp(ORDERS, steps=steps) * (1 + 1e-11)).all()
    assert ours.epsilon(delta=0.01, steps=steps) <= worst.epsilon(delta=0.0099, steps=steps) + 1e-9


def test_nothing_drawn_is_nothing_given_away():
    for change in ({"sample_rate": 0.0}, {"training_steps": 0}, {"gradient_bounds": (0.0, 0.0)}):
        for noise in (0.8, 0.0):
            ours = dataclasses.replace(SMALL, noise_std=noise, **change)
            assert (ours.rdp(ORDERS, steps=0) == 0.0).all()
            assert ours.epsilon(delta=1e-5, steps=3) == 0.0
    silent = dataclasses.replace(SMALL, noise_std=0.0)
    assert (silent.rdp(ORDERS, steps=3) == math.inf).all()
    faint = dataclasses.replace(SMALL, noise_std=1e-200)
    assert (faint.rdp(ORDERS, steps=3) > 1e100).all()
    assert silent.epsilon(delta=1e-5, steps=3) == math.inf


@pytest.mark.parametrize("ours", [SMALL, CALM], ids=["expanding", "calm"])
def test_more_sampling_more_gradient_or_fewer_steps_give_away_more(ours):
    def curve(certificate, steps=2):
        return certificate.rdp(ORDERS, steps=steps)

    rates = [curve(dataclasses.replace(ours, sample_rate=q)) for q in (0.0, 0.1, 0.5)]
    bounds = [
        curve(dataclasses.replace(ours, gradient_bounds=b)) for b in ((0.1,), (0.2,), (0.2, 0.1))
    ]
    longer = [curve(dataclasses.replace(ours, training_steps=t)) for t in (0, 1, 3, 6)]
    sooner = [curve(ours, steps=k) for k in (40, 10, 3, 1, 0)]
    for values in (rates, bounds, longer, sooner):
        for less, more in itertools.pairwise(values):
            assert (less <= more).all()
    epsilons = [ours.epsilon(delta=0.01, steps=k) for k in (40, 10, 3, 1, 0)]
    assert epsilons == sorted(epsilons)


def test_steps_that_are_not_counted_change_nothing(monkeypatch):
    # sizes that are followed
    monkeypatch.setattr(batch_moments, "_COUNTED", 3)
    _, moments = dataclasses.replace(SMALL)._followed(4)  # nothing cached
    at = [moments.rdp(ORDERS, steps=k) for k in (2, 3, 4, 10**9)]
    assert (at[0] > at[1]).all()
    assert (at[1] == at[2]).all()
    assert (at[1] == at[3]).all()
    # the union bound over batch sizes covers as many steps, so no more may be counted
    monkeypatch.setattr(mini_batches, "_COUNTED", 5)
    calm = dataclasses.replace(CALM)
    for of in (lambda k: calm.rdp([2.0], steps=k)[0], lambda k: calm.epsilon(delta=0.1, steps=k)):
        at = [of(k) for k in (4, 5, 6, 10**9)]
        assert at[0] > at[1] == at[2] == at[3]


def test_sampling_a_hundredth_costs_far_less_than_everyone_everywhere():
    # no batch expands: 0.01·2 + 0.01·999/10 < 2
    ours = PoissonContractionCertificate((0.2,), 0.01, 0.05, 100, 1.0, 0.01, 0.01, 10.0, 999)
    every = ContractionCertificate(0.99, 0.05, (0.02,) * 100)
    # μ is about q times as large in the mean, and at least that (convexity)
    ratio = ours.rdp([2.0], steps=100)[0] / every.rdp([2.0], steps=100)[0]
    assert 0.01**2 < ratio < 10 * 0.01**2
    steps = ours.steps_for(epsilon=0.1, delta=1e-3)
    assert steps < 0.5 * every.steps_for(epsilon=0.1, delta=1e-3)
    assert ours.epsilon(delta=1e-3, steps=steps) <= 0.1 < ours.epsilon(delta=1e-3, steps=steps - 1)
    assert best_of([every, ours]).winner(delta=1e-3, steps=steps).certificate is ours


def test_too_large_batches_are_charged_to_delta():
    ours = PoissonContractionCertificate((1.0,), 0.1, 0.05, 20, 1.0, 0.05, 1.0, 10.0, 100)
    size, rest = ours._largest_batch(1e-3)
    missed = (20 + 1_000_000) * binom.sf(size, 100, 0.1)
    assert size < 100
    assert rest + missed <= 1e-3
    assert missed > 1e-8  # no larger than needed: one size less would cost above δ/100
    assert (20 + 1_000_000) * binom.sf(size - 1, 100, 0.1) > 1e-5
    # the rest of δ is what the bound over the smaller batches has to do with
    _, moments = ours._followed(size)
    assert ours.epsilon(delta=1e-3, steps=2) == moments.epsilon(delta=rest, steps=2)
    assert moments.epsilon(delta=rest, steps=2) > moments.epsilon(delta=1e-3, steps=2)
    calm = dataclasses.replace(ours, smoothness=0.1)
    assert calm._largest_batch(1e-3) == (100, 1e-3)  # no batch expands: nothing is spent


# --- laws ---------------------------------------------------------------------------------------

LAWS = st.lists(st.tuples(st.floats(0.0, 4.0), st.floats(0.01, 1.0)), min_size=1, max_size=8).map(
    lambda pairs: Law(np.array([v for v, _ in pairs]), np.array([w for _, w in pairs]))
)


@given(LAWS, st.lists(st.floats(0.1, 3.9), max_size=4), st.floats(0.0, 3.0), st.floats(0.0, 4.0))
def test_spread_keeps_mass_and_mean_and_raises_convex_functions(law, inner, slope, kink):
    ours = spread(law, np.unique([0.0, *inner, 4.0]))
    # a dozen roundings of numbers below 40
    assert ours.weights.sum() == pytest.approx(law.weights.sum(), rel=1e-13)
    assert ours.mean == pytest.approx(law.mean, rel=1e-13, abs=1e-13)
    for convex in (
        lambda x: np.exp(slope * x),
        lambda x: np.maximum(x - kink, 0.0),
        lambda x: (x - kink) ** 2,
    ):
        assert law.weights @ convex(law.values) <= ours.weights @ convex(ours.values) + 1e-8


@given(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=4), st.floats(0.0, 1.0))
def test_sums_of_few_shifts_are_exact(shifts, rate):
    law = sum_law(np.array(shifts), rate)
    for power in (0, 1, 2, 5):
        exact = sum(
            np.dot(mask, shifts) ** power
            * rate ** sum(mask)
            * (1 - rate) ** (len(mask) - sum(mask))
            for mask in itertools.product((0, 1), repeat=len(shifts))
        )
        assert law.weights @ law.values**power == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_many_shifts_keep_the_mean_and_lose_no_tail(seed):
    random = np.random.default_rng(seed)
    shifts = random.uniform(0.0, 1.0, 200)
    law = sum_law(shifts, 0.02)
    assert len(law.values) <= 17
    assert law.mean == pytest.approx(0.02 * shifts.sum(), rel=1e-9)
    variance = 0.02 * 0.98 * (shifts**2).sum()
    assert variance <= law.variance <= 1.2 * variance
    for tilt in (0.5, 2.0):
        exact = np.log1p(0.02 * np.expm1(tilt * shifts)).sum()
        assert np.log(law.weights @ np.exp(tilt * law.values)) >= exact


def test_what_is_too_rare_for_a_double_is_not_lost():
    # all 200 present: probability 1e-400; at this order that alone is the moment
    law = sum_law(np.ones(200), 0.01)
    assert law.values[-1] == 200.0
    order = np.array([40.0])
    ours = log_moment(order, factors=one(0.9), shifts=law, training_steps=1, unlearning_steps=0)
    assert ours[0] >= 200 * math.log(0.01) + 40.0 * 39.0 / 2.0 * 200.0**2
    sizes = factor_law(np.linspace(0.9, 3.0, 301), trials=300, rate=1e-3)
    assert sizes.values[-1] == 3.0
    # rare factors, rare shifts: the product of their probabilities underflows, too
    ours = log_moment(order, factors=sizes, shifts=law, training_steps=1, unlearning_steps=1)
    # the worst outcome: 200 apart, then tripled; both steps hide: 1/(1 + 1/9) = 0.9
    worst = 0.9 * 40.0 * 39.0 / 2.0 * 200.0**2
    assert ours[0] >= 200 * math.log(0.01) + 300 * math.log(1e-3) + worst


def test_law_of_the_factor_keeps_what_is_given():
    constants = {"step_size": 1.0, "weight_decay": 0.1, "smoothness": 1.0}
    constants["expected_batch_size"] = 10.0
    values = np.array([step_factor(size, **constants) for size in range(101)])
    law = factor_law(values, trials=100, rate=0.1)
    weights = binom.pmf(np.arange(101), 100, 0.1)
    assert law.mean == pytest.approx(weights @ values, rel=1e-12)
    assert law.weights.sum() == pytest.approx(1.0, rel=1e-12)
    assert law.values[0] == values[0]
    assert law.values[-1] == values[-1]
    assert weights @ np.exp(3.0 * values) <= law.weights @ np.exp(3.0 * law.values)
    # given that no batch is larger than 22: the conditional law, the rest has left
    given_small = factor_law(values[:23], trials=100, rate=0.1)
    assert values[22] > values[0]
    assert given_small.weights.sum() == pytest.approx(1.0, rel=1e-12)
    exact = weights[:23] @ values[:23] / weights[:23].sum()
    assert given_small.mean == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("tail", [0.3, 1e-3, 1e-12, 1e-200])
def test_largest_size_is_the_smallest_that_is_rarely_exceeded(rate, tail):
    size = largest_size(trials=60, rate=rate, tail=tail)
    assert binom.sf(size, 60, rate) <= tail
    assert size == 0 or binom.sf(size - 1, 60, rate) > tail * (1.0 - 1e-8)  # room for rounding


def test_step_factor_is_the_larger_end_of_the_spectrum():
    for size, eta, decay, smooth, batch in itertools.product(
        (0, 3, 50), (0.1, 1.0, 3.0), (0.0, 0.5), (0.0, 1.0), (10.0,)
    ):
        ours = step_factor(
            size, step_size=eta, weight_decay=decay, smoothness=smooth, expected_batch_size=batch
        )
        slopes = decay + smooth * np.linspace(0.0, size, 101) / batch
        exact = np.abs(1.0 - eta * slopes).max()
        assert exact <= ours <= exact + 1e-14 * max(1.0, exact)


# --- one linear output ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_coupled_logistic_runs_never_separate_by_more_than_the_recursion(seed):
    # Both runs draw the same coins; the one without the forget set drops its rows, b stays.
    random = np.random.default_rng(seed)
    ours = PoissonContractionCertificate.one_output_glm(**GLM)
    features = random.normal(size=(42, 5))
    features *= np.minimum(1.0, 2.0 / np.linalg.norm(features, axis=1, keepdims=True))
    labels, caps = random.integers(0, 2, 42), np.ones(42)
    caps[-2:] = GLM["caps"]

    def step(theta, rows):
        x = features[rows]
        gradients = (1.0 / (1.0 + np.exp(-x @ theta)) - labels[rows])[:, None] * x
        norms = np.linalg.norm(gradients, axis=1, keepdims=True)
        clipped = gradients * np.minimum(1.0, 0.7 * caps[rows][:, None] / (norms + 1e-6))
        return (1.0 - 0.5 * 0.05) * theta - 0.5 / 8 * clipped.sum(axis=0)

    theta = other = random.normal(size=5)
    gap, farthest = 0.0, 0.0
    for t in range(60):
        coins = random.random(42) < (0.2 if t % 3 else 0.8)  # some batches far above b
        retained = np.flatnonzero(coins[:40])
        rows = np.flatnonzero(coins) if t < 30 else retained
        noise = ours.noise_std * random.normal(size=5)
        theta, other = step(theta, rows) + noise, step(other, retained) + noise
        drawn = coins[40:] if t < 30 else [0, 0]
        gap = ours._factor(len(retained)) * gap + np.dot(ours._shifts, drawn)
        distance = np.linalg.norm(theta - other)
        farthest = max(farthest, distance / max(gap, 1e-9))
        assert distance <= gap + 1e-12  # rounding of models of size 3
    assert farthest > 0.05  # the recursion is not vacuous here


def test_glm_constants_are_those_of_the_theory():
    ours = PoissonContractionCertificate.one_output_glm(**GLM)
    assert ours.noise_std == pytest.approx(0.5 * 1.5 * 0.7 / 8, rel=1e-14)
    assert ours.smoothness == 0.25 * 4.0
    assert ours.num_retained == 40
    assert ours.sample_rate == 0.2
    shift = 0.5 * 0.7 / 8 * np.array(GLM["caps"])
    assert (shift <= ours._shifts).all()
    assert (ours._shifts <= shift * (1.0 + 2e-5)).all()  # room for float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_outputs": 10}, "num_outputs = 1 .*got num_outputs=10.*Clipping breaks"),
        ({"momentum": 0.9}, r"momentum = 0\.0 .*got momentum=0\.9.*plain SGD"),
        ({"sampling": "shuffled"}, "sampling = 'poisson' .*got sampling='shuffled'"),
        ({"guarantee": "estimate"}, "guarantee = 'bound' .*got guarantee='estimate'.*Fix caps"),
    ],
)
def test_runs_without_a_proof_are_refused_by_name(change, words):
    with pytest.raises(CertificateError, match=words):
        PoissonContractionCertificate.one_output_glm(**(GLM | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caps": (0.5, 1.5)}, "row 1"),
        ({"caps": ()}, "caps"),
        ({"num_instances": 1}, "num_instances"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"training_steps": -1}, "training_steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
    ],
)
def test_wrong_values_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        PoissonContractionCertificate.one_output_glm(**(GLM | change))


def test_wrong_fields_are_named():
    for name, value in (
        ("gradient_bounds", (0.1, -1.0)),
        ("gradient_bounds", ((0.1,),)),
        ("noise_std", -1.0),
        ("smoothness", math.inf),
        ("num_retained", -1),
    ):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(SMALL, **{name: value})
    with pytest.raises(ValueError, match="steps"):
        SMALL.rdp(ORDERS, steps=-1)
    with pytest.raises(ValueError, match="delta"):
        SMALL.epsilon(delta=0.0, steps=1)


def test_record_is_frozen_and_says_what_it_assumes():
    ours = PoissonContractionCertificate.one_output_glm(**GLM)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.noise_std = 9.0
    text = " ".join(ours.assumptions)
    for words in (
        "probability 0.2",
        "no shuffled epochs",
        "0.5·0.05",
        "0.5/8",
        "40 retained",
        "2 forgotten",
        "training (30)",
        "same initialisation",
        "no momentum",
        "one linear output",
        "fixed before the run",
        "summing to 1.1",
    ):
        assert words in text, words
    assert all(line.endswith(".") for line in ours.assumptions)
    assert ours.two_sided is True


def test_any_order_is_answered_and_joined_with_the_certificate_of_full_batches():
    curve = CALM.rdp(DEFAULT_ORDERS, steps=1)
    assert np.isfinite(curve).all()
    scaled = (np.array(DEFAULT_ORDERS) - 1.0) * curve
    assert (np.diff(scaled) > 0.0).all()


# --- known batches --------------------------------------------------------------------------------

KNOWN = {
    "forget": [3, 7],
    "gradient_bounds": [1.0, 0.5],
    "noise_std": 0.4,
    "step_size": 0.5,
    "weight_decay": 0.1,
    "smoothness": 1.0,
    "expected_batch_size": 3,
}
CYCLE = [[0, 1, 2], [3, 4, 5], [6, 7, 8], range(9)] * 3


def test_known_batches_become_factors_and_shifts():
    ours = known_batches(CYCLE, **KNOWN)
    sizes = [3, 2, 2, 7] * 3
    shifts = [0.0, 0.5 / 3, 0.25 / 3, 0.75 / 3] * 3
    factors = [max(0.95, abs(1.0 - 0.5 * (0.1 + k / 3))) for k in sizes]
    assert max(factors) == 0.95  # |0.95 − 0.5·7/3| = 0.22
    assert ours.shifts == pytest.approx(shifts, rel=1e-15)
    assert ours.contraction == pytest.approx(factors, rel=1e-14)
    assert ours.unlearning_contraction == pytest.approx(0.95, rel=1e-14)
    steep = known_batches(CYCLE, **(KNOWN | {"smoothness": 4.0}))
    assert steep.contraction[3] == pytest.approx(0.5 * 4.0 * 7 / 3 - 0.95, rel=1e-14)
    assert steep.unlearning_contraction == steep.contraction[3]
    small = known_batches(CYCLE, **(KNOWN | {"smoothness": 4.0}), unlearning_batch_size=2)
    assert small.unlearning_contraction == pytest.approx(0.95, rel=1e-14)


def test_known_batches_without_a_forgotten_row_give_nothing_away():
    ours = known_batches([[0, 1], [2]], **KNOWN)
    assert ours.epsilon(delta=1e-5, steps=0) == 0.0
    assert known_batches([], **KNOWN).epsilon(delta=1e-5, steps=0) == 0.0


def test_known_batches_are_never_above_every_batch_holding_the_forget_set():
    ours = known_batches(CYCLE, **KNOWN)
    every = ContractionCertificate(0.95 + 1e-14, 0.4, (0.75 / 3 + 1e-15,) * 12)
    for steps in (0, 3, 20):
        assert ours.mu(steps) <= every.mu(steps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"forget": [3, 3]}, "forget"),
        ({"gradient_bounds": [1.0]}, "gradient_bounds"),
        ({"gradient_bounds": [1.0, -1.0]}, "row 1"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"step_size": 0.0}, "step_size"),
        ({"unlearning_batch_size": -1}, "unlearning_batch_size"),
    ],
)
def test_wrong_known_batches_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        known_batches(CYCLE, **(KNOWN | change))
    with pytest.raises(ValueError, match="batches without repetition"):
        known_batches([[1, 1]], **KNOWN)
