"""The certificate as a file: JSON, versioned, private, whole or absent.

Knows JSON and files; what a file says is not checked here but by `verification`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic_file import atomic_file
from ..errors import LedgerError
from .certificate_record import FIELDS, FORMAT, VERSION, CertificateRecord, is_sha256


def write_certificate(
    record: CertificateRecord, *, path: str | os.PathLike[str], overwrite: bool = False
) -> None:
    """Write the certificate to `path` and its key, if it has one, to `path`.key; mode 0600.

    Guarantee: the certificate appears whole or not at all, and after its key.

    Args:
        record: From `certificate_record`, or read.
        path: Target; its folder must exist.
        overwrite: Replace files that are there.

    Returns:
        Nothing.

    Raises:
        FileExistsError: There is a file, and `overwrite` is False.
        OSError: The folder is missing or not writable.

    Edge cases (first match wins):
        plain ids, or a record that was read   no key is written

    Source: JSON, RFC 8259; floats by their shortest exact decimal form.
    """
    key_path = Path(f"{os.fspath(path)}.key")
    for there in (Path(path), key_path):
        if there.exists() and not overwrite:
            raise FileExistsError(
                f"Expected {there} not to exist, got a file. It may be the only proof of an "
                "earlier request: choose another name, or pass overwrite=True."
            )
    text = json.dumps(record.content(), indent=1, ensure_ascii=False, allow_nan=False)
    data = f"{text}\n".encode()
    if record.key is not None:
        with atomic_file(key_path) as file:
            file.write(f"{record.key.hex()}\n".encode())
    with atomic_file(path) as file:
        file.write(data)


def read_certificate(path: str | os.PathLike[str]) -> CertificateRecord:
    """Read a certificate file as it is; `verify_certificate` says whether it holds.

    Guarantee: none. Every field is there, of its type and finite; nothing was recomputed.

    Args:
        path: A file that `write_certificate` wrote.

    Returns:
        The record; its key is None.

    Raises:
        LedgerError: Not a certificate, damaged, of another version, or a field that is missing,
            unknown or of another type.
        OSError: The file cannot be read.

    Edge cases (first match wins):
        other spaces or another order of the fields   the same record
        NaN or an infinite number                     LedgerError

    Source: JSON, RFC 8259; numbers are read as IEEE doubles, exactly as written.
    """
    data = Path(path).read_bytes()
    try:
        content = json.loads(
            data,
            object_pairs_hook=_without_repetition,
            parse_constant=_refused,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise LedgerError(
            f"Expected {path} to be a certificate in JSON, got a file that cannot be read "
            f"({error}). Use an earlier copy."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LedgerError(f"Expected {path} to be a certificate, got another kind of file.")
    if content.get("version") != VERSION:
        raise LedgerError(
            f"Expected {path} to be a certificate of version {VERSION}, got "
            f"version={content.get('version')!r}. Install the release that wrote it."
        )
    odd = sorted(set(content) ^ {"format", "version", *FIELDS})
    if odd:
        raise LedgerError(
            f"Expected {path} to have the fields of a certificate, got one missing or unknown: "
            f"{odd[0]!r}. The file was edited or damaged."
        )
    return CertificateRecord(**{name: _typed(name, content[name], path) for name in FIELDS})


def read_key(path: str | os.PathLike[str]) -> bytes:
    """Read the key that was written beside a certificate.

    Guarantee: none; `verify_certificate` says whether it is the key of a certificate.

    Args:
        path: A file that `write_certificate` wrote.

    Returns:
        32 bytes.

    Raises:
        LedgerError: Not 32 bytes in hex.
        OSError: The file cannot be read.

    Edge cases (first match wins):
        space around the digits   ignored

    Source: `certificate_record` explains the hashes.
    """
    data = Path(path).read_bytes()[:100]
    text = data.decode("ascii", "replace").strip()
    if not is_sha256(text):
        raise LedgerError(
            f"Expected {path} to hold a key of 64 hexadecimal digits, got another kind of file."
        )
    return bytes.fromhex(text)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _refused(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


_TEXTS = (
    "method", "direction", "certificate_class", "model_before", "model_after", "created", "checksum"
)  # fmt: skip
_COUNTS = ("number_forgotten", "steps", "training_steps", "earlier_requests")


def _typed(name: str, value: Any, path: str | os.PathLike[str]) -> Any:
    """Return the value of a field in the record's type, or refuse the file."""
    good = True
    if name in _TEXTS:
        good = isinstance(value, str)
    elif name in _COUNTS:
        good = type(value) is int and 0 <= value < 2**63
    elif name in ("epsilon", "delta", "target_epsilon"):
        good = type(value) is float or (type(value) is int and abs(value) < 2**53)
    elif name == "ids_hashed":
        good = isinstance(value, bool)
    elif name == "key_sha256":
        good = value is None or isinstance(value, str)
    elif name in ("forgotten", "assumptions"):
        kinds = (str,) if name == "assumptions" else (str, int)
        good = isinstance(value, list) and all(type(item) in kinds for item in value)
        value = tuple(value) if good else value
    else:
        good = isinstance(value, Mapping)
        if name == "software":
            good = good and all(isinstance(item, str) for item in value.values())
    if not good:
        raise LedgerError(
            f"Expected {name} in {path} to be of a certificate's type, got "
            f"{str(value)[:80]!r}. The file was edited or damaged."
        )
    return value
