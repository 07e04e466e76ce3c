"""The certificate file: it says exactly what was written, and an edited one is found out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import stat

import numpy as np
import pytest

from opacus_pil import CertificateError, LedgerError
from opacus_pil.certificates import (
    Certificate,
    CertificateRecord,
    ContractionCertificate,
    LangevinCertificate,
    best_of,
    certificate_record,
    read_certificate,
    read_key,
    verify_certificate,
    write_certificate,
)
from tests.certificates.records import DELTA, MAKERS, one_output_glm, record_of

ORDERS = (1.1, 2.0, 3.5, 8.0, 64.0)


@pytest.fixture
def saved(tmp_path):
    """A file, its record before writing, and what the JSON says."""
    record = record_of(one_output_glm(np.random.default_rng(0)))
    path = tmp_path / "certificate.json"
    write_certificate(record, path=path)
    return path, record, json.loads(path.read_text(encoding="utf-8"))


def failed(record, **given):
    return {c.name for c in verify_certificate(record, **given).checks if c.passed is False}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_class_comes_back_bit_for_bit_and_holds(make, seed, tmp_path) -> None:
    certificate = make(np.random.default_rng(seed))
    record = record_of(certificate)
    write_certificate(record, path=tmp_path / "c")
    read = read_certificate(tmp_path / "c")
    assert read == record
    assert read.certificate == certificate
    assert read.certificate.assumptions == certificate.assumptions
    for steps in (0, 1, 7, 50):
        mine, theirs = (c.rdp(ORDERS, steps=steps) for c in (certificate, read.certificate))
        assert np.array_equal(mine, theirs)  # the same floats give the same floats
    assert verify_certificate(read).holds


def test_many_equal_steps_take_a_line_not_a_page(tmp_path) -> None:
    record = record_of(ContractionCertificate(0.99, 1.0, (0.1,) * 100_000))
    write_certificate(record, path=tmp_path / "c")
    assert (tmp_path / "c").stat().st_size < 10_000
    assert read_certificate(tmp_path / "c").certificate == record.certificate


def test_certificate_and_key_are_private_and_appear_together(saved) -> None:
    path, record, _ = saved
    key_path = path.with_name("certificate.json.key")
    assert sorted(path.parent.iterdir()) == [path, key_path]
    for file in (path, key_path):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_key(key_path) == record.key
    assert record.key.hex() not in path.read_text(encoding="utf-8")


def test_an_existing_proof_is_not_overwritten_unasked(saved) -> None:
    path, record, _ = saved
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="only proof of an earlier request"):
        write_certificate(record, path=path)
    assert path.read_bytes() == before
    write_certificate(dataclasses.replace(record, key=None), path=path, overwrite=True)


def test_a_write_that_fails_leaves_no_certificate(tmp_path) -> None:
    record = record_of(one_output_glm(np.random.default_rng(0)))
    broken = dataclasses.replace(record, epsilon=math.nan)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_certificate(broken, path=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


# --- what was forgotten ---------------------------------------------------------------------------


def test_small_numbers_cannot_be_read_off_the_hashes(saved) -> None:
    _, record, content = saved
    tried = {hashlib.sha256(str(n).encode()).hexdigest() for n in range(100)}
    # The key's own hash is public; as a salt it must not do either.
    salt = bytes.fromhex(record.key_sha256)
    tried |= {hashlib.sha256(salt + str(n).encode()).hexdigest() for n in range(100)}
    assert not tried & set(content["forgotten"])
    again = record_of(one_output_glm(np.random.default_rng(0)))
    assert not set(again.forgotten) & set(record.forgotten)  # another key, other hashes


def test_ids_are_found_with_the_key_and_only_with_it(saved) -> None:
    path, record, _ = saved
    read = read_certificate(path)
    assert verify_certificate(read, key=record.key, ids=["17", 3]).holds
    assert failed(read, key=record.key, ids=[3, 4]) == {"ids"}
    assert failed(read, key=b"\0" * 32, ids=[3]) == {"ids"}
    (check,) = [c for c in verify_certificate(read, ids=[3]).checks if c.name == "ids"]
    assert check.passed is None


def test_plain_ids_are_written_only_on_request(tmp_path) -> None:
    record = record_of(
        one_output_glm(np.random.default_rng(0)), forgotten=["a", np.int64(7)], plain_ids=True
    )
    write_certificate(record, path=tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]  # no key
    read = read_certificate(tmp_path / "c")
    assert read.forgotten == ("a", 7)
    assert verify_certificate(read, ids=["a", "7"]).holds
    assert failed(read, ids=["b"]) == {"ids"}


@pytest.mark.parametrize("forgotten", [[], [3, 3], [3, "3"]])
def test_ids_must_be_there_once(forgotten) -> None:
    with pytest.raises(ValueError, match="each once"):
        record_of(one_output_glm(np.random.default_rng(0)), forgotten=forgotten)


# --- edits ----------------------------------------------------------------------------------------


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
    if isinstance(value, list):
        return [edited(value[0]), *value[1:]]
    if isinstance(value, dict):
        first = next(iter(value))
        return {**value, first: edited(value[first])}
    return "x"


def places(value, path=()):
    """Every place of a JSON document that holds no other places."""
    if isinstance(value, dict) and value:
        return [p for key, item in value.items() for p in places(item, (*path, key))]
    if isinstance(value, list) and value:
        return [p for key, item in enumerate(value) for p in places(item, (*path, key))]
    return [path]


def with_edit(content, path):
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = edited(inner[path[-1]])
    return copy


def caught(path, content, *, new_checksum):
    """Names of the failed checks of a file with this content; "unusable" for a refused file."""
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        record = read_certificate(path)
        if new_checksum:
            record = dataclasses.replace(record, checksum=record.computed_checksum())
        return failed(record)
    except LedgerError:
        return {"unusable"}


def test_any_edit_is_caught_by_the_checksum(saved) -> None:
    path, _, content = saved
    every = places(content)
    assert len(every) > 40
    for place in every:
        found = caught(path, with_edit(content, place), new_checksum=False)
        assert found & {"checksum", "unusable"}, place


# With a new checksum only what disagrees with other fields can be seen. The others are declared:
# who, what for, when, by what. `forgotten`, `key_sha256` and the models are bound to things outside
# the file; the target may be edited to what the constants still satisfy; after earlier requests the
# certificate counts more steps and instances than this one's.
_BOUND_OUTSIDE = {
    "checksum", "method", "software", "created", "model_before", "model_after", "forgotten",
    "key_sha256", "target_epsilon", "earlier_requests",
}  # fmt: skip


def test_an_edit_with_a_new_checksum_is_caught_where_numbers_disagree(saved) -> None:
    path, _, content = saved
    seen = set()
    for place in places(content):
        found = caught(path, with_edit(content, place), new_checksum=True)
        assert bool(found) != (place[0] in _BOUND_OUTSIDE), (place, found)
        seen |= found
    assert {"unusable", "constants", "assumptions", "direction", "epsilon", "run"} <= seen


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_no_constant_of_any_class_can_be_edited_and_the_claim_be_another(make, tmp_path) -> None:
    record = record_of(make(np.random.default_rng(5)))
    path = tmp_path / "c"
    write_certificate(record, path=path)
    content = json.loads(path.read_text(encoding="utf-8"))
    for place in places(content["constants"], ("constants",)):
        copy = with_edit(content, place)
        if not caught(path, copy, new_checksum=True):
            # An order or a step that this ε does not come from: the claim is what it was.
            certificate = read_certificate(path).certificate
            assert certificate.assumptions == record.assumptions, place
            claim = certificate.epsilon(delta=record.delta, steps=record.steps)
            assert claim == pytest.approx(record.epsilon, rel=2e-9), place  # twice the tolerance


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"epsilon": 0.5}, "epsilon"),  # a smaller ε than the constants give
        ({"epsilon": 1.01}, "epsilon"),  # larger: true, but not what this release computes
        ({"steps": 6}, "epsilon"),
        ({"steps": 10**18}, "epsilon"),
        ({"delta": DELTA / 2}, "epsilon"),
        ({"delta": 2.0}, "epsilon"),
        ({"target_epsilon": 0.99}, "target"),
        ({"direction": "sideways"}, "direction"),
        ({"assumptions": ()}, "assumptions"),
        ({"training_steps": 199}, "run"),
        ({"training_steps": 201}, "run"),
        ({"method": ""}, "run"),
        ({"method": "finetuning"}, "run"),  # adds no noise
        ({"method": "noisy_finetuning"}, "run"),  # other steps
        ({"number_forgotten": 0, "forgotten": ()}, "forgotten"),
        ({"forgotten": ("00" * 32,) * 3}, "forgotten"),
        ({"ids_hashed": False}, "forgotten"),
        ({"key_sha256": None}, "forgotten"),
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
    false = dataclasses.replace(false, checksum=false.computed_checksum())
    assert check in failed(false)
    assert "does NOT hold" in str(verify_certificate(false))


def test_a_larger_epsilon_of_another_release_is_still_true() -> None:
    record = record_of(one_output_glm(np.random.default_rng(0)))
    older = dataclasses.replace(
        record, epsilon=1.1 * record.epsilon, software={**record.software, "opacus_pil": "0.0.1"}
    )
    older = dataclasses.replace(older, checksum=older.computed_checksum())
    assert verify_certificate(older).holds
    smaller = dataclasses.replace(older, epsilon=0.9 * record.epsilon)
    assert "epsilon" in failed(smaller)


def test_a_last_digit_is_no_forgery() -> None:
    record = record_of(one_output_glm(np.random.default_rng(0)))
    lower = dataclasses.replace(record, epsilon=math.nextafter(record.epsilon, 0.0))
    lower = dataclasses.replace(lower, checksum=lower.computed_checksum())
    assert verify_certificate(lower).holds


def test_earlier_requests_may_add_steps_and_instances(saved) -> None:
    record = record_of(
        MAKERS[10](np.random.default_rng(0)), training_steps=40, earlier_requests=1
    )  # 40 steps of training and 30 for the first request
    assert verify_certificate(record).holds


def test_the_model_must_be_the_one_after(saved) -> None:
    _, record, _ = saved
    assert verify_certificate(record, model_sha256=record.model_after).holds
    assert failed(record, model_sha256=record.model_before) == {"model"}
    assert failed(record, model_sha256="0" * 64) == {"model"}


# --- what is refused ------------------------------------------------------------------------------


def test_a_certificate_with_functions_cannot_be_written() -> None:
    certificate = LangevinCertificate(
        (0.1,), (64.0,), 0.5, 1.0, 1.0, "retrained",
        retrained_to_stationary=lambda order: 0.0, stationary_to_retrained=lambda order: 0.0,
    )  # fmt: skip
    for one in (certificate, best_of([certificate])):
        with pytest.raises(CertificateError, match=r"retrained_to_stationary.*got a function"):
            record_of(one)


def test_a_foreign_certificate_cannot_be_written() -> None:
    class ContractionCertificateOfMine(ContractionCertificate):
        pass

    with pytest.raises(CertificateError, match="Nobody else could recompute"):
        record_of(ContractionCertificateOfMine(0.5, 1.0, (0.1,)))
    with pytest.raises(TypeError, match="Nothing is proved about other runs"):
        certificate_record(
            None, forgotten=[1], method="x", steps=1, training_steps=1, epsilon=1.0, delta=1e-3,
            target_epsilon=1.0, model_before="0" * 64, model_after="0" * 64,
        )  # fmt: skip


@pytest.mark.parametrize("share", [0.99, 1.3])
def test_an_epsilon_that_is_not_the_certificates_cannot_be_written(share) -> None:
    certificate = one_output_glm(np.random.default_rng(0))
    epsilon = share * certificate.epsilon(delta=DELTA, steps=7)
    with pytest.raises(CertificateError, match="Expected epsilon between"):
        record_of(certificate, epsilon=epsilon)  # below its own, or above the target


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"format": "opacus_pil certificate"}', "[" * 100_000,
        '{"format": "opacus_pil certificate", "version": 2}', '{"a": NaN}', '{"a": 1e999}',
        '{"a": 1, "a": 2}', '{"a": ' + "9" * 5000 + "}", "\x00\xff",
    ],
)  # fmt: skip
def test_a_file_that_is_no_certificate_is_refused_by_name(text, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LedgerError, match=r"Expected .*file to be a certificate"):
        read_certificate(path)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(CertificateRecord)][:-1])
def test_a_field_missing_or_of_another_type_is_refused(name, saved) -> None:
    path, _, content = saved
    for value in ({"x": [None]}, None, 1.5, "5", -1):
        if (name == "key_sha256" and value in (None, "5")) or (
            isinstance(value, type(content[name])) and value != -1
        ):
            continue
        if value == -1 and not isinstance(content[name], int):
            continue
        path.write_text(json.dumps({**content, name: value}), encoding="utf-8")
        with pytest.raises(LedgerError, match=name):
            read_certificate(path)
    del content[name]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(LedgerError, match=name):
        read_certificate(path)


@pytest.mark.parametrize(
    "constants",
    [
        {"runs": [[0.1, 10**12]]},  # would fill the memory
        {"runs": [[0.1, -1]]},
        {"runs": [[0.1, True]]},
        {"runs": 3},
        {"float": "nan"},
        {"class": "ContractionCertificate", "constants": {}},
        {"class": [], "constants": 1},
        ["0.1"],
        "0.1",
        None,
    ],
)
def test_odd_constants_fail_and_raise_nothing(constants) -> None:
    record = record_of(one_output_glm(np.random.default_rng(0)))
    odd = dataclasses.replace(record, constants={**record.constants, "shifts": constants})
    assert "constants" in failed(odd)


def test_edited_counts_do_not_fill_the_memory() -> None:
    (poisson,) = [make for make in MAKERS if make.__name__ == "poisson"]
    record = record_of(poisson(np.random.default_rng(0)))
    for name in ("training_steps", "num_retained"):
        odd = dataclasses.replace(record, constants={**record.constants, name: 10**15})
        assert failed(odd) & {"constants", "epsilon", "assumptions"}


def test_a_key_file_is_checked(tmp_path) -> None:
    (tmp_path / "k").write_bytes(b"\xff" * 64)
    with pytest.raises(LedgerError, match="64 hexadecimal digits"):
        read_key(tmp_path / "k")


def test_classes_are_those_of_the_package() -> None:
    from opacus_pil.certificates.fields import CLASSES

    def below(kind):
        return {kind, *(k for sub in kind.__subclasses__() for k in below(sub))}

    ours = {k for k in below(Certificate) if k.__module__.startswith("opacus_pil.")}
    assert set(CLASSES.values()) == ours - {Certificate}
