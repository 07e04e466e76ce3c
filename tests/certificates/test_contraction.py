import dataclasses
import json
import math
import pathlib

import mpmath as mp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opacus_pil import CertificateError
from opacus_pil.certificates import ContractionCertificate, sequential_requests
from opacus_pil.certificates.certificate import Certificate
from tests.certificates import oracles

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "cases.json").read_text())
ORDERS = (1.1, 2.0, 8.0, 64.0)


NOISE = st.floats(0.1, 2.0)


@st.composite
def chains(draw, max_steps=9, noise=NOISE):
    """Random per-step (c, ζ, s) and a distance at the start."""
    steps = draw(st.integers(1, max_steps))

    def many(values):
        return draw(st.lists(values, min_size=steps, max_size=steps))

    contraction = many(st.floats(0.2, 1.4))
    return contraction, many(noise), many(st.floats(0.0, 2.0)), draw(st.floats(0.0, 2.0))


def certificate(chain):
    contraction, noise_std, shifts, distance = chain
    return ContractionCertificate(
        contraction,
        noise_std,
        shifts,
        distance,
        unlearning_contraction=1.0,
        unlearning_noise_std=1.0,
    )


@pytest.mark.parametrize("case", GOLDEN["contraction"])
def test_golden_chains(case):
    ours = ContractionCertificate(
        case["contraction"], case["noise_std"], case["shifts"], case["initial_distance"]
    )
    steps = case["unlearning_steps"]
    # golden values are rounded doubles; ours lie above the truth by at most 1e-12 (T <= 60)
    assert ours.mu(steps) == pytest.approx(case["mu"], rel=1e-11)
    assert ours.mu(steps) >= case["mu_chord"] * (1.0 - 1e-14)  # their rounding
    assert ours.mu(steps) >= case["linear_chain_gap"] / case["linear_chain_std"] * (1.0 - 1e-14)
    delta = ours.delta(epsilon=case["epsilon"], steps=steps)
    assert delta == pytest.approx(case["delta"], rel=1e-9)  # δ = 7e-42 magnifies μ's slack 200-fold


def test_golden_has_chains_where_one_chord_is_too_small():
    infeasible = [case for case in GOLDEN["contraction"] if case["mu_chord"] < 0.99 * case["mu"]]
    assert len(infeasible) >= 2


@pytest.mark.parametrize("case", GOLDEN["ou_chain"])
def test_certificate_is_exact_on_the_ornstein_uhlenbeck_chain(case):
    eta, size = case["step_size"], case["n"]
    ours = ContractionCertificate(
        1.0 - eta * case["strong_convexity"],
        case["temperature_sigma"] * math.sqrt(2.0 * eta),
        shifts=(eta * case["gradient_norm"] / size,) * case["training_steps"],
    )
    value = ours.rdp([case["order"]], steps=case["unlearning_steps"])[0]
    assert value == pytest.approx(case["exact"], rel=1e-10)  # slack 3e-12, squared; golden 1e-11


@given(chains())
def test_mu_solves_the_quadratic_programme(chain):
    # nnls works on conditioned doubles: 1e-7 is what an active-set solver promises here
    exact = oracles.programme_mu(*chain)
    assert certificate(chain).mu(0) == pytest.approx(exact, rel=1e-7, abs=1e-7)


@given(chains(noise=st.one_of(st.just(0.0), st.floats(0.2, 2.0))))
def test_steps_without_noise_are_pooled(chain):
    chain[1][-1] = 1.0  # noise at the end: a plan exists
    exact = oracles.programme_mu(*chain)
    assert certificate(chain).mu(0) == pytest.approx(exact, rel=1e-7, abs=1e-7)


@given(chains(), st.integers(0, 6), st.floats(0.0, 1.5), st.floats(0.0, 2.0))
def test_closed_form_of_unlearning_equals_the_steps_written_out(chain, steps, c, noise):
    contraction, noise_std, shifts, distance = chain
    short = ContractionCertificate(
        contraction,
        noise_std,
        shifts,
        distance,
        unlearning_contraction=c,
        unlearning_noise_std=noise,
    )
    longer = certificate(
        (contraction + [c] * steps, noise_std + [noise] * steps, shifts + [0.0] * steps, distance)
    )
    # both within the documented slack (about 1e-12) of the same number
    assert short.mu(steps) == pytest.approx(longer.mu(0), rel=1e-11)


