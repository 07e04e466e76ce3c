"""The queue by itself: what is kept, who may write, and what a broken or foreign file says."""

import contextlib
import json
import os
import sqlite3
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from opacus_pil.errors import LedgerError
from opacus_pil.unlearning.requests import RequestQueue
from opacus_pil.unlearning.requests.database import APPLICATION_ID, VERSION
from opacus_pil.unlearning.requests.server import Batch

from .processes import CONTEXT


@pytest.fixture
def queue(tmp_path):
    return RequestQueue(tmp_path / "requests", busy_timeout=5.0)


def batch_of(*request_ids, number=1, rows=(1, 2), steps=5):
    goal = {"steps": steps}
    return Batch(number=number, request_ids=request_ids, rows=rows, goal=goal, steps=steps, seed=77)


def everything(folder):
    """All that the database says, and nothing about how it is stored."""
    with contextlib.closing(sqlite3.connect(Path(folder) / "requests.db")) as db:
        return list(db.iterdump())


def test_asking_again_changes_nothing_and_another_set_under_the_same_id_is_refused(queue):
    first = queue.submit("ada", [7, 3])
    before = everything(queue.folder)
    assert queue.submit("ada", [3, 7]) == first
    with pytest.raises(ValueError, match="request_id='ada' to stand for the 2 rows"):
        queue.submit("ada", [3, 8])
    assert everything(queue.folder) == before
    assert first.rows == (3, 7)
    assert first.state == "queued"
    assert queue.status() == {"queued": 1, "planned": 0, "running": 0, "done": 0, "failed": 0}


@pytest.mark.parametrize(
    ("request_id", "rows", "message"),
    [
        ("", [1], "request_id not to be empty"),
        ("x", [], "at least one row"),
        ("x", [1, 1], "without repetition"),
        ("x", [-1], "rows in"),
    ],
)
def test_a_request_that_means_nothing_is_refused(queue, request_id, rows, message):
    before = everything(queue.folder)
    with pytest.raises(ValueError, match=message):
        queue.submit(request_id, rows)
    assert everything(queue.folder) == before
    with pytest.raises(TypeError, match="text"):
        queue.submit(5, [1])
    with pytest.raises(LedgerError, match="Submit it"):
        queue.get("nobody")


def test_requests_go_through_all_states_and_the_log_tells_it(queue):
    queue.submit("ada", [1])
    queue.submit("bob", [2])
    with queue.serving(wait=False) as server:
        batch = batch_of("ada", "bob")
        server.plan(batch)
        assert server.open_batch() == batch
        assert queue.get("ada").state == "planned"
        server.run(batch)
        assert queue.status()["running"] == 2
        server.finish(batch, state_file="state-1.pt", model="0f", result={"epsilon": None})
        assert server.open_batch() is None
        assert server.next_number() == 2
    assert [event.state for event in queue.events("bob")] == [
        "queued", "planned", "running", "done",
    ]  # fmt: skip
    assert queue.get("ada").result == {"epsilon": None}
    assert queue.state_file == queue.folder / "state-1.pt"
    assert queue.submit("ada", [1]).state == "done"  # asked again


def test_what_is_finished_is_never_run_again(queue):
    queue.submit("ada", [1])
    with queue.serving(wait=False) as server:
        batch = batch_of("ada")
        server.plan(batch)
        server.finish(batch, state_file="state-1.pt", model="0f", result={})
        before = everything(queue.folder)
        for change in (server.run, lambda done: server.fail(done, reason="no")):
            with pytest.raises(LedgerError, match="not run again"):
                change(batch)
        with pytest.raises(AssertionError, match="ada"):
            server.plan(batch_of("ada", number=2))
        assert everything(queue.folder) == before


def test_the_log_cannot_be_rewritten(queue):
    queue.submit("ada", [1])
    with contextlib.closing(sqlite3.connect(queue.folder / "requests.db")) as db:
        for change in ("UPDATE events SET note = ''", "DELETE FROM events"):
            with pytest.raises(sqlite3.IntegrityError, match="only appended"):
                db.execute(change)


def test_the_seed_of_a_finished_run_is_nowhere_in_the_files(queue):
    seed = 3_141_592_653_589_793
    marker = seed.to_bytes(8, "big")  # how SQLite stores an integer of this size
    queue.submit("ada", [1])

    def found():
        return any(marker in path.read_bytes() for path in queue.folder.iterdir())

    with queue.serving(wait=False) as server:
        batch = Batch(number=1, request_ids=("ada",), rows=(1,), goal={}, steps=1, seed=seed)
        server.plan(batch)
        assert found()  # the search finds what is there
        server.finish(batch, state_file="state-1.pt", model="0f", result={})
    assert not found()


def test_only_one_serves_and_the_others_wait_or_hear_why(queue):
    order = []
    with queue.serving(wait=False):
        with (
            pytest.raises(LedgerError, match="nobody else to serve"),
            RequestQueue(queue.folder).serving(wait=False),
        ):
            pass

        def second():
            with RequestQueue(queue.folder).serving(wait=True):
                order.append("second")

        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        order.append("first")
    waiting.join(10.0)
    assert order == ["first", "second"]


def test_a_server_whose_lock_file_was_deleted_cannot_write_any_more(queue):
    queue.submit("ada", [1])
    with queue.serving(wait=False) as robbed:
        (queue.folder / "serving.lock").unlink()
        with queue.serving(wait=False) as server:
            server.plan(batch_of("ada"))
            before = everything(queue.folder)
            for write in (
                lambda: robbed.run(batch_of("ada")),
                lambda: robbed.finish(batch_of("ada"), state_file="x", model="0f", result={}),
                lambda: robbed.begin("x", data={}, model="0f"),
            ):
                with pytest.raises(LedgerError, match="took over"):
                    write()
            assert everything(queue.folder) == before
            server.finish(batch_of("ada"), state_file="state-1.pt", model="0f", result={})


