"""Bounds from one run: exact enumeration of small dependent mechanisms, and what they refuse."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from opacus_pil.auditing import (
    Claim,
    GaussianTradeOff,
    Guesses,
    mahloujifar_bound,
    one_run_lower_bound,
    steinke_bound,
)
from opacus_pil.auditing.claim import Losses
from opacus_pil.auditing.guesses import by_rank, planned
from opacus_pil.auditing.one_run import (
    mahloujifar_p_value,
    mahloujifar_rejects,
    steinke_expected,
    steinke_p_value,
)

NONE = np.zeros(0, dtype=np.int64)


def dependent_mechanism(m, epsilon, kind):
    """P(guesses | coins) of an ε-DP mechanism whose canaries depend on each other, (2^m, 2^m)."""
    vectors = np.array(list(itertools.product((0, 1), repeat=m)))
    wrong = (vectors[:, None, :] != vectors[None, :, :]).sum(axis=2)  # sensitivity 1 in each coin
    utility = {
        "few wrong": -wrong,
        "all or nothing": np.abs(wrong - m / 2.0),
        "parity": (wrong % 2).astype(float),
    }[kind]
    weight = np.exp(epsilon * utility / 2.0)  # the exponential mechanism, each row normalised
    return weight / weight.sum(axis=1, keepdims=True), wrong


@pytest.mark.parametrize("kind", ["few wrong", "all or nothing", "parity"])
@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
def test_steinke_is_valid_for_dependent_canaries_by_enumeration(kind, epsilon):
    m = 5
    law, wrong = dependent_mechanism(m, epsilon, kind)
    p = np.array(
        [
            steinke_p_value(v, guesses=m, canaries=m, epsilon=epsilon, delta=0.0)
            for v in range(m + 1)
        ]
    )
    right = m - wrong
    for level in p:
        chance = (law * (p[right] <= level)).sum() / 2**m  # coins are fair
        assert chance <= level * (1 + 1e-12)


@pytest.mark.parametrize("leak", [1e-4, 1e-2])
def test_steinke_is_valid_when_everything_leaks_with_probability_delta(leak):
    m, epsilon = 40, 1.0
    honest = 1 / (1 + math.exp(-epsilon))
    v = np.arange(m + 1)
    law = (1 - leak) * binom.pmf(v, m, honest) + leak * (v == m)
    p = np.array(
        [
            float(steinke_p_value(int(k), guesses=m, canaries=m, epsilon=epsilon, delta=leak))
            for k in v
        ]
    )
    for level in p:
        assert law[p <= level].sum() <= level * (1 + 1e-12)
    # Without the term for δ it would not be valid: the leak alone rejects.
    naive = binom.sf(v - 1, m, honest)
    assert law[naive <= naive[m]].sum() > 10 * naive[m]


def test_steinke_closed_form_when_every_guess_is_right():
    for r in (10, 100, 1000):
        share = 0.05 ** (1 / r)  # p^r = 0.05
        exact = math.log(share / (1 - share))
        assert steinke_expected(Guesses(r, r, r, NONE), delta=0.0, level=0.05) == pytest.approx(
            exact, abs=1e-6
        )


def test_steinke_can_never_reject_at_a_large_delta():
    # THEORY 10: at the δ(ε) of 1-GDP and m = 1000 nothing can ever be rejected.
    for epsilon in (0.5, 1.0, 3.0):
        delta = norm.cdf(-epsilon + 0.5) - math.exp(epsilon) * norm.cdf(-epsilon - 0.5)
        p = steinke_p_value(1000, guesses=1000, canaries=1000, epsilon=epsilon, delta=delta)
        assert p > 0.05  # every guess right, and it is no evidence


def literal_rejects(v, r, m, mu, level):
    """Mahloujifar's recursion as it is written down, for μ-GDP."""
    hit, miss = level * v / m, level * (r - v) / m
    for i in range(v - 1, -1, -1):
        grown = max(miss, norm.cdf(norm.ppf(hit) - mu))
        if grown == miss:
            break
        hit, miss = min(1.0, hit + (grown - miss) * i / (r - i)), grown
    return hit + miss > r / m