@given(chains(max_steps=30), st.data())
def test_mu_bounds_every_linear_chain_inside_the_assumptions(chain, data):
    contraction, noise_std, shifts, distance = chain
    signs = data.draw(
        st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(shifts), max_size=len(shifts))
    )
    flips = data.draw(
        st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(shifts), max_size=len(shifts))
    )
    gap, std = oracles.linear_chain(
        np.multiply(contraction, flips), noise_std, np.multiply(shifts, signs), distance
    )
    assert certificate(chain).mu(0) >= abs(gap) / std * (1.0 - 1e-13)  # the oracle's rounding


@given(
    st.floats(0.1, 1.0),
    st.floats(0.1, 2.0),
    st.floats(0.01, 2.0),
    st.integers(1, 40),
    st.integers(0, 40),
)
def test_constant_contracting_chains_are_exact(c, noise, shift, steps, later):
    ours = ContractionCertificate(c, noise, (shift,) * steps, shift)
    length = steps + later
    gap, std = oracles.linear_chain(
        [c] * length, [noise] * length, [shift] * steps + [0.0] * later, shift
    )
    assume(gap / std > 1e-140)
    assert ours.mu(later) == pytest.approx(gap / std, rel=1e-9)


def test_shift_in_the_last_step_is_hidden_by_that_step_alone():
    ours = ContractionCertificate(0.9, 1.0, (0.0, 0.0, 1.0))
    assert ours.mu(0) == pytest.approx(1.0, rel=1e-12)
    gap, std = oracles.linear_chain([0.9] * 3, [1.0] * 3, [0.0, 0.0, 1.0], 0.0)
    assert gap / std < 0.64  # the one chord


@given(st.floats(0.3, 1.0), st.floats(0.1, 3.0), st.floats(0.01, 2.0), st.integers(1, 60))
def test_known_distance_at_the_start_of_unlearning(c, distance, noise, steps):
    # THEORY 5.2: D_α = α Z² c^{2K}(1 − c²)/(2ζ²(1 − c^{2K})); c = 1: α Z²/(2ζ²K)
    ours = ContractionCertificate(c, noise, initial_distance=distance).rdp(ORDERS, steps=steps)
    with mp.workdps(40):
        c_mp = mp.mpf(c)
        shrink = (
            mp.mpf(1) / steps
            if c == 1.0
            else c_mp ** (2 * steps) * (1 - c_mp**2) / (1 - c_mp ** (2 * steps))
        )
        exact = float(shrink * mp.mpf(distance) ** 2 / (2 * mp.mpf(noise) ** 2))
    assert ours == pytest.approx(np.multiply(ORDERS, exact), rel=1e-10)  # twice μ's slack
    assert (ours >= np.multiply(ORDERS, exact)).all()


@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e40])
@pytest.mark.parametrize("seed", range(4))
def test_products_far_outside_doubles_change_nothing(seed, scale):
    random = np.random.default_rng(seed)
    chain = (
        list(10.0 ** random.uniform(-90.0, 60.0, 12) * scale),
        list(10.0 ** random.uniform(-3.0, 3.0, 12)),
        list(10.0 ** random.uniform(-60.0, 30.0, 12)),
        1.0,
    )
    exact = oracles.minimax_mu(*chain)
    ours = certificate(chain).mu(0)
    # slack: 28·eps·(3·|log| + 40) with logarithms up to some thousand
    assert exact <= ours <= exact * (1 + mp.mpf("1e-9"))


