import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from opacus_pil.evaluation import (
    ensemble_outputs,
    gaussian_klom,
    klom,
    klom_of_oracles,
    margin_deviation,
)
from opacus_pil.evaluation.class_outputs import ClassOutputs


def ensembles(seed=0, models=(40, 30), instances=25, shift=1.0):
    generator = np.random.default_rng(seed)
    return (
        shift + generator.normal(size=(models[0], instances)),
        1.5 * generator.normal(size=(models[1], instances)),
    )


def by_histogram(p, q, bins=20, clip=100.0, floor=1e-5):
    """The definition for one instance, with numpy's histogram and scipy's entropy."""
    p, q = np.clip(p, -clip, clip), np.clip(q, -clip, clip)
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    p, q = (np.histogram(values, edges)[0] / len(values) for values in (p, q))
    return stats.entropy(p, np.where(p > 0, np.maximum(q, floor), q))  # it normalises both


class Fixed(nn.Module):
    """Returns its input plus a constant as logits."""

    def __init__(self, constant):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(constant, dtype=torch.float64))

    def forward(self, x):
        assert not self.training
        return x + self.constant


# --- the margin -------------------------------------------------------------------------------


def test_log_odds_are_those_of_the_softmax():
    generator = np.random.default_rng(0)
    logits, classes = generator.normal(size=(9, 5)), generator.integers(0, 5, size=9)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    own = p[np.arange(9), classes]
    found = ClassOutputs.of(logits, classes)
    np.testing.assert_allclose(found.log_odds, np.log(own / (1 - own)), rtol=1e-12)
    np.testing.assert_allclose(found.loss, -np.log(own), rtol=1e-12)
    np.testing.assert_allclose(
        found.error_norm, np.linalg.norm(p - np.eye(5)[classes], axis=1), rtol=1e-12
    )


def test_log_odds_do_not_saturate():
    """At z = 50 against 0, p_y is 1 in floats and log(p/(1−p)) would be infinite."""
    found = ClassOutputs.of([[50.0, 0.0], [-800.0, 0.0]], [0, 0])
    assert found.log_odds.tolist() == [50.0, -800.0]
    # 1 − p_y = e^-50 in both entries of the error.
    assert found.error_norm[0] == pytest.approx(math.sqrt(2) * math.exp(-50), rel=1e-12)
    assert found.loss[1] == 800.0
    three = ClassOutputs.of([[0.0, 0.0, 0.0]], [1]).log_odds
    assert three[0] == pytest.approx(-math.log(2), rel=1e-15)


def test_one_logit_is_its_own_log_odds():
    z = np.array([1.5, -2.0, 0.0])
    assert ClassOutputs.of(z, [1, 1, 1]).log_odds.tolist() == z.tolist()
    assert ClassOutputs.of(z, [0.0, 0.0, 0.0]).log_odds.tolist() == (-z).tolist()
    assert ClassOutputs.of(z, [1, 0, 1]).correct.tolist() == [1.0, 1.0, 0.0]  # z = 0 predicts 0


def test_ensemble_outputs_are_each_models_own_and_modes_come_back():
    models = [Fixed([1.0, 0.0]).train(), Fixed([0.0, 2.0])]
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    found = ensemble_outputs(models, x=x, y=torch.tensor([0, 0, 1]), batch_size=2)
    assert found.margins.tolist() == [[1.0, 4.0, -2.0], [-2.0, 1.0, 1.0]]
    assert found.correct.tolist() == [[True, True, False], [False, True, True]]
    assert models[0].training
    with pytest.raises(ValueError, match="at least one model"):
        ensemble_outputs([], x=x, y=torch.tensor([0, 0, 1]))


# --- the binned divergence ----------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"bins": 7}, {"clip": 0.8}, {"floor": 0.01}])
def test_klom_of_every_instance_is_its_definition(change):
    p, q = ensembles()
    found = klom(p, oracles=q, **change)
    expected = [by_histogram(p[:, i], q[:, i], **change) for i in range(25)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-12, atol=1e-14)  # rounding
    assert (found.unlearned_models, found.oracle_models) == (40, 30)
    assert found.quantile(0.95) == np.quantile(found.values, 0.95)


def test_klom_of_disjoint_margins_is_its_ceiling_and_of_equal_ones_zero():
    p, q = np.full((5, 2), 3.0), np.full((4, 2), 3.0)
    assert klom(p, oracles=q).values.tolist() == [0.0, 0.0]
    found = klom(p, oracles=q - 1)
    np.testing.assert_allclose(found.values, found.ceiling, rtol=1e-12)
    assert found.ceiling == pytest.approx(-math.log(1e-5), abs=2e-5)  # the floor's own share


def test_klom_counts_the_largest_margin():
    """The reference implementation drops it: then these ensembles would look alike."""
    p, q = np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([[0.0]] * 4)
    # Half of the unlearned models are where no oracle is: ½ log(½/1) + ½ log(½/floor).
    expected = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-5)
    assert klom(p, oracles=q).values[0] == pytest.approx(expected, rel=1e-4)  # normalisation


def test_klom_is_blind_to_a_common_change_of_scale():
    p, q = ensembles(1)
    plain = klom(p, oracles=q).values
    np.testing.assert_allclose(klom(2 * p + 3, oracles=2 * q + 3).values, plain, rtol=1e-12)
    order = np.random.default_rng(0).permutation(25)
    np.testing.assert_array_equal(klom(p[:, order], oracles=q[:, order]).values, plain[order])
    # Models have no order.
    np.testing.assert_array_equal(klom(p[::-1], oracles=q).values, plain)


