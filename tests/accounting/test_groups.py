import itertools
import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from opacus_pil.accounting import (
    DEFAULT_ORDERS,
    group_rdp,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)
from opacus_pil.accounting.gram import gram_forward
from opacus_pil.accounting.groups import _lattice_law, collinear_law
from opacus_pil.accounting.mixtures import (
    ShiftLaw,
    forward_divergence,
    mass_moved_right,
    reverse_divergence,
)
from tests.oracles import _gauss_legendre

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "cases.json").read_text())["groups"]
ABOVE = 1e-9  # the documented largest relative excess where the quadrature answers
ROUNDING = 1e-12  # truths in double precision, and shifts or norms given to 16 digits
LATTICE = 0.02  # twice the largest mean excess of a sum of members rounded up to the lattice
NONE = np.zeros(1)


def both(shifts, rate, order):
    """Both one-dimensional bounds at noise 1 and one order."""
    law = collinear_law(np.asarray(shifts, float), rate)
    orders = np.array([order])
    return (
        float(forward_divergence(law, orders)[0]),
        float(reverse_divergence(law, orders, ignored=NONE)[0]),
    )


def rdp(sensitivities, rate=0.1, orders=DEFAULT_ORDERS, noise=1.0, gram=None):
    return group_rdp(
        sensitivities, noise_multiplier=noise, sample_rate=rate, orders=orders, gram=gram
    )


def collinear_truth(shifts, rate, order, *, forward):
    """D of the collinear mixture as it stands in the definition, in 50 digits."""
    with mpmath.workdps(50):
        q, total = mpmath.mpf(rate), float(sum(shifts))
        atoms = [
            (
                mpmath.fsum(mpmath.mpf(float(s)) * b for s, b in zip(shifts, drawn, strict=True)),
                q ** sum(drawn) * (1 - q) ** (len(drawn) - sum(drawn)),
            )
            for drawn in itertools.product((0, 1), repeat=len(shifts))
        ]
        power = mpmath.mpf(order) if forward else 1 - mpmath.mpf(order)

        def excess(t):
            u = mpmath.fsum(p * mpmath.expm1(m * t - m * m / 2) for m, p in atoms)
            return (mpmath.power(1 + u, power) - 1 - power * u) * mpmath.npdf(t)

        # Panels fit the fastest scale; the reverse integrand peaks no lower than −(α−1)·Σs.
        curvature = 1.0 if forward else 1.0 + (order - 1.0) * total**2 / 4.0
        width = min(1.0, 3.0 / total, 3.0 / math.sqrt(curvature))
        low = -13.0 - (0.0 if forward else min((order - 1.0) * total, 40.0))
        high = (order * total if forward else total) + 13.0
        edges = np.linspace(low, high, 2 + math.ceil((high - low) / width))
        middles = [excess(mpmath.mpf(float(t))) for t in (edges[1:] + edges[:-1]) / 2]
        floor = max(middles) * mpmath.mpf(10) ** -20  # tolerances here are 1e-12
        moment = mpmath.fsum(
            _gauss_legendre(excess, mpmath.mpf(float(edges[i])), mpmath.mpf(float(edges[i + 1])))
            for i in range(len(middles))
            if max(middles[max(i - 1, 0) : i + 2]) > floor
        )
        return float(mpmath.log1p(moment) / (mpmath.mpf(order) - 1))


def plane_truth(gradients, rate, order, *, forward):
    """D of the mixture in the plane by the tensor trapezoid rule (geometric convergence)."""
    subsets = np.array(list(itertools.product((0, 1), repeat=len(gradients))), float)
    centres = subsets @ gradients
    drawn = subsets.sum(axis=1)
    masses = rate**drawn * (1 - rate) ** (len(gradients) - drawn)
    reach = 10.0 + max(order, 2.0) * np.linalg.norm(centres, axis=1).max()
    step = 0.05
    axis = np.arange(-reach, reach, step)
    x, y = np.meshgrid(axis, axis)
    density = sum(
        p * np.exp(c[0] * x + c[1] * y - c @ c / 2) for p, c in zip(masses, centres, strict=True)
    )
    weight = np.exp(-(x * x + y * y) / 2) / (2 * math.pi) * step * step
    power = order if forward else 1 - order
    return math.log(float((density**power * weight).sum())) / (order - 1)


