"""Files are whole or absent, private, and tell when somebody touched them."""

import os
import stat

import numpy as np
import pytest
import torch

from opacus_pil.checkpoint import load_state, save_state, write_atomic
from opacus_pil.errors import LedgerError


def test_a_private_file_is_readable_by_its_owner_only(tmp_path):
    write_atomic(tmp_path / "a", b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    write_atomic(tmp_path / "b", b"x", private=False)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a"
    write_atomic(target, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_state_comes_back_and_loads_without_unpickling_code(tmp_path):
    state = {
        "step": np.int64(3),
        "weights": {"a": torch.arange(4.0)},
        "levels": [(np.arange(3, dtype=np.uint16), "x")],
        "none": None,
    }
    save_state(tmp_path / "s", state, kind="run")
    again = load_state(tmp_path / "s", kind="run")
    assert again["step"] == 3
    assert again["levels"][0][0].tolist() == [0, 1, 2]
    assert again["none"] is None
    assert torch.equal(again["weights"]["a"], state["weights"]["a"])
    torch.load(tmp_path / "s", weights_only=True)


def test_truncated_edited_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "s"
    save_state(path, {"weights": torch.zeros(1000)}, kind="run")
    whole = path.read_bytes()
    with pytest.raises(LedgerError, match="kind='run'"):
        load_state(path, kind="ledger")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LedgerError, match="cannot be read"):
        load_state(path, kind="run")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(LedgerError):
        load_state(path, kind="run")
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "missing", kind="run")
