"""Assumptions are codes and numbers; what a reader sees is generated from them."""

from __future__ import annotations

import dataclasses
import math
import string

import numpy as np
import pytest

from opacus_pil import CertificateError
from opacus_pil.certificates import (
    Assumption,
    ContractionCertificate,
    DataProcessingCertificate,
    LangevinCertificate,
    NoisyFineTuningCertificate,
    PoissonContractionCertificate,
    assumption,
    best_of,
)
from opacus_pil.certificates.assumptions import number_kinds
from opacus_pil.certificates.derivation import derivation_mismatch
from opacus_pil.certificates.fields import CLASSES, constants_of, rebuilt
from opacus_pil.certificates.methods import CERTIFIED_METHODS, SPEAKS_OF, method_mismatch
from opacus_pil.certificates.sentences import CONTEXT, OWN, SENTENCES
from opacus_pil.unlearning.methods import METHODS, NOISE_FREE_METHODS
from tests.certificates.records import MAKERS, fixed_batches, one_output_glm, requests, stationary

PLAIN = [code for code in CONTEXT if not number_kinds(code)]
MADE = [make(np.random.default_rng(3)) for make in MAKERS]


def test_every_sentence_is_a_sentence_and_its_numbers_have_a_kind() -> None:
    assert not set(OWN) & set(CONTEXT)
    for code, words in SENTENCES.items():
        assert words.endswith("."), code
        assert set(code) <= set(string.ascii_lowercase + string.digits + "_"), code
        assert set(number_kinds(code).values()) <= {"g", "d", "list", "names"}, code
        assert "names" not in number_kinds(code).values() or code in OWN  # text: never a context's
    assert len(set(SENTENCES.values())) == len(SENTENCES)


@pytest.mark.parametrize(
    "code",
    [
        "rows_independent_not_checked", "order_given_by_caller", "dataset_not_fingerprinted",
        "fingerprint_given_by_caller", "frozen_part_is_public", "augmentation_random",
        "labels_without_evidence", "supplied_by_caller",
    ],
)  # fmt: skip
def test_what_training_may_have_to_name_is_a_context_without_numbers(code) -> None:
    assert code in PLAIN


@pytest.mark.parametrize("certificate", MADE, ids=lambda c: type(c).__name__)
def test_words_are_those_of_the_codes_with_numbers_filled_in(certificate) -> None:
    codes = certificate.assumption_codes
    assert certificate.assumptions == tuple(one.sentence for one in codes)
    for one in codes:
        assert "{" not in one.sentence
        for part in string.Formatter().parse(SENTENCES[one.code]):
            assert part[0] in one.sentence


@pytest.mark.parametrize("certificate", MADE, ids=lambda c: type(c).__name__)
def test_every_certificate_takes_further_contexts_and_keeps_its_numbers(certificate) -> None:
    more = certificate.with_context("supplied_by_caller", "frozen_part_is_public")
    added = {one.code for one in more.assumption_codes} - {
        one.code for one in certificate.assumption_codes
    }
    assert "frozen_part_is_public" in added
    assert more.epsilon(delta=1e-3, steps=5) == certificate.epsilon(delta=1e-3, steps=5)
    assert more.with_context("supplied_by_caller") == more  # each once
    assert rebuilt(*constants_of(more)) == more
    assert "frozen_part_is_public" not in str(certificate.context)  # the first is left alone


@pytest.mark.parametrize(
    "context",
    [
        ("Räume sind still.",), ("model_clipped",), ("one_linear_output",), ("",),
        ("supplied_by_caller", "supplied by caller"),
        (assumption("least_of", members=1, names=("anything that I like",)),),
        (assumption("supplied_by_caller", of="Me"),),
        (assumption("decoupled_decay", weight_decay=math.inf, step_size=1.0),),
    ],
)  # fmt: skip
def test_free_text_and_codes_of_other_places_are_refused_as_context(context) -> None:
    makers = (
        lambda: ContractionCertificate(0.9, 1.0, (0.1,), context=context),
        lambda: DataProcessingCertificate((0.1,), (2.0,), context=context),
        lambda: LangevinCertificate((0.1,), (2.0,), 0.9, 1.0, 1.0, context=context),
        lambda: NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.0, 2.0, context=context),
        lambda: PoissonContractionCertificate(
            (1.0,), 0.1, 1.0, 20, 0.5, 0.1, 0.2, 10.0, 99, context=context
        ),
        lambda: dataclasses.replace(
            next(c for c in MADE if type(c).__name__ == "Chien2024Certificate"), context=context
        ),
    )
    for make in makers:
        with pytest.raises(CertificateError):
            make()


