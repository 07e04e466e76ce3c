"""Lines A5, A12: rows of a batch that are not the drawn rows, each once and in their order.

What the tripwire sees of these: nothing. Each gradient is clipped, only whose it is, and by whose
cap, is another matter: it shows where a batch is joined, and where its sum is formed again.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, default_collate

from opacus_pil import BatchMemoryManager
from tests.cases.loops import views
from tests.cases.trainings import (
    NOISE,
    SIZE,
    TINY,
    answer,
    gaussian_rdp,
    plain_loop,
    points,
    train,
)

CAPS = np.where(np.arange(SIZE) % 2, 1.0, 0.1)


def repeated_first(items):
    return default_collate([*items, items[0]])


def without_the_corrupt(items):
    """Row 0 is corrupt."""
    return default_collate([item for item in items if item[0][0] < 5.0])


def filled_up(items):
    return default_collate([*items, *items[:1] * (32 - len(items))])


def mixed(items):
    inputs, targets = default_collate(items)
    return 0.5 * inputs + 0.5 * inputs.flip(0), targets


def centred(items):
    inputs, targets = default_collate(items)
    return (inputs - inputs.mean(0) if len(inputs) > 1 else inputs), targets


def labels_turned(items):
    inputs, targets = default_collate(items)
    return inputs, targets.flip(0)


class TestRowsNotOnce:
    """A5: two views of each row; rows repeated, left out, mixed."""

    @pytest.mark.parametrize("policy", ["worst_case", "capped", "full", "participation"])
    @pytest.mark.parametrize(
        "collate",
        [views, repeated_first, without_the_corrupt, filled_up, mixed, centred, labels_turned],
    )
    def test_a_collate_function_cannot_hide_it(self, collate, policy):
        found = answer(plain_loop, policy=policy, loader={"collate_fn": collate})
        assert found.honest
        assert found.label in ("estimate", "refused")

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("policy", ["worst_case", "full", "participation"])
    def test_a_loop_cannot_either(self, policy, mode):
        def cut(training):
            for inputs, targets in training.loader:
                training.step(inputs[:10], targets[:10])

        def doubled(training):
            for inputs, targets in training.loader:
                training.step(torch.cat([inputs, -inputs]), torch.cat([targets, targets]))

        for loop in (cut, doubled):
            found = answer(loop, policy=policy, mode=mode)
            assert found.honest
            assert found.label == "estimate"
            assert "another number of gradients" in found.words

    def test_two_views_are_charged_as_two_clip_bounds(self):
        found = train(plain_loop, loader={"collate_fn": views})
        assert (found.spent() >= gaussian_rdp([2.0 / NOISE]) - TINY).all()


class Sorting(Dataset):
    """Storage that reads in its own order, and says nothing of it."""

    def __init__(self, data):
        self.data = data
        self.tensors = data.tensors

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        return self.data[row]

    def __getitems__(self, rows):
        return [self.data[row] for row in sorted(rows, reverse=True)]


def by_size(items):
    return default_collate(sorted(items, key=lambda item: -float(item[0].norm())))


class TestRowsInAnotherOrder:
    """A12: caps of half of the rows are .1, and the batch is sorted."""

    @staticmethod
    def sorted_in_the_loop(training):
        for inputs, targets in training.loader:
            order = inputs.norm(dim=1).argsort(descending=True)
            training.step(inputs[order], targets[order])

    @staticmethod
    def two_in_the_middle_exchanged(training):
        for inputs, targets in training.loader:
            order = torch.arange(len(inputs))
            order[[9, 10]] = order[[10, 9]]
            training.step(inputs[order], targets[order])

    @staticmethod
    def physical_batches_turned(training):
        with BatchMemoryManager(
            data_loader=training.loader, max_physical_batch_size=7, optimizer=training.optimizer
        ) as loader:
            for inputs, targets in loader:
                training.step(inputs.flip(0), targets.flip(0))

    @pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
    def test_a_collate_function_that_sorts_is_followed(self, mode):
        for row in (0, 1, 2):
            found = answer(
                plain_loop, row=row, policy="capped", caps=CAPS, mode=mode,
                loader={"collate_fn": by_size},
            )  # fmt: skip
            assert found.honest
            assert found.label == "bound"

    @pytest.mark.parametrize("policy", ["full", "participation"])
    def test_measured_norms_are_given_to_the_rows_they_belong_to(self, policy):
        """A full pass joins its chunks by the same function: it is followed there too."""
        for row in (0, 1, 5):
            found = answer(plain_loop, row=row, policy=policy, loader={"collate_fn": by_size})
            assert found.honest
            assert found.label == "output_specific"

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("loop", ["sorted_in_the_loop", "two_in_the_middle_exchanged",
                                      "physical_batches_turned"])  # fmt: skip
    def test_a_loop_that_sorts_is_found_out(self, loop, mode):
        found = answer(getattr(self, loop), policy="capped", caps=CAPS, mode=mode)
        assert found.label == "refused"
        assert "other gradients in training" in found.words or "another order" in found.words

    @pytest.mark.parametrize("policy", ["capped", "full", "participation"])
    def test_a_data_set_that_sorts_is_found_out(self, policy):
        caps = CAPS if policy == "capped" else None
        found = answer(plain_loop, policy=policy, caps=caps, data=Sorting(points()))
        assert found.label in ("estimate", "refused")
        assert "another order" in found.words or "other gradients" in found.words
