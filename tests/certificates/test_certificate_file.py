"""The certificate file: it says exactly what was written, and other files are refused."""

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
    ContractionCertificate,
    LangevinCertificate,
    best_of,
    certificate_record,
    read_certificate,
    read_key,
    verify_certificate,
    write_certificate,
)
from opacus_pil.certificates.certificate_record import FIELDS, VERSION, hashed_id
from tests.certificates.records import DELTA, MAKERS, failed, one_output_glm, record_of

ORDERS = (1.1, 2.0, 3.5, 8.0, 64.0)


@pytest.fixture
def saved(tmp_path):
    """A file, its record before writing, and what the JSON says."""
    record = record_of(one_output_glm(np.random.default_rng(0)))
    path = tmp_path / "certificate.json"
    write_certificate(record, path=path)
    return path, record, json.loads(path.read_text(encoding="utf-8"))


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
    # What is public of the key must not do as a key or salt either.
    salt = bytes.fromhex(record.key_mac)
    tried |= {hashlib.sha256(salt + str(n).encode()).hexdigest() for n in range(100)}
    tried |= {hashed_id(n, key=salt) for n in range(100)}
    assert not tried & set(content["forgotten"])
    again = record_of(one_output_glm(np.random.default_rng(0)))
    assert not set(again.forgotten) & set(record.forgotten)  # another key, other hashes


def test_ids_are_found_with_the_key_and_only_with_it(saved) -> None:
    path, record, _ = saved
    read = read_certificate(path)
    report = verify_certificate(read, key=record.key, ids=["17", 3])
    assert report.holds
    assert report.covers is True
    assert failed(read, key=b"\0" * 32, ids=[3]) == {"key"}
    for given in ({"ids": [3]}, {"key": record.key}, {"ids": [], "key": record.key}):
        report = verify_certificate(read, **given)
        assert report.covers is None
        assert "ids" in [c.name for c in report.checks if c.passed is None]


def test_an_id_that_is_not_in_it_does_not_break_a_certificate(saved) -> None:
    path, record, _ = saved
    report = verify_certificate(read_certificate(path), key=record.key, ids=[3, 4])
    assert report.holds
    assert report.covers is False
    assert report.missing == ("4",)
    assert str(report).endswith("The certificate holds; this id is not in it: '4'.")
    assert "1 of 2 not in it: '4'" in str(report)
    assert report.statement  # still says what it says


def test_plain_ids_are_written_only_on_request(tmp_path) -> None:
    record = record_of(
        one_output_glm(np.random.default_rng(0)), forgotten=["a", np.int64(7), "é"], plain_ids=True
    )
    write_certificate(record, path=tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]  # no key
    read = read_certificate(tmp_path / "c")
    assert read.forgotten == ("a", 7, "é")
    assert verify_certificate(read, ids=["a", "7"]).covers is True
    assert verify_certificate(read, ids=["b"]).covers is False


def test_plain_ids_take_the_place_of_hashed_ones_with_their_key(saved) -> None:
    path, record, _ = saved
    plain = record_of(record.certificate, plain_ids=True)
    write_certificate(plain, path=path, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # and whoever has a key is told that this is not its certificate
    assert failed(read_certificate(path), key=record.key) == {"key"}


@pytest.mark.parametrize("forgotten", [[], [3, 3], [3, "3"]])
def test_ids_must_be_there_once(forgotten) -> None:
    with pytest.raises(ValueError, match="each once"):
        record_of(one_output_glm(np.random.default_rng(0)), forgotten=forgotten)


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
            None, forgotten=[1], method="dp_sgd", steps=1, training_steps=1, epsilon=1.0,
            delta=1e-3, target_epsilon=1.0, model_before="0" * 64, model_after="1" * 64,
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
        '{"a": NaN}', '{"a": 1e999}',
        '{"format": "opacus_pil certificate", "version": 3}',
        '{"format": "opacus_pil certificate", "version": true}',
        '{"format": "opacus_pil certificate", "version": "2"}',
        '{"a": 1, "a": 2}', '{"a": ' + "9" * 5000 + "}", "\x00\xff",
    ],
)  # fmt: skip
def test_a_file_that_is_no_certificate_is_refused_by_name(text, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LedgerError, match=r"Expected .*file to be a certificate"):
        read_certificate(path)


NULLABLE = {"key_mac", "earlier_steps", "earlier_forgotten", "signature", "signed_by"}


@pytest.mark.parametrize("name", FIELDS[VERSION])
def test_a_field_missing_or_of_another_type_is_refused(name, saved) -> None:
    path, _, content = saved
    for value in ({"x": [None]}, None, 1.5, "5 !", -1):
        if value is None and name in NULLABLE:
            continue
        if isinstance(content[name], float) and value in (1.5, -1):
            continue  # a number like any other; `verification` asks for its range
        if name == "constants" and isinstance(value, dict):
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
        {"code": "supplied_by_caller"},
        {"code": "no such code", "of": "me"},
        json.loads('{"a":' * 300 + "1" + "}" * 300),
        json.loads('{"class": "BestCertificate", "constants": {"members": [' * 300 + "]}}" * 300),
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
