import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pil import CertificateError
from opacus_pil.accounting.rdp import DEFAULT_ORDERS
from opacus_pil.accounting.shown import rounded_up
from opacus_pil.certificates import (
    BestCertificate,
    Certificate,
    ContractionCertificate,
    DataProcessingCertificate,
    NoisyFineTuningCertificate,
    best_of,
)

ORDERS = (1.1, 2.0, 8.0, 64.0)

CONTRACTION = st.builds(
    ContractionCertificate,
    st.floats(0.5, 1.0),
    st.floats(0.2, 2.0),
    st.lists(st.floats(0.0, 1.0), max_size=5),
)
FINE_TUNING = st.builds(
    NoisyFineTuningCertificate,
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.2, 3.0),
)
DATA_PROCESSING = st.floats(1e-3, 2.0).map(
    lambda rho: DataProcessingCertificate(rho * np.array(DEFAULT_ORDERS), DEFAULT_ORDERS)
)
MEMBERS = st.lists(st.one_of(CONTRACTION, FINE_TUNING, DATA_PROCESSING), min_size=1, max_size=4)


@dataclasses.dataclass(frozen=True)
class Fixed(Certificate):
    """ε and Rényi divergence as given, per number of steps."""

    curve: tuple[float, ...]
    two_sided: bool = True
    reference: str = "same_horizon"
    assumptions = ("It holds.",)

    def rdp(self, orders, *, steps):
        return np.full(np.shape(orders), self.curve[min(steps, len(self.curve) - 1)])

    def epsilon(self, *, delta, steps):
        return self.curve[min(steps, len(self.curve) - 1)]


@given(MEMBERS, st.integers(0, 30))
def test_every_number_is_the_least_of_the_members(members, steps):
    ours = best_of(members)
    rdp = np.min([member.rdp(ORDERS, steps=steps) for member in members], axis=0)
    assert (ours.rdp(ORDERS, steps=steps) == rdp).all()
    epsilon = min(member.epsilon(delta=1e-4, steps=steps) for member in members)
    assert ours.epsilon(delta=1e-4, steps=steps) == epsilon


@given(MEMBERS, st.integers(0, 30))
def test_converting_the_least_divergences_gives_no_less(members, steps):
    ours = best_of(members)
    through_orders = Certificate.epsilon(ours, delta=1e-4, steps=steps)
    # rounding: the exact Gaussian curve and the conversion are each good to some ulps
    assert ours.epsilon(delta=1e-4, steps=steps) <= through_orders * (1.0 + 1e-12)


@given(MEMBERS, st.integers(0, 30))
def test_winner_has_the_reported_epsilon_and_no_one_less(members, steps):
    ours = best_of(members)
    winner = ours.winner(delta=1e-4, steps=steps)
    assert winner.epsilon == ours.epsilon(delta=1e-4, steps=steps)
    assert winner.certificate in members
    assert winner.certificate.epsilon(delta=1e-4, steps=steps) == winner.epsilon
    assert winner.assumptions == winner.certificate.assumptions
    assert winner.name.startswith(type(winner.certificate).__name__)
    assert len(winner.others) == len(members) - 1
    assert all(winner.epsilon <= other for other in winner.others.values())
    assert winner.name not in winner.others


@given(MEMBERS, st.floats(0.1, 20.0))
def test_steps_for_is_the_smallest_number(members, target):
    ours = best_of(members)
    curve = [ours.epsilon(delta=1e-4, steps=k) for k in range(61)]
    first = next((k for k, value in enumerate(curve) if value <= target), None)
    if first is None:
        with pytest.raises(CertificateError, match="retrain instead"):
            ours.steps_for(epsilon=target, delta=1e-4, max_steps=60)
    else:
        assert ours.steps_for(epsilon=target, delta=1e-4, max_steps=60) == first