# --- against the truth ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_groups_are_met_from_above(case):
    norms, noise = np.array(case["norms"]), case["noise_std"]
    forward, reverse = both(norms / noise, case["sample_rate"], case["order"])
    gradients = np.array(case["gradients"]) / noise
    gram = gram_forward(gradients @ gradients.T, case["sample_rate"], np.array([case["order"]]))[0]
    pairs = [
        (forward, case["collinear_forward"]),
        (reverse, case["collinear_reverse"]),
        (gram, case["gram_forward"]),
    ]
    for value, truth in pairs:
        assert truth * (1 - ROUNDING) <= value <= truth * (1 + ABOVE)


@pytest.mark.parametrize(
    ("shifts", "rate", "order"),
    [
        ([1.0, 1.0], 0.01, 8.0),
        ([0.3, 0.7, 1.1], 0.2, 1.3),
        ([0.3, 0.7, 1.1], 0.2, 6.5),
        ([2.5, 0.1], 1e-4, 3.7),
        ([1e-3, 4e-3, 2e-3], 0.05, 64.0),
        ([1e-7, 3e-7], 1e-3, 1.5),
        ([1e-5, 3.0], 1e-6, 2.2),
        ([4.0, 0.5], 1e-18, 1.01),  # the square of Z − 1 has its mode at 8
        ([0.4, 0.6, 0.2], 0.9, 1.01),
        ([0.05, 0.04], 0.5, 300.0),
    ],
)
def test_collinear_bounds_equal_the_integral_in_fifty_digits(shifts, rate, order):
    for value, forward in zip(both(shifts, rate, order), (True, False), strict=True):
        truth = collinear_truth(shifts, rate, order, forward=forward)
        assert truth * (1 - ROUNDING) <= value <= truth * (1 + ABOVE)


@pytest.mark.parametrize("seed", range(6))
def test_gram_value_covers_the_plane_in_both_directions(seed):
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(3, 2)) * 0.6
    rate = float(generator.uniform(0.05, 0.6))
    norms = np.linalg.norm(gradients, axis=1)
    orders = [1.5, 2.0, 2.5, 3.0, 4.0]
    values = rdp(norms, rate, orders, gram=gradients @ gradients.T)
    loose = rdp(norms, rate, orders)
    for value, limit, order in zip(values, loose, orders, strict=True):
        truth = [plane_truth(gradients, rate, order, forward=forward) for forward in (True, False)]
        assert max(truth) * (1 - 1e-10) <= value <= limit * (1 + ABOVE)  # 1e-10: the tensor rule
        if order == int(order):  # then the forward direction is exact
            law = gram_forward(gradients @ gradients.T, rate, np.array([order]))[0]
            assert law == pytest.approx(truth[0], rel=1e-9)  # as documented


def test_gram_formula_equals_its_definition():
    generator = np.random.default_rng(5)
    gradients = generator.normal(size=(2, 3)) * 0.8
    rate, order = 0.3, 5
    subsets = np.array(list(itertools.product((0, 1), repeat=2)), float) @ gradients
    masses = np.array([0.49, 0.21, 0.21, 0.09])
    total = 0.0
    for drawn in itertools.product(range(4), repeat=order):
        sums = subsets[list(drawn)]
        cross = (np.sum(sums.sum(axis=0) ** 2) - np.sum(sums**2)) / 2
        total += masses[list(drawn)].prod() * math.exp(cross)
    value = gram_forward(gradients @ gradients.T, rate, np.array([float(order)]))[0]
    assert value == pytest.approx(math.log(total) / (order - 1), rel=1e-12)  # 1,024 terms


@pytest.mark.parametrize(("count", "shift", "rate"), [(200, 0.1, 0.01), (1000, 0.02, 0.05)])
def test_many_equal_members_match_the_second_moment(count, shift, rate):
    drawn = np.arange(count + 1)
    masses = binom.pmf(drawn, count, rate)
    moment = masses @ np.expm1(np.outer(drawn, drawn) * shift**2) @ masses
    value = both(np.full(count, shift), rate, 2.0)[0]
    # scipy's binomial probabilities are good to about 1e-11
    assert math.log1p(moment) * (1 - 1e-10) <= value <= math.log1p(moment) * (1 + ABOVE)


