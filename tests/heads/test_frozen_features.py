"""Features computed once: the network's own, of these rows, in a private file, and erasable."""

from __future__ import annotations

import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from opacus_pil import LedgerError, UnsupportedError
from opacus_pil.files.fingerprint import dataset_fingerprint
from opacus_pil.heads import BoundedFeatures, FrozenFeatures
from tests.heads.models import SIZE, WIDTH, frozen, head, raw


def body(*, width: int = 6) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(WIDTH, width), nn.BatchNorm1d(width), nn.Dropout(0.5), BoundedFeatures(width)
    )


def features(data=None, network=None, **options) -> FrozenFeatures:
    return FrozenFeatures(
        raw() if data is None else data, body() if network is None else network, progress=False,
        **options,
    )  # fmt: skip


def files(folder) -> list:
    return sorted(folder.iterdir())


def test_a_row_is_what_the_network_makes_of_it_in_evaluation_mode():
    network = body().train()
    found = features(network=network, batch_size=5)
    assert network.training  # a copy was put into evaluation mode
    assert all(p.requires_grad for p in network.parameters())
    expected = network.eval()(raw().tensors[0]).detach()
    torch.testing.assert_close(found.features, expected, rtol=1e-6, atol=1e-7)  # by other batches
    assert torch.equal(found.targets, raw().tensors[1])
    assert (len(found), found.width) == (SIZE, 7)
    assert torch.equal(found[3][0], found.features[3])
    assert not found.features.requires_grad


def test_a_batch_is_its_rows_in_their_order_twice_too_and_after_an_erasure():
    found = features()
    found.erase([2])
    for rows in ([4, 0, 4, 2], [], list(range(SIZE))):
        several = found.__getitems__(rows)
        assert len(several) == len(rows)
        for (x, y), row in zip(several, rows, strict=True):
            assert torch.equal(x, found[row][0])
            assert torch.equal(y, found[row][1])
    assert not found.__getitems__([2])[0][0].any()


def test_training_a_head_on_features_is_training_it_on_the_frozen_network():
    whole = frozen(head())
    data = features(network=whole[:-1])
    for p in whole[-1].parameters():
        nn.init.ones_(p)
    torch.testing.assert_close(whole(raw().tensors[0]), whole[-1](data.features))


def test_the_key_follows_weights_buffers_layers_and_data():
    first = features().key
    assert features().key == first
    changed = body()
    changed[0].weight.data[0, 0] += 1e-3
    buffers = body()
    buffers[1].running_mean += 1.0
    layers = nn.Sequential(*body()[:-1], BoundedFeatures(6, radius=1.0 + 1e-9))
    moved = TensorDataset(*(tensor.flip(0) for tensor in raw().tensors))
    others = [features(network=n).key for n in (changed, buffers, layers)]
    others += [features(moved).key, features(Subset(raw(), range(20))).key]
    assert len({first, *others}) == 6


def test_a_network_that_is_changed_in_place_later_changes_nothing_that_is_kept(tmp_path):
    network = body()
    kept = features(network=network, folder=tmp_path)
    before, key = kept.features.clone(), kept.key
    with torch.no_grad():
        network[0].weight.zero_()
    assert torch.equal(kept.features, before)
    assert dataset_fingerprint(kept) == dataset_fingerprint(features())
    assert features(network=network, folder=tmp_path).key != key


# --- the file -------------------------------------------------------------------------------------


def test_the_file_is_private_and_the_next_reads_it_instead_of_computing(tmp_path, monkeypatch):
    first = features(folder=tmp_path)
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    computed = []
    monkeypatch.setattr(
        BoundedFeatures, "forward",
        lambda self, x, own=BoundedFeatures.forward: computed.append(len(x)) or own(self, x),
    )  # fmt: skip
    second = features(folder=tmp_path, batch_size=4)
    assert sum(computed) <= 8  # a look at the first rows, twice; not all of them
    assert torch.equal(first.features, second.features)
    assert dataset_fingerprint(first) == dataset_fingerprint(second)


