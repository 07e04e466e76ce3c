"""CIFAR-10 and SVHN from tiny files in the layout of the originals, written here byte by byte."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from opacus_pil import datasets

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")


def pixel(channel: int, row: int, column: int, number: int) -> int:
    """A value that no two of the four axes can share by accident of order."""
    return (90 * channel + 7 * row + 3 * column + 11 * number) % 256


def image(number: int) -> np.ndarray:
    """Shape (3, 32, 32)."""
    c, h, w = np.meshgrid(np.arange(3), np.arange(32), np.arange(32), indexing="ij")
    return ((90 * c + 7 * h + 3 * w + 11 * number) % 256).astype(np.uint8)


def write_cifar(root: Path, *, labels: dict[str, list[int]]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for name, classes in labels.items():
        content = b""
        for label in classes:
            # "The first byte is the label, the next 1024 bytes are the red channel values …"
            content += bytes([label]) + image(number).tobytes()
            number += 1
        (root / f"{name}.bin").write_bytes(content)


def write_svhn(folder: Path, *, labels: list[int], name: str = "train_32x32.mat") -> None:
    pixels = np.stack([image(k).transpose(1, 2, 0) for k in range(len(labels))], axis=3)
    savemat(folder / name, {"X": pixels, "y": np.array(labels, dtype=np.uint8)[:, None]})


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    labels = {name: [k, 9 - k] for k, name in enumerate(BATCHES)} | {"test_batch": [4, 0, 9]}
    write_cifar(tmp_path / "cifar-10-batches-bin", labels=labels)
    return tmp_path


def test_cifar10_keeps_order_of_files_rows_channels_and_pixels(cifar: Path) -> None:
    data = datasets.load("cifar10", folder=cifar)
    assert data.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert data.images.shape == (10, 3, 32, 32)
    assert (data.images.dtype, data.labels.dtype) == (torch.float32, torch.int64)
    for number, c, h, w in ((0, 0, 0, 1), (0, 2, 31, 0), (7, 1, 5, 30), (9, 2, 17, 3)):
        # a float32 holds v / 255 to 2^-24 of it
        assert data.images[number, c, h, w].item() == pytest.approx(
            pixel(c, h, w, number) / 255, rel=2**-24
        )
    assert (data.name, data.classes) == ("cifar10 train", tuple(range(10)))


def test_cifar10_test_part_is_the_test_batch_alone(cifar: Path) -> None:
    data = datasets.load("cifar10", folder=cifar, part="test")
    assert data.labels.tolist() == [4, 0, 9]
    assert torch.equal(data.images[1], torch.from_numpy(image(11).astype(np.float32)) / 255)


def test_cifar10_folder_may_be_that_of_the_files(cifar: Path) -> None:
    direct = datasets.load("cifar10", folder=cifar / "cifar-10-batches-bin")
    assert torch.equal(direct.images, datasets.load("cifar10", folder=str(cifar)).images)


def test_svhn_is_turned_into_rows_and_ten_means_zero(tmp_path: Path) -> None:
    write_svhn(tmp_path, labels=[1, 10, 9, 10])
    write_svhn(tmp_path, labels=[10], name="test_32x32.mat")
    data = datasets.load("svhn", folder=tmp_path)
    assert data.labels.tolist() == [1, 0, 9, 0]
    assert data.labels.dtype == torch.int64
    expected = np.stack([image(k) for k in range(4)]).astype(np.float32) / np.float32(255)
    assert np.array_equal(data.images.numpy(), expected)
    assert datasets.load("svhn", folder=tmp_path, part="test").labels.tolist() == [0]


def test_what_is_loaded_splits_like_the_sets_inside_packages(tmp_path: Path) -> None:
    write_svhn(tmp_path, labels=[1, 2] * 10)
    data = datasets.load("svhn", folder=tmp_path)
    parts = datasets.split(
        data, sizes={"train": 0.5, "test": 0.5}, generator=torch.Generator().manual_seed(0)
    )
    assert [p.labels.bincount().tolist() for p in parts.values()] == [[0, 5, 5]] * 2
    rows = datasets.logistic_features(data.images)
    assert rows.shape == (20, 3 * 32 * 32 + 1)
    assert (rows.double().norm(dim=1) <= 1.0).all()


@pytest.mark.parametrize(
    ("name", "part", "file", "where"),
    [
        ("cifar10", "train", "data_batch_3.bin", "cifar-10-binary.tar.gz"),
        ("cifar10", "test", "test_batch.bin", "cifar-10-binary.tar.gz"),
        ("svhn", "train", "train_32x32.mat", "ufldl.stanford.edu/housenumbers"),
        ("svhn", "test", "test_32x32.mat", "ufldl.stanford.edu/housenumbers"),
    ],
)
def test_missing_file_is_named_with_its_place_and_origin(
    cifar: Path, name: str, part: str, file: str, where: str
) -> None:
    (cifar / "cifar-10-batches-bin" / file).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=f"{file} to exist, got no such file.*{where}"):
        datasets.load(name, folder=cifar, part=part)


def test_pickles_are_never_opened_and_the_message_says_why(tmp_path: Path) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return Path.touch, (ran,)

    (root / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    for folder in (tmp_path, root):
        with pytest.raises(FileNotFoundError, match=r"pickles, which are not read\. Unpack"):
            datasets.load("cifar10", folder=folder)
    assert not ran.exists()


@pytest.mark.parametrize("change", [-1, 1, -3073 * 2])
def test_cifar10_file_that_is_not_whole_records_is_refused(cifar: Path, change: int) -> None:
    path = cifar / "cifar-10-batches-bin" / "data_batch_2.bin"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0")
    size = len(content) + change
    with pytest.raises(ValueError, match=rf"data_batch_2.bin.* 3073 bytes .*got {size} bytes"):
        datasets.load("cifar10", folder=cifar)


def test_cifar10_label_out_of_range_names_file_and_row(cifar: Path) -> None:
    write_cifar(cifar / "cifar-10-batches-bin", labels={"data_batch_5": [0, 3, 10]})
    with pytest.raises(ValueError, match=r"data_batch_5.bin in \[0, 9\], got 1 of 3 .*row 2"):
        datasets.load("cifar10", folder=cifar)


@pytest.mark.parametrize("label", [0, 11])
def test_svhn_label_out_of_range_names_file_and_row(tmp_path: Path, label: int) -> None:
    write_svhn(tmp_path, labels=[5, label])
    with pytest.raises(ValueError, match=rf"in \[1, 10\], got 1 of 2 .*row 1, label {label}\)"):
        datasets.load("svhn", folder=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"X": np.zeros((32, 32, 3, 2), np.uint8)},
        {"y": np.ones((2, 1), np.uint8)},
        {"X": np.zeros((32, 32, 3, 3), np.uint8), "y": np.ones((2, 1), np.uint8)},
        {"X": np.zeros((2, 3, 32, 32), np.uint8), "y": np.ones((2, 1), np.uint8)},
        {"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1), np.uint8)},
        {"X": np.zeros((32, 32, 3, 0), np.uint8), "y": np.ones((0, 1), np.uint8)},
        {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array(["1", "2"])},
    ],
)
def test_svhn_file_of_other_arrays_is_refused(tmp_path: Path, content: dict) -> None:
    savemat(tmp_path / "train_32x32.mat", content)
    with pytest.raises(ValueError, match=r"train_32x32.mat to hold X of shape \(32, 32, 3, n\)"):
        datasets.load("svhn", folder=tmp_path)


def test_svhn_file_that_is_cut_or_foreign_is_refused(tmp_path: Path) -> None:
    write_svhn(tmp_path, labels=[1, 2])
    path = tmp_path / "train_32x32.mat"
    whole = path.read_bytes()
    cut = [whole[:end] for end in (*range(0, 400, 7), *range(400, len(whole), 997))]
    for broken in (*cut, b"no such thing", b"MATLAB 7.3 MAT-file" * 40):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train_32x32\.mat"):
            datasets.load("svhn", folder=tmp_path)
    assert loadmat(io.BytesIO(whole))["y"].tolist() == [[1], [2]]  # the whole one was readable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digits", "folder": "."}, "folder to fit name='digits'.*It needs none"),
        ({"name": "svhn"}, "folder to fit name='svhn', got folder=None. Name the folder"),
        ({"name": "cifar10", "folder": ".", "part": "extra"}, "part to be one of train, test"),
        ({"name": "mnist5k", "part": "test"}, "part to be None for mnist5k"),
    ],
)
def test_folder_and_part_are_for_the_sets_that_have_them(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.load(**arguments)
