"""TrainedData: the data set that unlearning reads, held against the one that was trained on.

Rows name people. Another content, or another order, makes every row somebody else. Knows
fingerprints and ids; no model and no ledger.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from ..accounting.instance_ids import InstanceIds
from ..errors import LedgerError
from ..files.fingerprint import Fingerprint

_AUGMENTED = "random augmentation"  # in a fingerprint's notes, of a transform


class TrainedData:
    """A data set, what it held when training began, and what its rows are called.

    Args:
        dataset: What unlearning reads.
        began: Fingerprint of the training's data; None: that of `dataset` as it is now.
        fingerprint_of: Reads a fingerprint.
        ids: Of the rows.

    Attributes:
        dataset, ids: As given.
        size: Number of rows.
        began: What the data set held when training began.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        began: Fingerprint | None,
        fingerprint_of: Callable[[Any], Fingerprint],
        ids: InstanceIds,
    ) -> None:
        self.dataset, self.ids, self.size = dataset, ids, len(dataset)
        self._read = fingerprint_of
        now = fingerprint_of(dataset)
        self.began = now if began is None else began
        self._plain = dict(self.began)
        # A data set of another class may be read in another way: then nothing is compared.
        self._reference = self.began if self.began.how == now.how else now

    def require_same(self) -> None:
        """Raise if the data set does not hold what it held, in that order.

        Raises:
            LedgerError: Says what differs, and the cure.
        """
        differs = self._reference.differs(self._read(self.dataset))
        if differs:
            raise LedgerError(
                f"Expected the data set as it was when training began, got another one: {differs}. "
                "Its rows would be other people. Pass what was trained on, unchanged and in the "
                "same order; rows that were forgotten keep their places."
            )

    def codes(self) -> tuple[str, ...]:
        """Return what a certificate takes for granted about the data: codes of its context."""
        found = []
        if self.began.how == "given":
            found.append("fingerprint_given_by_caller")
        elif not self.began.whole or self._reference is not self.began:
            found.append("dataset_not_fingerprinted")
        if any(_AUGMENTED in note for note in self.began.notes):
            found.append("augmentation_random")
        return tuple(found)

    def state(self) -> dict[str, Any]:
        """Return what tells these rows from others, as plain values."""
        return {"fingerprint": copy.deepcopy(self._plain), "ids_sha256": self._ids_digest}

    def require_state(self, state: Mapping[str, Any]) -> None:
        """Raise if `state` of another engine says that its rows were others.

        Raises:
            LedgerError: Other contents, another order, or other ids.
        """
        differs = self.began.differs(state["fingerprint"])
        if not differs and state["ids_sha256"] not in (None, self._ids_digest):
            differs = "other instance_ids" if self.ids.given else "no instance_ids, as it had then"
        if differs:
            raise LedgerError(
                f"Expected the data set that was served before, got another one: {differs}. The "
                "same rows would be other people. Build the engine on the same rows in the same "
                "order, with the same instance_ids."
            )

    @cached_property
    def _ids_digest(self) -> str | None:
        if not self.ids.given:
            return None
        text = json.dumps(self.ids.of(range(self.size)), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()
