"""One changed number changes the fingerprint, wherever it is; what was not read is said."""

import dataclasses
import hashlib
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    random_split,
)

from opacus_pil.errors import LedgerError
from opacus_pil.files import content_digest
from opacus_pil.files.container import load_entries, save_entries
from opacus_pil.files.content_digest import ContentDigest
from opacus_pil.files.fingerprint import Fingerprint, _sampled_sha256, dataset_fingerprint
from opacus_pil.training.checkpoint import _KIND
from tests.capture.models import images
from tests.training_loop import SIZE, Loop

ORDER = "the same instances in another order or container"


def table(seed=0, rows=6):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=drawn), torch.arange(rows) % 2


class Rows(Dataset):
    """Attributes that are given, items that must not be drawn."""

    def __init__(self, length, **attributes):
        self._length = length
        vars(self).update(attributes)

    def __len__(self):
        return self._length

    def __getitem__(self, row):
        raise AssertionError("an item was drawn")


class Plain:
    """A data set that derives from nothing."""

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def old_form(dataset):
    """What checkpoints held before contents were read whole."""
    return {"length": len(dataset), "sha256": _sampled_sha256(dataset)}


# --- contents ------------------------------------------------------------------------------------


def test_checksum_is_sha256_of_type_shape_and_bytes():
    x = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    words = "".join(f"{len(w)} {w};" for w in ("TensorDataset 4", "0", "float32 (4, 3)"))
    expected = hashlib.sha256(words.encode() + x.numpy().tobytes()).hexdigest()
    found = dataset_fingerprint(TensorDataset(x))
    assert (found.length, found.sha256, found.whole, found.how) == (4, expected, True, "contents")


def test_every_number_of_a_large_array_counts_where_the_old_rule_skipped_rows():
    x = torch.zeros(80, 1 << 20, dtype=torch.uint8)  # 80 MiB: the old rule read every other row
    dataset = TensorDataset(x)
    before, old = dataset_fingerprint(dataset), old_form(dataset)
    x[41, 12345] = 1
    after = dataset_fingerprint(dataset)
    assert old_form(dataset) == old
    assert after.differs(before) == "other contents"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_one_changed_bit_changes_the_checksum_and_a_permutation_only_the_order(rows, width, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, size=(rows, width), dtype=np.uint8)
    labels = rng.permutation(rows)
    found = dataset_fingerprint(TensorDataset(*map(torch.from_numpy, (values, labels))))
    order = rng.permutation(rows)
    moved = dataset_fingerprint(
        TensorDataset(torch.from_numpy(values[order]), torch.from_numpy(labels[order]))
    )
    same = bool((order == np.arange(rows)).all())
    assert moved.differs(found) == ("" if same else ORDER)
    values[rng.integers(rows), rng.integers(width)] ^= np.uint8(1 << rng.integers(8))
    changed = dataset_fingerprint(TensorDataset(*map(torch.from_numpy, (values, labels))))
    assert changed.differs(found) == "other contents"


def test_labels_that_move_without_their_rows_are_other_contents():
    x, y = table()
    assert dataset_fingerprint(TensorDataset(x, y)).differs(
        dataset_fingerprint(TensorDataset(x, y.roll(1)))
    ) == "other contents"  # fmt: skip


def test_columns_that_change_places_are_other_contents():
    x, _ = table()
    there, back = (dataset_fingerprint(TensorDataset(*pair)) for pair in ((x, x + 1), (x + 1, x)))
    assert there.differs(back) == "other contents"


def test_a_write_through_shared_memory_is_seen_at_the_next_call():
    values = np.zeros((5, 3))
    tensor = torch.from_numpy(values)
    dataset, version = TensorDataset(tensor), tensor._version
    before = dataset_fingerprint(dataset)
    values[4, 2] = 1.0
    assert tensor._version == version  # torch does not know: this is why nothing is cached
    assert dataset_fingerprint(dataset).differs(before) == "other contents"


@pytest.mark.parametrize("block", [1, 8, 64, 1 << 23])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
        lambda x: x.numpy(),
        lambda x: np.asfortranarray(x.numpy()),
    ],
)
def test_checksum_depends_on_the_numbers_not_on_how_they_lie_in_memory(layout, block, monkeypatch):
    x = torch.arange(7 * 5 * 3, dtype=torch.float64).reshape(7, 5, 3)
    expected = dataset_fingerprint([x[0]]), dataset_fingerprint(x)
    monkeypatch.setattr(content_digest, "_BLOCK", block)
    laid = layout(x)
    assert (dataset_fingerprint([laid[0]]), dataset_fingerprint(laid)) == expected
    assert dataset_fingerprint(laid).rows == expected[1].rows


