"""The SQLite file behind the queue: made once, recognised, opened, and its errors in plain words.

Knows the tables; not what a request goes through (`queue.py`). One connection per transaction:
it can neither be carried into a forked process nor hold a lock longer than it works.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import LedgerError

APPLICATION_ID = 0x50494C51  # "PILQ", in the file's header
VERSION = 1
STATES = ("queued", "planned", "running", "done", "failed")

# Beside the tables of version 1, which mean what they meant: files without them get them when
# somebody writes.
_ADDED = (
    "CREATE TABLE IF NOT EXISTS instance_ids ("
    "request_id TEXT PRIMARY KEY REFERENCES requests (request_id), ids TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS data_set ("
    "only_row INTEGER PRIMARY KEY CHECK (only_row = 1), state TEXT NOT NULL)",
    # Every model that the folder held, the deployed one first; state_file once it lay there.
    "CREATE TABLE IF NOT EXISTS models ("
    "position INTEGER PRIMARY KEY AUTOINCREMENT, sha256 TEXT NOT NULL, state_file TEXT)",
)
_TABLES = f"""
CREATE TABLE requests (
  position INTEGER PRIMARY KEY AUTOINCREMENT,
  request_id TEXT NOT NULL UNIQUE,
  rows TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN {STATES}),
  batch INTEGER REFERENCES batches (batch),
  result TEXT
);
CREATE TABLE batches (
  batch INTEGER PRIMARY KEY AUTOINCREMENT,
  rows TEXT NOT NULL,
  goal TEXT NOT NULL,
  steps INTEGER NOT NULL,
  seed INTEGER,
  open INTEGER NOT NULL CHECK (open IN (0, 1))
);
CREATE UNIQUE INDEX one_open_batch ON batches (open) WHERE open = 1;
CREATE TABLE served (
  only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
  owner TEXT,
  process TEXT,
  state_file TEXT
);
INSERT INTO served (only_row) VALUES (1);
CREATE TABLE events (
  event INTEGER PRIMARY KEY AUTOINCREMENT,
  time TEXT NOT NULL,
  request_id TEXT NOT NULL,
  state TEXT NOT NULL,
  note TEXT NOT NULL
);
CREATE TRIGGER events_are_not_changed BEFORE UPDATE ON events
  BEGIN SELECT RAISE(ABORT, 'events are only appended'); END;
CREATE TRIGGER events_are_not_removed BEFORE DELETE ON events
  BEGIN SELECT RAISE(ABORT, 'events are only appended'); END;
CREATE TRIGGER done_is_done BEFORE UPDATE OF state ON requests WHEN OLD.state IN ('done', 'failed')
  BEGIN SELECT RAISE(ABORT, 'a finished request is not run again'); END;