def second_moment_below(shifts, rate):
    """D_2 with every member rounded down to a fine lattice instead."""
    step = shifts.sum() / 4000
    masses = np.zeros(4001)
    masses[0] = 1.0
    for place in np.floor(shifts / step).astype(int):
        moved = np.append(np.zeros(place), masses[: len(masses) - place])
        masses = (1 - rate) * masses + rate * moved
    atoms = step * np.arange(4001)
    return math.log1p(masses @ np.expm1(np.outer(atoms, atoms)) @ masses)


def test_rounding_up_costs_little_for_unequal_members():
    shifts = np.random.default_rng(1).uniform(0.01, 0.1, size=100)
    below = second_moment_below(shifts, 0.05)  # members are 4 to 73 steps: 1.5 % low or less
    value = both(shifts, 0.05, 2.0)[0]
    assert below <= value <= below * (1 + LATTICE + 0.03)


@pytest.mark.parametrize(("scale", "rate"), [(1.0, 0.01), (0.2, 0.3), (3.0, 1e-3), (0.05, 0.5)])
def test_lattice_is_above_the_exact_subset_sums_and_near(scale, rate):
    shifts = scale * np.random.default_rng(2).uniform(0.05, 1.0, size=9)
    orders = np.array([1.01, 1.5, 2.0, 3.3, 8.0, 20.0])
    exact, rounded = collinear_law(shifts, rate), _lattice_law(shifts, rate)
    forward = [forward_divergence(law, orders) for law in (exact, rounded)]
    reverse = [reverse_divergence(law, orders, ignored=0 * orders) for law in (exact, rounded)]
    for below, above in (forward, reverse):
        assert (below <= above * (1 + ABOVE)).all()
        assert (above <= below * (1 + LATTICE)).all()


@pytest.mark.parametrize(
    ("sensitivities", "noise", "rate"), [([1.0, 1.0], 2.0, 0.1), ([0.5, 0.8, 1.0], 1.5, 0.02)]
)
def test_epsilon_is_above_the_loss_distribution_of_the_mixture(sensitivities, noise, rate):
    subsets = np.array(list(itertools.product((0, 1), repeat=len(sensitivities))), float)
    drawn = subsets.sum(axis=1)
    optimistic = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise,
        (subsets @ sensitivities).tolist(),
        (rate**drawn * (1 - rate) ** (len(sensitivities) - drawn)).tolist(),
        pessimistic_estimate=False,
        value_discretization_interval=1e-3,
        use_connect_dots=False,
    )
    for steps in (1, 20):
        curve = steps * rdp(sensitivities, rate, noise=noise)
        epsilon = rdp_to_epsilon(curve, orders=DEFAULT_ORDERS, delta=1e-5)[0]
        below = optimistic.self_compose(steps).get_epsilon_for_delta(1e-5)
        assert below <= epsilon <= 3.0 * below + 0.1  # of use, not only valid


# --- how it behaves ------------------------------------------------------------------------------

ORDERS = [1.05, 1.7, 2.0, 5.5, 32.0, 500.0]
sets = st.lists(st.floats(1e-4, 2.0), min_size=2, max_size=5)


@settings(max_examples=30, deadline=None)
@given(sets, st.floats(1e-4, 0.99), st.floats(0.3, 8.0), st.floats(1.0, 1.5))
def test_rdp_is_monotone_in_everything(sensitivities, rate, noise, factor):
    base = rdp(sensitivities, rate, ORDERS, noise)
    assert (np.diff(base) >= -ABOVE * base[1:]).all()
    above = [
        rdp([factor * s for s in sensitivities], rate, ORDERS, noise),
        rdp(sensitivities, min(1.0, factor * rate), ORDERS, noise),
        rdp(sensitivities, rate, ORDERS, noise / factor),
        rdp([*sensitivities, factor], rate, ORDERS, noise),
        rdp(sensitivities, 1.0, ORDERS, noise),
    ]
    below = [rdp([s], rate, ORDERS, noise) for s in sensitivities]
    for larger in above:
        assert (base <= larger * (1 + ABOVE)).all()
    for smaller in below:
        assert (smaller <= base * (1 + ABOVE)).all()


