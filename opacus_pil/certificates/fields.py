"""A certificate as plain JSON values, and back: a class name from a fixed list, and its constants.

Nothing is unpickled or imported by name. Floats keep every bit (JSON writes their shortest exact
form), infinity is written as {"float": "inf"}, NaN is refused, repeated numbers are counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CertificateError, OpacusPilError
from .assumptions import Assumption, assumption
from .best import BestCertificate
from .certificate import Certificate
from .chien2024 import Chien2024Certificate
from .contraction import ContractionCertificate
from .data_processing import DataProcessingCertificate
from .langevin import LangevinCertificate
from .mini_batches import PoissonContractionCertificate
from .noisy_finetuning import NoisyFineTuningCertificate

CLASSES: dict[str, type[Certificate]] = {
    kind.__name__: kind
    for kind in (
        BestCertificate,
        Chien2024Certificate,
        ContractionCertificate,
        DataProcessingCertificate,
        LangevinCertificate,
        NoisyFineTuningCertificate,
        PoissonContractionCertificate,
    )
}
# DataProcessingCertificate keeps its argument `rdp`, also a method's name, as the field `curve`.
_ARGUMENT = {("DataProcessingCertificate", "curve"): "rdp"}
_INFINITY = {"float": "inf"}
_LONGEST = 10_000_000  # entries of one sequence: an edited count must not fill the memory
# What constructors and formulas raise when they are fed numbers they were not made for.
REFUSALS = (
    TypeError, ValueError, ArithmeticError, MemoryError, RecursionError, OpacusPilError
)  # fmt: skip


def constants_of(certificate: Certificate) -> tuple[str, dict[str, Any]]:
    """Return class name and constants, in JSON values.

    Raises:
        CertificateError: A class this package does not know, or a constant that is no number, text
            or sequence of them, such as the functions of a Langevin certificate.
    """
    name = type(certificate).__name__
    if CLASSES.get(name) is not type(certificate):
        raise CertificateError(
            f"Expected one of the package's own certificates ({', '.join(CLASSES)}), got {name}. "
            "Nobody else could recompute its numbers from a file."
        )
    steps = getattr(certificate, "training_steps", 0)
    if steps > _LONGEST:
        raise CertificateError(f"Expected at most {_LONGEST} training steps, got {steps}.")
    return name, {
        field.name: encoded(getattr(certificate, field.name), f"{name}.{field.name}")
        for field in _fields(type(certificate))
    }


def rebuilt(name: str, constants: Mapping[str, Any]) -> Certificate:
    """Return the certificate that `constants_of` described.

    Raises:
        CertificateError: An unknown class, a constant too many or too few, one that the class
            refuses, or one that it does not keep as it is written.
    """
    kind = CLASSES.get(name)
    if kind is None:
        raise CertificateError(
            f"Expected the certificate's class to be one of {', '.join(CLASSES)}, got {name!r}. "
            "Use the release that wrote the file."
        )
    names = {field.name for field in _fields(kind)}
    constants = _completed(kind, constants)
    if set(constants) != names:
        odd = sorted(set(constants) ^ names)
        raise CertificateError(
            f"Expected the constants of {name} ({', '.join(sorted(names))}), got one missing or "
            f"unknown: {odd[0]!r}. The file was edited or written by another release."
        )
    try:
        certificate = kind(
            **{_ARGUMENT.get((name, key), key): decoded(constants[key]) for key in names}
        )
    except REFUSALS as error:
        raise CertificateError(
            f"Expected constants that {name} accepts, got a refusal: {error}"
        ) from error
    if constants_of(certificate)[1] != constants:
        raise CertificateError(
            f"Expected constants that {name} keeps as they are written, got others after "
            "rebuilding it. The file was edited."
        )
    return certificate


def _completed(kind: type[Certificate], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Return constants with the empty context that was not written before every class had one.

    Files of version 1 and queues keep what was written then; a context left out says as much as an
    empty one.
    """
    found = {name: _completed_inside(value) for name, value in constants.items()}
    if any(field.name == "context" for field in _fields(kind)):
        found.setdefault("context", [])
    return found


def _completed_inside(value: Any) -> Any:
    if isinstance(value, list):
        return [_completed_inside(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = CLASSES.get(str(value.get("class")))
    inner = value.get("constants")
    if kind is not None and len(value) == 2 and isinstance(inner, dict):
        return {**value, "constants": _completed(kind, inner)}
    return {name: _completed_inside(item) for name, item in value.items()}


def _fields(kind: type[Certificate]) -> list[dataclasses.Field[Any]]:
    """Those fields that the constructor takes; the others follow from them."""
    assert dataclasses.is_dataclass(kind)
    return [field for field in dataclasses.fields(kind) if field.init]


def encoded(value: Any, where: str) -> Any:
    """Return a constant in JSON values; `where` is its name for the error."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return _encoded_float(value, where)
    if isinstance(value, Certificate):
        name, constants = constants_of(value)
        return {"class": name, "constants": constants}
    if isinstance(value, Assumption):
        return {"code": value.code, **{n: encoded(v, where) for n, v in value.numbers}}
    if isinstance(value, list | tuple):
        return _encoded_sequence(value, where)
    if callable(value):
        raise CertificateError(
            f"Expected {where} to be a number, got a function. A file cannot hold it, and a table "
            "of its values would not say what it is between and beyond them: this certificate can "
            "be used, but not written."
        )
    raise CertificateError(f"Expected {where} to be a plain value, got {type(value).__name__}.")


def _encoded_float(value: float, where: str) -> Any:
    if math.isnan(value):
        raise CertificateError(f"Expected {where} to be a number, got NaN.")
    return value if math.isfinite(value) else dict(_INFINITY)


def _encoded_sequence(value: Sequence[Any], where: str) -> Any:
    """Return a list of the items, or how often each stands in a row where that is shorter."""
    if len(value) > _LONGEST:
        raise CertificateError(
            f"Expected {where} to have at most {_LONGEST} entries, got {len(value)}."
        )
    items = [encoded(item, where) for item in value]
    runs = [[item, len(list(same))] for item, same in itertools.groupby(items)]
    return {"runs": runs} if 2 * len(runs) < len(items) else items


def decoded(value: Any) -> Any:
    """Return the constant that was encoded, or raise one of REFUSALS."""
    if isinstance(value, list):
        return tuple(decoded(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value == _INFINITY:
        return math.inf
    if set(value) == {"class", "constants"} and isinstance(value["constants"], dict):
        return rebuilt(value["class"], value["constants"])
    if isinstance(value.get("code"), str):
        return _decoded_assumption(**value)
    if set(value) == {"runs"} and _are_runs(value["runs"]):
        return _decoded_runs(value["runs"])
    raise CertificateError(f"Expected a constant, got {str(value)[:80]}.")


def _decoded_assumption(code: str, **numbers: Any) -> Assumption:
    return assumption(code, **{name: decoded(item) for name, item in numbers.items()})


def _are_runs(pairs: Any) -> bool:
    """Whether these are pairs of an item and how often it stands in a row."""
    return (
        isinstance(pairs, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        and all(type(count) is int and count > 0 for _, count in pairs)
    )


def _decoded_runs(pairs: list[list[Any]]) -> tuple[Any, ...]:
    total = sum(count for _, count in pairs)
    if total > _LONGEST:
        raise CertificateError(f"Expected at most {_LONGEST} entries in a sequence, got {total}.")
    return tuple(itertools.chain.from_iterable([decoded(item)] * count for item, count in pairs))