@pytest.mark.parametrize("context", ["supplied_by_caller", 3, (3,), (None,)])
def test_a_context_that_is_no_tuple_of_codes_is_refused_by_type(context) -> None:
    with pytest.raises(TypeError, match="Expected context"):
        ContractionCertificate(0.9, 1.0, (0.1,), context=context)


@pytest.mark.parametrize(
    ("code", "numbers"),
    [
        ("no_such_code", {}),
        ("decoupled_decay", {}),
        ("decoupled_decay", {"weight_decay": 0.1}),
        ("decoupled_decay", {"weight_decay": 0.1, "step_size": 1.0, "other": 1.0}),
        ("decoupled_decay", {"weight_decay": "0.1", "step_size": 1.0}),
        ("decoupled_decay", {"weight_decay": math.nan, "step_size": 1.0}),
        ("decoupled_decay", {"weight_decay": True, "step_size": 1.0}),
        ("phase_steps", {"phase_steps": ("1 step, approved",)}),
        ("phase_steps", {"phase_steps": (1.5,)}),
        ("phase_steps", {"phase_steps": 3}),
        ("requests_in_turn", {"requests": 1.0}),
        ("requests_in_turn", {"requests": -1}),
        ("requests_in_turn", {"requests": 10**400}),
    ],
)
def test_numbers_must_be_there_and_of_their_kind(code, numbers) -> None:
    with pytest.raises(CertificateError):
        assumption(code, **numbers)


def test_numbers_are_kept_in_the_order_of_the_sentence() -> None:
    one = assumption("decoupled_decay", step_size=2.0, weight_decay=0.1)
    assert one == Assumption("decoupled_decay", (("weight_decay", 0.1), ("step_size", 2.0)))


# --- methods --------------------------------------------------------------------------------------


def test_every_class_says_which_methods_it_may_speak_of() -> None:
    assert set(SPEAKS_OF) | {type(best_of([MADE[0]]))} == set(CLASSES.values())
    for methods in SPEAKS_OF.values():
        assert methods
        assert set(methods) <= set(CERTIFIED_METHODS)
    # what the engine runs without noise, or without a model to start from, is none of them
    assert set(CERTIFIED_METHODS) == set(METHODS) - {*NOISE_FREE_METHODS, "retraining"}


@pytest.mark.parametrize("method", [*NOISE_FREE_METHODS, "retraining", "Finetuning", "", "DP_SGD"])
def test_no_certificate_speaks_of_a_method_that_cannot_be_certified(method) -> None:
    for certificate in MADE:
        assert "none that can be certified" in str(method_mismatch(certificate, method))


@pytest.mark.parametrize("certificate", MADE, ids=lambda c: type(c).__name__)
def test_only_data_processing_speaks_of_clipped_and_of_unclipped_steps(certificate) -> None:
    spoken = {m for m in CERTIFIED_METHODS if method_mismatch(certificate, m) is None}
    kernel, tuning = {"dp_sgd", "langevin"}, {"noisy_finetuning"}
    if isinstance(certificate, DataProcessingCertificate):
        assert spoken == kernel | tuning
    elif isinstance(certificate, NoisyFineTuningCertificate):
        assert spoken == tuning
    else:
        assert spoken == kernel