@settings(max_examples=20, deadline=None)
@given(sets, st.integers(0, 100))
def test_order_of_members_and_absent_members_do_not_matter(sensitivities, seed):
    mixed = np.random.default_rng(seed).permutation([*sensitivities, 0.0, 0.0])
    # sums of the members in another order differ by a few ulps
    assert rdp(mixed, 0.2, ORDERS) == pytest.approx(rdp(sensitivities, 0.2, ORDERS), rel=1e-9)


def test_large_sets_are_monotone_between_enumeration_and_lattice():
    members = np.random.default_rng(3).uniform(0.01, 0.1, size=40)
    curves = [rdp(members[:size], 0.05, ORDERS) for size in (11, 12, 13, 14, 40)]
    for smaller, larger in itertools.pairwise(curves):
        assert (smaller <= larger).all()
    assert rdp(members[::-1], 0.05, ORDERS) == pytest.approx(curves[-1], rel=ABOVE)


@pytest.mark.parametrize("count", [2, 12, 13, 300])
def test_never_above_a_step_that_draws_everyone(count):
    members = np.random.default_rng(count).uniform(0.1, 1.0, size=count)
    naive = np.array(DEFAULT_ORDERS) * members.sum() ** 2 / 2
    everyone = rdp(members, 1.0)
    assert everyone == pytest.approx(naive, rel=1e-12)  # both rounded
    assert (everyone >= naive).all()
    for rate in (1e-6, 0.3, 1 - 1e-12):
        assert (rdp(members, rate) <= everyone).all()


def test_single_member_is_a_single_instance():
    expected = sampled_gaussian_rdp(
        0.7, noise_multiplier=1.3, sample_rate=0.02, orders=DEFAULT_ORDERS
    )
    assert (rdp([0.0, 0.7], 0.02, noise=1.3) == expected).all()


def test_two_copies_drawn_apart_are_more_than_one_twice_as_rare():
    # q-Bernoulli twice is below one member of twice the length at rate 1 − (1−q)²
    together = rdp([2.0], 1 - 0.95**2, ORDERS)
    assert (rdp([1.0, 1.0], 0.05, ORDERS) <= together * (1 + ABOVE)).all()
    assert (rdp([1.0, 1.0], 0.05, ORDERS) > rdp([1.0], 0.05, ORDERS)).all()


def test_gram_uses_the_norm_of_the_sum_when_everyone_is_drawn():
    gradients = np.array([[1.0, 0.0], [-1.0, 0.1], [0.3, 0.4]])
    norms = np.linalg.norm(gradients, axis=1)
    expected = np.array(ORDERS) * 0.5 * np.sum(gradients.sum(axis=0) ** 2)
    value = rdp(norms, 1.0, ORDERS, gram=gradients @ gradients.T)
    assert value == pytest.approx(expected, rel=1e-12)  # rounded up by a few ulps of the trace
    assert (value >= expected).all()


def test_gram_of_collinear_members_changes_nothing_and_opposite_ones_help():
    norms = np.array([0.4, 0.9, 0.6])
    gram = np.outer(norms, norms)
    plain = rdp(norms, 0.1, ORDERS)
    # the square root of a norm that equals the sum loses half an ulp
    assert rdp(norms, 0.1, ORDERS, gram=gram) == pytest.approx(plain, rel=1e-9)
    signs = np.array([1.0, -1.0, 1.0])
    assert (rdp(norms, 0.1, ORDERS, gram=gram * np.outer(signs, signs)) < plain).all()


def test_gram_of_a_large_set_falls_back_to_the_norms():
    norms = np.full(20, 0.3)
    assert (rdp(norms, 0.1, ORDERS, gram=0.09 * np.eye(20)) == rdp(norms, 0.1, ORDERS)).all()


