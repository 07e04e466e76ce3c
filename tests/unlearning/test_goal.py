"""Goals and the table of methods: checked once, the same after a way through JSON."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from opacus_pil.certificates import (
    ContractionCertificate,
    DataProcessingCertificate,
    NoisyFineTuningCertificate,
)
from opacus_pil.certificates.methods import CERTIFIED_METHODS, CLIPS_FIRST, SPEAKS_OF
from opacus_pil.errors import CertificateError
from opacus_pil.unlearning.goal import (
    FixedSteps,
    Pilots,
    Retraining,
    StepsAtDelta,
    Target,
    checked_goal,
    goal_from,
    plain_goal,
    plain_wish,
)
from opacus_pil.unlearning.methods import METHOD, METHODS, NOISE_FREE_METHODS, of_the_kernel
from opacus_pil.unlearning.pilots import fit_calibration

NOISY = NoisyFineTuningCertificate(1.5, 0.5, 0.1, 0.2, [3.0, 2.0])
FIT = fit_calibration(
    [0.0, 1.0, 2.0, 3.0], times=[1, 2, 4, None], max_steps=9, method="finetuning", order=2.0
)
WISHES = {
    Target: {"epsilon": 1, "delta": 1e-2, "method": "langevin", "max_steps": 7, "step_grid": 1},
    StepsAtDelta: {
        "steps": 3, "delta": 1e-2, "method": "noisy_finetuning", "certificate": NOISY
    },
    FixedSteps: {"steps": 0, "method": "l1_sparse"},
    Pilots: {"calibration": FIT, "max_steps": 5},
    Retraining: {"method": "retraining"},
}  # fmt: skip


@pytest.mark.parametrize("kind", WISHES, ids=lambda kind: kind.__name__)
def test_a_goal_is_the_same_after_a_way_through_json(kind):
    goal = checked_goal(**WISHES[kind])
    assert type(goal) is kind
    for plain in (plain_goal(goal), plain_wish(**WISHES[kind])):
        assert goal_from(json.loads(json.dumps(plain))) == goal


def test_a_goal_that_an_earlier_release_kept_is_read():
    kept = {
        "epsilon": None, "delta": None, "method": "dp_sgd", "steps": 4, "max_steps": None,
        "step_grid": 10, "strength": None, "predict": False,
    }  # fmt: skip
    assert goal_from(kept) == FixedSteps(method="dp_sgd", steps=4)


def test_a_goal_holds_only_what_was_asked_of_it():
    """No goal has a field that another kind of goal would read: there is nothing to contradict."""
    own = {kind: {field.name for field in fields(kind)} for kind in WISHES}
    assert own[FixedSteps] == {"method", "steps", "strength"}
    assert own[StepsAtDelta] == {"method", "steps", "delta", "certificate", "adaptive"}
    assert not {"steps", "strength", "calibration"} & own[Target]


@pytest.mark.parametrize(
    ("wish", "error", "match"),
    [
        ({}, ValueError, "got neither"),
        ({"epsilon": 1.0}, ValueError, "got neither"),
        ({"delta": 0.1}, ValueError, "got neither"),
        ({"epsilon": 1.0, "steps": 2}, ValueError, "got both"),
        ({"steps": 2, "predict": True}, ValueError, "delta beside steps"),
        ({"steps": 2, "delta": 0.1, "predict": True}, ValueError, "epsilon with predict"),
        ({"steps": 2, "strength": 1.0}, ValueError, "l1_sparse or gradient_difference only"),
        ({"method": "retraining", "steps": 2}, ValueError, "alone"),
        ({"calibration": FIT, "steps": 2}, ValueError, "calibration alone"),
        ({"epsilon": 1.0, "delta": 0.1, "method": "finetuning"}, CertificateError, "steps alone"),
        (
            {"epsilon": 1.0, "delta": 0.1, "certificate": NOISY},
            CertificateError, "whose steps are other ones",
        ),
        (
            {"steps": 1, "delta": 0.1, "method": "noisy_finetuning"},
            CertificateError, "got none",
        ),
        (
            {
                "steps": 1, "delta": 0.1, "adaptive": True,
                "certificate": ContractionCertificate(0.9, 1.0),
            },
            CertificateError, "the last model only",
        ),
    ],
)  # fmt: skip
def test_arguments_that_contradict_each_other_are_refused(wish, error, match):
    with pytest.raises(error, match=match):
        checked_goal(**wish)
    with pytest.raises(error, match=match):
        goal_from(plain_wish(**wish))


# --- methods --------------------------------------------------------------------------------------


def test_the_table_says_what_the_certificates_say():
    assert {name for name in METHODS if METHOD[name].certifiable} == set(CERTIFIED_METHODS)
    assert {name for name in METHODS if METHOD[name].own_constants} == set(CLIPS_FIRST)
    assert not any(METHOD[name].certifiable for name in NOISE_FREE_METHODS)
    for kind, methods in SPEAKS_OF.items():
        assert set(methods) <= set(METHODS), kind


def test_a_certificate_speaks_of_the_methods_that_it_lists():
    bound = DataProcessingCertificate([0.1, 0.2], [2.0, 3.0])
    for name in CERTIFIED_METHODS:
        assert METHOD[name].described_by(bound)
        assert METHOD[name].described_by(NOISY) == (name == "noisy_finetuning")


def test_steps_of_the_kernel_are_those_that_charge_who_is_in_them():
    assert {name for name in METHODS if of_the_kernel(name)} == {
        "dp_sgd", "langevin", "retraining"
    }  # fmt: skip
    assert of_the_kernel("training")


def test_a_method_adds_a_term_exactly_where_it_has_a_strength():
    assert [n for n in METHODS if METHOD[n].term] == [n for n in METHODS if METHOD[n].strength]
    assert [n for n in METHODS if METHOD[n].reads_forget_set] == ["gradient_difference"]
