"""A model's SHA-256: every bit counts, and nothing but names, types, shapes and bits does."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
import torch.nn as nn
from opacus import GradSampleModule

from opacus_pil import LedgerError
from opacus_pil.files.container import save_state
from opacus_pil.files.model_hash import model_file_hash, model_hash


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_every_single_bit_of_every_weight_counts() -> None:
    state = network().state_dict()
    seen = {model_hash(state)}
    for value in state.values():
        raw = value.reshape(-1).view(torch.uint8)
        for place in range(len(raw)):
            for bit in range(8):
                raw[place] ^= 1 << bit
                seen.add(model_hash(state))
                raw[place] ^= 1 << bit
    bits = 8 * sum(4 * value.numel() for value in state.values())
    assert len(seen) == 1 + bits
    assert model_hash(network()) in seen  # and all bits are back


def test_it_is_the_documented_sequence_of_bytes() -> None:
    state = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(3, dtype=torch.int16)}
    written = b"opacus_pil model 1;1 a torch.int16 ();" + struct.pack("<h", 3)
    written += b"1 b torch.float32 (2,);" + struct.pack("<2f", 1.0, -2.0)
    assert model_hash(state) == hashlib.sha256(written).hexdigest()


def test_layout_order_and_wrapper_do_not_count() -> None:
    module = network()
    state = module.state_dict()
    assert model_hash(dict(reversed(state.items()))) == model_hash(module)
    assert model_hash({n: v.t().contiguous().t() for n, v in state.items()}) == model_hash(module)
    assert model_hash(GradSampleModule(module)) == model_hash(state)


def test_name_type_and_shape_count() -> None:
    value = torch.zeros(4)
    states = [
        {"a": value}, {"b": value}, {"a": value.double()}, {"a": value.view(torch.int32)},
        {"a": value.reshape(2, 2)}, {"a": value, "b": value[:0]}, {"a": -value}, {},
        {"a": value.bfloat16()}, {"a": value.bool()}, {"a": value.to(torch.complex64)},
    ]  # fmt: skip
    assert len({model_hash(state) for state in states}) == len(states)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), 3.0, None],
    ids=["sparse", "meta", "number", "none"],
)
def test_what_has_no_plain_bytes_is_refused(value) -> None:
    with pytest.raises(TypeError, match="'a' to be a dense tensor"):
        model_hash({"a": value})
    with pytest.raises(TypeError, match="names as keys"):
        model_hash({1: torch.zeros(1)})


def test_a_file_has_the_hash_of_what_is_in_it(tmp_path) -> None:
    module = network()
    path = tmp_path / "model.pt"
    for content in (
        module.state_dict(),
        {"module_state_dict": GradSampleModule(network()).state_dict(), "epoch": 3},
    ):
        torch.save(content, path)
        assert model_file_hash(path) == model_hash(module)


def test_a_file_that_is_no_state_is_refused_and_runs_no_code(tmp_path) -> None:
    path = tmp_path / "model.pt"
    for content in (network(), [1], {}, {"a": 1}):
        torch.save(content, path)
        with pytest.raises(LedgerError, match=r"model\.pt"):
            model_file_hash(path)
    path.write_bytes(b"not torch")
    with pytest.raises(LedgerError, match="cannot be read safely"):
        model_file_hash(path)
    with pytest.raises(FileNotFoundError):
        model_file_hash(tmp_path / "missing.pt")


def test_a_file_of_the_queue_points_to_the_models_own(tmp_path) -> None:
    save_state(tmp_path / "state.pt", {"module": torch.zeros(2)}, kind="something")
    with pytest.raises(LedgerError, match=r"state\.pt to hold a model's weights.*Pass model\.pt"):
        model_file_hash(tmp_path / "state.pt")
