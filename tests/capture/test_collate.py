"""An order is found where each row of a batch is one drawn row up to padding, and nowhere else."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from opacus_pil.capture.collate import (
    COMPARED,
    DEFAULT,
    ProvingCollate,
    keeps_order,
    order_of_rows,
)

LENGTHS = [3, 1, 4, 2]


def sentences():
    """Items of different lengths, words from 1: 0 is padding."""
    return [(torch.arange(1, n + 1) + 10 * k, k) for k, n in enumerate(LENGTHS)]


def joined(items, *, left=False, order=None, padding=0):
    order = range(len(items)) if order is None else order
    words = [items[k][0] for k in order]
    if left:
        turned = pad_sequence([w.flip(0) for w in words], batch_first=True, padding_value=padding)
        padded = turned.flip(1)
    else:
        padded = pad_sequence(words, batch_first=True, padding_value=padding)
    return padded, torch.tensor([items[k][1] for k in order])


def proved(collate, items, **options):
    return ProvingCollate(collate, **options)(items)


class TestOrders:
    """What a batch shows by itself."""

    @pytest.mark.parametrize("left", [False, True])
    @pytest.mark.parametrize("padding", [0, -100])
    @pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
    def test_padding_at_either_end_is_looked_through(self, left, padding, order):
        def collate(items):
            order_now = [k for k in order if k < len(items)]
            return joined(items, left=left, order=order_now, padding=padding)

        batch, how, why, positions = proved(collate, sentences())
        assert how == COMPARED.how
        assert why == ""
        assert (positions or [0, 1, 2, 3]) == order
        assert batch[0].shape == (4, 4)

    def test_length_sorting_is_the_order_that_it_is(self):
        def collate(items):
            by_length = sorted(range(len(items)), key=lambda k: -len(items[k][0]))
            return joined(items, order=by_length)

        *_, positions = proved(collate, sentences())
        assert positions == [2, 0, 3, 1]

    def test_padding_that_is_no_constant_is_another_row(self):
        def collate(items):
            words, labels = joined(items)
            words[1, 1:] = torch.tensor([5, 6, 7])[: words.shape[1] - 1]
            return words, labels

        assert proved(collate, sentences())[1] == ""

    def test_ragged_lists_one_per_row(self):
        def collate(items):
            return [item[0].tolist() for item in items][::-1], torch.tensor(
                [item[1] for item in items][::-1]
            )

        *_, positions = proved(collate, sentences())
        assert positions == [3, 2, 1, 0]

    def test_mappings_named_tuples_and_arrays(self):
        class Item(NamedTuple):
            words: torch.Tensor
            more: dict

        def collate(items):
            turned = items[::-1]
            return Item(
                torch.stack([item[0][:1] for item in turned]),
                {"labels": np.array([item[1] for item in turned]), "task": "fixed"},
            )

        *_, positions = proved(collate, sentences())
        assert positions == [3, 2, 1, 0]

    def test_leaves_must_agree(self):
        """Inputs one way and labels the other: each is an order, together they are none."""

        def collate(items):
            words, labels = joined(items)
            return words, labels.flip(0)

        batch, how, why, _ = proved(collate, sentences())
        assert how == ""
        assert "not the drawn rows, each once" in why
        assert batch[1].tolist() == [3, 2, 1, 0]

    def test_equal_rows_may_stand_for_each_other(self):
        items = [(torch.tensor([k // 2]), 0) for k in range(6)]

        def collate(items):
            return default_collate(items[1::-1] + items[2:])

        assert proved(collate, items)[3] is None  # as drawn

    def test_not_a_number_is_the_same_record(self):
        items = [(torch.tensor([float("nan"), k]), k) for k in range(4)]
        *_, positions = proved(lambda items: default_collate(items[::-1]), items)
        assert positions == [3, 2, 1, 0]

    def test_a_constant_beside_the_rows_says_nothing_of_any(self):
        def collate(items):
            return joined(items)[1], torch.zeros(7), "text", 3.5

        assert proved(collate, sentences())[1] == COMPARED.how

    def test_one_that_depends_on_the_batch_mixes_its_rows(self):
        def collate(items):
            return joined(items)[1], float(sum(item[1] for item in items))

        assert "depends on several rows" in proved(collate, sentences())[2]

    @given(order=st.permutations(range(7)), labels=st.lists(st.integers(0, 2), min_size=7,
                                                           max_size=7))  # fmt: skip
    def test_whatever_the_permutation_the_rows_are_where_it_says(self, order, labels):
        """Equal rows make it ambiguous; what is found is right all the same, leaf by leaf."""
        items = [(torch.tensor([label, label % 2]), label) for label in labels]
        batch = default_collate([items[k] for k in order])
        found, why = order_of_rows(batch, [default_collate([item]) for item in items])
        assert why == ""
        assert sorted(found) == list(range(7))
        for k, row in enumerate(found):
            assert torch.equal(batch[0][k], items[row][0])
            assert batch[1][k] == items[row][1]

    def test_the_batch_may_come_second(self):
        def collate(items):
            return torch.stack([item[0][:1].expand(5) for item in items[::-1]], dim=1)

        *_, positions = proved(collate, sentences(), batch_first=False)
        assert positions == [3, 2, 1, 0]


class TestNoOrder:
    """Rows mixed, left out, repeated: not known, and why."""

    @pytest.mark.parametrize(
        ("collate", "words"),
        [
            (lambda items: default_collate([i for i in items if i[1] != 2] or items), "3 rows"),
            (lambda items: default_collate([*items, items[0]]), "5 rows"),
            (lambda items: default_collate([items[0]] * len(items)), "not the drawn rows"),
            (lambda items: default_collate(items)[1].float().mean(), "one value"),
            (lambda items: [*default_collate(items), torch.ones(len(items) + 1)], "5 rows"),
        ],
    )
    def test_it_says_why(self, collate, words):
        items = [(torch.tensor([k]), k) for k in range(4)]
        _, how, why, positions = proved(collate, items)
        assert how == ""
        assert positions is None
        assert words in why

    def test_mixup_is_no_order(self):
        def collate(items):
            inputs, labels = default_collate(items)
            return 0.7 * inputs + 0.3 * inputs.flip(0), labels

        items = [(torch.tensor([float(k)]), k) for k in range(4)]
        assert proved(collate, items)[1] == ""

    def test_statistics_of_the_batch_are_no_order(self):
        def collate(items):
            inputs, labels = default_collate(items)
            return inputs - inputs.mean(0), labels

        items = [(torch.tensor([float(k)]), k) for k in range(4)]
        assert proved(collate, items)[1] == ""

    def test_a_function_that_fails_on_one_row_is_asked_no_more(self):
        def collate(items):
            if len(items) < 2:
                raise ValueError("too few")
            return default_collate(items)

        batch, how, why, _ = proved(collate, [(torch.tensor([k]), k) for k in range(4)])
        assert how == ""
        assert "fails on a single row (ValueError)" in why
        assert batch[1].tolist() == [0, 1, 2, 3]


class TestTransparency:
    """The loop sees what it would have seen."""

    def test_default_collation_is_not_compared(self):
        assert keeps_order(default_collate)
        batch, how, _, positions = proved(default_collate, [(torch.tensor([1]), 1)])
        assert (how, positions) == (DEFAULT.how, None)
        assert batch[0].tolist() == [[1]]

    def test_nothing_drawn_is_nothing_asked(self):
        asked = []

        def collate(items):
            asked.append(len(items))
            return items

        assert proved(collate, [])[1] == DEFAULT.how
        assert asked == [0]

    def test_a_function_that_takes_items_apart_is_given_copies(self):
        def collate(items):
            labels = [item.pop("label") for item in items]
            return torch.tensor(labels), torch.stack([item.pop("x") for item in items])

        items = [{"x": torch.tensor([k]), "label": k} for k in range(3)]
        assert proved(collate, items)[1] == COMPARED.how

    def test_no_generator_moves_more_than_it_did(self):
        def collate(items):
            torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002 global ones are meant
            return default_collate(items)

        items = [(torch.tensor([k]), k) for k in range(3)]

        def states():
            torch.manual_seed(1)
            np.random.seed(1)  # noqa: NPY002
            random.seed(1)
            yield
            yield torch.rand(3).tolist(), np.random.rand(), random.random()  # noqa: NPY002

        draws = []
        for joining in (collate, ProvingCollate(collate)):
            run = states()
            next(run)
            joining(items)
            draws.append(next(run))
        assert draws[0] == draws[1]

    def test_what_it_answers_passes_through_pinning(self):
        """Pinning tensors needs an accelerator; it must leave the rest of the answer alone."""
        answer = (["a batch"], *proved(_turned, [(torch.tensor([k]), k) for k in range(4)])[1:])
        assert pin_memory(answer) == answer

    @pytest.mark.parametrize("workers", [0, 2])
    def test_what_it_answers_passes_through_workers(self, workers):
        class Numbers(Dataset):
            def __len__(self):
                return 12

            def __getitem__(self, row):
                return torch.tensor([row])

        loader = DataLoader(
            Numbers(), batch_size=4, num_workers=workers, collate_fn=ProvingCollate(_turned)
        )
        for batch, how, why, positions in loader:
            assert (how, why, positions) == (COMPARED.how, "", [3, 2, 1, 0])
            assert batch.shape == (4, 1)


def _turned(items):
    return default_collate(items[::-1])
