"""RequestQueue: deletion requests that survive whatever happens to the process that serves them.

Knows request ids, row numbers and states; no model, no torch. What serving a request means is
`serving.py`, the file itself `database.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import _validate as check
from ...errors import LedgerError
from .database import STATES, RequestDatabase, keep_data, keep_model, log, readable
from .lock import serving_lock
from .server import Server

_LARGEST_ROW = 2**62


@dataclass(frozen=True, kw_only=True)
class Request:
    """One deletion request as it stands.

    Attributes:
        request_id: The requester's own name for it.
        rows: Rows of the data set that are to leave, ascending.
        ids: What these rows are called: the instance ids of the engine that they were submitted
            to; the rows themselves where it had none, or nobody said so.
        state: "queued", "planned", "running", "done" or "failed".
        result: Once done: what was run and what may be claimed, as plain values; once failed:
            {"reason": why}; before: None.
    """

    request_id: str
    rows: tuple[int, ...]
    ids: tuple[str | int, ...]
    state: str
    result: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the log: when which request came into which state, and why."""

    time: str
    request_id: str
    state: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Belonging:
    """Whose a folder is: the data that its rows are of, and the models that it held.

    Attributes:
        data: What tells the data set from others; None: nobody said so yet.
        models: SHA-256 of each model, the deployed one first; of an earlier release's none.
        served: Whether a state was put into the folder to be served from.
        served_model: SHA-256 of the model in it; None: no state, or not known.
    """

    data: Mapping[str, Any] | None
    models: tuple[str, ...]
    served: bool
    served_model: str | None


