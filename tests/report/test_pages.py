"""A run's page: its numbers are the engine's, its words claim no more, its ids stay text."""

from __future__ import annotations

import math
import re
import stat
import uuid
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import opacus_pil
from opacus_pil.accounting.best_guess import best_guess
from opacus_pil.accounting.shown import rounded_up
from opacus_pil.auditing import LowerBound
from opacus_pil.report import Claim, Exposed, Report, render_page, write_page
from opacus_pil.report.exposed import MOST_ROWS
from opacus_pil.report.words import LABELS, TERMS
from tests.report.runs import DELTA, HOSTILE, Page, everyone, trained

IDS = [f"p{i:02d}" for i in range(60)]


def report(spent, **changes):
    verdict = (("Q1?", "One."), ("Q2?", "Two."), ("Q3?", "Three."))
    return Report(
        title="T", subtitle="S", verdict=verdict, exposed=Exposed.of(spent), **changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return trained(ids=IDS)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    engine, test = run
    path = tmp_path_factory.mktemp("page") / "report.html"
    engine.write_report(path, delta=DELTA, test=test)
    return path


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text(encoding="utf-8"))


def test_the_table_holds_everybodys_number_rounded_up(run, page):
    spent = run[0].get_per_instance_epsilon(DELTA)
    assert sorted(page.rows["id"]) == IDS
    for name, shown in zip(page.rows["id"], page.rows["epsilon"], strict=True):
        assert spent[name] <= shown <= spent[name] * (1 + 1e-3)  # four digits, upwards
    assert page.rows["id"] == spent.top(60)["instance_id"].tolist()  # most exposed first
    assert page.rows["tied"] == spent.top(60)["tied"].tolist()


def test_the_page_says_the_engines_own_numbers(run, page):
    engine, _ = run
    spent = engine.get_per_instance_epsilon(DELTA)
    for value in (spent.worst_case, spent.epsilon.max(), engine.get_epsilon(DELTA)):
        assert rounded_up(value, digits=4) in page.text
    assert engine.fingerprint.sha256 in page.text
    for reason in spent.reasons:
        assert reason in page.text
    steps = sum(n for _, _, n in engine.accountant.history)
    assert f"{steps} of noise 1 at rate" in page.text


def test_a_prv_number_says_that_it_is_another_method(run, page):
    prv = rounded_up(run[0].get_epsilon(DELTA), digits=4)
    places = [m.start() for m in re.finditer(re.escape(prv), page.text)]
    assert places
    for place in places:
        around = page.text[max(place - 90, 0) : place + 90]
        assert "PRV" in around
        assert "not comparable with" in around


def test_the_order_is_verdict_exposed_evidence_constants_glossary(page):
    order = ["verdict", "exposed", "evidence", "limits", "constants", "glossary"]
    anchors = [v for _, name, v in page.attributes if name == "id" and v in order]
    assert anchors == order
    links = [v for tag, name, v in page.attributes if (tag, name) == ("a", "href")]
    assert set(links) - {"#content"} == {f"#{name}" for name in order}
    assert page.text.index("This file is private.") < page.text.index("How private was")
    for words in (*TERMS.values(), *(word for pair in LABELS.values() for word in pair)):
        assert words in page.text


def test_losses_of_the_model_are_those_of_its_loss(run, page):
    engine, test = run
    model = engine.trainings[-1].module._module
    with torch.no_grad():
        mean = torch.nn.BCEWithLogitsLoss()(model(test.tensors[0]), test.tensors[1])
    assert f"test 60 {float(mean):.4g} " in page.text


def test_writing_a_page_moves_neither_model_nor_random_numbers_nor_ledger(tmp_path):
    engine, test = trained(epochs=1)
    before = torch.random.get_rng_state()
    steps, epsilon = engine.per_instance.steps, engine.get_per_instance_epsilon(DELTA).epsilon
    mode = engine.trainings[-1].module.training
    engine.write_report(tmp_path / "r.html", delta=DELTA, test=test)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert engine.per_instance.steps == steps
    assert np.array_equal(engine.get_per_instance_epsilon(DELTA).epsilon, epsilon)
    assert engine.trainings[-1].module.training == mode


def test_lower_bounds_stand_beside_rounded_down(tmp_path):
    engine, _ = trained(epochs=1)
    bound = LowerBound(1.23459, 1e-3, 0.95, "one run", "none", condition="")
    engine.write_report(tmp_path / "r.html", delta=DELTA, test=[bound])
    text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "one run 1.234 0.95 none" in text
    assert "largest lower bound 1.234" in text


