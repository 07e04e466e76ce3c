import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from opacus_pil.certificates.batch_laws import Law, sum_law
from opacus_pil.certificates.block_plan import BlockLaws, block_lengths
from opacus_pil.certificates.log_laws import LogLaw, in_logs, narrowed, summed


def one(value):
    return Law(np.array([value]), np.ones(1))


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_blocks_add_up_and_the_last_ones_are_single(steps, blocks):
    lengths = block_lengths(steps, blocks)
    assert sum(count << exponent for exponent, count in lengths) == steps
    assert lengths[0][0] == 0 or steps == 0
    assert min(count for _, count in lengths) >= 1
    left = steps
    for exponent, count in lengths[::-1]:  # from the first step: a block is short beside the rest
        for _ in range(count):
            left -= 1 << exponent
            assert left + 1 >= blocks * ((1 << exponent) - 1) // blocks


@pytest.mark.parametrize("c", [0.9, 0.999, 1.0, 1.01])
@pytest.mark.parametrize("rate", [1e-3, 0.3])
def test_laws_of_blocks_are_spread_versions_of_the_sums(c, rate):
    laws = BlockLaws(one(c), sum_law(np.array([0.2]), rate), training_steps=256)
    laws.up_to(8)
    for exponent in (0, 1, 4, 8):
        carried = 0.2 * c ** np.arange(2**exponent)
        law = laws.shifts[exponent]
        # a few roundings of each of 256 steps
        assert np.exp(law.logs) @ law.values == pytest.approx(rate * carried.sum(), rel=1e-12)
        for tilt in (0.1, 1.0, 30.0):
            exact = np.log1p(rate * np.expm1(tilt * carried)).sum()
            ours = logsumexp(law.logs + tilt * law.values)
            assert exact <= ours * (1.0 + 1e-12)
            if tilt < 1.0:
                assert ours <= 1.05 * exact  # 300 values are enough where it matters
        assert laws.noises[exponent] <= (c ** (2 * np.arange(2**exponent))).sum() * (1.0 + 1e-15)
        assert laws.powers[exponent] >= c ** (2**exponent) * (1.0 - 1e-15)


LOG_LAWS = st.lists(
    st.tuples(st.floats(0.0, 4.0), st.floats(-2000.0, 0.0)), min_size=1, max_size=40
).map(
    lambda pairs: LogLaw(
        *(np.array(part) for part in zip(*sorted(dict(pairs).items()), strict=True))
    )
)


@given(LOG_LAWS, st.integers(3, 12), st.floats(0.0, 3000.0), st.floats(0.0, 4.0))
@settings(max_examples=200)
def test_narrowed_laws_keep_mass_and_mean_and_raise_convex_functions(law, count, slope, kink):
    ours = narrowed(law, count=count)
    assert len(ours.values) <= count + 2  # the least value and the first beyond are added
    assert ours.values[-1] == law.values[-1]
    size = float(np.abs(law.logs).max()) + slope * 4.0
    assert logsumexp(ours.logs) == pytest.approx(logsumexp(law.logs), rel=1e-12, abs=1e-14)
    for convex in (lambda x: slope * x, lambda x: slope * np.maximum(x - kink, 0.0)):
        before = logsumexp(law.logs + convex(law.values))
        assert before <= logsumexp(ours.logs + convex(ours.values)) + 1e-14 * (size + 1.0)


@pytest.mark.parametrize("low", [1.0, 1e-150, 1e10])
def test_values_that_differ_by_ulps_lose_no_mass(low):
    values = low * (1.0 + np.arange(40) * np.finfo(float).eps)
    for weights in (np.zeros(40), -np.arange(40) * 1.0, np.arange(40) * 1.0):
        ours = narrowed(LogLaw(values, weights), count=12)
        assert logsumexp(ours.logs) == pytest.approx(logsumexp(weights), abs=1e-12)
        assert ours.values[-1] == values[-1]


def test_sums_of_rare_values_lose_nothing():
    rare = LogLaw(np.array([0.0, 1.0]), np.array([math.log1p(-1e-300), -700.0]))
    law = rare
    for _ in range(12):
        law = summed(law, law, factor=1.0, count=50)
    assert law.values[-1] == pytest.approx(4096.0, rel=1e-11)
    assert law.logs[-1] >= -4096 * 700.0 * (1.0 + 1e-12)
    assert in_logs(Law(np.zeros(1), np.array([0.0]))).logs[0] == pytest.approx(-690.8, abs=0.1)