def test_mahloujifar_is_the_recursion_of_the_paper():
    for v, r, m, mu in itertools.product((60, 75, 90), (100,), (100, 400), (0.2, 1.0)):
        for level in (0.01, 0.2):
            found = mahloujifar_rejects(
                v, guesses=r, canaries=m, curve=GaussianTradeOff(mu), level=level
            )
            assert found == literal_rejects(v, r, m, mu, level)


def switched(m, share, epsilon):
    """A shared coin decides whether all canaries answer at ε or none says anything: P(right)."""
    p = 1 / (1 + math.exp(-epsilon))
    v = np.arange(m + 1)
    grid = np.linspace(0.0, epsilon + 1.0, 200)
    deltas = share * np.maximum(p - np.exp(grid) * (1 - p), 0.0)  # exactly what it allows
    law = share * binom.pmf(v, m, p) + (1 - share) * binom.pmf(v, m, 0.5)
    return law, Losses(grid, deltas)


@pytest.mark.parametrize(("m", "share", "epsilon"), [(60, 0.4, 1.5), (200, 0.4, 1.5), (60, 0.9, 3)])
def test_mahloujifar_is_valid_where_one_coin_decides_for_all(m, share, epsilon):
    law, curve = switched(m, share, epsilon)
    for level in (0.01, 0.05, 0.2):
        rejected = [
            mahloujifar_rejects(v, guesses=m, canaries=m, curve=curve, level=level)
            for v in range(m + 1)
        ]
        assert law[rejected].sum() <= level
    # A test that takes canaries as independent rejects the same correct mechanism far too often.
    assert (
        law[binom.sf(np.arange(m + 1) - 1, m, 0.5 + curve.total_variation / 2) < 0.05].sum() > 0.15
    )


def test_the_p_value_is_where_rejection_begins():
    curve = GaussianTradeOff(0.5)
    design = {"guesses": 100, "canaries": 200, "curve": curve}
    p = mahloujifar_p_value(75, **design)
    assert mahloujifar_rejects(75, **design, level=p * 1.001)
    assert not mahloujifar_rejects(75, **design, level=p * 0.999)
    assert mahloujifar_p_value(50, **design) == 1.0


def test_mahloujifar_bound_lies_below_the_claim_that_the_guesses_fit():
    claim = Claim(((1.0, 0.05, 60),), delta=1e-5)
    tv = claim.losses().total_variation
    m = 400
    few = Guesses(round(m * (1 + tv) / 2), m, m, np.array([200, 210, 250]))
    bound = mahloujifar_bound(few, claim=claim, level=0.05)
    assert 0 <= bound.epsilon < claim.epsilon < bound.ceiling
    assert bound.p_value > 0.05
    assert bound.assumption == "none"
    perfect = mahloujifar_bound(Guesses(m, m, m, NONE + 0), claim=claim, level=0.05)
    assert perfect.epsilon > claim.epsilon
    assert perfect.p_value < 1e-6


# --- scores, coins and ids --------------------------------------------------------------------


def some(m=300, shift=2.0, seed=0):
    random = np.random.default_rng(seed)
    coins = random.random(m) < 0.5
    return random.normal(size=m) + shift * coins, coins


def test_a_sign_slip_and_random_scores_find_nothing():
    scores, coins = some()
    assert one_run_lower_bound(scores, included=coins, delta=1e-6).epsilon > 1.0
    assert one_run_lower_bound(-scores, included=coins, delta=1e-6).epsilon == 0.0
    flat = one_run_lower_bound(np.zeros(300), included=coins, delta=1e-6)
    assert flat.epsilon < 0.5  # ties are broken without a look at the coins


@pytest.mark.slow
def test_random_scores_exceed_zero_in_at_most_five_percent_of_runs():
    found = []
    for seed in range(200):
        scores, coins = some(m=60, shift=0.0, seed=seed)
        found.append(one_run_lower_bound(scores, included=coins, delta=1e-6).epsilon > 0)
    assert np.mean(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)  # three standard errors