def test_members_that_do_not_reach_the_target_are_passed_over():
    never, late, soon = Fixed((9.0,)), Fixed((9.0, 9.0, 9.0, 1.0)), Fixed((9.0, 9.0, 0.5))
    for order in ((never, late, soon), (soon, late, never), (late, never, soon)):
        assert best_of(order).steps_for(epsilon=1.0, delta=1e-5) == 2
    assert best_of([never, late]).steps_for(epsilon=1.0, delta=1e-5) == 3
    assert best_of([Fixed((0.5,)), late]).steps_for(epsilon=1.0, delta=1e-5) == 0


def test_target_out_of_reach_lists_the_best_of_each():
    ours = best_of([Fixed((9.0, 3.25)), ContractionCertificate(1.0, 1.0, initial_distance=50.0)])
    second = ours.members[1].epsilon(delta=1e-5, steps=40)
    with pytest.raises(CertificateError) as failure:
        ours.steps_for(epsilon=0.5, delta=1e-5, max_steps=40)
    for part in (
        "epsilon=0.5",
        "delta=1e-05",
        "max_steps=40",
        "Fixed: epsilon=3.25",
        f"ContractionCertificate: epsilon={rounded_up(second, digits=6)}",
        "retrain instead",
    ):
        assert part in str(failure.value)


@pytest.mark.parametrize("other", ["retrained", "stationary"])
def test_different_references_are_refused_and_named(other):
    with pytest.raises(CertificateError, match=f"Fixed 1: same_horizon, Fixed 2: {other}"):
        best_of([Fixed((1.0,)), Fixed((2.0,), reference=other)])
    with pytest.raises(CertificateError, match="one reference"):
        best_of([ContractionCertificate(0.9, 1.0), Fixed((2.0,), reference=other)])
    same = best_of([Fixed((1.0,), reference=other), Fixed((2.0,), reference=other)])
    assert same.reference == other


def test_the_weakest_direction_holds_for_all():
    both, one = Fixed((1.0,)), Fixed((2.0,), two_sided=False)
    assert best_of([both, both]).two_sided is True
    assert best_of([both, one]).two_sided is False
    assert best_of([both, one]).winner(delta=1e-5, steps=0).certificate.two_sided is True


def test_a_best_among_members_is_taken_apart():
    first, second, third = Fixed((1.0,)), Fixed((2.0,)), ContractionCertificate(0.9, 1.0)
    ours = best_of([best_of([first, second]), third])
    assert ours.members == (first, second, third)
    assert ours == BestCertificate((first, second, third))
    names = [ours.winner(delta=1e-5, steps=0).name, *ours.winner(delta=1e-5, steps=0).others]
    assert sorted(names) == ["ContractionCertificate", "Fixed 1", "Fixed 2"]


def test_assumptions_name_every_member_and_keep_their_sentences():
    contraction = ContractionCertificate(0.9, 0.25, (0.1,))
    training = DataProcessingCertificate((0.1, 0.3), (2.0, 4.0))
    ours = best_of([contraction, training])
    assert "ContractionCertificate, DataProcessingCertificate" in ours.assumptions[0]
    for member in (contraction, training):
        for sentence in member.assumptions:
            assert f"{type(member).__name__}: {sentence}" in ours.assumptions
    assert all(line.endswith(".") for line in ours.assumptions)


def test_infinite_members_do_not_hide_finite_ones():
    ours = best_of([ContractionCertificate(1.0, 1.0, initial_distance=1.0), Fixed((3.0,))])
    assert ours.epsilon(delta=1e-5, steps=0) == 3.0
    assert ours.winner(delta=1e-5, steps=0).others == {"ContractionCertificate": math.inf}


def test_wrong_members_are_named():
    with pytest.raises(ValueError, match="at least one"):
        best_of([])
    with pytest.raises(TypeError, match="certificates only, got certificates=3"):
        best_of([3])
    with pytest.raises(ValueError, match="max_steps"):
        best_of([Fixed((1.0,))]).steps_for(epsilon=1.0, delta=1e-5, max_steps=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        best_of([Fixed((1.0,))]).members = ()
