"""The table from facts to labels: whole, and never stronger than its weakest fact."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import opacus_pil
from opacus_pil.accounting.guarantee import GUARANTEES, weakest
from opacus_pil.capture.recorder import Fact
from opacus_pil.training.evidence import BEST, table
from opacus_pil.training.policies import NORM_POLICIES
from opacus_pil.training.probe import explained
from opacus_pil.training.row_gradients import RowGradients
from opacus_pil.training.verdict import joined, judged, uncertifiable

ROOT = Path(opacus_pil.__file__).parent
CODES = sorted({row.code for row in table()})
WITH_DETAIL = sorted({row.code for row in table() if "{detail}" in row.words})


@functools.cache
def emitted() -> dict[str, set[str]]:
    """Codes that some module makes facts of: by name, file by file.

    `Fact("code", …)`, `note("code", …)`, `_keep("code", …)`, and functions that return a pair
    (code, detail) for `_keep(*…)`.
    """
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        if path.name == "evidence.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = getattr(function, "attr", getattr(function, "id", ""))
                first = node.args[0] if node.args else None
                if name in ("Fact", "note", "_keep") and isinstance(first, ast.Constant):
                    found.setdefault(first.value, set()).add(path.name)
            if (
                isinstance(node, ast.Return)
                and isinstance(node.value, ast.Tuple)
                and node.value.elts
            ):
                first = node.value.elts[0]
                known = isinstance(first, ast.Constant) and first.value in CODES
                if known and isinstance(first, ast.Constant):
                    found.setdefault(str(first.value), set()).add(path.name)
    return found


def test_every_fact_that_is_made_is_in_the_table():
    assert set(emitted()) <= set(CODES)


def test_every_row_of_the_table_is_of_a_fact_that_is_made():
    """`earlier_release` and `other_data` are made of saved ledgers, by their codes as keys."""
    named = {
        node.value
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(CODES) - set(emitted()) <= named & {"earlier_release", "other_data"}


def test_the_collector_sees_what_it_should():
    assert "recorder.py" in emitted()["draw_skipped"]
    assert {"probe.py", "row_gradients.py"} <= emitted()["loss_couples_rows"]
    assert "ghost.py" in emitted()["gradient_changed"]
    assert explained.__module__.endswith("probe")
    assert RowGradients.coupling.__doc__


def test_every_policy_has_a_best_label_and_every_row_known_ones():
    assert set(BEST) == set(NORM_POLICIES)
    for row in table():
        assert row.leaves in GUARANTEES
        assert set(row.policies or ()) <= set(NORM_POLICIES)
        assert row.words[0].islower() or row.words.startswith("{"), "a clause, no sentence"
        assert not row.words.endswith(".")


@pytest.mark.parametrize("policy", sorted(BEST))
@pytest.mark.parametrize("code", CODES)
def test_words_have_no_braces_left(policy, code):
    verdict = judged(policy, [Fact(code, "as found")])
    for reason in (*verdict.reasons, verdict.broken):
        assert "{" not in reason
        assert "}" not in reason
    why = uncertifiable([code], policy=policy)
    assert why is None or ("{" not in why and "}" not in why)


@pytest.mark.parametrize("code", WITH_DETAIL)
def test_details_reach_the_reader(code):
    policies = next(row.policies for row in table() if row.code == code) or ("worst_case",)
    assert any("as found" in r for r in judged(policies[0], [Fact(code, "as found")]).reasons)


@pytest.mark.parametrize("policy", sorted(BEST))
@given(codes=st.lists(st.sampled_from(CODES), max_size=5))
def test_a_verdict_is_the_weakest_of_its_facts(policy, codes):
    verdict = judged(policy, [Fact(code) for code in codes])
    each = [judged(policy, [Fact(code)]) for code in codes]
    assert verdict.label == weakest([BEST[policy][0], *(one.label for one in each)])
    assert verdict.unbounded == any(one.unbounded for one in each)
    assert verdict.unamplified == any(one.unamplified for one in each)
    assert bool(verdict.broken) == any(one.broken for one in each)
    assert set(verdict.codes) == set(codes)


@pytest.mark.parametrize("policy", sorted(BEST))
@given(codes=st.lists(st.sampled_from(CODES), max_size=4), split=st.integers(0, 4))
def test_facts_found_later_weigh_as_much(policy, codes, split):
    facts = [Fact(code) for code in codes]
    at_once = judged(policy, facts)
    later = joined(policy, judged(policy, facts[:split]), facts[split:])
    assert later.label == at_once.label
    assert set(later.reasons) == set(at_once.reasons)
    assert (later.unbounded, later.unamplified, later.broken, later.chosen) == (
        at_once.unbounded, at_once.unamplified, at_once.broken, at_once.chosen,
    )  # fmt: skip


def test_nothing_found_is_the_policy_s_best():
    for policy, (label, why) in BEST.items():
        verdict = judged(policy, [])
        assert verdict.label == label
        assert verdict.reasons == ((why,) if why else ())
        assert verdict.chosen
        assert not verdict.broken


def test_an_unknown_fact_is_ours_to_mend():
    with pytest.raises(KeyError):
        judged("worst_case", [Fact("no such thing")])


def test_a_strong_label_with_a_fact_is_an_assumption_in_words():
    """Only sentences that say what is assumed leave "bound" as it is."""
    for row in table():
        if row.leaves == "bound":
            assert "assumed" in row.words or row.code == "earlier_release"


def test_what_is_charged_infinitely_breaks_caps_and_no_certificate_rests_on_it():
    for row in table():
        if row.unbounded:
            assert row.breaks_caps
            assert row.leaves == "estimate"
            assert not row.certifiable


class TestCertificates:
    """What a ledger may carry."""

    def test_nothing_found_carries_them(self):
        assert uncertifiable([], policy="worst_case") is None

    def test_another_policy_s_facts_do_not_matter(self):
        assert uncertifiable(["random_gradient"], policy="worst_case") is None
        assert uncertifiable(["caps_changed"], policy="worst_case") is None

    def test_a_loss_that_was_not_checked_carries_none(self):
        for policy in ("worst_case", "capped"):
            assert "see the ledger's reasons" in (
                uncertifiable(["loss_not_checked"], policy=policy) or ""
            )

    @pytest.mark.parametrize("code", ["loss_couples_rows", "noise_repeated", "draw_skipped",
                                      "divisor_changed", "coarse_rounding"])  # fmt: skip
    def test_neither_does_what_was_seen_to_be_wrong(self, code):
        assert uncertifiable(["earlier_release", code], policy="worst_case")