def _hold(folder, holding):
    with RequestQueue(folder).serving(wait=False):
        if os.fork() == 0:  # like a loader's worker: it outlives the server
            holding.set()
            threading.Event().wait(30.0)
            os._exit(0)
        threading.Event().wait(30.0)


def test_the_death_of_a_server_frees_the_lock_at_once_even_if_its_child_lives(queue):
    holding = CONTEXT.Event()
    server = CONTEXT.Process(target=_hold, args=(queue.folder, holding))
    server.start()
    assert holding.wait(30.0)
    with pytest.raises(LedgerError, match="nobody else"), queue.serving(wait=False):
        pass
    server.kill()
    server.join(10.0)
    with queue.serving(wait=False):
        pass


def test_a_reader_sees_the_last_whole_state_while_another_writes(queue):
    queue.submit("ada", [1])
    with contextlib.closing(
        sqlite3.connect(queue.folder / "requests.db", isolation_level=None)
    ) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE requests SET state = 'running'")
        impatient = RequestQueue(queue.folder, busy_timeout=0.0)
        assert impatient.get("ada").state == "queued"
        with pytest.raises(LedgerError, match="another process has locked"):
            impatient.submit("bob", [2])
        with (
            pytest.raises(LedgerError, match="another process has locked"),
            impatient.serving(wait=False),
        ):
            pass
        writer.execute("ROLLBACK")
    assert [request.request_id for request in queue.requests()] == ["ada"]
    queue.submit("bob", [2])


@contextlib.contextmanager
def _as_an_ordinary_user():
    """Root may write everything: work as nobody for a while, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_database_says_so_and_stays_as_it_is():
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o777)  # an ordinary user must get this far
        with _as_an_ordinary_user():
            queue = RequestQueue(Path(parent) / "requests")
            queue.submit("ada", [1])
            before = everything(queue.folder)
            (queue.folder / "requests.db").chmod(0o400)
            with pytest.raises(LedgerError, match=r"a read-only one.*writable"):
                queue.submit("bob", [2])
            with (
                pytest.raises(LedgerError, match="a read-only one"),
                queue.serving(wait=False),
            ):
                pass
            assert queue.get("ada").state == "queued"  # what can be read is read
            (queue.folder / "requests.db").chmod(0o600)
            assert everything(queue.folder) == before


def test_a_folder_that_cannot_be_written_to_says_so():
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o777)
        with _as_an_ordinary_user():
            folder = Path(parent) / "requests"
            folder.mkdir(mode=0o500)
            with pytest.raises(LedgerError, match=r"no permission.*writable"):
                RequestQueue(folder)
            folder.chmod(0o700)
            queue = RequestQueue(folder)
            folder.chmod(0o500)
            with pytest.raises(LedgerError, match="writable"), queue.serving(wait=False):
                pass
            folder.chmod(0o700)
            (Path(parent) / "closed").mkdir(mode=0o500)
            with pytest.raises(LedgerError, match="writable"):
                RequestQueue(Path(parent) / "closed" / "requests")


@pytest.mark.parametrize("content", [b"", b"text that is no database at all" * 40])
def test_a_file_that_is_no_queue_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "requests.db"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="Pass another folder"):
        RequestQueue(tmp_path)
    assert path.read_bytes() == content
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("kind", "version", "message"),
    [
        (12, VERSION, "another SQLite file"),
        (APPLICATION_ID, VERSION + 1, f"version {VERSION}, got version={VERSION + 1}"),
    ],
)
def test_another_database_or_a_newer_version_is_refused_and_left_alone(
    tmp_path, kind, version, message
):
    path = tmp_path / "requests.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
        db.execute(f"PRAGMA application_id = {kind}")
        db.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=message):
        RequestQueue(tmp_path)
    assert path.read_bytes() == before


def test_a_damaged_database_is_refused(queue):
    queue.submit("ada", [1])
    path = queue.folder / "requests.db"
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)  # the tables' own pages
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"damaged|fails on"):
        queue.submit("bob", [1])


def test_paths_that_cannot_hold_a_queue(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="to be a folder"):
        RequestQueue(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        RequestQueue(tmp_path / "missing" / "requests")


def test_files_are_for_their_owner_only(queue):
    seen = {}
    with queue.serving(wait=False) as server:
        queue.submit("ada", [1])
        with contextlib.closing(sqlite3.connect(queue.folder / "requests.db")) as db:
            db.execute("SELECT * FROM requests").fetchall()  # keeps -wal and -shm in place
            server.plan(batch_of("ada"))
            seen = {path.name: stat.S_IMODE(path.stat().st_mode) for path in queue.folder.iterdir()}
    assert {"requests.db", "requests.db-wal", "requests.db-shm", "serving.lock"} == seen.keys()
    assert set(seen.values()) == {0o600}
    assert stat.S_IMODE(queue.folder.stat().st_mode) == 0o700


def _submit_many(folder, first):
    for number in range(first, first + 10):
        RequestQueue(folder).submit(f"request {number}", [number])


def test_several_processes_make_the_queue_and_submit_at_once(tmp_path):
    folder = tmp_path / "requests"
    processes = [CONTEXT.Process(target=_submit_many, args=(folder, first)) for first in (0, 5, 10)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60.0)
        assert process.exitcode == 0
    found = {request.request_id: request.rows for request in RequestQueue(folder).requests()}
    assert found == {f"request {number}": (number,) for number in range(20)}
    assert len(RequestQueue(folder).events()) == 20
    assert json.loads(json.dumps(RequestQueue(folder).status()))["queued"] == 20