KINDS = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    "complex64", "complex128", "float8_e4m3fn",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_number_is_read(kind):
    dtype = getattr(torch, kind)
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).to(dtype)
    found = dataset_fingerprint(TensorDataset(x))
    assert found.how == "contents"
    assert found.rows
    other = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).to(dtype)
    assert dataset_fingerprint(TensorDataset(other)).differs(found) == "other contents"
    assert dataset_fingerprint(TensorDataset(x.t().contiguous().t())) == found


def test_equal_bytes_of_another_type_or_shape_are_other_contents():
    zero = [torch.zeros(4, 2, dtype=getattr(torch, kind)) for kind in KINDS]
    zero += [torch.zeros(4, 1, 2), torch.zeros(4), torch.zeros(4, 0)]
    found = [dataset_fingerprint(TensorDataset(x)).sha256 for x in zero]
    assert len(set(found)) == len(found)


def test_gradients_conjugates_and_views_are_numbers_as_well():
    x = torch.randn(4, 3, dtype=torch.complex64)
    expected = dataset_fingerprint(x.conj().clone())
    assert dataset_fingerprint(x.conj()) == expected
    assert dataset_fingerprint(x.conj().clone().requires_grad_()) == expected
    assert dataset_fingerprint(torch.ones(1, 3).expand(4, 3)) == dataset_fingerprint(
        torch.ones(4, 3)
    )


@pytest.mark.parametrize("laid", [lambda x: x, lambda x: x[:, ::2]])
def test_no_copy_of_the_whole_array_is_made(laid):
    x = laid(np.zeros((64, 1 << 20), dtype=np.uint8))
    tracemalloc.start()
    try:
        dataset_fingerprint(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * content_digest._BLOCK < x.nbytes  # a block, and what is made of its rows


# --- containers ----------------------------------------------------------------------------------


def test_containers_of_torch_are_followed():
    x, y = table()
    base = TensorDataset(x, y)
    whole = {
        "tensors": base,
        "one": TensorDataset(x),
        "swapped": TensorDataset(y, x),
        "subset": Subset(base, [0, 1, 2]),
        "reordered": Subset(base, [1, 0, 2]),
        "of arrays": Subset(base, np.array([0, 1, 3])),
        "nested": Subset(Subset(base, [5, 1, 2]), [0, 1]),
        "concat": ConcatDataset([base, base]),
        "parts": ConcatDataset([Subset(base, range(3)), Subset(base, range(3, 6))]),
        "stack": StackDataset(x, y),
        "names": StackDataset(image=x, label=y),
        "other names": StackDataset(image=x, target=y),
        "stacked sets": StackDataset(base, Subset(base, range(6))),
        "split": random_split(base, [4, 2], generator=torch.Generator().manual_seed(0))[0],
        "array": x.numpy()[:, :2],
        "list of pairs": list(zip(x, y, strict=True)),
        "tuple of pairs": [(a, b.item()) for a, b in zip(x, y, strict=True)],
        "dicts": [{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
        "numbers": [1, 2, 3],
        "floats": [1.0, 2.0, 3.0],
        "ragged": [[1, 2], [3], []],
    }
    found = {name: dataset_fingerprint(dataset) for name, dataset in whole.items()}
    assert {name for name, f in found.items() if not (f.whole and f.how == "contents")} == set()
    assert {name for name, f in found.items() if not f.rows} == set()
    for (first, a), (second, b) in itertools.combinations(found.items(), 2):
        assert a != b, (first, second)
    assert found["subset"].differs(found["reordered"]) == ORDER
    assert found["tensors"].differs(found["parts"]) == ORDER  # the same rows, put together
    assert found["numbers"] == dataset_fingerprint(range(1, 4))  # whole numbers are whole numbers
    again = {name: dataset_fingerprint(dataset) for name, dataset in whole.items()}
    assert again == found


def test_a_subset_tells_its_rows_from_those_of_another():
    base = TensorDataset(*table(rows=9))
    first, second, moved = (
        dataset_fingerprint(Subset(base, rows)) for rows in ([0, 1, 2], [0, 1, 3], [2, 0, 1])
    )
    assert first.differs(second) == "other contents"
    assert first.differs(moved) == ORDER


def test_torchvision_like_attributes_are_read_and_transforms_named():
    x, y = table()
    settings_of_it = {
        "root": Path("somewhere"), "train": True, "classes": ["a", "b"],
        "class_to_idx": {"a": 0, "b": 1}, "target_transform": None,
    }  # fmt: skip
    plain = dataset_fingerprint(Rows(6, data=x, targets=y.tolist(), **settings_of_it))
    assert (plain.how, plain.whole, plain.notes) == ("contents", True, ())
    augmented = Rows(6, data=x, targets=y.tolist(), transform=torch.nn.Identity())
    named = dataset_fingerprint(Subset(augmented, range(6)))
    assert named.whole
    assert named.notes == ("Rows.transform: random augmentation is not in the fingerprint.",)
    # a note says what is not compared
    bare = dataset_fingerprint(Subset(Rows(6, data=x, targets=y.tolist()), range(6)))
    assert named == bare
    moved = dataset_fingerprint(Rows(6, data=x.flip(0), targets=y.flip(0).tolist()))
    assert moved.differs(plain) == ORDER


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": [0, 1, 0]},  # images on disk
        {"data": ["a.png", "b.png", "c.png"], "targets": [0, 1, 0]},
        {"data": torch.ones(3), "weights": torch.ones(3)},  # who knows what it is for
        {"data": torch.ones(3), "paths": {"a": ["x"]}},
        {"data": torch.ones(3), "reader": object()},
        {"data": [torch.ones(2), "text", 1]},
        {"dataset": TensorDataset(torch.ones(3))},
    ],
)
def test_what_was_not_read_is_said(attributes):
    found = dataset_fingerprint(Rows(3, **attributes))
    assert (found.how, found.whole, found.rows) == ("parts", False, "")
    assert any("not in the fingerprint" in note for note in found.notes)


@pytest.mark.parametrize("dataset", [Plain(3), Rows(3), Rows(3, data=["a", "b", "c"])])
def test_an_unknown_data_set_contributes_its_length_and_says_so(dataset):
    found = dataset_fingerprint(dataset)
    assert (found.length, found.how, found.whole) == (3, "length_only", False)
    assert len(found.notes) == 1
    other = type(dataset)(4)
    assert dataset_fingerprint(other).differs(found) == "4 instances against 3"


def test_a_wrapped_data_set_is_read_too():
    x, y = table()
    outer = [Rows(6, dataset=TensorDataset(a, y), transform=abs) for a in (x, x + 1)]
    first, second = map(dataset_fingerprint, outer)
    assert first.differs(second) == "other contents"
    assert len(first.notes) == 2  # the transform, and what the wrapper does


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
        np.array(["a", "b", "c"]),
        np.array([1, None, 2], dtype=object),
        np.ma.array([1, 2, 3], mask=[0, 1, 0]),
        [{1}, {2}, {3}],
        ["a", "b", "c"],
    ],
)
def test_what_has_no_plain_numbers_is_not_claimed_to_be_read(value):
    found = dataset_fingerprint(value if isinstance(value, list) else [value] * 3)
    assert not found.whole
    assert found.how == "parts"


