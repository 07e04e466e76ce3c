"""LedgerTable: questions to a ledger file of any size, answered by DuckDB without loading it.

Knows the columns of `PerInstanceAccountant.to_parquet`; holds no state of an accountant.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .. import _validate as check
from ..accounting.ledger_rows import ROWS_VERSION, VERSION_KEY
from ..errors import LedgerError


class LedgerTable:
    """A ledger file written by `to_parquet`, to be asked and never to be changed.

    Only the columns and row groups that a question needs are read. Every answer carries δ,
    guarantee and whether the rows are tombstones of forgotten instances, whose ε stands still; rows
    with different ones are never mixed in one quantile.

    Args:
        path: The Parquet file.

    Raises:
        FileNotFoundError: There is no such file.
        LedgerError: Not a Parquet file, or not one of this version of `to_parquet`.

    Privacy: every answer depends on private data.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"Expected a ledger file, got no file at {self.path}.")
        try:
            schema = pq.read_schema(self.path)
        except (OSError, ValueError) as error:  # pyarrow's errors are these
            raise LedgerError(
                f"Expected {self.path} to be a whole Parquet file, got one that cannot be read "
                f"({type(error).__name__}). Write it again."
            ) from error
        version = (schema.metadata or {}).get(VERSION_KEY, b"none").decode()
        if version != ROWS_VERSION:
            raise LedgerError(
                f"Expected a ledger file of version {ROWS_VERSION}, got version={version!r} in "
                f"{self.path}. Write it with to_parquet of this release."
            )
        self.columns: tuple[str, ...] = tuple(schema.names)
        self._text_ids = schema.field("instance_id").type == pa.string()

    @property
    def text_ids(self) -> bool:
        """Whether ids are texts; else they are integers."""
        return self._text_ids

    def __len__(self) -> int:
        """Return the number of rows, read from the file's footer."""
        return int(pq.read_metadata(self.path).num_rows)

    def top(self, k: int, *, lowest: bool = False) -> pd.DataFrame:
        """Return the `k` rows with the highest ε (or the lowest), ties in the order of the file.

        Args:
            k: At least 1; fewer rows come back from a file with fewer.
            lowest: From the least exposed instance upwards instead.
        """
        count = check.integer("k", k, low=1)
        direction = "ASC" if lowest else "DESC"
        return self._ask(
            "SELECT * EXCLUDE (file_row_number) FROM ledger "
            f"ORDER BY epsilon {direction}, file_row_number LIMIT ?",
            [count],
        )

    def quantiles(
        self, *, by: str | None = None, at: Sequence[float] = (0.0, 0.1, 0.5, 0.9, 1.0)
    ) -> pd.DataFrame:
        """Return quantiles of ε, for each value of a column if asked.

        Args:
            by: Name of a column, for example one that was passed as `columns={"label": …}`.
            at: Probabilities in [0, 1].

        Returns:
            One row per group, δ, guarantee and tombstones or not, ordered by them: the group's
            value, delta, guarantee, forgotten, instances, and a column "q0.5" (and so on) per
            probability: the lowest ε of an instance such that at least that share of the group has
            no more.

        Raises:
            ValueError: No such column, or a probability outside [0, 1].
        """
        shares = [check.probability("at", share) for share in at]
        if by is not None:
            check.choice("by", by, self.columns, "Pass it to to_parquet as one of its columns.")
        keys = [
            _quoted(name) for name in dict.fromkeys([by, "delta", "guarantee", "forgotten"]) if name
        ]
        found = [f'quantile_disc(epsilon, {share!r}) AS "q{share:g}"' for share in shares]
        return self._ask(
            f"SELECT {', '.join([*keys, 'count(*) AS instances', *found])} FROM ledger "
            f"GROUP BY {', '.join(keys)} ORDER BY {', '.join(keys)}",
            [],
        )

    def instance(self, instance_id: int | str) -> pd.DataFrame:
        """Return the rows of one id: one, or one per accountant that went into the file.

        Raises:
            TypeError: Text for ids that are integers, or the other way round.
            LedgerError: No instance has this id.
        """
        if isinstance(instance_id, str) != self._text_ids:
            kind = "text" if self._text_ids else "an integer"
            raise TypeError(check.expected("instance_id", f"to be {kind}", instance_id))
        known = instance_id if isinstance(instance_id, str) else int(instance_id)
        found = self._ask(
            "SELECT * EXCLUDE (file_row_number) FROM ledger WHERE instance_id = ? "
            "ORDER BY file_row_number",
            [known],
        )
        if found.empty:
            raise LedgerError(
                f"Expected the id of an instance in {self.path}, got instance_id={instance_id!r}."
            )
        return found

    def _ask(self, question: str, values: list[Any]) -> pd.DataFrame:
        # No spilling: temporary files would hold private values. No extensions from the network.
        with duckdb.connect(
            config={"temp_directory": "", "autoinstall_known_extensions": "false"}
        ) as connection:
            ledger = connection.read_parquet(glob.escape(str(self.path)), file_row_number=True)
            ledger.create_view("ledger")
            return connection.execute(question, values).df()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