def test_long_shrinking_chain_is_its_stationary_value():
    # c = 0.99, N = 100,000: P underflows; μ² = s²/(1−c)² · (1−c²)/ζ² up to c^N = e^{-1005}
    ours = ContractionCertificate(0.99, 0.5, (0.01,) * 100_000)
    exact = (0.01 / 0.01) * math.sqrt(1.0 - 0.99**2) / 0.5
    assert exact * (1.0 - 1e-12) <= ours.mu(0) <= exact * (1.0 + 1e-8)  # slack ~ T·100 ulps


def test_long_growing_chain_pays_every_step_alone():
    # c > 1: slopes s/(ζ²P_u) rise with u, the hull keeps every point, μ² = T s²/ζ²
    ours = ContractionCertificate(1.1, 0.5, (0.01,) * 20_000)
    exact = math.sqrt(20_000) * 0.01 / 0.5
    # the shifts' logarithms reach 1900 = 20,000·log 1.1, so the slack reaches 3e-8
    assert exact * (1.0 - 1e-12) <= ours.mu(0) <= exact * (1.0 + 1e-7)


def test_a_distance_never_underflows_to_none():
    assert ContractionCertificate(0.5, 1.0, (1.0,)).mu(1_000_000) == 1e-150
    assert ContractionCertificate(0.5, 1.0, (1.0,) + (0.0,) * 5_000).mu(0) == 1e-150


def test_edge_cases_of_mu():
    assert ContractionCertificate(0.9, 1.0).mu(0) == 0.0
    assert ContractionCertificate(0.9, 0.0, (0.0,) * 4).mu(7) == 0.0
    assert ContractionCertificate(0.9, 1.0, initial_distance=1.0).mu(0) == math.inf
    assert ContractionCertificate(0.9, 0.0, (1.0,)).mu(10) == math.inf
    assert ContractionCertificate(0.0, 1.0, (1.0,)).mu(1) == 0.0
    # c_t = 0 forgets all before: only the last shift counts
    forgets = certificate(([1.0, 0.0], [1.0, 2.0], [5.0, 3.0], 9.0))
    assert forgets.mu(0) == pytest.approx(1.5, rel=1e-12)
    # a shift after the last noise cannot be hidden; a later noisy step hides it
    late = ContractionCertificate(1.0, [1.0, 0.0], (0.0, 1.0), unlearning_noise_std=0.5)
    assert late.mu(0) == math.inf
    assert late.mu(1) == pytest.approx(2.0, rel=1e-12)


@given(chains(), st.floats(0.0, 1.5), st.floats(0.0, 2.0))
def test_mu_does_not_grow_with_steps(chain, c, noise):
    ours = dataclasses.replace(
        certificate(chain), unlearning_contraction=c, unlearning_noise_std=noise
    )
    values = np.array([ours.mu(k) for k in range(12)])
    assert (values[1:] <= values[:-1] * (1.0 + 1e-13)).all()  # equal plans, rounded differently


def test_rdp_is_that_of_two_gaussians_and_converts_to_a_larger_epsilon():
    ours = ContractionCertificate(0.95, 0.3, (0.02,) * 50)
    for steps in (0, 5, 40):
        mu = ours.mu(steps)
        assert ours.rdp(ORDERS, steps=steps) == pytest.approx(np.multiply(ORDERS, mu * mu / 2.0))
        exact = ours.epsilon(delta=1e-5, steps=steps)
        assert exact <= Certificate.epsilon(ours, delta=1e-5, steps=steps)
        assert ours.delta(epsilon=exact, steps=steps) <= 1e-5 * (1.0 + 1e-10)  # both rounded up
        assert oracles.gaussian_delta(mu, exact) <= 1e-5


@given(st.floats(0.8, 1.0), st.floats(0.02, 0.3), st.floats(0.05, 3.0))
def test_steps_for_is_the_smallest_number(c, shift, target):
    ours = ContractionCertificate(c, 0.2, (shift,) * 20)
    try:
        steps = ours.steps_for(epsilon=target, delta=1e-3, max_steps=300)
    except CertificateError:
        steps = 301
    curve = [ours.epsilon(delta=1e-3, steps=k) for k in range(301)]
    first = next((k for k, value in enumerate(curve) if value <= target), 301)
    assert steps == first