def test_binned_klom_of_many_models_approaches_that_of_the_laws():
    """With 40,000 models the bins hold the law: Gaussians one standard deviation apart, KL ½."""
    generator = np.random.default_rng(2)
    p, q = 1 + generator.normal(size=(40_000, 1)), generator.normal(size=(40_000, 1))
    found = klom(p, oracles=q, bins=20).values[0]
    # Within bins of width h < 0.5 a log ratio of slope 1 loses h²/24; sampling moves the rest by
    # 1/√40,000 on either side, the floor at the edges by 0.001: four deviations.
    assert found == pytest.approx(0.5, abs=0.25 / 24 + 4 * 0.005)


def test_oracles_against_themselves_show_the_bias():
    """Perfect unlearning is not 0 with few models, and less the more there are."""
    generator = np.random.default_rng(3)
    few, many = generator.normal(size=(8, 200)), generator.normal(size=(400, 200))
    assert klom_of_oracles(few).values.mean() > 3 * klom_of_oracles(many).values.mean() > 0
    found = klom_of_oracles(few)
    np.testing.assert_array_equal(found.values, klom(few[::2], oracles=few[1::2]).values)
    worse = klom(few[::2] + 3, oracles=few[1::2])
    assert worse.quantile() > found.quantile()


# --- Gaussians ------------------------------------------------------------------------------------


def test_gaussian_klom_by_quadrature():
    p, q = ensembles(4)
    found = gaussian_klom(p, oracles=q).values
    for i in range(3):
        first = stats.norm(p[:, i].mean(), p[:, i].std(ddof=1))
        second = stats.norm(q[:, i].mean(), q[:, i].std(ddof=1))
        grid = np.linspace(first.ppf(1e-14), first.isf(1e-14), 20_001)
        integrand = first.pdf(grid) * (first.logpdf(grid) - second.logpdf(grid))
        # The trapezoid rule is exact for such integrands up to the tails left out (1e-14).
        assert found[i] == pytest.approx(np.trapezoid(integrand, grid), rel=1e-9)


def test_gaussian_klom_edges():
    spread, flat = np.array([[0.0], [2.0]]), np.array([[1.0], [1.0]])
    assert gaussian_klom(spread, oracles=spread).values.tolist() == [0.0]
    assert gaussian_klom(flat, oracles=flat).values.tolist() == [0.0]
    assert gaussian_klom(flat, oracles=flat + 1).values.tolist() == [math.inf]
    assert gaussian_klom(spread, oracles=flat).values.tolist() == [math.inf]
    assert gaussian_klom(flat, oracles=spread).values.tolist() == [math.inf]
    tenth = np.full((3, 1), 0.1)  # whose mean rounds
    assert gaussian_klom(tenth, oracles=tenth[:2]).values.tolist() == [0.0]


# --- one model ------------------------------------------------------------------------------------


def test_one_more_oracle_has_uniform_p_values():
    """Exact for Gaussian margins: the share of p below u is u, binomially."""
    generator = np.random.default_rng(5)
    size = 20_000
    found = margin_deviation(generator.normal(size=size), oracles=generator.normal(size=(4, size)))
    for level in (0.01, 0.1, 0.5):
        slack = 5 * math.sqrt(level * (1 - level) / size)
        assert (found.p_value <= level).mean() == pytest.approx(level, abs=slack)


def test_deviation_is_signed_and_scale_free():
    oracles = np.array([[0.0, 1.0, 5.0], [2.0, 1.0, 5.0]])
    found = margin_deviation([4.0, 1.0, 4.0], oracles=oracles)
    # mean 1, s = √2, R = 2: t = 3 / (√2 · √1.5)
    assert found.t[0] == pytest.approx(3 / math.sqrt(3), rel=1e-12)
    assert found.t[1:].tolist() == [0.0, -math.inf]
    assert found.p_value[1:].tolist() == [1.0, 0.0]
    # One degree of freedom: Cauchy.
    expected = 1 - 2 * math.atan(math.sqrt(3)) / math.pi
    assert found.p_value[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: klom([1.0, 2.0], oracles=[[1.0, 2.0]] * 3), "margin_deviation"),
        (lambda: klom([[1.0, 2.0]], oracles=[[1.0, 2.0]] * 3), "at least 2 models"),
        (lambda: klom([[1.0]] * 2, oracles=[[1.0, 2.0]] * 3), "same instances"),
        (lambda: klom([[math.nan]] * 2, oracles=[[1.0]] * 3), "finite"),
        (lambda: klom([[1.0]] * 2, oracles=[[1.0]] * 2, bins=1), "bins"),
        (lambda: klom([[1.0]] * 2, oracles=[[1.0]] * 2, floor=0.0), "floor"),
        (lambda: gaussian_klom([[1.0]], oracles=[[1.0]] * 2), "at least 2 models"),
        (lambda: klom_of_oracles([[1.0]] * 3), "at least 4 models"),
        (lambda: margin_deviation([1.0, 2.0], oracles=[[1.0]] * 2), "same length"),
        (lambda: margin_deviation([1.0], oracles=[[1.0]]), "at least 2 models"),
    ],
)
def test_unusable_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
