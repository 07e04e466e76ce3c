"""A deletion's page says what ran and claims what the result claims, or that there is no claim."""

from __future__ import annotations

import dataclasses
import stat

import numpy as np
import pytest
from scipy import stats

from opacus_pil.accounting.best_guess import best_guess
from opacus_pil.certificates import LangevinCertificate
from opacus_pil.evaluation import oracle_gap
from opacus_pil.evaluation.gap import Metrics
from opacus_pil.report.numbers import up
from opacus_pil.unlearning.reported import deletion_report
from tests.report.runs import CERTIFICATE, HOSTILE, Page, certified, retrained, uncertified


def written(result, path, **options) -> Page:
    result.write_report(path, **options)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return Page(path.read_text(encoding="utf-8"))


def test_a_certified_deletion_says_epsilon_assumptions_and_hashes(tmp_path) -> None:
    result = certified()
    page = written(result, tmp_path / "r.html")
    shown = deletion_report(result).claims[0].statement
    number = float(shown.split("ε = ")[1].split(" ")[0])
    assert result.epsilon <= number <= result.epsilon * (1 + 1e-3)
    assert "ε reached" in page.text
    for sentence in CERTIFICATE.assumptions:
        assert page.text.count(sentence) == 1
    for words in ("a" * 64, "b" * 64, "12 steps of dp_sgd ran", "takes 300", "taken for granted",
                  "not measured here", "Copies of the data"):  # fmt: skip
        assert words in page.text
    assert "img" not in page.tags
    assert HOSTILE.split(" {{")[0] in page.text  # as text


@pytest.mark.parametrize("make", [uncertified, retrained])
def test_without_a_certificate_there_is_no_epsilon_and_no_certificate(make, tmp_path) -> None:
    page = written(make(), tmp_path / "r.html")
    assert "none: nothing is certified" in page.text
    assert "indistinguishable" not in page.text.split("What each number means")[0]
    assert not [v for _, name, v in page.attributes if (name, v) == ("id", "certificates")]
    assert ("badge certified" in str(page.attributes)) is False
    assert "no claim" in page.text
    if make is uncertified:
        assert "every retained instance's privacy loss is infinite" in page.text
        assert "steps predicted 5 to 20" in page.text
    else:
        assert "none of them was read" in page.text


def test_the_gap_to_retrained_models_has_its_prediction_interval(tmp_path) -> None:
    oracles = [{"forget": Metrics(accuracy=right, loss=loss)}
               for right, loss in ((0.80, 0.5), (0.84, 0.6), (0.85, 0.7))]  # fmt: skip
    gap = oracle_gap({"forget": Metrics(accuracy=0.9, loss=0.4)}, oracles=oracles)
    page = written(uncertified(), tmp_path / "r.html", gap=gap)
    values = np.array([0.80, 0.84, 0.85])
    half = stats.t.ppf(0.975, 2) * values.std(ddof=1) * np.sqrt(4 / 3)
    low, high = values.mean() - half, values.mean() + half
    assert f"accuracy, forget 0.9 0.83 +0.07 {low:.4g} to {high:.4g} 3" in page.text
    assert "never proof" in page.text
    single = oracle_gap({"forget": Metrics(accuracy=0.9, loss=0.4)}, oracles=oracles[:1])
    assert "unknown" in written(uncertified(), tmp_path / "s.html", gap=single).text


def test_another_gap_is_refused_and_nothing_is_written(tmp_path) -> None:
    with pytest.raises(TypeError, match="Expected gap to map a split"):
        certified().write_report(tmp_path / "r.html", gap={"forget": 0.1})
    assert not list(tmp_path.iterdir())


def test_what_may_be_shown_of_a_deletion_names_nobody_and_counts_nothing(tmp_path) -> None:
    """Two deletions of other people, in other steps, to the same target, give the same page."""
    first, private = certified(), written(certified(), tmp_path / "r.html")
    plan = dataclasses.replace(
        first.plan, forget_set=np.array([7]), ids=("bob",), steps=17, reason="other", reasons=(),
        epsilon=CERTIFICATE.epsilon(delta=1e-3, steps=17),
    )  # fmt: skip
    second = dataclasses.replace(first, plan=plan, steps=17, model_after="c" * 64)
    pages = []
    for number, result in enumerate((first, second)):
        pages.append(written(result, tmp_path / f"{number}.html", public=True))
    texts = [(tmp_path / f"{number}.html").read_text(encoding="utf-8") for number in (0, 1)]
    assert texts[0] == texts[1]
    for told in (" ann", "After 12 steps", up(first.epsilon), "a" * 64, "largest 0.4"):
        assert told in private.text
        assert told not in pages[0].text
    assert up(plan.target_epsilon) in pages[0].text
    assert "Constants only." in pages[0].text
    assert "the one word that depends on the data" in pages[0].text
    for code in CERTIFICATE.assumption_codes:
        assert pages[0].text.count(code.without_numbers) == 1
        assert "{" not in code.without_numbers
        assert not any(letter.isdigit() for letter in code.without_numbers)


@pytest.mark.parametrize("make", [uncertified, retrained])
def test_what_may_be_shown_without_a_certificate_claims_as_little(make, tmp_path) -> None:
    page = written(make(), tmp_path / "p.html", public=True)
    assert "no claim" in page.text
    assert "indistinguishable" not in page.text.split("What each number means")[0]
    for told in (" ann", "12 steps", "300"):
        assert told not in page.text


def test_a_wrong_gap_is_refused_on_a_public_page_too(tmp_path) -> None:
    with pytest.raises(TypeError, match="SplitGap"):
        certified().write_report(tmp_path / "p.html", gap={"forget": 1.0}, public=True)
    assert list(tmp_path.iterdir()) == []


def test_the_claim_says_how_often_a_guess_is_right(tmp_path) -> None:
    result = certified()
    page = written(result, tmp_path / "r.html")
    assert result.certificate.two_sided
    right = up(100 * best_guess(result.epsilon, delta=1e-3))
    assert f"is right in at most {right} % of all cases" in page.text


@pytest.mark.parametrize("public", [False, True])
def test_a_claim_in_one_direction_allows_a_guesser_more(public, tmp_path) -> None:
    first = certified()
    one_way = LangevinCertificate((0.4,), (2.0,), 0.5, 1.0, 4.0 / 3.0)
    assert not one_way.two_sided
    result = dataclasses.replace(first, plan=dataclasses.replace(first.plan, certificate=one_way))
    page = written(result, tmp_path / "r.html", public=public)
    epsilon = first.plan.target_epsilon if public else first.epsilon
    right = up(100 * best_guess(epsilon, delta=1e-3, two_sided=False))
    assert right != up(100 * best_guess(epsilon, delta=1e-3))
    assert "in one direction" in page.text
    assert f"is right in at most {right} % of all cases" in page.text


def test_a_deletion_that_needs_no_step_says_so(tmp_path) -> None:
    first = certified()
    epsilon = CERTIFICATE.epsilon(delta=1e-3, steps=0)
    plan = dataclasses.replace(first.plan, steps=0, epsilon=epsilon, target_epsilon=epsilon)
    result = dataclasses.replace(first, plan=plan, steps=0)
    page = written(result, tmp_path / "r.html")
    assert "certified: by the training alone" in page.text
    assert "No step was run, and none is needed" in page.text
    # That none is needed depends on who is deleted.
    shown = written(result, tmp_path / "p.html", public=True).text
    assert "A deletion: certified" in shown
    assert "training alone" not in shown
    assert "No step" not in shown