def test_the_least_of_several_speaks_of_what_all_of_them_speak_of() -> None:
    training, tuning = MADE[4], MADE[2]
    assert method_mismatch(best_of([training, tuning]), "noisy_finetuning") is None
    assert "NoisyFineTuning" in str(method_mismatch(best_of([training, tuning]), "dp_sgd"))


# --- numbers of contexts --------------------------------------------------------------------------


@pytest.mark.parametrize("certificate", MADE, ids=lambda c: type(c).__name__)
def test_the_constructors_contexts_give_their_constants(certificate) -> None:
    assert derivation_mismatch(certificate) is None


DERIVED = [make(np.random.default_rng(4)) for make in (one_output_glm, fixed_batches, requests)]
DERIVED += [
    stationary(np.random.default_rng(4)),
    PoissonContractionCertificate.one_output_glm(
        caps=[0.5, 1.0], max_grad_norm=1.3, step_size=1.5, weight_decay=0.0123456789,
        feature_norm=2**0.5, noise_multiplier=5.0, expected_batch_size=8.0, num_instances=40,
        training_steps=10, sample_rate=0.2,
    ),
]  # fmt: skip
# With other values of these the constants are what they were: the step may contract by the same
# 1 − ηλ, and the shifts of known batches are given, whatever divides them. Then the edited words
# are true of such a run. `members` is held against the number of instances by the record.
_SLACK = {
    ("one_linear_output", "feature_norm"), ("smooth_convex_loss", "loss_smoothness"),
    ("full_batch", "num_instances"), ("convex_retained", "smoothness"),
    ("convex_retained", "unlearning_batch_size"), ("constant_divisor", "expected_batch_size"),
    ("replaced_records", "smoothness"), ("capped_gradients", "members"),
}  # fmt: skip


@pytest.mark.parametrize("certificate", DERIVED, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 2.0])
def test_a_number_of_a_context_that_does_not_give_the_constants_is_found(
    certificate, factor
) -> None:
    changed = 0
    for place, one in enumerate(certificate.context):
        if isinstance(one, str):
            continue
        for name, value in one.numbers:
            if isinstance(value, tuple):
                other = (*value[:-1], value[-1] + 1)
            else:
                other = type(value)(value * factor)
                if isinstance(value, int) and other == value:
                    other = value + 1
            edited = assumption(one.code, **{**dict(one.numbers), name: other})
            context = (*certificate.context[:place], edited, *certificate.context[place + 1 :])
            false = dataclasses.replace(certificate, context=context)
            if derivation_mismatch(false) is None:
                assert (one.code, name) in _SLACK
            else:
                changed += 1
    assert changed >= 2


@pytest.mark.parametrize("certificate", DERIVED, ids=lambda c: type(c).__name__)
def test_contexts_with_numbers_come_together(certificate) -> None:
    for one in certificate.context:
        if isinstance(one, Assumption):
            rest = tuple(other for other in certificate.context if other != one)
            alone = dataclasses.replace(certificate, context=rest)
            single = len([c for c in certificate.context if isinstance(c, Assumption)]) == 1
            assert single or derivation_mismatch(alone) is not None, one.code


def test_nobody_starts_to_take_part_later() -> None:
    certificate = one_output_glm(np.random.default_rng(4))
    first, rest = certificate.shifts[0], certificate.shifts[1:]
    later = dataclasses.replace(certificate, shifts=(first, *(0.5 * s for s in rest)))
    assert derivation_mismatch(later) is None  # somebody left: an earlier request
    more = dataclasses.replace(certificate, shifts=(first, 0.5 * first, *rest[1:]))
    assert "a larger shift at a later step" in str(derivation_mismatch(more))


def test_numbers_beside_a_certificate_that_does_not_come_from_them_are_found() -> None:
    stray = assumption("one_linear_output", feature_norm=1.0)
    for certificate in (
        DataProcessingCertificate((0.1,), (2.0,), context=(stray,)),
        NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.0, 2.0, context=(stray,)),
        best_of([MADE[0], ContractionCertificate(0.9, 1.0, (0.1,), context=(stray,))]),
    ):
        assert derivation_mismatch(certificate) is not None
