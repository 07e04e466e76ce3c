"""An edited certificate file is found out, or says nothing that is stronger.

Checksums are recomputed wherever it matters: whoever edits a file can do that.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pil import CertificateError, LedgerError
from opacus_pil.certificates import (
    ContractionCertificate,
    DataProcessingCertificate,
    LangevinCertificate,
    NoisyFineTuningCertificate,
    PoissonContractionCertificate,
    best_of,
    read_certificate,
    verify_certificate,
    write_certificate,
)
from opacus_pil.certificates.counted import counted
from opacus_pil.certificates.methods import CERTIFIED_METHODS
from tests.certificates.records import (
    DELTA,
    MAKERS,
    failed,
    one_output_glm,
    record_of,
    requests,
)

# What no other field of an unsigned file holds: who, which models, what was asked for, when, by
# what. Each is said as "the file says", or is bound to something outside: the key of the ids, the
# ids, the model. `method` has two names for the same steps.
DESCRIPTIVE = {
    "forgotten", "key_mac", "model_before", "model_after", "target_epsilon", "software", "created",
    "earlier_requests", "method",
}  # fmt: skip


def descriptive(record):
    """Those, and what this certificate's constants neither count nor use."""
    own = counted(record.certificate)
    found = set(DESCRIPTIVE)
    if own.steps is None:
        found.add("training_steps")
    more = record.certificate.epsilon(delta=record.delta, steps=record.steps + 1)
    if more == pytest.approx(record.epsilon, rel=1e-9):
        found.add("steps")  # the same ε after other numbers
    return found


@functools.cache
def made(number: int, seed: int = 0):
    return record_of(MAKERS[number](np.random.default_rng(seed)))


def resealed(record):
    return dataclasses.replace(record, checksum=record.computed_checksum())


def codes(report):
    return [code for code, _ in report.assumptions]


def content_of(record):
    return json.loads(json.dumps(record.content()))


