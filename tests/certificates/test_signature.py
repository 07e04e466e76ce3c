"""A signature says who wrote a certificate file; any edit after it is seen."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from opacus_pil import LedgerError
from opacus_pil.certificates import (
    new_key,
    read_certificate,
    read_public_key,
    sign_certificate,
    verify_certificate,
    write_certificate,
)
from opacus_pil.certificates.certificate_record import FIELDS, VERSION
from tests.certificates.records import failed, one_output_glm, record_of
from tests.certificates.test_certificate_edits import edited

PEM = serialization.Encoding.PEM


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Paths of two private keys; their public keys lie beside them."""
    folder = tmp_path_factory.mktemp("keys")
    paths = folder / "issuer", folder / "other"
    for path in paths:
        new_key(path)
    return paths


@pytest.fixture(scope="module")
def signed(keys):
    return sign_certificate(record_of(one_output_glm(np.random.default_rng(0))), key=keys[0])


def public(path):
    return read_public_key(f"{path}.pub")


def answer(record, **given):
    (check,) = [c for c in verify_certificate(record, **given).checks if c.name == "signature"]
    return check


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_pair_is_private_and_public_and_never_overwritten(tmp_path) -> None:
    path = tmp_path / "issuer"
    mask = os.umask(0)
    try:
        name = new_key(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.with_name("issuer.pub").stat().st_mode) == 0o644
    assert read_public_key(tmp_path / "issuer.pub") == name
    private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    assert private.public_key().public_bytes_raw().hex() == name
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"issuer\.pub not to exist"):
        new_key(path)
    (tmp_path / "issuer.pub").unlink()
    with pytest.raises(FileExistsError, match="issuer not to exist"):
        new_key(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["issuer"]


def test_a_pair_is_whole_or_absent(tmp_path, monkeypatch) -> None:
    real = os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError("disk full")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        new_key(tmp_path / "issuer")
    assert list(tmp_path.iterdir()) == []


def _write(path, data):
    path.write_bytes(data)
    return path


def test_other_files_are_no_keys(tmp_path, keys) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    locked = private.private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    foreign = rsa.generate_private_key(65537, 1024)
    rsa_private = foreign.private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    rsa_public = foreign.public_key().public_bytes(
        PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    record = record_of(one_output_glm(np.random.default_rng(0)))
    pem = keys[0].read_bytes()
    public_pem = Path(f"{keys[0]}.pub").read_bytes()
    for data in (b"", b"\xff", pem[:60], public_pem, locked, rsa_private):
        with pytest.raises(LedgerError, match="Ed25519 private key"):
            sign_certificate(record, key=_write(tmp_path / "k", data))
    for data in (b"", b"\xff", public_pem[:60], public_pem[:-30], pem, rsa_public):
        with pytest.raises(LedgerError, match="Ed25519 public key"):
            read_public_key(_write(tmp_path / "k", data))
    with pytest.raises(FileNotFoundError):
        sign_certificate(record, key=tmp_path / "missing")


# --- signing and checking -------------------------------------------------------------------------


def test_a_signed_certificate_comes_back_and_is_by_its_signer(signed, keys, tmp_path) -> None:
    write_certificate(signed, path=tmp_path / "c")
    read = read_certificate(tmp_path / "c")
    assert read == signed
    report = verify_certificate(read, signed_by=public(keys[0]))
    assert report.holds
    assert answer(read, signed_by=public(keys[0])).passed is True
    assert read.signed_by == public(keys[0])
    # the signature is Ed25519 over the canonical content: another program can check it
    content = json.loads((tmp_path / "c").read_text(encoding="ascii"))
    signature = content.pop("signature")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    key = serialization.load_pem_public_key(Path(f"{keys[0]}.pub").read_bytes())
    key.verify(
        bytes.fromhex(signature), b"opacus_pil certificate signature\n" + text.encode("ascii")
    )


def test_an_unsigned_file_says_that_anybody_may_have_written_it(signed, keys) -> None:
    plain = dataclasses.replace(signed, signature=None, signed_by=None)
    check = answer(plain)
    assert check.passed is None
    assert check.detail == "nobody signed it: anybody may have written this file"
    assert "nobody signed it: anybody may have written this file" in str(verify_certificate(plain))
    assert failed(plain, signed_by=public(keys[0])) == {"signature"}


def test_a_signature_says_little_until_somebody_says_whose(signed, keys) -> None:
    check = answer(signed)
    assert check.passed is None
    assert signed.signed_by in check.detail
    assert failed(signed, signed_by=public(keys[1])) == {"signature"}
    again = sign_certificate(signed, key=keys[1])  # a rotated key takes the place of the old one
    assert failed(again, signed_by=public(keys[0])) == {"signature"}
    assert verify_certificate(again, signed_by=public(keys[1])).holds
    assert sign_certificate(again, key=keys[0]) == signed  # Ed25519 has no randomness


def test_any_edited_field_breaks_the_signature(signed, keys) -> None:
    asked = public(keys[0])
    for name in FIELDS[VERSION]:
        value = signed.content()[name]
        if isinstance(value, list):
            other = (*value[1:], value[0])
        elif isinstance(value, dict):
            first = next(iter(value))
            other = {**value, first: edited(value[first])}
        else:
            other = "0" * 64 if value is None else edited(value)
        false = dataclasses.replace(signed, **{name: other})
        if name not in ("checksum", "signature", "signed_by"):
            false = dataclasses.replace(false, checksum=false.computed_checksum())
        assert "signature" in failed(false), name  # also where nobody asked whose it is
        assert "signature" in failed(false, signed_by=asked), name


def test_a_signature_of_another_certificate_or_a_bare_name_does_not_count(signed, keys) -> None:
    asked = public(keys[0])
    other = record_of(one_output_glm(np.random.default_rng(1)))
    moved = dataclasses.replace(other, signature=signed.signature, signed_by=signed.signed_by)
    assert failed(moved, signed_by=asked) == {"signature"}
    for changes in (
        {"signed_by": None}, {"signature": ""}, {"signature": "0" * 128}, {"signed_by": asked[:62]},
        {"signature": "x"}, {"signature": signed.signature[:-2]}, {"signed_by": "zz" * 32},
    ):  # fmt: skip
        assert "signature" in failed(dataclasses.replace(signed, **changes), signed_by=asked)


def test_a_signature_without_its_key_or_cut_is_refused_at_reading(signed, tmp_path) -> None:
    content = signed.content()
    for changes in (
        {"signature": None}, {"signed_by": None}, {"signed_by": content["signed_by"][:62]},
        {"signature": content["signature"][:-2]}, {"signature": content["signature"].upper()},
    ):  # fmt: skip
        (tmp_path / "c").write_text(json.dumps({**content, **changes}), encoding="utf-8")
        with pytest.raises(LedgerError, match="sign"):
            read_certificate(tmp_path / "c")


@pytest.mark.parametrize("asked", ["", "issuer.pub", "0" * 62, b"\0" * 32, "G" * 64])
def test_what_is_no_public_key_cannot_be_asked_for(signed, asked) -> None:
    with pytest.raises(ValueError, match="signed_by"):
        verify_certificate(signed, signed_by=asked)


def test_what_was_edited_or_is_of_version_1_is_not_signed(signed, keys) -> None:
    with pytest.raises(LedgerError, match="edited one"):
        sign_certificate(dataclasses.replace(signed, epsilon=0.0), key=keys[0])
    old = read_certificate(Path(__file__).parent / "version1" / "contraction.json")
    with pytest.raises(LedgerError, match="no place for a signature"):
        sign_certificate(old, key=keys[0])


# --- without the library --------------------------------------------------------------------------


@pytest.fixture
def without_library(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "cryptography":
            monkeypatch.setitem(sys.modules, name, None)


def test_without_the_library_the_cure_is_named(signed, keys, tmp_path, without_library) -> None:
    unsigned = dataclasses.replace(signed, signature=None, signed_by=None)
    for act in (
        lambda: new_key(tmp_path / "k"),
        lambda: sign_certificate(unsigned, key=keys[0]),
        lambda: read_public_key(f"{keys[0]}.pub"),
        lambda: verify_certificate(signed, signed_by="0" * 64),
    ):
        with pytest.raises(ImportError, match=r'pip install "opacus-pil\[sign\]"'):
            act()
    assert list(tmp_path.iterdir()) == []
    assert verify_certificate(unsigned).holds  # which needs no library
    check = answer(signed)
    assert check.passed is None
    assert "not checked" in check.detail


def test_certificates_load_without_the_library() -> None:
    code = "import sys, opacus_pil.certificates; sys.exit('cryptography' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
