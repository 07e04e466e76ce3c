import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pil import CertificateError
from opacus_pil.accounting import rdp_to_epsilon, sampled_gaussian_rdp
from opacus_pil.certificates import DataProcessingCertificate

GRID = (1.5, 2.0, 4.0, 16.0, 64.0)


def trained(orders=GRID):
    """Curve of 100 sampled Gaussian steps."""
    return 100 * sampled_gaussian_rdp(0.5, noise_multiplier=1.0, sample_rate=0.1, orders=orders)


def test_number_of_steps_changes_nothing():
    ours = DataProcessingCertificate(trained(), GRID)
    epsilon, _ = rdp_to_epsilon(trained(), orders=GRID, delta=1e-5)
    for steps in (0, 1, 1_000_000):
        assert (ours.rdp(GRID, steps=steps) == trained()).all()
        assert ours.epsilon(delta=1e-5, steps=steps) == epsilon


@given(st.floats(1.01, 64.0))
def test_other_orders_get_an_upper_bound(order):
    ours = DataProcessingCertificate(trained(), GRID)
    # the accountant rounds up by at most 1e-9
    assert ours.rdp([order], steps=3)[0] >= trained([order])[0] * (1.0 - 1e-9)


def test_interpolation_is_linear_in_order_times_divergence():
    ours = DataProcessingCertificate((0.1, 0.3, math.inf, 1.0), (2.0, 4.0, 5.0, 6.0))
    asked = ours.rdp([1.5, 2.0, 3.0, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0], steps=0)
    middle = (0.5 * 1.0 * 0.1 + 0.5 * 3.0 * 0.3) / 2.0
    expected = [0.1, 0.1, middle, 0.3, math.inf, math.inf, math.inf, 1.0, math.inf]
    assert asked == pytest.approx(expected, rel=1e-13)


def test_steps_for_is_nothing_or_out_of_reach():
    ours = DataProcessingCertificate(trained(), GRID)
    epsilon = ours.epsilon(delta=1e-5, steps=0)
    assert ours.steps_for(epsilon=epsilon, delta=1e-5) == 0
    with pytest.raises(CertificateError) as failure:
        ours.steps_for(epsilon=0.9 * epsilon, delta=1e-5)
    for words in (f"{epsilon:.6g}", "at K=0 steps", "retrain instead"):
        assert words in str(failure.value)


def test_fields_may_be_named_and_are_frozen():
    ours = DataProcessingCertificate(rdp=trained(), orders=GRID, two_sided=False)
    assert ours.two_sided is False
    assert DataProcessingCertificate(trained(), GRID).two_sided is True
    assert ours == DataProcessingCertificate(tuple(trained()), np.array(GRID), False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.orders = (2.0,)


def test_assumptions_say_what_the_curve_must_cover():
    text = " ".join(DataProcessingCertificate(trained(), GRID).assumptions)
    for words in ("whole training transcripts", "both directions", "BatchNorm", "64"):
        assert words in text
    assert "both directions" not in " ".join(
        DataProcessingCertificate(trained(), GRID, two_sided=False).assumptions
    )


@pytest.mark.parametrize(
    ("rdp", "orders", "words"),
    [
        ((0.1,), (2.0, 3.0), "same length"),
        ((0.1, -0.2), (2.0, 3.0), "row 1"),
        ((0.1, math.nan), (2.0, 3.0), "not NaN"),
        ((0.1, 0.2), (3.0, 2.0), "increase strictly"),
        ((0.1, 0.2), (1.0, 2.0), "orders"),
    ],
)
def test_wrong_values_are_named(rdp, orders, words):
    with pytest.raises(ValueError, match=words):
        DataProcessingCertificate(rdp, orders)


def test_wrong_steps_are_named():
    with pytest.raises(ValueError, match="steps"):
        DataProcessingCertificate((0.1,), (2.0,)).rdp([2.0], steps=-1)
    with pytest.raises(TypeError, match="two_sided"):
        DataProcessingCertificate((0.1,), (2.0,), two_sided=1)
