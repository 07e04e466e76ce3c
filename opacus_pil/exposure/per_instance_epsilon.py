"""PerInstanceEpsilon: every instance's ε, and the questions that people ask of it.

Wraps the plain record of `accounting` with ids, the worst case of the same method, and what breaks
ties. Knows no engine and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..accounting import PerInstanceAccountant
from ..accounting import PerInstanceEpsilon as PlainEpsilon
from ..accounting.instance_ids import id_hint
from ..accounting.rdp import rdp_to_epsilon
from ..accounting.shown import quantiles_above, rounded_up

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class _NoSuchInstance(KeyError):
    """A KeyError that prints its sentence as it is, where Python would quote it."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, repr=False)
class PerInstanceEpsilon(PlainEpsilon):
    """ε of every instance asked for, with its label, who it is, and what everyone is told.

    Attributes:
        epsilon: Shape (n,), in nats; may be inf.
        order: Shape (n,), the Rényi order each ε was read at.
        delta: The δ of the (ε, δ) statement.
        guarantee: "bound", "expectation_bound", "output_specific" or "estimate".
        reasons: Why not a stronger label, a sentence each.
        instance_ids: Shape (n,), who they are: your ids, or rows of the data set.
        worst_case: ε of an instance that every step may move by the clip bound, by the same method
            (Rényi, the same orders): never below any of `epsilon`. Opacus's own number for the same
            run (`engine.get_epsilon`, PRV by default) is tighter and not comparable with these.
        norms: Shape (n,), unclipped gradient norm that each instance was last seen with, inf or NaN
            where it was not; orders those whose ε is equal, unseen ones last. None: the policy
            measures none.

    Privacy: each value depends on private data; see the README before you show it to anyone.

    >>> import numpy as np
    >>> spent = PerInstanceEpsilon(
    ...     np.array([0.5, 2.0]), np.array([8.0, 8.0]), 1e-5, "estimate",
    ...     instance_ids=np.array(["ann", "bob"]), worst_case=3.0,
    ... )
    >>> spent["bob"]
    2.0
    """

    instance_ids: npt.NDArray[Any] | None = None
    worst_case: float = float("inf")
    norms: FloatArray | None = None

    @classmethod
    def of(
        cls, account: PerInstanceAccountant, *, delta: float, rows: IntArray | None,
        norms: FloatArray | None,
    ) -> Self:  # fmt: skip
        """Return what an account says at δ about some of its instances; None: all."""
        plain = account.get_epsilon(delta, indices=rows)
        chosen: Any = slice(None) if rows is None else rows
        worst, _ = rdp_to_epsilon(account.worst_case_rdp(), orders=account.orders, delta=delta)
        return cls(
            plain.epsilon, plain.order, plain.delta, plain.guarantee, plain.reasons,
            instance_ids=account.instance_ids[chosen], worst_case=float(worst),
            norms=None if norms is None else norms[chosen],
        )  # fmt: skip

    def __getitem__(self, instance_id: Any) -> float:
        """Return the ε of one instance, by its id.

        Raises:
            KeyError: Nobody here has it.
        """
        place = self._places.get(instance_id)
        if place is None:
            whole = isinstance(instance_id, int | np.integer) and instance_id >= 0
            row = instance_id if whole else "..."
            raise _NoSuchInstance(
                f"Expected an id of one of these {len(self)} instances, got {instance_id!r}. "
                f"{id_hint(instance_id, self._places)} By row: "
                f"get_per_instance_epsilon(delta, rows=[{row}])."
            )
        return float(self.epsilon[place])

    @property
    def ties(self) -> int:
        """Number of instances that share their ε with another one."""
        return int((self._tied > 1).sum())

    def top(self, n: int = 10) -> pd.DataFrame:
        """Return the n most exposed instances, one row each, the most exposed first.

        Ties are broken by the unclipped gradient norm last seen, then by row: of instances whose
        gradients are all clipped ε cannot tell which is more exposed.

        Columns: instance_id, epsilon, tied (how many have this ε), norm, guarantee, worst_case.

        Args:
            n: At most so many, >= 0.

        Raises:
            ImportError: pandas is missing; install the extra `report`.
        """
        count = check.integer("n", n, low=0)
        return self._frame(self._ranked[:count])

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per instance, in their order; columns as in `top`.

        Raises:
            ImportError: pandas is missing; install the extra `report`.
        """
        return self._frame(np.arange(len(self)))

    def plot(self) -> Figure:
        """Draw how ε is distributed, beside the worst case by the same method.

        Raises:
            ImportError: matplotlib is missing; install the extra `report`.

        Privacy: a histogram of per-instance values is private.
        """
        from ..plots import epsilon_histogram  # an optional extra

        return epsilon_histogram(
            self.epsilon, worst_case=self.worst_case, guarantee=self.guarantee, delta=self.delta
        )

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """Hand the rows of `to_dataframe` to any library that reads Arrow (PyCapsule interface).

        Polars, DuckDB and pyarrow take the object as it is: `polars.DataFrame(spent)`.
        """
        import pyarrow as pa  # an optional extra

        table = pa.Table.from_pandas(self.to_dataframe(), preserve_index=False)
        return table.__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        """Say in a few lines who is exposed and what may be claimed."""
        if not len(self):
            return f"PerInstanceEpsilon(no instance, δ = {rounded_up(self.delta)})"
        shown = quantiles_above(self.epsilon, [0.0, 0.5, 0.9, 1.0])
        least, median, high, most = (rounded_up(value) for value in shown)
        lines = [
            f"Per-instance ε of {len(self):,} instances at δ = {rounded_up(self.delta)}: "
            f"{self.guarantee}",
            f"  least {least} · median {median} · 90 % {high} · most {most}",
            f"  worst case, by the same method {rounded_up(self.worst_case)}",
        ]
        if self.ties:
            most_tied = int(self._tied[self._ranked[0]])
            lines.append(
                f"  ties: {self.ties:,} share their ε with another; {most_tied:,} have the largest"
            )
        why = "takes for granted" if self.guarantee == "bound" else "not stronger"
        lines += [f"  {why}: {reason}" for reason in self.reasons]
        return "\n".join(lines)

    # --- inside -------------------------------------------------------------------------------

    @cached_property
    def _ids(self) -> npt.NDArray[Any]:
        return np.arange(len(self)) if self.instance_ids is None else self.instance_ids

    @cached_property
    def _places(self) -> dict[Any, int]:
        return {name: place for place, name in enumerate(self._ids.tolist())}

    @cached_property
    def _tied(self) -> IntArray:
        """How many instances have each one's ε."""
        _, place, counts = np.unique(self.epsilon, return_inverse=True, return_counts=True)
        found: IntArray = counts[place]
        return found

    @cached_property
    def _ranked(self) -> IntArray:
        """Places, the most exposed first; among equal ε those that were never seen are last."""
        norms = np.zeros(len(self)) if self.norms is None else self.norms
        breaker = np.where(np.isfinite(norms), norms, -1.0)
        order: IntArray = np.lexsort((np.arange(len(self)), -breaker, -self.epsilon))
        return order

    def _frame(self, places: IntArray) -> pd.DataFrame:
        import pandas as pd  # an optional extra

        norms = np.full(len(self), np.nan) if self.norms is None else self.norms
        return pd.DataFrame(
            {
                "instance_id": self._ids[places],
                "epsilon": self.epsilon[places],
                "tied": self._tied[places],
                "norm": np.where(np.isfinite(norms), norms, np.nan)[places],
                "guarantee": self.guarantee,
                "worst_case": self.worst_case,
            }
        )