def test_gram_summed_in_single_precision_is_accepted_and_rounded_up():
    gradients = np.random.default_rng(4).normal(size=(4, 3)) * 0.5
    norms = np.linalg.norm(gradients, axis=1)
    exact = rdp(norms, 0.2, [2.0], gram=gradients @ gradients.T)
    single = gradients.astype(np.float32)
    rough = rdp(norms, 0.2, [2.0], gram=(single @ single.T).astype(float))
    assert rough == pytest.approx(exact, rel=1e-5)  # single precision


# --- rounding ------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=30))
def test_moved_mass_never_raises_the_distribution_function(weights):
    masses = np.array(weights) / sum(weights)
    moved = mass_moved_right(masses, 1e-6)
    assert moved.sum() == pytest.approx(1.0, abs=1e-14)  # rounding of a sum of 30
    assert (np.cumsum(moved) <= np.cumsum(masses) + 1e-14).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 2.0), st.floats(0.01, 1.0)), min_size=2, max_size=6),
    st.integers(0, 5), st.floats(1.0, 1.5), st.sampled_from([1.2, 2.0, 4.7]),
)  # fmt: skip
def test_raising_any_one_shift_raises_both_divergences(pairs, which, factor, order):
    shifts = np.array([0.0] + [pair[0] for pair in pairs])
    masses = np.array([1.0] + [pair[1] for pair in pairs])
    masses /= masses.sum()
    raised = shifts.copy()
    raised[1 + which % len(pairs)] *= factor
    laws = []
    for atoms in (shifts, raised):
        ascending = np.argsort(atoms)
        laws.append(ShiftLaw(atoms[ascending], masses[ascending]))
    orders = np.array([order])
    below, above = (forward_divergence(law, orders)[0] for law in laws)
    assert below <= above * (1 + ABOVE)
    below, above = (reverse_divergence(law, orders, ignored=NONE)[0] for law in laws)
    assert below <= above * (1 + ABOVE)


def test_probability_known_only_beyond_the_atoms_counts_in_both_directions():
    atoms, masses = np.array([0.0, 0.2, 1.5]), np.array([0.9, 0.09, 0.01])
    whole = ShiftLaw(atoms, masses)
    parted = ShiftLaw(
        atoms[:2],
        np.array([0.91, 0.09]),  # what is far is counted again on 0, at no cost
        far_shifts=atoms[2:],
        far_log_masses=np.log(masses[2:]),
    )
    orders = np.array([1.1, 2.0, 3.5, 9.0])
    exact, bound = (forward_divergence(law, orders) for law in (whole, parted))
    assert (exact <= bound * (1 + ABOVE)).all()
    exact, bound = (reverse_divergence(law, orders, ignored=0 * orders) for law in (whole, parted))
    assert (exact <= bound * (1 + ABOVE)).all()


@pytest.mark.parametrize(
    ("shifts", "rate", "order"),
    [
        ([1.0, 1.0], 0.5, 60.0),
        ([3.0, 2.0], 0.3, 12.0),
        ([0.8, 1.5], 0.1, 90.0),
        ([0.1, 0.05], 0.5, 4096.0),  # far from 0 and narrow: a rule of growth 1 is 8e-9 too low
        ([0.05, 0.05], 0.5, 4096.0),  # and one of a tenth of the growth 5e-12
    ],
)
def test_sharp_turns_of_the_reverse_integrand_are_resolved(shifts, rate, order):
    value = both(shifts, rate, order)[1]
    truth = collinear_truth(shifts, rate, order, forward=False)
    assert truth * (1 - ROUNDING) <= value <= truth * (1 + ABOVE)


def test_rare_draws_of_a_far_shift_give_half_the_order_times_chi_square():
    # E[(Z−1)²] = q²·expm1(r²); higher moments are smaller by q·e^(2r²) = 1e-25 and more.
    rate, shift, order = 1e-150, 12.0, 2.0
    law = ShiftLaw(np.array([0.0, shift]), np.array([1.0, rate]))
    expected = order / 2 * rate * math.expm1(shift * shift) * rate
    reverse = reverse_divergence(law, np.array([order]), ignored=NONE)[0]
    for value in (forward_divergence(law, np.array([order]))[0], reverse):
        assert expected * (1 - ROUNDING) <= value <= expected * (1 + ABOVE)


