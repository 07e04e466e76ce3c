"""Certificate files of version 1, which hold sentences where version 2 holds codes.

Their words are not shown: they are generated anew from class and constants, and held against what
the file says. Knows the old fields and how sentences turn into codes; checks no numbers.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from ..errors import CertificateError
from .assumptions import Assumption, assumption, number_kinds
from .certificate import Certificate
from .fields import decoded, encoded
from .sentences import CONTEXT, SENTENCES

FIELDS = (
    "forgotten", "ids_hashed", "key_sha256", "number_forgotten", "method", "steps",
    "training_steps", "earlier_requests", "epsilon", "delta", "target_epsilon", "direction",
    "certificate_class", "constants", "assumptions", "model_before", "model_after", "software",
    "created", "checksum",
)  # fmt: skip
# Once a context of some certificates, now of all that it holds for.
_NOW_EVERYWHERE = SENTENCES["not_adaptive"]
_NUMBER = {
    "g": r"\d+(?:\.\d+)?(?:e[+-]\d+)?",
    "d": r"\d+",
    "list": r"none|\d+(?:, \d+)*",
}


class Version1(NamedTuple):
    """What only version 1 holds: sentences, and the digest of the key of the hashed ids."""

    sentences: tuple[str, ...]
    key_sha256: str | None


def upgraded(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Return constants of version 1 as version 2 writes them, also inside of other constants.

    Raises:
        CertificateError: A context that is no sentence of this package.
    """
    found = {name: _upgraded(value) for name, value in constants.items()}
    if "context" not in found:
        return found
    sentences = decoded(found["context"])
    if not isinstance(sentences, tuple) or not all(isinstance(item, str) for item in sentences):
        raise CertificateError("Expected sentences as context, got something else.")
    kept = [_coded(item) for item in sentences if item != _NOW_EVERYWHERE]
    return {**found, "context": encoded(tuple(kept), "context")}


def words_mismatch(certificate: Certificate, sentences: Iterable[str]) -> str | None:
    """Return the first recorded sentence that is not the generated one; None: all are."""
    generated, recorded = (
        [one for one in those if not one.endswith(_NOW_EVERYWHERE)]
        for those in (certificate.assumptions, sentences)
    )
    if generated == recorded:
        return None
    for own, said in zip(generated, recorded, strict=False):
        if own != said:
            return said
    return f"{len(recorded)} sentences instead of {len(generated)}"


def _upgraded(value: Any) -> Any:
    if isinstance(value, list):
        return [_upgraded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"class", "constants"} and isinstance(value["constants"], dict):
        return {**value, "constants": upgraded(value["constants"])}
    return {name: _upgraded(item) for name, item in value.items()}


def _coded(sentence: str) -> str | Assumption:
    """Return the code of a context sentence, with the numbers that it shows."""
    for code in CONTEXT:
        match = _pattern(code).fullmatch(sentence)
        if match is None:
            continue
        kinds = number_kinds(code)
        one = assumption(code, **{name: _READ[kinds[name]](match[name]) for name in kinds})
        if one.sentence == sentence:
            return one if one.numbers else code
    raise CertificateError(
        f"Expected sentences of this package as context, got another one: {sentence[:80]!r}. Its "
        "words are not shown; the certificate rests on something that nobody can check."
    )


def _listed(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(map(int, text.split(", ")))


_READ: dict[str, Callable[[str], Any]] = {"g": float, "d": int, "list": _listed}


@cache
def _pattern(code: str) -> re.Pattern[str]:
    """A sentence with its numbers left open."""
    found, seen = "", set[str]()
    for words, name, _, _ in string.Formatter().parse(SENTENCES[code]):
        found += re.escape(words)
        if name in seen:
            found += f"(?P={name})"
        elif name is not None:
            found += f"(?P<{name}>{_NUMBER[number_kinds(code)[name]]})"
            seen.add(name)
    return re.compile(found, re.ASCII)
