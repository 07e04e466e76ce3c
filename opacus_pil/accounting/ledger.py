"""The ledger: the accountant's state as numpy arrays and plain values, checked when it is read.

Knows what a well-formed ledger is; not how a step changes it, nor how shards become one
(`shards`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray
from ..errors import LedgerError
from .filter import PrivacyFilter
from .guarantee import GUARANTEES, STRONGEST_LABEL
from .history import History

VERSION = 3
_WITHOUT_REASONS = 2  # written by a release that kept none
_UNEARNED = (
    "the ledger was written by a release that did not look at what ran: the label is its own"
)


@dataclass(frozen=True)
class Ledger:
    """Everything that gives the accounted numbers their meaning.

    Shapes: orders (orders,); sensitivities (levels,); base (levels + 1, orders), the last row
    belongs to forgotten instances; level, infinite, instance_ids (instances,); offset (instances,
    orders); caps (instances,) or None. `repeats` steps at (noise_multiplier, sample_rate) are not
    in `base` yet.
    """

    orders: FloatArray
    sensitivities: FloatArray
    base: FloatArray
    flushes: int
    repeats: int
    noise_multiplier: float
    sample_rate: float
    level: npt.NDArray[np.uint16]
    offset: FloatArray
    infinite: npt.NDArray[np.bool_]
    worst_infinite: bool
    caps: FloatArray | None
    source: str
    steps: int
    unattributed: int
    guarantee: str
    reasons: dict[str, int]
    instance_ids: npt.NDArray[Any]
    privacy_filter: PrivacyFilter | None
    history: History | None

    def to_dict(self) -> dict[str, Any]:
        """Return copies of the arrays and plain values, with the format's version."""
        state: dict[str, Any] = {"version": VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, PrivacyFilter | History):
                value = value.to_dict()
            copied = value.copy() if isinstance(value, np.ndarray | dict) else value
            state[field.name] = copied
        if self.instance_ids.dtype.kind == "U":  # tensors hold no strings; lists of them are plain
            state["instance_ids"] = self.instance_ids.tolist()
        return state

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Ledger:
        """Return a checked ledger; arrays may come as numpy arrays, lists or CPU tensors.

        Raises:
            LedgerError: A key is missing, the version is unknown, or a value cannot be right.
        """
        state = _of_this_version(state, [field.name for field in fields(cls)])
        try:
            ledger = cls(
                orders=_array(state["orders"], np.float64),
                sensitivities=_array(state["sensitivities"], np.float64),
                base=_array(state["base"], np.float64),
                flushes=int(state["flushes"]),
                repeats=int(state["repeats"]),
                noise_multiplier=float(state["noise_multiplier"]),
                sample_rate=float(state["sample_rate"]),
                level=_array(state["level"]).astype(np.uint16, casting="same_kind"),
                offset=_array(state["offset"], np.float64),
                infinite=_array(state["infinite"], bool),
                worst_infinite=bool(state["worst_infinite"]),
                caps=None if state["caps"] is None else _array(state["caps"], np.float64),
                source=str(state["source"]),
                steps=int(state["steps"]),
                unattributed=int(state["unattributed"]),
                guarantee=str(state["guarantee"]),
                reasons={str(why): int(count) for why, count in state["reasons"].items()},
                instance_ids=_array(state["instance_ids"]),
                privacy_filter=None,
                history=None,
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise LedgerError(f"Expected a readable ledger, got one with {error}.") from error
        ledger._check()
        return replace(
            ledger,
            privacy_filter=ledger._read_filter(state["privacy_filter"]),
            history=ledger._read_history(state["history"]),
        )

    def require_same_frame(self, other: Ledger) -> None:
        """Raise unless `other` is on the same orders and levels."""
        for name in ("orders", "sensitivities"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if not np.array_equal(mine, theirs):
                raise LedgerError(
                    f"Expected a ledger with the same {name} ({len(mine)} values), got "
                    f"{len(theirs)} other ones. Construct the accountant with the ledger's {name}."
                )

    def require_same_instances(self, other: Ledger) -> None:
        """Raise unless `other` is a ledger of the same instances on the same orders and levels."""
        self.require_same_frame(other)
        if len(other.level) != len(self.level):
            raise LedgerError(
                f"Expected a ledger of {len(self.level)} instances, got {len(other.level)}. "
                "Load the ledger of this training set."
            )
        if not np.array_equal(other.instance_ids, self.instance_ids):
            raise LedgerError(
                "Expected a ledger with this accountant's instance_ids, got other ids. "
                "Load the ledger of this training set."
            )
        if self.history is not None and other.history is None and other.steps:
            raise LedgerError(
                f"Expected a ledger with the history of its {other.steps} steps, got one without. "
                "Construct the accountant without history."
            )

    def _read_filter(self, state: Mapping[str, Any] | None) -> PrivacyFilter | None:
        if state is None:
            return None
        if self.caps is None:
            raise LedgerError("Expected caps in a ledger with budgets, got none.")
        size, orders = len(self.level), len(self.orders)
        return PrivacyFilter.from_dict(_plain(state), size=size, orders=orders)

    def _read_history(self, state: Mapping[str, Any] | None) -> History | None:
        if state is None:
            return None
        read = History.from_dict(
            _plain(state), size=len(self.level), num_levels=len(self.sensitivities)
        )
        if read.steps != self.steps or not np.array_equal(read.levels(), self.level):
            raise LedgerError(
                f"Expected a history that ends at step {self.steps} on the ledger's levels, got "
                f"one of {read.steps} steps. Use an earlier copy."
            )
        return read

    def _check(self) -> None:
        instances, rows = len(self.level), len(self.sensitivities) + 1
        shapes = {
            "base": (rows, len(self.orders)),
            "offset": (instances, len(self.orders)),
            "infinite": (instances,),
            "instance_ids": (instances,),
        }
        if self.caps is not None:
            shapes["caps"] = (instances,)
        for name, shape in shapes.items():
            found = getattr(self, name).shape
            if found != shape:
                raise LedgerError(f"Expected {name} of shape {shape}, got shape {found}.")
        sound = {
            "level below the number of levels": bool((self.level < rows).all()),
            "finite base >= 0": bool(np.isfinite(self.base).all() and (self.base >= 0).all()),
            "finite offset": bool(np.isfinite(self.offset).all()),
            "counts >= 0": min(self.flushes, self.repeats, self.steps, self.unattributed) >= 0,
            "a known guarantee": self.guarantee in GUARANTEES,
            "a known source": self.source in STRONGEST_LABEL,
            "noise_multiplier >= 0": self.noise_multiplier >= 0.0,
            "sample_rate in [0, 1]": 0.0 <= self.sample_rate <= 1.0,
            "unique instance_ids": len(np.unique(self.instance_ids)) == instances,
        }
        for claim, holds in sound.items():
            if not holds:
                raise LedgerError(
                    f"Expected a ledger with {claim}, got one without. Use an earlier copy."
                )


def _of_this_version(state: Mapping[str, Any], names: list[str]) -> Mapping[str, Any]:
    """Return a saved state with every key of this version, or refuse it."""
    if state.get("version") == _WITHOUT_REASONS and "reasons" not in state:
        earlier = {_UNEARNED: int(state.get("steps", 0))} if state.get("steps") else {}
        state = {**state, "version": VERSION, "reasons": earlier}
    missing = [name for name in ["version", *names] if name not in state]
    if missing:
        raise LedgerError(f"Expected a ledger with the keys {names}, got none for {missing}.")
    if state["version"] != VERSION:
        raise LedgerError(
            f"Expected ledger version {VERSION}, got version={state['version']!r}. "
            "Install the release that wrote it."
        )
    return state


def _array(value: Any, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    """Return a fresh array from an array, a list or a CPU tensor, without importing torch."""
    return np.array(value.numpy() if hasattr(value, "numpy") else value, dtype=dtype)


def _plain(value: Any) -> Any:
    """Turn CPU tensors in a nested state into arrays."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.numpy() if hasattr(value, "numpy") else value
