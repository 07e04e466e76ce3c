"""The certificate as a file: JSON, versioned, private, whole or absent.

Knows JSON and files; what a file says is not checked here but by `verification`. Fields that
nothing can check (versions, time) may hold nothing but versions and a time.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..atomic_file import atomic_file
from ..errors import LedgerError
from .certificate_record import FIELDS, FORMAT, VERSION, CertificateRecord, is_hex
from .recording import NO_VERSION, SOFTWARE, VERSION_LIKE
from .version1 import Version1


def write_certificate(
    record: CertificateRecord, *, path: str | os.PathLike[str], overwrite: bool = False
) -> None:
    """Write the certificate to `path` and its key, if it has one, to `path`.key; mode 0600.

    Guarantee: the certificate appears whole or not at all, and after its key.

    Args:
        record: From `certificate_record`, `sign_certificate`, or read.
        path: Target; its folder must exist.
        overwrite: Replace files that are there.

    Returns:
        Nothing.

    Raises:
        FileExistsError: There is a file, and `overwrite` is False.
        OSError: The folder is missing or not writable.

    Edge cases (first match wins):
        plain ids                              no key is written, an overwritten one's is deleted
        a record that was read                 no key is written
        a record read from version 1           the same file of version 1

    Source: JSON, RFC 8259; floats by their shortest exact decimal form.
    """
    key_path = Path(f"{os.fspath(path)}.key")
    for there in (Path(path), key_path):
        if there.exists() and not overwrite:
            raise FileExistsError(
                f"Expected {there} not to exist, got a file. It may be the only proof of an "
                "earlier request: choose another name, or pass overwrite=True."
            )
    # In ASCII: what a terminal takes for a command must not stand in an id as it is.
    data = f"{json.dumps(record.content(), indent=1, allow_nan=False)}\n".encode("ascii")
    if record.key is not None:
        with atomic_file(key_path) as file:
            file.write(f"{record.key.hex()}\n".encode())
    with atomic_file(path) as file:
        file.write(data)
    if not record.ids_hashed:
        key_path.unlink(missing_ok=True)  # of a certificate that is no more


def read_certificate(path: str | os.PathLike[str]) -> CertificateRecord:
    """Read a certificate file as it is; `verify_certificate` says whether it holds.

    Guarantee: none. Every field is there, of its type and finite; nothing was recomputed.

    Args:
        path: A file that `write_certificate` wrote, of this version of the format or version 1.

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
    content = _content(path)
    version = content.get("version")
    if type(version) is not int or version not in FIELDS:
        raise LedgerError(
            f"Expected {path} to be a certificate of version 1 to {VERSION}, got "
            f"version={str(version)[:20]!r}. Install the release that wrote it."
        )
    names = FIELDS[version]
    odd = sorted(set(content) ^ {"format", "version", *names})
    if odd:
        raise LedgerError(
            f"Expected {path} to have the fields of a certificate, got one missing or unknown: "
            f"{odd[0][:80]!r}. The file was edited or damaged."
        )
    fields = {name: _typed(name, content[name], path) for name in names}
    if (fields.get("signature") is None) != (fields.get("signed_by") is None):
        raise LedgerError(
            f"Expected {path} to hold signature and signed_by or neither, got one of them. The "
            "file was edited or damaged."
        )
    if version == VERSION:
        return CertificateRecord(**fields)
    old = Version1(fields.pop("assumptions"), fields.pop("key_sha256"))
    for name in ("key_mac", "earlier_steps", "earlier_forgotten"):
        fields[name] = None
    return CertificateRecord(**fields, assumption_codes=(), version1=old)


def _content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON object of a certificate file."""
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
    return content


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
    if not is_hex(text):
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
    raise ValueError(f"{text[:20]} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def _word(value: Any) -> bool:
    """Whether `value` may be a name out of a fixed list; which one is asked by `verification`."""
    return isinstance(value, str) and re.fullmatch(r"\w{0,64}", value, re.ASCII) is not None


def _id(value: Any) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)  # no text at all
    return type(value) is int and abs(value) < 2**63


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _versions(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in SOFTWARE
        and isinstance(item, str)
        and (item in NO_VERSION or VERSION_LIKE.fullmatch(item) is not None)
        for name, item in value.items()
    )


_TIME = re.compile(r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d\+00:00", re.ASCII)
_TYPES: dict[str, Callable[[Any], bool]] = {
    "forgotten": lambda value: isinstance(value, list) and all(map(_id, value)),
    "ids_hashed": lambda value: isinstance(value, bool),
    "key_mac": lambda value: value is None or is_hex(value),
    "key_sha256": lambda value: value is None or is_hex(value),
    "number_forgotten": _count,
    "method": _word,
    "steps": _count,
    "training_steps": _count,
    "earlier_requests": _count,
    "earlier_steps": lambda value: value is None or _count(value),
    "earlier_forgotten": lambda value: value is None or _count(value),
    "epsilon": _number,
    "delta": _number,
    "target_epsilon": _number,
    "direction": _word,
    "certificate_class": _word,
    "constants": lambda value: isinstance(value, dict),
    "assumptions": _texts,
    "assumption_codes": lambda value: isinstance(value, list) and all(map(_word, value)),
    "model_before": is_hex,
    "model_after": is_hex,
    "software": _versions,
    "created": lambda value: isinstance(value, str) and _TIME.fullmatch(value) is not None,
    "checksum": is_hex,
    "signature": lambda value: value is None or is_hex(value, size=64),
    "signed_by": lambda value: value is None or is_hex(value),
}


def _typed(name: str, value: Any, path: str | os.PathLike[str]) -> Any:
    """Return the value of a field in the record's type, or refuse the file."""
    if not _TYPES[name](value):
        raise LedgerError(
            f"Expected {name} in {path} to be of a certificate's type, got "
            f"{str(value)[:80]!r}. The file was edited or damaged."
        )
    return tuple(value) if name in _SEQUENCES else value


_SEQUENCES = ("forgotten", "assumptions", "assumption_codes")