class RequestQueue:
    """A durable queue of deletion requests: queued → planned → running → done or failed.

    Guarantee: a submitted request is in the file until it is done or failed, whoever is killed
        when; the two are final. Each change is one transaction. At most one process serves at a
        time, and its death is known at once (`lock.py`); a server that lost its lock all
        the same, because somebody deleted the lock file, cannot change anything any more.
    Any number of processes may submit and read meanwhile.

    Args:
        folder: Holds the database, the model served last (its state, and its weights alone in
            `model.pt`), the certificates and the run in progress. Made (mode 0700)
            if missing; its parent must exist. On a local disk: neither SQLite's write-ahead log nor
            the lock works between machines.
        busy_timeout: Seconds to wait for another process's transaction, >= 0.

    Raises:
        LedgerError: Something else lies there, it is of a newer version, read-only or locked.
        FileNotFoundError, NotADirectoryError: No such parent; a file where the folder should be.

    Privacy: the file (mode 0600) says who asked to be forgotten. Row numbers are kept after a
        request is done, so that asking again is recognised.
    """

    def __init__(self, folder: str | os.PathLike[str], *, busy_timeout: float = 30.0) -> None:
        self.folder = Path(folder)
        seconds = check.real("busy_timeout", busy_timeout, low=0.0)
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(f"Expected requests to be a folder, got {folder}.") from error
        except OSError as error:
            raise readable(error, self.folder) from error
        self._database = RequestDatabase(self.folder / "requests.db", busy_timeout=seconds)

    # --- for everybody ------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        rows: npt.ArrayLike,
        *,
        ids: Sequence[str | int] | None = None,
        data: Mapping[str, Any] | None = None,
        model: str | None = None,
        require: Callable[[Belonging], None] | None = None,
    ) -> Request:
        """Put a request into the queue; asking for the same again changes nothing.

        Args:
            request_id: Any text that is not empty.
            rows: Rows of the data set, each once, in any order.
            ids: What the rows are called, in their order, to be shown with the request.
            data: What tells the data set from others, kept with the first request that brings it;
                see `data`.
            model: SHA-256 of the model that the request is about, kept if the folder has none yet.
            require: Raises unless the request fits whose the folder is. Called inside the
                transaction: whoever submits at the same moment has or has not been there.

        Returns:
            The request as it stands: queued, or however far an earlier submission has come.

        Raises:
            ValueError: No rows, a negative or repeated one, or an id that stands for other rows.
            LedgerError: The database cannot be written. Nothing is changed.
        """
        if not isinstance(request_id, str):
            raise TypeError(check.expected("request_id", "to be text", request_id))
        if not request_id:
            raise ValueError(check.expected("request_id", "not to be empty", request_id))
        given = check.index_array("rows", rows, size=_LARGEST_ROW)
        order = np.argsort(given)
        wanted = given[order].tolist()
        if not wanted:
            raise ValueError("Expected a request to name at least one row, got none.")
        if ids is not None:
            check.same_length("ids", np.asarray(ids), "rows", len(wanted))
        with self._database.writing() as db:
            belonging = self._belonging(db)
            if require is not None:
                require(belonging)
            known = _row(db, request_id)
            if known is None:
                db.execute(
                    "INSERT INTO requests (request_id, rows, state) VALUES (?, ?, 'queued')",
                    (request_id, json.dumps(wanted)),
                )
                if ids is not None:
                    db.execute(
                        "INSERT INTO instance_ids (request_id, ids) VALUES (?, ?)",
                        (request_id, json.dumps([ids[k] for k in order.tolist()])),
                    )
                if data is not None:
                    keep_data(db, data)
                if model is not None and not belonging.models and not belonging.served:
                    keep_model(db, model)
                log(db, [request_id], "queued", f"{len(wanted)} rows")
            elif json.loads(known["rows"]) != wanted:
                raise ValueError(
                    f"Expected request_id={request_id!r} to stand for the "
                    f"{len(json.loads(known['rows']))} rows it was submitted with, got "
                    f"{len(wanted)} other ones. Submit them under an id of their own."
                )
            return self._found(db, request_id)

    @property
    def data(self) -> dict[str, Any] | None:
        """What tells the data set that the rows are of from others; None: nobody said so yet."""
        found = self.belonging.data
        return None if found is None else dict(found)

    @property
    def belonging(self) -> Belonging:
        """Whose the folder is."""
        with self._database.reading() as db:
            return self._belonging(db)

    def get(self, request_id: str) -> Request:
        """Return one request as it stands.

        Raises:
            LedgerError: Nobody submitted it.
        """
        with self._database.reading() as db:
            return self._found(db, request_id)

    def requests(self, *, state: str | None = None) -> list[Request]:
        """Return the requests in one state, or all, in the order they were submitted."""
        if state is not None:
            check.choice("state", state, STATES)
        with self._database.reading() as db:
            rows = db.execute(
                "SELECT * FROM requests WHERE ?1 IS NULL OR state = ?1 ORDER BY position", (state,)
            ).fetchall()
            return [self._request(db, row) for row in rows]

    def status(self) -> dict[str, int]:
        """Return how many requests are in each state."""
        with self._database.reading() as db:
            counts = db.execute("SELECT state, count(*) FROM requests GROUP BY state").fetchall()
        return dict.fromkeys(STATES, 0) | dict(counts)

    def events(self, request_id: str | None = None) -> list[Event]:
        """Return the log, of one request or of all, oldest first. Times are UTC, ISO 8601."""
        with self._database.reading() as db:
            rows = db.execute(
                "SELECT time, request_id, state, note FROM events "
                "WHERE ?1 IS NULL OR request_id = ?1 ORDER BY event",
                (request_id,),
            )
            return [Event(**row) for row in map(dict, rows)]

    @property
    def state_file(self) -> Path | None:
        """The model and ledgers served last; None before the first serving."""
        with self._database.reading() as db:
            name = db.execute("SELECT state_file FROM served").fetchone()[0]
        return None if name is None else self.folder / name

    # --- for the one who serves ---------------------------------------------------------------

    @contextlib.contextmanager
    def serving(self, *, wait: bool) -> Iterator[Server]:
        """Hold the right to serve for a block.

        Args:
            wait: Wait for another process that serves; else raise.

        Raises:
            LedgerError: Another process serves and `wait` is False.
        """
        with serving_lock(self.folder / "serving.lock", wait=wait):
            owner = secrets.token_hex(16)
            process = f"process {os.getpid()} on {socket.gethostname()}"
            with self._database.writing() as db:
                db.execute("UPDATE served SET owner = ?, process = ?", (owner, process))
            yield Server(self._database, owner=owner, process=process)

    # --- inside -------------------------------------------------------------------------------

    def _found(self, db: sqlite3.Connection, request_id: str) -> Request:
        row = _row(db, request_id)
        if row is None:
            raise LedgerError(
                f"Expected a request_id that was submitted, got request_id={request_id!r}. "
                "Submit it."
            )
        return self._request(db, row)

    def _belonging(self, db: sqlite3.Connection) -> Belonging:
        data, models = None, []
        if "data_set" in self._database.tables:
            data = db.execute("SELECT state FROM data_set").fetchone()
        if "models" in self._database.tables:
            models = db.execute(
                "SELECT sha256, state_file FROM models ORDER BY position"
            ).fetchall()
        file = db.execute("SELECT state_file FROM served").fetchone()[0]
        served = [sha256 for sha256, name in models if file is not None and name == file]
        return Belonging(
            data=None if data is None else json.loads(data[0]),
            models=tuple(sha256 for sha256, _ in models),
            served=file is not None,
            served_model=served[-1] if served else None,
        )

    def _request(self, db: sqlite3.Connection, row: sqlite3.Row) -> Request:
        rows = tuple(json.loads(row["rows"]))
        named = None
        if "instance_ids" in self._database.tables:
            named = db.execute(
                "SELECT ids FROM instance_ids WHERE request_id = ?", (row["request_id"],)
            ).fetchone()
        return Request(
            request_id=row["request_id"],
            rows=rows,
            ids=rows if named is None else tuple(json.loads(named[0])),
            state=row["state"],
            result=None if row["result"] is None else json.loads(row["result"]),
        )


def _row(db: sqlite3.Connection, request_id: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM requests WHERE request_id = ?", (request_id,)
    ).fetchone()
    return row