def test_a_lattice_never_places_a_member_below_its_shift():
    for a, b in np.random.default_rng(6).uniform(0.05, 1.0, size=(300, 2)):
        law = _lattice_law(np.array([a, b]), 0.3)
        atoms = law.shifts[law.masses > 0.01]  # drawn: nobody, one of them, both
        assert (atoms >= [0.0, min(a, b), max(a, b), a + b]).all()


def test_the_other_direction_counts_where_its_bound_is_the_larger():
    # Opposite gradients: pairs of draws cancel in the exact forward moment only.
    gradients = np.array([[0.9], [-0.9]])
    gram, order, rate = gradients @ gradients.T, 2.0, 0.5
    forward = gram_forward(gram, rate, np.array([order]))[0]
    norms_of_sums = ShiftLaw(np.array([0.0, 0.9]), np.array([0.5, 0.5]))
    reverse = reverse_divergence(norms_of_sums, np.array([order]), ignored=NONE)[0]
    assert forward < reverse
    value = rdp([0.9, 0.9], rate, [order], gram=gram)[0]
    # the norms of the sums are padded by the square root of a few ulps
    assert reverse * (1 - ROUNDING) <= value <= reverse * (1 + 1e-6)


# --- edges ---------------------------------------------------------------------------------------


def test_edge_values():
    nothing = np.zeros(len(DEFAULT_ORDERS))
    assert (rdp([]) == nothing).all()
    assert (rdp([0.0, 0.0]) == nothing).all()
    assert (rdp([1.0, 1.0], 0.0, noise=0.0) == nothing).all()
    assert (rdp([], gram=np.zeros((0, 0))) == nothing).all()
    assert np.isinf(rdp([1.0, 0.0], 1e-9, noise=0.0)).all()


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("shift", [1e-300, 1e-150, 1e-9, 1e-3, 1.0, 30.0, 1e4, 1e90, 1e200])
@pytest.mark.parametrize("rate", [1e-300, 1e-30, 0.5, 1 - 1e-16])
def test_extremes_are_positive_and_never_nan(count, shift, rate):
    values = rdp([1.0] * (count - 1) + [0.5], rate, [1.01, 2.0, 64.0, 4096.0], noise=1 / shift)
    assert (values > 0).all()  # NaN fails as well
    assert (values[1:] >= values[:-1] * (1 - ABOVE)).all()


@pytest.mark.parametrize("noise", [1e-300, 1e-200, 1e-160, 0.01, 0.1, 1.0, 1e160, 1e300])
@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e-30, 0.5, 1 - 1e-16, 1.0])
def test_extremes_with_opposite_gradients_are_positive_and_never_nan(noise, rate):
    gram = [[1.0, -1.0], [-1.0, 1.0]]
    orders = [1.01, 2.0, 20.0, 50.0, 90.0, 4096.0]
    values = rdp([1.0, 1.0], rate, orders, noise, gram)
    assert (values > 0).all()
    assert (values <= rdp([1.0, 1.0], rate, orders, noise) * (1 + ABOVE)).all()


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.eye(3), r"shape \(members, members\) = \(2, 2\), got gram of shape \(3, 3\)"),
        ([[1.0, 0.5], [0.4, 1.0]], "symmetric"),
        ([[1.0, 0.0], [0.0, 0.9]], "1 of 2 different .first: member 1"),
        ([[1.0, 1.5], [1.5, 1.0]], "positive semidefinite"),
        ([[1.0, math.nan], [0.0, 1.0]], "finite"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, message):
    with pytest.raises(ValueError, match=message):
        rdp([1.0, 1.0], gram=gram)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sensitivities": [1.0, -1.0]}, "sensitivities"),
        ({"sensitivities": [[1.0, 1.0]]}, "sensitivities"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"orders": [1.0]}, "orders"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "sensitivities": [1.0, 1.0], "noise_multiplier": 1.0, "sample_rate": 0.1, "orders": [2.0],
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=f"Expected {message}"):
        group_rdp(arguments.pop("sensitivities"), **arguments)