def test_whole_numbers_beyond_64_bits_are_read():
    large = dataset_fingerprint([2**70, 1])
    assert large.whole
    assert large != dataset_fingerprint([2**70 + 1, 1])


def test_a_hugging_face_data_set_is_known_by_its_own_fingerprint():
    """Public: every transformation of a datasets.Dataset changes its `_fingerprint`."""
    first, again, other = (
        dataset_fingerprint(Rows(3, _fingerprint=name, _data=object())) for name in "aab"
    )
    assert (first.how, first.whole) == ("given", False)
    assert first == again
    assert first.differs(other) == "another name for the contents"
    assert "own fingerprint" in first.notes[0]
    assert dataset_fingerprint(Subset(Rows(3, _fingerprint="a"), [0, 1])).how == "given"
    mixed = ConcatDataset([Rows(3, _fingerprint="a"), TensorDataset(torch.ones(2))])
    assert dataset_fingerprint(mixed).how == "parts"


# --- the caller's word ---------------------------------------------------------------------------


def test_a_given_name_stands_for_the_contents_and_nothing_is_read():
    a, b = Rows(3, data=torch.ones(3)), Rows(3, data=torch.zeros(3))
    found = dataset_fingerprint(a, given="v1")
    assert (found.how, found.whole, found.rows) == ("given", False, "")
    assert found == dataset_fingerprint(b, given="v1")
    assert found.differs(dataset_fingerprint(a, given="v2")) == "another name for the contents"
    assert found.differs(dataset_fingerprint(a)) == "known by 'given' against 'contents'"
    assert found.differs(dataset_fingerprint(Rows(4), given="v1")) == "3 instances against 4"