"""


class RequestDatabase:
    """A file of ours, made with mode 0600 if there is none.

    Args:
        path: The file; its folder must exist.
        busy_timeout: Seconds to wait for another process's transaction.

    Attributes:
        tables: Names of the tables that were there when it was opened last: files of earlier
            releases lack some until they are written.

    Raises:
        LedgerError: Another kind of file, a newer version, or one that cannot be read or written.
    """

    def __init__(self, path: Path, *, busy_timeout: float) -> None:
        self.path, self._timeout = path, busy_timeout
        self.tables: frozenset[str] = frozenset()
        with self._worded():
            if not path.exists():
                _make(path)
            with self._connection():
                pass

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a consistent view that no writer disturbs and that disturbs no writer."""
        with self._worded(), self._connection() as connection:
            connection.execute("BEGIN")
            yield connection
            connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give a transaction: all of the block is kept, or, if it raises or dies, nothing."""
        with self._worded(), self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")  # the write lock before the first read
            try:
                for table in _ADDED:
                    connection.execute(table)
                self.tables = _tables(connection)
                yield connection
            except BaseException:
                if connection.in_transaction:  # a full disk ends it by itself
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    # --- inside -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=self._timeout,
            isolation_level=None,
        )
        with contextlib.closing(connection):
            connection.row_factory = sqlite3.Row
            self._check(connection)
            self.tables = _tables(connection)
            connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")  # an erased seed leaves no bytes
            yield connection

    def _check(self, connection: sqlite3.Connection) -> None:
        """Raise unless the file is ours; nothing is written."""
        kind = _number(connection, "PRAGMA application_id")
        version = _number(connection, "PRAGMA user_version")
        if kind != APPLICATION_ID:
            raise LedgerError(
                f"Expected {self.path} to be a queue of deletion requests, got another SQLite "
                f"file (application_id={kind}). Pass another folder."
            )
        if version != VERSION:
            raise LedgerError(
                f"Expected {self.path} to be a queue of version {VERSION}, got version={version}. "
                "Use the release that wrote it."
            )

    @contextlib.contextmanager
    def _worded(self) -> Iterator[None]:
        """Say what a failing database means and what to do about it."""
        try:
            yield
        except sqlite3.Error as error:
            code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF  # without its extension
            found, cure = _MEANING.get(code, ("one that SQLite fails on", "Use an earlier copy."))
            raise LedgerError(
                f"Expected {self.path} to be a queue that can be read and written, got {found} "
                f"({error}). Nothing was changed. {cure}"
            ) from error
        except OSError as error:
            raise readable(error, self.path) from error


_MEANING = {
    sqlite3.SQLITE_BUSY: (
        "one that another process has locked",
        "Wait for that process or end it, or raise busy_timeout.",
    ),
    sqlite3.SQLITE_READONLY: (
        "a read-only one",
        "Make the file and its folder writable for this user.",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "one that cannot be opened",
        "Pass an existing folder on a local disk that this user may write to.",
    ),
    sqlite3.SQLITE_NOTADB: ("a file that is no SQLite database", "Pass another folder."),
    sqlite3.SQLITE_CORRUPT: ("a damaged one", "Use an earlier copy."),
    sqlite3.SQLITE_FULL: ("a full disk", "Make room."),
}


def readable(error: OSError, path: Path) -> Exception:
    """Return what to raise for a file or folder that cannot be made or opened."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return error
    return LedgerError(
        f"Expected {path} to be a queue that can be read and written, got no permission "
        f"({error}). Nothing was changed. Make the folder writable for this user."
    )


def _make(path: Path) -> None:
    """Make a file with its tables beside the target, then link it there, unless one is there now.

    So the file is whole or absent, whoever dies or is faster meanwhile.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)  # mode 0600; SQLite gives its -wal and -shm files the mode of this one
    try:
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(";\n".join([_TABLES, *_ADDED]))
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def keep_data(connection: sqlite3.Connection, state: Mapping[str, Any]) -> None:
    """Keep what tells the data set from others, unless it is known; inside the transaction."""
    connection.execute(
        "INSERT OR IGNORE INTO data_set (only_row, state) VALUES (1, ?)", (json.dumps(dict(state)),)
    )


def keep_model(
    connection: sqlite3.Connection, sha256: str, *, state_file: str | None = None
) -> None:
    """Keep that the folder is of a model, unless it is known; inside the transaction."""
    connection.execute(
        "INSERT INTO models (sha256, state_file) SELECT ?1, ?2 WHERE NOT EXISTS "
        "(SELECT 1 FROM models WHERE sha256 = ?1 AND state_file IS ?2)",
        (sha256, state_file),
    )


def _tables(connection: sqlite3.Connection) -> frozenset[str]:
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return frozenset(name for (name,) in map(tuple, found))


def _number(connection: sqlite3.Connection, question: str) -> int:
    return int(connection.execute(question).fetchone()[0])


def log(db: sqlite3.Connection, request_ids: Sequence[str], state: str, note: str) -> None:
    """Append one line per request, inside the caller's transaction."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    db.executemany(
        "INSERT INTO events (time, request_id, state, note) VALUES (?, ?, ?, ?)",
        [(now, request_id, state, note) for request_id in request_ids],
    )