def read_back(content, *, new_checksum=True):
    """The record of a file with this content; None where reading refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        path.write_text(json.dumps(content), encoding="utf-8")
        try:
            record = read_certificate(path)
        except LedgerError:
            return None
    return resealed(record) if new_checksum else record


def edited(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 1.01 * value + (value == 0.0)
    if isinstance(value, str):
        flipped = "0" if value[-1:] != "0" else "1"
        return value[:-1] + flipped
    return "x"


def places(value, path=()):
    """Every place of a JSON document that holds no other places."""
    if isinstance(value, dict) and value:
        return [p for key, item in value.items() for p in places(item, (*path, key))]
    if isinstance(value, list) and value:
        return [p for key, item in enumerate(value) for p in places(item, (*path, key))]
    return [path]


def with_edit(content, path):
    other = copy.deepcopy(content)
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = edited(inner[path[-1]])
    return other


def test_any_edit_is_caught_by_the_checksum() -> None:
    content = content_of(made(1))
    every = [p for p in places(content) if p[0] not in ("signature", "signed_by")]
    assert len(every) > 40
    for place in every:
        record = read_back(with_edit(content, place), new_checksum=False)
        assert record is None or "checksum" in failed(record), place


def test_any_edit_by_somebody_without_the_key_is_caught_by_whoever_has_it() -> None:
    content, key = content_of(made(1)), made(1).key
    for place in places(content):
        if place[0] in ("checksum", "signature", "signed_by"):
            continue  # not under the key: one is recomputed here, the others are the signer's
        record = read_back(with_edit(content, place))
        assert record is None or "key" in failed(record, key=key), place


@pytest.mark.parametrize("number", range(len(MAKERS)), ids=[make.__name__ for make in MAKERS])
def test_an_edited_place_with_a_new_checksum_changes_no_claim(number) -> None:
    record = made(number, 5)
    before = verify_certificate(record)
    assert before.holds
    content = content_of(record)
    for place in places(content):
        read = read_back(with_edit(content, place))
        if read is None:
            continue
        after = verify_certificate(read)
        if not after.holds:
            continue
        # What still holds claims the same under the same assumptions. A constant that this ε does
        # not come from may be another one; then it is that one which is said, and true.
        assert codes(after) == codes(before), place
        assert place[0] == "constants" or after.assumptions == before.assumptions, place
        claim = read.certificate.epsilon(delta=read.delta, steps=read.steps)
        assert claim == pytest.approx(record.epsilon, rel=2e-9), place  # twice the tolerance
        if after.statement != before.statement:
            assert place[0] in descriptive(record), place


# --- one field at a time --------------------------------------------------------------------------


def _semantic(record, name):
    """Values that somebody who knows the format might put into a field."""
    value = record.content()[name]
    if isinstance(value, list):
        shorter = [value[:i] + value[i + 1 :] for i in range(len(value))]
        return [*shorter, value[::-1], [*value, *value[:1]], [*value, "supplied_by_caller"]]
    if name == "constants":
        found = [with_edit(value, place) for place in places(value)]
        found += [{k: v for k, v in value.items() if k != left} for left in value]
        return [*found, {**value, "context": []}]
    if name == "certificate_class":
        return ["ContractionCertificate", "DataProcessingCertificate", "Certificate"]
    if name == "method":
        return [*CERTIFIED_METHODS, "Finetuning", "finetuning", "retraining", "DP_SGD", ""]
    if name == "direction":
        return ["both", "unlearned_from_reference"]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        near = [value + 1, max(value - 1, 0), 0, value * 0.5, value * 2, value * (1 - 1e-8)]
        return [*near, *map(int, near)]
    return [None, "0" * 64, "f" * 64, "1.0", {}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(st.data())
def test_one_edited_field_is_refused_or_found_or_says_nothing_stronger(data) -> None:
    number = data.draw(st.sampled_from([1, 2, 4, 5, 7, 9, 10, 11]))  # those that are quick
    record = made(number)
    names = [name for name in record.content() if name != "checksum"]
    name = data.draw(st.sampled_from(names))
    pool = [] if name in ("format", "version") else _semantic(record, name)
    value = data.draw(st.sampled_from(pool) | JSON if pool else JSON)
    content = {**content_of(record), name: value}
    try:
        read = read_back(content)
    except ValueError:
        return  # NaN has no JSON
    if read is None:
        return
    before, after = verify_certificate(record), verify_certificate(read)
    if not after.holds:
        return
    if name == "epsilon":  # a last digit of a number that was rounded up
        assert read.epsilon == pytest.approx(record.epsilon, rel=2e-9)
    elif name == "constants":
        assert codes(after) == codes(before)
        assert after.statement == before.statement
    else:
        assert after.assumptions == before.assumptions
        if after.statement != before.statement:
            assert name in descriptive(record)
            changed = [a for a, b in zip(after.statement, before.statement, strict=True) if a != b]
            assert all("epsilon" not in line or name == "target_epsilon" for line in changed)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"epsilon": 0.5}, "epsilon"),  # a smaller ε than the constants give
        ({"epsilon": 1.01}, "epsilon"),  # larger: true, but not what this release computes
        ({"steps": 6}, "epsilon"),
        ({"steps": 10**18}, "epsilon"),
        ({"delta": DELTA / 2}, "epsilon"),
        ({"delta": 2.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"target_epsilon": 0.99}, "target"),
        ({"direction": "sideways"}, "direction"),
        ({"direction": "unlearned_from_reference"}, "direction"),
        ({"assumption_codes": ()}, "assumptions"),
        ({"assumption_codes": ("not_adaptive",)}, "assumptions"),
        ({"training_steps": 199}, "run"),
        ({"training_steps": 201}, "run"),
        ({"earlier_requests": 1, "training_steps": 150}, "run"),  # switched checks off
        ({"earlier_requests": 1, "training_steps": 250}, "run"),
        ({"earlier_steps": 50}, "run"),
        ({"earlier_steps": 50, "training_steps": 150}, "run"),  # of no earlier request
        ({"earlier_steps": None, "training_steps": 150}, "run"),
        ({"earlier_forgotten": 1}, "run"),
        ({"earlier_requests": 1, "earlier_forgotten": None, "training_steps": 100}, "run"),
        ({"method": ""}, "run"),
        ({"method": "Finetuning"}, "run"),  # no method at all
        ({"method": "finetuning"}, "run"),  # adds no noise
        ({"method": "retraining"}, "run"),
        ({"method": "noisy_finetuning"}, "run"),  # other steps
        ({"model_after": "0" * 63 + "a"}, "run"),  # the model before: nothing moved
        ({"number_forgotten": 0, "forgotten": ()}, "forgotten"),
        ({"forgotten": ("00" * 32,) * 3}, "forgotten"),
        ({"forgotten": ("02" * 32, "01" * 32, "03" * 32)}, "forgotten"),  # not in order
        ({"forgotten": ("01" * 32, "02" * 32), "number_forgotten": 2}, "run"),
        ({"ids_hashed": False}, "forgotten"),
        ({"key_mac": None}, "forgotten"),
        ({"model_after": "x"}, "model"),
        ({"certificate_class": "Certificate"}, "constants"),
        ({"constants": {}}, "constants"),
    ],
)
def test_the_check_that_fails_is_the_one_that_was_asked(changes, check) -> None:
    record = record_of(one_output_glm(np.random.default_rng(0)))
    for name in ("epsilon", "target_epsilon"):
        if name in changes:
            changes[name] *= record.epsilon
    false = dataclasses.replace(record, **changes)
    if not math.isnan(false.epsilon):
        false = resealed(false)
    assert check in failed(false)
    report = verify_certificate(false)
    assert str(report).endswith("does NOT hold.")
    assert not report.statement  # what does not hold is not repeated in good words
    assert not report.assumptions


def test_swapped_ids_are_found_with_the_key_and_never_looked_up_with_another() -> None:
    record = made(1)
    others = tuple(sorted(["00" * 32, *record.forgotten[1:]]))
    false = resealed(dataclasses.replace(record, forgotten=others))
    assert failed(false, key=record.key, ids=[3, 5, 17]) == {"key"}
    assert verify_certificate(false, key=record.key, ids=[3]).covers is None


# --- counts ---------------------------------------------------------------------------------------


def test_constants_count_exactly_what_the_record_says_and_what_came_before() -> None:
    record = record_of(requests(np.random.default_rng(0)))  # 40 steps, and 30 of a first request
    assert (record.training_steps, record.earlier_steps, record.earlier_requests) == (40, 30, 1)
    assert verify_certificate(record).holds
    for changes in (
        {"training_steps": 39, "earlier_steps": 31},  # not the phases
        {"training_steps": 41, "earlier_steps": 29},
        {"earlier_requests": 2},
        {"earlier_requests": 0, "earlier_steps": 0},
        {"earlier_requests": 0, "earlier_steps": 0, "training_steps": 70},
        {"earlier_steps": None},
        {"earlier_steps": 31},
        {"earlier_forgotten": 1},  # nothing in the constants counts instances
    ):
        assert "run" in failed(resealed(dataclasses.replace(record, **changes))), changes


def test_instances_of_earlier_requests_are_counted_where_constants_count_instances() -> None:
    certificate = PoissonContractionCertificate((0.5,) * 5, 0.2, 0.8, 10, 0.5, 0.1, 0.2, 10.0, 47)
    record = record_of(certificate, training_steps=6, earlier_requests=2)
    assert (record.earlier_steps, record.earlier_forgotten) == (4, 2)
    assert verify_certificate(record).holds
    assert "2 instances and 4 steps" in str(verify_certificate(record))
    for changes in ({"earlier_forgotten": 1}, {"earlier_forgotten": None}, {"earlier_steps": 3}):
        assert failed(resealed(dataclasses.replace(record, **changes))) == {"run"}


def test_epsilon_is_that_of_this_release_or_of_earlier_ones_and_nothing_else() -> None:
    certificate = PoissonContractionCertificate((0.5,) * 3, 0.2, 0.8, 10, 0.5, 0.1, 0.2, 10.0, 47)
    alone, joined = (record_of(one) for one in (certificate, best_of([certificate])))
    for record in (alone, joined):
        asked = {"delta": record.delta, "steps": record.steps}
        now = certificate.epsilon(**asked)
        before = record.certificate.epsilon_of_earlier_releases(**asked)
        assert record.epsilon == now < 0.97 * before  # two numbers, not one
        for epsilon, names in (
            (now, set()),
            (before, set()),
            ((now + before) / 2.0, {"epsilon"}),
            (1.001 * before, {"epsilon"}),
            (0.999 * now, {"epsilon"}),
        ):
            changes = {"epsilon": epsilon, "target_epsilon": 2.0 * before}
            assert failed(resealed(dataclasses.replace(record, **changes))) == names, epsilon


def test_training_is_not_said_to_be_longer_than_everybody_took_part() -> None:
    full = one_output_glm(np.random.default_rng(0))
    shifts = (*full.shifts[:100], *(0.5 * s for s in full.shifts[100:]))
    later = dataclasses.replace(full, shifts=shifts)  # somebody left after 100 steps
    record = record_of(later, training_steps=100, earlier_requests=1)
    assert verify_certificate(record).holds
    false = dataclasses.replace(record, training_steps=150, earlier_steps=50)
    assert failed(resealed(false)) == {"run"}
    with pytest.raises(CertificateError, match="shifts that fall after 100 of 200"):
        record_of(later)


def test_another_number_of_steps_or_instances_cannot_be_written() -> None:
    certificate = one_output_glm(np.random.default_rng(0))
    for changes in (
        {"training_steps": 199}, {"training_steps": 201, "earlier_requests": 1},
        {"forgotten": [1, 2]}, {"forgotten": [1, 2, 3, 4]}, {"earlier_steps": 5},
        {"earlier_requests": 1, "earlier_steps": 5}, {"earlier_forgotten": 2},
    ):  # fmt: skip
        with pytest.raises(CertificateError, match="Expected the certificate of this run, got"):
            record_of(certificate, **changes)
    with pytest.raises(ValueError, match="earlier_steps"):
        record_of(certificate, earlier_steps=-1)


def test_certificates_of_different_runs_are_not_one() -> None:
    both = best_of([ContractionCertificate(0.9, 1.0, (0.1,) * n) for n in (20, 21)])
    with pytest.raises(CertificateError, match="20 and 21 counted"):
        record_of(both, training_steps=20)


def test_what_nothing_counts_is_said_to_be_uncounted() -> None:
    record = record_of(DataProcessingCertificate((0.1,), (64.0,)), earlier_requests=3)
    assert (record.earlier_steps, record.earlier_forgotten) == (None, None)
    told = str(verify_certificate(record))
    assert "3 earlier requests, of which the constants count nothing" in told
    assert "the constants count no training steps" in told
    # even if whoever wrote it knows
    known = record_of(record.certificate, earlier_requests=3, earlier_steps=9, earlier_forgotten=4)
    assert (known.earlier_steps, known.earlier_forgotten) == (None, None)


# --- models ---------------------------------------------------------------------------------------


def test_noisy_steps_leave_another_model_and_no_step_the_same() -> None:
    curve = DataProcessingCertificate((0.1,), (64.0,))
    same = {"model_before": "0" * 64, "model_after": "0" * 64}
    with pytest.raises(CertificateError, match="one model before and after 7 noisy steps"):
        record_of(curve, **same)
    with pytest.raises(CertificateError, match="another model after no step"):
        record_of(curve, steps=0)
    assert verify_certificate(record_of(curve, steps=0, **same)).holds
    # noisy fine-tuning clips the model before its first step
    assert verify_certificate(record_of(curve, steps=0, method="noisy_finetuning")).holds
    clipped = NoisyFineTuningCertificate(0.0, 1.0, 0.1, 0.0, 1.0)
    assert verify_certificate(record_of(clipped, steps=0)).holds
    for changes in ({"steps": 0}, {"model_after": "0" * 63 + "a"}):
        record = resealed(dataclasses.replace(record_of(curve), **changes))
        assert failed(record) == {"run"}


# --- what is still true ---------------------------------------------------------------------------


def test_a_larger_epsilon_of_another_release_is_still_true() -> None:
    record = record_of(one_output_glm(np.random.default_rng(0)))
    older = dataclasses.replace(
        record, epsilon=1.1 * record.epsilon, software={**record.software, "opacus_pil": "0.0.1"}
    )
    assert verify_certificate(resealed(older)).holds
    smaller = dataclasses.replace(older, epsilon=0.9 * record.epsilon)
    assert "epsilon" in failed(smaller)


def test_a_last_digit_is_no_forgery() -> None:
    record = record_of(one_output_glm(np.random.default_rng(0)))
    lower = dataclasses.replace(record, epsilon=math.nextafter(record.epsilon, 0.0))
    assert verify_certificate(resealed(lower)).holds


def test_the_model_must_be_the_one_after() -> None:
    record = made(1)
    assert verify_certificate(record, model_sha256=record.model_after).holds
    assert failed(record, model_sha256=record.model_before) == {"model"}
    assert failed(record, model_sha256="0" * 64) == {"model"}


# --- what is printed ------------------------------------------------------------------------------


def test_one_direction_is_said_to_be_one() -> None:
    certificate = LangevinCertificate((0.1,), (64.0,), 0.9, 1.0, 1.0)
    record = record_of(certificate)
    assert "in one direction, from model to reference" in str(verify_certificate(record))
    wider = dataclasses.replace(record, direction="both")
    assert failed(resealed(wider)) == {"direction"}
    constants = {**record.constants, "two_sided": True}
    assert "direction" in failed(resealed(dataclasses.replace(record, constants=constants)))


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nok   signature", "\u202eholds", "\x9b1m", "\x07"])
def test_nothing_in_a_file_reaches_the_terminal_as_a_command_or_a_line(text, tmp_path) -> None:
    record = record_of(
        one_output_glm(np.random.default_rng(0)), forgotten=[text, 5, 17], plain_ids=True
    )
    write_certificate(record, path=tmp_path / "c")
    assert (tmp_path / "c").read_bytes().isascii()
    lines = str(verify_certificate(record)).count("\n")
    for changes in (
        {"direction": text}, {"method": text}, {"certificate_class": text}, {"created": text},
        {"assumption_codes": (text,)}, {"constants": {**record.constants, text: 1}},
        {"constants": {**record.constants, "context": [text]}}, {"model_after": text},
        {"software": {"opacus_pil": text}}, {"software": {text: "1.0"}},
    ):  # fmt: skip
        false = resealed(dataclasses.replace(record, **changes))
        told = str(verify_certificate(false, ids=[text, f"{text}x"]))
        assert text not in told
        assert all(line.isprintable() for line in told.split("\n"))
        assert told.count("\n") <= lines
        # and the fields with a fixed form are refused before anybody can print them
        if changes.keys() & {"software", "created", "direction", "method", "assumption_codes"}:
            assert read_back(content_of(false)) is None


def test_a_build_with_words_for_a_version_is_written_as_unknown(monkeypatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.0 approved")
    record = record_of(one_output_glm(np.random.default_rng(0)))
    assert record.software["torch"] == "unknown"
    assert read_back(content_of(record)) is not None


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("2.13.0", True), ("2.13.0+cpu", True), ("2.6.0a0+ecf3bae40a.nv25.01", True),
        ("3.13.0rc1", True), ("3.12.1+", True), ("1.0.post1", True), ("0.1.dev3", True),
        ("1!2.0", True), ("not installed", True), ("unknown", True), ("", False), ("2.0 ", False),
        ("approved", False), ("2.0-approved-by-the-authority", False), ("٣.٢", False),
        ("1.0\n", False),
    ],
)  # fmt: skip
def test_versions_are_versions(version, good) -> None:
    record = made(1)
    record = dataclasses.replace(record, software={**record.software, "torch": version})
    assert (read_back(content_of(record)) is not None) == good


def test_a_long_answer_is_cut() -> None:
    record = made(1)
    odd = dataclasses.replace(record, constants={**record.constants, "x" * 100_000: 1})
    assert max(map(len, str(verify_certificate(odd)).split("\n"))) < 500


def test_the_report_is_json_too() -> None:
    report = verify_certificate(made(1))
    read = json.loads(json.dumps(report.to_json()))
    assert read["holds"] is True
    assert read["covers"] is None
    assert [check["name"] for check in read["checks"]] == [c.name for c in report.checks]
    assert {a["code"] for a in read["assumptions"]} == set(made(1).assumption_codes)