@pytest.mark.parametrize("policy", ["last_seen", "worst_case"])
def test_the_label_on_the_page_is_the_ledgers(policy, tmp_path):
    engine, _ = trained(policy=policy, epochs=1)
    engine.write_report(tmp_path / "r.html", delta=DELTA)
    text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    label = engine.get_per_instance_epsilon(DELTA).guarantee
    assert f"labelled {label}: {LABELS[label][0]}" in text
    assert ("not a privacy guarantee for anybody" in text) == (label == "estimate")


def test_a_public_page_holds_constants_only(run, tmp_path):
    engine, _ = run
    engine.write_report(tmp_path / "p.html", delta=DELTA, public=True)
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    page = Page(text)
    spent = engine.get_per_instance_epsilon(DELTA)
    private = {rounded_up(v, digits=d) for v in spent.epsilon for d in (3, 4)}
    # The worst case is a constant; an instance may stand on it.
    private -= {rounded_up(spent.worst_case, digits=d) for d in (3, 4)}
    assert private
    assert not [number for number in private if number in page.text]
    assert not [name for name in IDS if name in page.text]
    assert engine.fingerprint.sha256 not in text
    assert "svg" not in page.tags
    assert page.rows is None
    assert "Constants only." in page.text
    assert "This file is private." not in page.text
    assert rounded_up(engine.get_epsilon(DELTA), digits=4) in page.text


def test_the_verdict_gives_opacus_number_and_what_a_guesser_can_do_with_it(run, page, tmp_path):
    engine, _ = run
    epsilon = engine.get_epsilon(DELTA)
    right = rounded_up(100 * best_guess(epsilon, delta=DELTA), digits=4)
    engine.write_report(tmp_path / "p.html", delta=DELTA, public=True)
    public = Page((tmp_path / "p.html").read_text(encoding="utf-8")).text
    for text in (page.text, public):
        assert f"ε is {rounded_up(epsilon, digits=4)} at δ = 0.001" in text
        assert f"guesses rightly in at most {right} % of all cases" in text


def test_a_page_says_when_it_was_written(page):
    today = datetime.now(UTC).date()
    near = {(today - timedelta(days=days)).isoformat() for days in (0, 1)}  # midnight may pass
    assert any(f"written (UTC) {day}" in page.text for day in near)


@pytest.mark.parametrize("public", [False, True])
def test_a_training_without_steps_has_no_page(public, tmp_path):
    engine, _ = trained(epochs=0)
    with pytest.raises(ValueError, match="at least one step to report of"):
        engine.write_report(tmp_path / "r.html", delta=DELTA, public=public)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["fixed batches", "a batch used twice"])
def test_an_epsilon_that_does_not_hold_is_not_stated(case, tmp_path):
    with pytest.warns(UserWarning, match="participation|matched with rows"):
        engine, _ = trained(
            policy=None if case == "fixed batches" else "last_seen", epochs=1,
            poisson=case != "fixed batches", twice=case != "fixed batches",
        )  # fmt: skip
    number = rounded_up(engine.get_epsilon(DELTA), digits=4)
    engine.write_report(tmp_path / "p.html", delta=DELTA, public=True)
    public = Page((tmp_path / "p.html").read_text(encoding="utf-8")).text
    assert "No ε is stated here" in public
    assert number not in public
    engine.write_report(tmp_path / "r.html", delta=DELTA)
    text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "one to state for the training" not in text
    if case == "fixed batches":
        assert "that fixed or shuffled batches do not have: it is no bound" in text
    else:
        assert "that is no bound, because a step's batch was not the one" in text


def test_the_file_is_private_and_whole(written, run, tmp_path):
    engine, _ = run
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    kept = written.read_bytes()
    with pytest.raises(ValueError, match="delta"):
        engine.write_report(written, delta=2.0)
    with pytest.raises(ValueError, match="Expected test to hold at least one row"):
        engine.write_report(
            written, delta=DELTA, test=TensorDataset(torch.zeros(0, 3), torch.zeros(0, 1))
        )
    assert written.read_bytes() == kept
    assert list(written.parent.iterdir()) == [written]
    with pytest.raises(ValueError, match="make_private"):
        opacus_pil.PerInstancePrivacyEngine().write_report(tmp_path / "none.html", delta=DELTA)
    assert not list(tmp_path.iterdir())