def test_steps_for_finds_large_numbers():
    # c = 1: μ = Z/(ζ√K), so K = (Z/(ζμ))²
    ours = ContractionCertificate(1.0, 1.0, initial_distance=100.0)
    steps = ours.steps_for(epsilon=0.4, delta=1e-5)
    assert ours.epsilon(delta=1e-5, steps=steps) <= 0.4 < ours.epsilon(delta=1e-5, steps=steps - 1)
    assert steps > 100_000


def test_target_out_of_reach_names_the_best_and_the_cure():
    ours = ContractionCertificate(1.2, 1.0, (1.0,))
    with pytest.raises(CertificateError) as failure:
        ours.steps_for(epsilon=0.01, delta=1e-5, max_steps=1000)
    message = str(failure.value)
    best = ours.epsilon(delta=1e-5, steps=1000)
    for part in ("epsilon=0.01", "delta=1e-05", "max_steps=1000", f"{best:.6g}", "retrain instead"):
        assert part in message
    assert "K=" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"contraction": -0.1}, "contraction"),
        ({"noise_std": math.inf}, "noise_std"),
        ({"shifts": (0.1, -0.2)}, "row 1"),
        ({"shifts": ((0.1,),)}, "one value per training step"),
        ({"initial_distance": math.nan}, "initial_distance"),
        ({"contraction": (0.9,)}, "same length"),
        ({"contraction": (0.9, 0.9)}, "Pass the value of the unlearning steps"),
        ({"noise_std": (0.9, 0.9)}, "unlearning_noise_std"),
        ({"unlearning_contraction": -1.0}, "unlearning_contraction"),
    ],
)
def test_wrong_values_are_named(arguments, words):
    settings = {"contraction": 0.9, "noise_std": 1.0, "shifts": (0.1, 0.2)} | arguments
    with pytest.raises(ValueError, match=words) as failure:
        ContractionCertificate(**settings)
    assert "Expected" in str(failure.value)
    assert "got" in str(failure.value)


def test_wrong_steps_are_named():
    ours = ContractionCertificate(0.9, 1.0)
    with pytest.raises(ValueError, match="steps"):
        ours.mu(-1)
    with pytest.raises(TypeError, match="steps"):
        ours.rdp(ORDERS, steps=1.5)
    with pytest.raises(ValueError, match="delta"):
        ours.epsilon(delta=0.0, steps=1)
    with pytest.raises(ValueError, match="epsilon"):
        ours.steps_for(epsilon=-1.0, delta=1e-5)


