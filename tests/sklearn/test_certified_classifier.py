"""CertifiedClassifier: who is public, what is computed from whom, and what a deletion proves."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

from opacus_pil import CertificateError
from opacus_pil.certificates import read_certificate, read_key, verify_certificate
from opacus_pil.sklearn import CertifiedClassifier
from opacus_pil.sklearn.head_features import HeadFeatures

DELTA = 1e-3
PUBLIC, ROWS = 30, 150


def table(rows=ROWS, *, columns=4, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=rows)
    labels[:classes] = np.arange(classes)  # the public rows show every class
    centres = rng.normal(size=(classes, columns)) * 3.0
    return centres[labels] + rng.normal(size=(rows, columns)), np.array(["a", "b", "c"])[labels]


def estimator(**changes):
    settings = {"weight_decay": 2e-2, "noise_std": 0.1, "training_steps": 40, "random_state": 0}
    return CertifiedClassifier(**(settings | changes))


@pytest.fixture(scope="module")
def kept():
    return pickle.dumps(estimator().fit(*table(), public_size=PUBLIC))


@pytest.fixture
def fitted(kept):
    return pickle.loads(kept)  # each test has a copy of its own, and trains nothing


# --- who is public ------------------------------------------------------------------------------


def test_public_rows_are_the_same_said_either_way(fitted):
    X, y = table()
    other = estimator().fit(X[PUBLIC:], y[PUBLIC:], public=(X[:PUBLIC], y[:PUBLIC]))
    np.testing.assert_array_equal(other.caps_, fitted.caps_)
    np.testing.assert_array_equal(other.decision_function(X), fitted.decision_function(X))
    spent = fitted.per_instance_epsilon(DELTA)
    # A row keeps the number it has in X: somebody who reads 31 there asks for 31 here.
    assert list(spent.instance_ids) == list(range(PUBLIC, ROWS))
    assert list(other.per_instance_epsilon(DELTA).instance_ids) == list(range(ROWS - PUBLIC))


def test_features_do_not_depend_on_private_rows(fitted):
    X, y = table()
    changed = X.copy()
    changed[PUBLIC:] *= 100.0
    other = estimator().fit(changed, y, public_size=PUBLIC)
    for name, value in fitted.features_.state_dict().items():
        assert torch.equal(value, other.features_.state_dict()[name])


def test_a_cap_depends_on_public_rows_and_on_its_own_row_only(fitted):
    X, y = table()
    changed = X.copy()
    changed[PUBLIC] += 5.0
    other = estimator().fit(changed, y, public_size=PUBLIC)
    np.testing.assert_array_equal(other.caps_[1:], fitted.caps_[1:])
    assert not np.array_equal(other.caps_[0], fitted.caps_[0])


def test_without_public_rows_everyone_is_charged_the_worst_case():
    X, y = table()
    alone = estimator(feature_scale=10.0).fit(X, y)
    assert (alone.caps_ == 1.0).all()
    spent = alone.per_instance_epsilon(DELTA)
    assert spent.guarantee == "bound"
    # Everyone has the level of the worst case; the same table, the same number.
    assert (spent.epsilon == spent.worst_case).all()


def test_caps_from_public_rows_lower_everybodys_epsilon(fitted):
    spent = fitted.per_instance_epsilon(DELTA)
    assert spent.guarantee == "bound"
    assert (spent.epsilon <= spent.worst_case).all()
    assert np.median(spent.epsilon) < spent.worst_case


def test_features_have_norm_at_most_one_whatever_the_row_is():
    X, _ = table()
    found = HeadFeatures.from_public(None, X[:PUBLIC])
    rows = np.concatenate([X, X * 1e6, X * 0.0, np.full((1, 4), 1e300)])
    assert (np.linalg.norm(found.of(rows), axis=1) <= 1.0).all()


def test_nine_public_rows_in_ten_keep_their_length():
    X, _ = table()
    found = HeadFeatures.from_public(None, X).of(X)
    lengths = np.linalg.norm(found[:, :-1], axis=1)
    shortened = lengths > 0.5**0.5 * (1 - 1e-5)  # BoundedFeatures leaves room of 1e-6
    assert shortened.mean() == pytest.approx(0.1, abs=1.5 / ROWS)  # a quantile lies between rows


@pytest.mark.parametrize(
    ("changes", "options", "error", "words"),
    [
        ({"noise_std": 0.0}, {}, ValueError, "noise_std"),
        ({"weight_decay": -1.0}, {}, ValueError, "weight_decay"),
        ({"training_steps": 1.5}, {}, TypeError, "training_steps"),
        ({"feature_scale": 0.0}, {}, ValueError, "feature_scale"),
        ({"target": (1.0, DELTA, 50)}, {}, ValueError, "public rows"),
        ({"target": 1.0}, {"public_size": PUBLIC}, TypeError, "epsilon, delta, steps"),
        ({"classes": ["a", "b"]}, {}, ValueError, "classes="),
        ({}, {"public_size": ROWS}, ValueError, "public_size"),
        ({}, {"public_size": 0}, ValueError, "public_size"),
        ({}, {"public": table(5)[0]}, TypeError, "pair"),
        ({}, {"public": table(), "public_size": 3}, TypeError, "both"),
        ({}, {"public": (table(5)[0], table(6)[1])}, ValueError, "public"),
        ({}, {"public": table(5, columns=3)}, ValueError, "features"),
        ({}, {"ids": ["x"] * ROWS}, ValueError, "without repetition"),
        ({}, {"ids": range(3)}, ValueError, "one per row"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_and_an_earlier_fit_stays(
    fitted, changes, options, error, words
):
    before = fitted.decision_function(table()[0])
    with pytest.raises(error, match=words):
        fitted.set_params(**changes).fit(*table(), **options)
    np.testing.assert_array_equal(fitted.decision_function(table()[0]), before)


def test_a_label_that_no_public_row_has_must_be_named():
    X, y = table()
    seen = (X[:PUBLIC][y[:PUBLIC] != "c"], y[:PUBLIC][y[:PUBLIC] != "c"])
    with pytest.raises(ValueError, match="known classes"):
        estimator().fit(X, y, public=seen)
    named = estimator(classes=["a", "b", "c"]).fit(X, y, public=seen)
    assert list(named.classes_) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="all 3 classes"):
        estimator(classes=["a", "b", "c"], target=(1.0, DELTA, 50)).fit(X, y, public=seen)


# --- predictions ----------------------------------------------------------------------------------


def test_probabilities_labels_and_logits_agree(fitted):
    X, y = table()
    logits, chances = fitted.decision_function(X), fitted.predict_proba(X)
    with torch.no_grad():
        own = fitted.head_(torch.as_tensor(fitted.features_.of(X)).float()).numpy()
    np.testing.assert_allclose(logits, own, atol=1e-5)  # the head computes in float32
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, atol=1e-12)
    single = 1.0 / (1.0 + np.exp(-logits))
    np.testing.assert_allclose(chances * single.sum(axis=1, keepdims=True), single, atol=1e-12)
    assert (fitted.predict(X) == fitted.classes_[logits.argmax(axis=1)]).all()
    assert fitted.score(X, y) > 0.8  # three well separated groups; chance is 0.33


def test_two_classes_have_one_decision_and_its_logistic_probability():
    X, y = table(classes=2)
    two = estimator().fit(X, y, public_size=PUBLIC)
    lead, chances = two.decision_function(X), two.predict_proba(X)
    assert lead.shape == (ROWS,)
    np.testing.assert_allclose(chances[:, 1], 1.0 / (1.0 + np.exp(-lead)), atol=1e-12)
    assert (two.predict(X) == np.where(lead > 0, "b", "a")).all()


def test_the_seed_decides_the_noise_and_without_one_fits_differ():
    X, y = table()
    one, same = (estimator().fit(X, y).decision_function(X) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    torch.manual_seed(5)
    first = estimator(random_state=None).fit(X, y)
    torch.manual_seed(5)  # the caller's seed is no source of privacy
    second = estimator(random_state=None).fit(X, y)
    assert not np.array_equal(first.decision_function(X), second.decision_function(X))
    assert first._seeds is None  # and it is not kept, where nobody asked for it


def test_global_generators_stay_where_they_were():
    torch.manual_seed(1)
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002 (it is watched, not drawn from)
    state = torch.get_rng_state()
    estimator(random_state=None).fit(*table(), public_size=PUBLIC).forget(
        [40], epsilon=3.0, delta=DELTA
    )
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002


def test_a_frozen_network_of_the_callers_is_used_and_left_as_it_is():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5)).train()
    X, y = table()
    own = estimator(frozen=network).fit(X, y, public_size=PUBLIC)
    assert own.features_.of(X[:2]).shape == (2, 7)
    np.testing.assert_array_equal(own.predict_proba(X), own.predict_proba(X))
    assert network.training
    assert network[0].weight.requires_grad
    assert clone(own).frozen is not network
    assert own.forget([50], epsilon=2.0, delta=DELTA).verify(model=own).holds


def test_a_search_over_parameters_works_as_for_any_estimator():
    X, y = table(60)
    with warnings.catch_warnings():
        search = GridSearchCV(estimator(), {"noise_std": [0.1, 9.0]}, cv=2)
        search.fit(X[10:], y[10:], public=(X[:10], y[:10]))
    assert search.best_params_ == {"noise_std": 0.1}  # with 9.0 nothing but noise is left


# --- forgetting -----------------------------------------------------------------------------------


def test_a_deletion_is_certified_verified_and_erased(fitted, tmp_path):
    X, _ = table()
    before = fitted.decision_function(X)
    done = fitted.forget([40, 41], epsilon=0.3, delta=DELTA)
    assert done.ids == (40, 41)
    assert 0.0 < done.epsilon <= 0.3
    assert done.delta == DELTA
    assert done.steps > 0
    assert done.epsilon == done.certificate.epsilon(delta=DELTA, steps=done.steps)
    # What the certificate counts is what was asked for, read off Opacus's optimizer in float32.
    assert done.certificate.noise_std == pytest.approx(fitted.noise_std, rel=1e-6)
    assert not np.array_equal(fitted.decision_function(X), before)
    report = done.verify(model=fitted, ids=[40, 41])
    assert report.holds
    assert report.covers
    assert done.verify(ids=[42]).covers is False
    assert not done.verify(model=estimator().fit(*table())).holds
    done.write(tmp_path / "case.json")
    read = read_certificate(tmp_path / "case.json")
    key = read_key(tmp_path / "case.json.key")
    assert verify_certificate(read, key=key, ids=[41]).covers
    kept = fitted.unlearning_.dataset
    assert not kept.features[[10, 11]].any()  # rows 40 and 41, of the private ones
    assert kept.features[12].any()


def test_a_certificate_that_was_edited_does_not_hold(fitted):
    done = fitted.forget([40], epsilon=0.5, delta=DELTA)
    less = dataclasses.replace(done.record, epsilon=done.record.epsilon / 2)
    assert not dataclasses.replace(done, record=less).verify().holds


def test_later_deletions_count_the_earlier_ones(fitted):
    first = fitted.forget([40], epsilon=0.5, delta=DELTA)
    second = fitted.forget(rows=[50], epsilon=0.5, delta=DELTA)
    assert (first.record.earlier_requests, second.record.earlier_requests) == (0, 1)
    assert second.record.earlier_forgotten == 1
    assert second.ids == (50,)
    assert second.verify(model=fitted, ids=[50]).holds
    assert first.steps == 0 or not first.verify(model=fitted).holds  # another model by now
    with pytest.raises(ValueError, match="forgotten"):
        fitted.forget([40], epsilon=0.5, delta=DELTA)


def test_ids_name_people_and_rows_name_rows_of_x():
    X, y = table()
    people = [f"person-{k}" for k in range(ROWS)]
    known = estimator().fit(X, y, ids=people, public_size=PUBLIC)
    assert known.per_instance_epsilon(DELTA)["person-31"] > 0
    assert known.forget(["person-31"], epsilon=1.0, delta=DELTA).ids == ("person-31",)
    assert known.forget(rows=[32], epsilon=1.0, delta=DELTA).ids == ("person-32",)
    for bad in (["person-3"], ["nobody"]):
        with pytest.raises(ValueError, match="nobody has"):
            known.forget(bad, epsilon=1.0, delta=DELTA)
    with pytest.raises(ValueError, match="public"):
        known.forget(rows=[3], epsilon=1.0, delta=DELTA)


def test_out_of_reach_is_an_error_and_changes_nothing(fitted):
    X, _ = table()
    before = fitted.decision_function(X)
    with pytest.raises(CertificateError, match="Fit again without"):
        fitted.forget([40], epsilon=1e-3, delta=1e-9, max_steps=1)
    np.testing.assert_array_equal(fitted.decision_function(X), before)
    assert not fitted.unlearning_.forgotten


def test_a_pickled_estimator_forgets_what_the_original_would(fitted):
    X, _ = table()
    other = pickle.loads(pickle.dumps(fitted))
    done, same = (one.forget([40], epsilon=0.3, delta=DELTA) for one in (fitted, other))
    assert same.verify(model=other).holds
    assert done.steps == same.steps > 0
    np.testing.assert_array_equal(fitted.decision_function(X), other.decision_function(X))


def test_constants_for_a_target_are_found_on_public_rows():
    X, y = table(400)
    found = estimator(target=(1.0, DELTA, 100), training_steps=None).fit(X, y, public_size=100)
    assert found.constants_.training_steps > 40
    done = found.forget([150], epsilon=1.0, delta=DELTA)
    assert done.steps <= 100
    with pytest.raises(CertificateError, match="some constants reach"):
        estimator(target=(1e-4, 1e-9, 1)).fit(X, y, public_size=100)


def test_a_forgotten_row_is_as_if_its_label_had_been_another_one():
    """After enough steps the model of a data set with a flipped row is the one without the flip.

    Without noise in the comparison (the same seeds), what is left of the row shrinks at each step
    by the contraction that the certificate states.
    """
    X, y = table()
    flipped = y.copy()
    flipped[40] = "a" if y[40] != "a" else "b"
    one, other = (estimator(feature_scale=10.0).fit(X, labels) for labels in (y, flipped))
    before = weights(one) - weights(other)
    first, second = (e.forget([40], epsilon=0.2, delta=DELTA) for e in (one, other))
    steps = min(first.steps, second.steps)
    assert steps == first.steps == second.steps
    assert steps > 0
    factor = first.certificate.contraction**steps
    after = weights(one) - weights(other)
    assert before.norm() > 0
    assert after.norm() <= before.norm() * factor * (1 + 1e-3)  # weights are kept in float32


def weights(fitted):
    return torch.cat([p.detach().flatten() for p in fitted.head_.parameters()]).double()


def test_nothing_loads_scikit_learn_but_its_own_room():
    code = (
        "import sys, opacus_pil, opacus_pil.unlearning, opacus_pil.heads\n"
        "print({'sklearn', 'transformers', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
