"""One row per instance: the ledger as people read it, a chunk at a time and as a Parquet file.

Knows what can be asked of an accountant; not how it keeps its state. Nothing can be loaded back
from the rows: the saved form of an accountant is `ledger.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray
from ..atomic_file import atomic_file
from .guarantee import PerInstanceEpsilon
from .rdp import rdp_to_epsilon

ROW_GROUP = 1 << 16  # instances; a question about one of them reads one group
ROWS_VERSION = "2"  # of the file's columns; under VERSION_KEY in its metadata
VERSION_KEY = b"opacus_pil.ledger_rows"

Columns = Mapping[str, npt.ArrayLike]


class Losses(Protocol):
    """What rows are made of: an accountant, as far as it is read here."""

    @property
    def num_instances(self) -> int:
        """Number of rows."""

    @property
    def orders(self) -> FloatArray:
        """Rényi orders."""

    @property
    def instance_ids(self) -> npt.NDArray[Any]:
        """Shape (instances,)."""

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """Shape (instances,)."""

    @property
    def forgotten(self) -> npt.NDArray[np.bool_]:
        """Shape (instances,)."""

    @property
    def sensitivities(self) -> FloatArray:
        """Shape (instances,)."""

    @property
    def budgeted(self) -> bool:
        """Whether a realised sum differs from the loss."""

    @property
    def realised_guarantee(self) -> str:
        """Label of the realised sum."""

    def get_epsilon(
        self, delta: float, *, indices: npt.ArrayLike | None = None
    ) -> PerInstanceEpsilon:
        """Return ε of the instances asked for."""

    def spent_rdp(self, indices: npt.ArrayLike | None = None) -> FloatArray:
        """Return the realised sum of the instances asked for."""


def ledger_chunks(
    losses: Losses,
    *,
    delta: float | None = None,
    columns: Columns | None = None,
    size: int = ROW_GROUP,
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield the rows of `to_dataframe`, `size` instances at a time, then `columns` of the caller.

    Args:
        losses: The accountant.
        delta: δ of the epsilons. Default 1 / num_instances.
        columns: Name -> shape (instances,), for example {"label": labels}.
        size: Instances per chunk, >= 1; RDP is formed for one chunk only.

    Raises:
        TypeError, ValueError: δ outside (0, 1); a column of another length, or with a name that is
            taken.
    """
    total = losses.num_instances
    target = check.delta(1.0 / total if delta is None else delta)
    own = {name: np.asarray(values) for name, values in (columns or {}).items()}
    for name, values in own.items():
        check.same_length(f"column {name!r}", values, "instances", total)
    ids, active, forgotten = losses.instance_ids, losses.active, losses.forgotten
    # Nobody may take a tombstone for an instance that gives nothing away.
    sensitivities = np.where(forgotten, np.nan, losses.sensitivities)
    for start in range(0, total, size):
        rows = np.arange(start, min(start + size, total))
        found = losses.get_epsilon(target, indices=rows)
        chunk = {
            "instance_id": ids[rows],
            "epsilon": found.epsilon,
            "order": found.order,
            "sensitivity": sensitivities[rows],
            "active": active[rows],
            "forgotten": forgotten[rows],
            "delta": np.full(len(rows), found.delta),
            "guarantee": np.full(len(rows), found.guarantee),
        }
        if losses.budgeted:
            chunk["spent_epsilon"], _ = rdp_to_epsilon(
                losses.spent_rdp(rows), orders=losses.orders, delta=target
            )
            chunk["spent_guarantee"] = np.full(len(rows), losses.realised_guarantee)
        taken = sorted(chunk.keys() & own.keys())
        if taken:
            raise ValueError(
                f"Expected columns with names of their own, got {taken}, which the ledger has. "
                "Rename them."
            )
        yield chunk | {name: values[rows] for name, values in own.items()}


def write_ledger(path: str | os.PathLike[str], chunks: Iterable[Columns]) -> None:
    """Write chunks of rows to a Parquet file, one row group each; whole or absent, mode 0600.

    Args:
        path: Target; its folder must exist.
        chunks: Name -> shape (rows,), the same names and types in each, at least one chunk.

    Raises:
        ImportError: pyarrow is missing; install the extra `report`.
        OSError: The folder is missing or not writable.
        ValueError: Chunks that do not fit together, or none. No file is left behind.

    Privacy: the rows depend on private data, hence the mode.
    """
    import pyarrow as pa  # an optional extra
    import pyarrow.parquet as pq

    iterator = iter(chunks)
    first = next(iterator, None)
    if first is None:
        raise ValueError("Expected at least one chunk of rows, got none.")
    with atomic_file(path) as file:
        table = pa.table(dict(first))
        schema = table.schema.with_metadata({VERSION_KEY: ROWS_VERSION})
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            writer.write_table(table.cast(schema))
            for chunk in iterator:
                table = pa.table(dict(chunk))
                if not table.schema.equals(schema):
                    raise ValueError(
                        f"Expected chunks with the columns {schema.names} of one type each, got "
                        f"{table.schema.names}. Give every chunk the same columns."
                    )
                writer.write_table(table)