def test_a_page_loads_nothing_and_carries_one_program(written, page):
    text = written.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<link|<iframe| on[a-z]+=", text)
    programs = re.findall(r"<script(?! type=\"application/json\")", text)
    assert len(programs) == 1  # and the policy names it by its hash: see test_summary.py


def test_hostile_ids_and_words_stay_text(tmp_path):
    ids = [HOSTILE + str(i) for i in range(30)]
    spent = everyone(30, ids=ids)
    shown = report(
        spent, reasons=(HOSTILE,), constants=((HOSTILE, HOSTILE),),
        claims=(Claim(title=HOSTILE, kind=HOSTILE, statement=HOSTILE, assumptions=(HOSTILE,)),),
    )  # fmt: skip
    page = Page(render_page(shown))
    assert sorted(page.rows["id"]) == sorted(ids)  # as they were written, nothing expanded
    assert "img" not in page.tags
    assert page.tags.count("script") == 3  # rows, points, the family's own
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    odd = Report(title="\ud800", subtitle="S", verdict=())  # a text that has no UTF-8
    write_page(tmp_path / "r.html", odd)
    assert "\\ud800" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_fifty_thousand_instances_are_at_most_three_megabytes(tmp_path):
    ids = [str(uuid.UUID(int=i << 80 | i)) for i in range(50_000)]  # as long as ids become
    spent = everyone(50_000, ids=ids)
    write_page(tmp_path / "r.html", report(spent))
    assert (tmp_path / "r.html").stat().st_size <= 3_000_000
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert sorted(page.rows["id"]) == sorted(ids)


def test_more_than_the_table_holds_is_said_and_counted(monkeypatch):
    assert MOST_ROWS == 50_000
    monkeypatch.setattr("opacus_pil.report.exposed.MOST_ROWS", 100)
    page = Page(render_page(report(everyone(300))))
    assert len(page.rows["id"]) == 100
    assert "the 100 most exposed of 300" in page.text
    bars = [v for tag, name, v in page.attributes if (tag, name) == ("rect", "aria-label")]
    assert sum(int(v.split()[0]) for v in bars) == 300


@pytest.mark.parametrize("size", [1, 2, 50, 5_000])
@pytest.mark.parametrize("worst", [6.0, 1e-3, math.inf])
def test_every_finite_instance_is_in_one_bar(size, worst):
    spent = everyone(size, worst_case=worst)
    exposed = Exposed.of(spent)
    assert sum(bar.count for bar in exposed.histogram.bars) == size
    for bar in exposed.histogram.bars:
        inside = [e for e in exposed.rows["epsilon"] if bar.low <= e < bar.high]
        assert len(inside) == bar.count  # what the table shows for this bar
    assert exposed.distribution.points[-1][2] == "100.0 %"
    assert (exposed.histogram.worst is None) == math.isinf(worst)


def test_zero_and_infinity_are_shown():
    spent = everyone(4)
    zeros = Exposed.of(type(spent)(np.zeros(4), spent.order, 1e-5, "estimate", worst_case=0.0))
    assert [bar.count for bar in zeros.histogram.bars] == [4]
    mixed = np.array([1.0, math.inf, 2.0, math.inf])
    some = Exposed.of(type(spent)(mixed, spent.order, 1e-5, "estimate"))
    assert some.infinite == 2
    assert some.rows["epsilon"][:2] == [None, None]
    assert some.first[0][1] == "∞"
    assert some.distribution.points[-1][2] == "50.0 %"  # the rest never comes
    none = Exposed.of(type(spent)(np.full(4, math.inf), spent.order, 1e-5, "estimate"))
    assert none.histogram is None
    page = Page(render_page(report(type(spent)(
        np.full(4, math.inf), spent.order, 1e-5, "estimate"))))  # fmt: skip
    assert "4 have no finite ε" in page.text


def test_shared_assumptions_are_listed_once():
    claims = [Claim(title=f"R{i}", kind="K", statement="S", assumptions=("all make it", f"own {i}"))
              for i in range(3)]  # fmt: skip
    text = Page(render_page(report(everyone(3), claims=tuple(claims)))).text
    assert text.count("all make it") == 1
    assert [text.count(f"own {i}") for i in range(3)] == [1, 1, 1]