def test_the_null_check_and_the_design_stand_beside_the_number():
    scores, coins = some()
    bound = one_run_lower_bound(scores, included=coins, delta=1e-6, guesses=100)
    assert bound.null_share <= 0.12  # 5 % and noise of 200 permutations
    assert bound.epsilon <= bound.ceiling
    assert 0 < bound.smallest_detectable < bound.ceiling
    perfect = one_run_lower_bound(coins.astype(float), included=coins, delta=1e-6, guesses=100)
    assert perfect.epsilon == perfect.ceiling


def test_the_smallest_detectable_epsilon_is_found_by_half_of_all_audits():
    bound = steinke_bound(Guesses(60, 100, 200, NONE), delta=1e-8, level=0.05)
    share = 1 / (1 + math.exp(-bound.smallest_detectable))
    needed = next(
        v for v in range(101)
        if steinke_expected(Guesses(v, 100, 200, NONE), delta=1e-8, level=0.05) > 0
    )  # fmt: skip
    assert binom.sf(needed - 1, 100, share) == pytest.approx(0.5, abs=0.02)


def test_guesses_are_half_from_each_end():
    coins = np.array([False, True, False, True])
    found = by_rank([0.0, 3.0, 1.0, 2.0], included=coins, guesses=2)
    assert (found.right, found.wrong, found.count, found.canaries) == (2, 0, 2, 4)
    assert by_rank([3.0, 0.0, 1.0, 2.0], included=coins, guesses=2).right == 0


def test_scores_are_joined_by_id_whatever_their_order():
    scores, coins = some(m=50)
    ids = [f"row {i}" for i in range(50)]
    shuffled = np.random.default_rng(1).permutation(50)
    by_id = one_run_lower_bound(
        {ids[i]: scores[i] for i in shuffled},
        included=dict(zip(ids, coins, strict=True)),
        delta=1e-6,
    )
    assert by_id.right == one_run_lower_bound(scores, included=coins, delta=1e-6).right


@pytest.mark.parametrize(
    ("scores", "included", "error", "message"),
    [
        ({1: 0.0}, {1: True, 2: False}, ValueError, "1 ids without a score and 0 scores of others"),
        ({1: 0.0, 3: 1.0}, {1: True, 2: False}, ValueError, "no score for 2.*joined by id"),
        ({1: 0.0}, [True], TypeError, "both with ids or both without"),
        ([0.0, 1.0], [True], ValueError, "one entry per entry of scores"),
        ([0.0, math.nan], [True, False], ValueError, "1 of 2 NaN .first: row 1"),
        ([0.0, 1.0], [0, 2], ValueError, "coins to be true or false"),
        ([], [], ValueError, "at least one canary"),
    ],
)
def test_scores_that_do_not_match_the_canaries_are_refused(scores, included, error, message):
    with pytest.raises(error, match=message):
        one_run_lower_bound(scores, included=included, delta=1e-5)


def test_a_delta_above_one_over_the_canaries_is_refused_with_the_cure():
    scores, coins = some()
    with pytest.raises(ValueError, match=r"well below 1 / canaries.*Pass a smaller delta"):
        one_run_lower_bound(scores, included=coins, delta=0.01)


def test_planned_guesses_depend_on_the_claim_only_and_help():
    claim = Claim(((1.0, 0.05, 60),), delta=1e-5)
    m = 1000

    def score(guesses):
        return steinke_expected(guesses, delta=1e-5, level=0.05)

    few = planned(claim.losses(), canaries=m, score=score)
    tv = claim.losses().total_variation
    assert 2 <= few < m
    # All of them, as likely as not, give less than the few that the plan takes.
    assert score(Guesses(round(m * (1 + tv) / 2), m, m, NONE)) < 1.0


def test_a_bound_refuses_an_unknown_assumption_and_is_plain_json():
    import json

    from opacus_pil.auditing import LowerBound

    with pytest.raises(ValueError, match="assumption"):
        LowerBound(1.0, 1e-5, 0.95, "m", "hopes")
    bound = LowerBound(math.inf, 1e-5, np.float64(0.95), "m", "assumes independence")
    assert not bound.for_verdict
    assert json.loads(json.dumps(bound.to_json()))["epsilon"] == "inf"
    assert "assumes independence" in str(bound)