def test_record_is_frozen_and_says_what_it_assumes():
    ours = ContractionCertificate(0.9, 0.25, (0.1, 0.3), 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.noise_std = 0.0
    text = " ".join(ours.assumptions)
    for number in ("0.9", "0.25", "0.3", "0.4", "0.5", "2 training steps"):
        assert number in text
    assert all(isinstance(line, str) and line.endswith(".") for line in ours.assumptions)
    assert ours.two_sided is True
    assert ours == ContractionCertificate(0.9, 0.25, np.array([0.1, 0.3]), 0.5)


# --- requests one after the other (THEORY 5.6) ----------------------------------------------------

REQUESTS = st.lists(
    st.tuples(st.integers(0, 8), st.floats(0.0, 1.5)), min_size=1, max_size=4
).filter(lambda phases: any(shift for _, shift in phases))


def distances_composed(c, noise, phases):
    """Distance at the start of the last unlearning: Z ← c^K·Z + shifts of the later requests."""
    distance = 0.0
    for number, (steps, _) in enumerate(phases):
        active = sum(shift for _, shift in phases[number:])
        distance = c**steps * distance + active * sum(c**j for j in range(steps))
    return ContractionCertificate(c, noise, initial_distance=distance)


@given(REQUESTS, st.floats(0.3, 1.1), st.floats(0.1, 2.0), st.integers(1, 8))
def test_requests_solve_the_programme_of_their_phases_written_out(phases, c, noise, last):
    ours = sequential_requests(
        c,
        noise_std=noise,
        phase_steps=[steps for steps, _ in phases],
        request_shifts=[shift for _, shift in phases],
    )
    # step by step: the run with everybody against the one with nobody of any request
    shifts = []
    for number, (steps, _) in enumerate(phases):
        shifts += [sum(shift for _, shift in phases[number:])] * steps
    shifts += [0.0] * last
    exact = oracles.programme_mu([c] * len(shifts), [noise] * len(shifts), shifts, 0.0)
    # nnls works on conditioned doubles
    assert ours.mu(last) == pytest.approx(exact, rel=1e-7, abs=1e-7)
    gap, std = oracles.linear_chain([c] * len(shifts), [noise] * len(shifts), shifts, 0.0)
    assert ours.mu(last) >= gap / std * (1.0 - 1e-13)  # the oracle's rounding


@given(REQUESTS, st.floats(0.3, 1.1), st.floats(0.1, 2.0), st.integers(1, 8))
def test_composing_distances_is_never_sharper(phases, c, noise, last):
    ours = sequential_requests(
        c,
        noise_std=noise,
        phase_steps=[steps for steps, _ in phases],
        request_shifts=[shift for _, shift in phases],
    )
    # the distance itself loses some ulps in the loop above
    assert ours.mu(last) <= distances_composed(c, noise, phases).mu(last) * (1.0 + 1e-12) + 1e-150


def test_composing_distances_loses_a_lot_right_after_a_request():
    phases = [(200, 0.02), (50, 0.03)]
    ours = sequential_requests(
        0.98, noise_std=0.5, phase_steps=(200, 50), request_shifts=(0.02, 0.03)
    )
    assert distances_composed(0.98, 0.5, phases).mu(1) > 4.0 * ours.mu(1)


@given(REQUESTS, st.floats(0.3, 1.0), st.floats(0.1, 2.0), st.integers(0, 8))
def test_forgetting_all_requests_costs_at_least_each_of_them(phases, c, noise, last):
    settings = {"noise_std": noise, "phase_steps": [steps for steps, _ in phases]}
    shifts = np.array([shift for _, shift in phases])
    together = sequential_requests(c, request_shifts=shifts, **settings)
    for number in range(len(phases)):
        alone = sequential_requests(
            c, request_shifts=np.where(np.arange(len(shifts)) == number, shifts, 0.0), **settings
        )
        # both rounded up within 1e-12
        assert alone.mu(last) <= together.mu(last) * (1.0 + 1e-12)
    # the first request never shifts a later phase: its later phases are more unlearning steps
    first = ContractionCertificate(c, noise, (shifts[0],) * phases[0][0])
    later = sum(steps for steps, _ in phases[1:])
    only = sequential_requests(
        c, request_shifts=np.where(np.arange(len(shifts)) == 0, shifts, 0.0), **settings
    )
    assert only.mu(last) == pytest.approx(first.mu(later + last), rel=1e-11, abs=1e-150)


def test_one_request_is_the_plain_certificate():
    ours = sequential_requests(0.9, noise_std=0.5, phase_steps=[7], request_shifts=[0.3])
    plain = ContractionCertificate(0.9, 0.5, (0.3,) * 7)
    assert ours.mu(4) == plain.mu(4)
    assert plain.assumptions == ours.assumptions[: len(plain.assumptions)]
    text = " ".join(sequential_requests(
        0.9, noise_std=0.5, phase_steps=(7, 4), request_shifts=(0.3, 0.2)
    ).assumptions)  # fmt: skip
    for words in ("2 requests", "until its own request", "7, 4", "released in between"):
        assert words in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"phase_steps": (3,)}, "request_shifts .* phase_steps"),
        ({"phase_steps": (3, -1)}, "phase_steps"),
        ({"request_shifts": (0.1, -0.1)}, "row 1"),
        ({"noise_std": -1.0}, "noise_std"),
    ],
)
def test_wrong_requests_are_named(change, words):
    setting = {"noise_std": 0.5, "phase_steps": (3, 2), "request_shifts": (0.1, 0.2)}
    with pytest.raises(ValueError, match=words):
        sequential_requests(0.9, **(setting | change))