@pytest.mark.slow  # starts a process
def test_another_process_reads_it(tmp_path):
    first = features(folder=tmp_path)
    script = (
        "import sys, torch\n"
        "from tests.heads.test_frozen_features import features, dataset_fingerprint\n"
        f"found = features(folder={str(tmp_path)!r})\n"
        "print(dataset_fingerprint(found).sha256, float(found.features.double().sum()))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0] == dataset_fingerprint(first).sha256
    assert float(said[1]) == float(first.features.double().sum())
    assert len(files(tmp_path)) == 1


class Scaled(nn.Module):
    """A setting that is neither a weight nor printed."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.factor * inputs


def test_features_of_other_settings_of_the_same_layers_are_not_taken_for_these(tmp_path):
    features(network=Scaled(2.0), folder=tmp_path)
    with pytest.raises(LedgerError, match="other settings"):
        features(network=Scaled(3.0), folder=tmp_path)
    assert features(network=Scaled(2.0), folder=tmp_path).features.any()


def test_a_damaged_or_renamed_file_is_refused(tmp_path):
    features(folder=tmp_path)
    (path,) = files(tmp_path)
    other = tmp_path / f"{features(network=body(width=5)).key}.pt"
    path.rename(other)
    with pytest.raises(LedgerError, match="renamed"):
        features(network=body(width=5), folder=tmp_path)
    other.rename(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LedgerError, match="cannot be read"):
        features(folder=tmp_path)


# --- erasing --------------------------------------------------------------------------------------


def test_erasing_leaves_zeros_in_memory_and_in_the_file_and_keeps_the_fingerprint(tmp_path):
    kept = features(folder=tmp_path)
    before, name = kept.features.clone(), dataset_fingerprint(kept)
    secret = before[5].numpy().tobytes()
    (path,) = files(tmp_path)
    assert secret in path.read_bytes()
    kept.erase([5, 9])
    assert not kept.features[[5, 9]].any()
    assert kept.erased.nonzero()[0].tolist() == [5, 9]
    others = [k for k in range(SIZE) if k not in (5, 9)]
    assert torch.equal(kept.features[others], before[others])
    assert secret not in path.read_bytes()
    assert len(files(tmp_path)) == 1  # no copy beside it
    assert dataset_fingerprint(kept) == name
    again = features(folder=tmp_path)
    assert not again.features[[5, 9]].any()
    assert dataset_fingerprint(again) == name
    assert len(again) == SIZE  # rows keep their places


def test_a_row_that_was_erased_stays_so_when_another_reader_erases(tmp_path):
    first, second = features(folder=tmp_path), features(folder=tmp_path)
    first.erase([3])
    second.erase([4])  # it had read row 3 before
    third = features(folder=tmp_path)
    assert third.erased.nonzero()[0].tolist() == [3, 4]
    assert not third.features[3].any()
    assert not second.features[3].any()


def test_erasing_again_writes_nothing(tmp_path):
    kept = features(folder=tmp_path)
    kept.erase([3, 4])
    (path,) = files(tmp_path)
    before = path.stat().st_mtime_ns
    kept.erase([4])
    kept.erase([])
    assert path.stat().st_mtime_ns == before


def test_erasing_what_could_not_be_written_is_done_when_it_is_asked_again(tmp_path, monkeypatch):
    kept = features(folder=tmp_path)
    with monkeypatch.context() as full:
        full.setattr(
            "opacus_pil.heads.frozen_features.save_state",
            lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")),
        )
        with pytest.raises(OSError, match="disk full"):
            kept.erase([5])
    kept.erase([5])
    assert not features(folder=tmp_path).features[5].any()


@pytest.mark.parametrize("rows", [[SIZE], [-1], [1, 1], [0.5]])
def test_rows_that_are_not_there_leave_everything_as_it_was(rows, tmp_path):
    kept = features(folder=tmp_path)
    before = kept.features.clone()
    (path,) = files(tmp_path)
    content = path.read_bytes()
    with pytest.raises((TypeError, ValueError), match="rows"):
        kept.erase(rows)
    assert torch.equal(kept.features, before)
    assert not kept.erased.any()
    assert path.read_bytes() == content


@pytest.mark.parametrize("what", ["features", "targets", "erased"])
def test_writing_to_a_row_changes_the_fingerprint(what):
    kept = features()
    kept.erase([2])
    name = dataset_fingerprint(kept)
    if what == "features":
        kept.features[7, 0] += 1.0
    elif what == "targets":
        kept.targets[7] += 1
    else:  # somebody else moves into a place that is free
        kept.features[2] = 1.0
    assert dataset_fingerprint(kept) != name


# --- refusals -------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + torch.randn_like(inputs)


class Augmented(TensorDataset):
    def __getitem__(self, row):
        inputs, target = super().__getitem__(row)
        return inputs * np.random.normal(), target  # noqa: NPY002 as augmentations do


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"network": Noisy()}, UnsupportedError, "random"),
        ({"data": Augmented(*raw().tensors)}, UnsupportedError, "augmentation"),
        ({"network": nn.Unflatten(1, (2, 2))}, ValueError, r"got \(24, 2, 2\)"),
        ({"network": nn.Flatten(0)}, ValueError, r"24 rows"),
        ({"network": nn.LSTM(WIDTH, 3)}, ValueError, "got tuple"),
        ({"data": TensorDataset(torch.zeros(0, 4), torch.zeros(0))}, ValueError, "dataset"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_what_gives_no_fixed_features_is_refused_and_leaves_no_file(change, error, words, tmp_path):
    before = torch.get_rng_state()
    with pytest.raises(error, match=words):
        features(**change, folder=tmp_path)
    assert not files(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


class OnDisk(torch.utils.data.Dataset):
    """Rows that are not in memory; what they are is not to be seen."""

    def __init__(self, seed: int) -> None:
        self._seed = [[seed]]

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, row):
        return raw(seed=self._seed[0][0] if row > 20 else 0)[row]


def test_features_of_other_rows_of_the_same_class_are_not_taken_for_these(tmp_path):
    """One record was exchanged for another since: the one that left would be trained on."""
    with pytest.raises(UnsupportedError, match="whose contents are known"):
        features(OnDisk(0), folder=tmp_path)
    assert not files(tmp_path)
    assert features(OnDisk(0)).features.any()
    named = []
    for seed in (0, 1):
        data = OnDisk(seed)
        data._fingerprint = f"version {seed}"
        named.append(features(data, folder=tmp_path))
    assert not torch.equal(named[0].features, named[1].features)
    assert len(files(tmp_path)) == 2


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="existing folder"):
        features(folder=tmp_path / "none")
