"""Signatures of certificates: Ed25519 keys as PEM files, signing, checking.

Knows keys and bytes. Whose key it is, and whether what is signed is true, it does not know; see
docs/signing.md. The library is loaded only where a signature is made or checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from ..errors import LedgerError
from .certificate_record import VERSION, CertificateRecord

_PREFIX = b"opacus_pil certificate signature\n"  # such a key signs nothing else with these words


def new_key(path: str | os.PathLike[str]) -> str:
    """Make a key pair: the private key at `path` (mode 0600), the public one at `path`.pub.

    Guarantee: both files are there, or neither; no file is overwritten. From the operating
        system's random generator.

    Args:
        path: Of the private key; its folder must exist.

    Returns:
        The public key: 32 bytes in hex, as certificates name it.

    Raises:
        FileExistsError: One of the files is there.
        ImportError: The library `cryptography` is not installed.
        OSError: The folder is missing or not writable.

    Edge cases (first match wins):
        another process makes the same file meanwhile   FileExistsError

    Source: Ed25519, RFC 8032; PEM of PKCS #8 (RFC 5958) and SubjectPublicKeyInfo (RFC 8410).
    """
    ed25519, serialization, _ = _library()
    public_path = Path(f"{os.fspath(path)}.pub")
    if public_path.exists():
        raise _there(public_path)
    private = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    _write_new(
        Path(path),
        private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        mode=0o600,
    )
    try:
        _write_new(
            public_path,
            private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo),
            mode=0o644,
        )
    except BaseException:
        Path(path).unlink()
        raise
    return str(private.public_key().public_bytes_raw().hex())


def read_public_key(path: str | os.PathLike[str]) -> str:
    """Read a public key that signatures are held against.

    Guarantee: none about whose key it is.

    Args:
        path: A PEM file of an Ed25519 public key, such as `new_key` wrote to `path`.pub.

    Returns:
        32 bytes in hex, for `verify_certificate(signed_by=…)`.

    Raises:
        LedgerError: Not such a file.
        ImportError: The library `cryptography` is not installed.
        OSError: The file cannot be read.

    Edge cases (first match wins):
        a private key   LedgerError: it does not belong where signatures are checked

    Source: SubjectPublicKeyInfo, RFC 8410.
    """
    ed25519, serialization, _ = _library()
    data = Path(path).read_bytes()
    try:
        found = serialization.load_pem_public_key(data)
    except Exception as error:  # the library raises several types on a foreign file, one cure
        raise LedgerError(
            f"Expected {path} to hold an Ed25519 public key in PEM, got another kind of file. Pass "
            "the file that ends in .pub."
        ) from error
    if not isinstance(found, ed25519.Ed25519PublicKey):
        raise LedgerError(
            f"Expected {path} to hold an Ed25519 public key, got a {type(found).__name__}. Make "
            "one with opacus-pil key."
        )
    return str(found.public_bytes_raw().hex())


def sign_certificate(
    record: CertificateRecord, *, key: str | os.PathLike[str]
) -> CertificateRecord:
    """Return the record with a signature; an earlier signature is replaced.

    Guarantee: whoever has the public key sees any later edit of any field. Nothing is verified
        before it is signed: verify first.

    Args:
        record: From `certificate_record`, or read.
        key: A PEM file of an Ed25519 private key, not encrypted.

    Returns:
        The signed record, for `write_certificate`.

    Raises:
        LedgerError: Not such a key; or a record of version 1, which has no place for a signature;
            or a record that was edited since its checksum was computed.
        ImportError: The library `cryptography` is not installed.
        OSError: The key cannot be read.

    Edge cases (first match wins):
        signed before   the new signature alone

    Source: Ed25519, RFC 8032, over the canonical JSON of all other fields, the checksum and the
        public key included.
    """
    private = _private_key(key)
    if record.version != VERSION:
        raise LedgerError(
            f"Expected a certificate of version {VERSION}, got version {record.version}, which has "
            "no place for a signature. Keep it as it is; sign its file with another tool."
        )
    if record.checksum != record.computed_checksum():
        raise LedgerError(
            "Expected a certificate with its own checksum, got an edited one. Sign what was read "
            "or made, not what was changed since."
        )
    public = private.public_key().public_bytes_raw().hex()
    unsigned = dataclasses.replace(record, signature=None, signed_by=public)
    made = private.sign(_PREFIX + unsigned.signed_bytes()).hex()
    return dataclasses.replace(unsigned, signature=made)


def has_valid_signature(record: CertificateRecord) -> bool:
    """Whether the record's signature is by the key that it names itself.

    Raises:
        ImportError: The library `cryptography` is not installed.
    """
    ed25519, _, invalid = _library()
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(str(record.signed_by)))
        public.verify(bytes.fromhex(str(record.signature)), _PREFIX + record.signed_bytes())
    except (invalid, ValueError):  # ValueError: no hex, another length, no point of the curve, NaN
        return False
    return True


def _private_key(path: str | os.PathLike[str]) -> Any:
    ed25519, serialization, _ = _library()
    data = Path(path).read_bytes()
    try:
        found = serialization.load_pem_private_key(data, password=None)
    except Exception as error:  # several types; TypeError where the key is encrypted
        raise LedgerError(
            f"Expected {path} to hold an Ed25519 private key in PEM without a passphrase, got "
            "another kind of file. Make one with opacus-pil key."
        ) from error
    if not isinstance(found, ed25519.Ed25519PrivateKey):
        raise LedgerError(
            f"Expected {path} to hold an Ed25519 private key, got a {type(found).__name__}. Make "
            "one with opacus-pil key."
        )
    return found


def _library() -> tuple[Any, Any, type[Exception]]:
    """Load the part of `cryptography` that is needed: ed25519, serialization, InvalidSignature."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ImportError(
            "Expected the library cryptography for signatures, got none. "
            'Run pip install "opacus-pil[sign]".'
        ) from error
    return ed25519, serialization, InvalidSignature


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Write a file that was not there, or leave none."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise _there(path) from error
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask takes away
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        raise


def _there(path: Path) -> FileExistsError:
    return FileExistsError(
        f"Expected {path} not to exist, got a file. A key that is gone cannot sign again: choose "
        "another name."
    )