@pytest.mark.parametrize(
    ("dataset", "given", "error", "match"),
    [
        (Rows(3), 7, TypeError, "given to be text"),
        (Rows(3), "", ValueError, "given not to be empty"),
        (Stream(), None, TypeError, "data set with a length, got Stream"),
        (iter([1]), None, TypeError, "with a length"),
    ],
)
def test_unusable_arguments_are_refused(dataset, given, error, match):
    with pytest.raises(error, match=match):
        dataset_fingerprint(dataset, given=given)


# --- saved and compared --------------------------------------------------------------------------


def test_the_plain_form_survives_json_and_torch_and_is_compared_like_the_record(tmp_path):
    x, y = table()
    found = dataset_fingerprint(TensorDataset(x, y))
    plain = dict(found)
    torch.save(plain, tmp_path / "f")
    for saved in (json.loads(json.dumps(plain)), torch.load(tmp_path / "f", weights_only=True)):
        assert saved == found
        assert found == saved
        assert found.differs(saved) == ""
        other = dataset_fingerprint(TensorDataset(x.flip(0), y.flip(0)))
        assert other != saved
        assert other.differs(saved) == ORDER
    assert set(plain) <= {field.name for field in dataclasses.fields(Fingerprint)}
    assert hash(found) == hash(dataset_fingerprint(TensorDataset(x, y)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.length = 7
    assert found != "something else"
    assert found != {}


class Folder(Dataset):
    def __init__(self):
        self.targets = [1, 2]

    def __len__(self):
        return 2


SAVED_BY_0_1_0 = {  # printed by dataset_fingerprint at version 0.1.0, commit b6005b2
    "tensors": (
        lambda: TensorDataset(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0])),
        "2f106a96f101e7ca3f546f2a5554c926934ee849708b859b3165e6da314dc8ee",
    ),
    "nested": (
        lambda: ConcatDataset([
            Subset(TensorDataset(torch.arange(6.0).reshape(3, 2).bfloat16()), [2, 0]), Folder(),
        ]),
        "e9fce006cb97beb5e10a4137a484dbef76185f81f5f1b2450295a92cdd9f3597",
    ),
    "large": (  # 96 MiB: every other row
        lambda: TensorDataset(torch.arange(3 << 22).reshape(3, -1)),
        "5d11282a54d20e5f5abdff96cecb759cae8fca8fcdecdb1437fc8878498e4398",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED_BY_0_1_0)
def test_what_old_checkpoints_hold_is_compared_by_the_rule_that_made_it(name):
    make, sha256 = SAVED_BY_0_1_0[name]
    dataset = make()
    old = {"length": len(dataset), "sha256": sha256}
    found = dataset_fingerprint(dataset)
    assert found.differs(old) == ""
    assert old == found
    assert found.differs({**old, "length": 7}).endswith("instances against 7")
    assert found.differs({**old, "sha256": "0" * 64}) == "other contents, or another order"


def test_two_records_without_the_data_set_cannot_be_compared_by_the_old_rule():
    found = dataset_fingerprint(TensorDataset(torch.ones(3)))
    read = Fingerprint(**{**dict(found), "notes": tuple(found.notes)})
    assert read == found
    assert "only the data set itself" in read.differs(old_form(TensorDataset(torch.ones(3))))


def test_a_checkpoint_of_before_is_known_to_be_of_its_data_set_and_of_no_other(tmp_path):
    Loop().run(until=2).save(tmp_path / "new")
    entries, state = load_entries(tmp_path / "new", kind=_KIND)
    old = {**state, "dataset": old_form(images(SIZE))}
    save_entries(tmp_path / "old", entries, old, kind=_KIND)
    loaded = Loop(seed=9).load(tmp_path / "old")
    assert loaded.engine.per_instance.steps == 2
    shifted = TensorDataset(images(SIZE).tensors[0] + 1, images(SIZE).tensors[1])
    # refused, or gone on with at the worst case and a warning: in no case taken for its own
    with pytest.raises((LedgerError, UserWarning), match="Expected a checkpoint of this data set"):
        Loop(seed=9, dataset=shifted).load(tmp_path / "old")


def test_digest_tells_nesting_apart():
    values = [
        [[1, 2], [3]], [[1], [2, 3]], [1, 2, 3], [[1, 2, 3]], [(1, 2), 3], [{"a": 1}], [{"b": 1}],
        [{"a": 1, "b": None}], [None], [True], [1], [1.0], [1j], [np.float32(1)], [torch.tensor(1)],
    ]  # fmt: skip
    found = []
    for value in values:
        digest = ContentDigest()
        assert digest.feed(value)[0]
        found.append(digest.hexdigest())
    assert len(set(found)) == len(found)
