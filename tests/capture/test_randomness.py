"""Who drew from the global generators is noticed, undone, and can be repeated."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pil.capture.randomness import (
    ForwardStates,
    Seen,
    generator_mark,
    generator_states,
    same_states,
    set_generator_states,
    untouched_generators,
    watch_forward,
)

DRAWS = {
    "torch": lambda: torch.rand(1),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002 the global generators are watched
    "python": lambda: random.random(),
}


class Notes:
    def __init__(self):
        self.kept = []

    def note(self, code, detail="", *, lasting=False):
        self.kept.append((code, lasting))


@pytest.mark.parametrize("kind", list(DRAWS))
def test_every_global_generator_is_noticed_and_put_back(kind):
    before = generator_states()
    with untouched_generators() as moved:
        assert not moved()
        DRAWS[kind]()
        assert moved()
    assert same_states(before, generator_states())


def test_they_are_put_back_after_an_error_too():
    before = generator_states()

    def failing():
        with untouched_generators():
            torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert same_states(before, generator_states())


class TestWatching:
    """A forward pass that trains and draws."""

    @staticmethod
    def watched(module):
        notes = Notes()
        watch_forward(module, notes)
        return notes

    def test_dropout_is_noted_for_good(self):
        module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
        notes = self.watched(module)
        module(torch.ones(2, 3))
        assert notes.kept == [("random_gradient", True)]

    def test_evaluation_and_quiet_models_are_not(self):
        module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
        notes = self.watched(module)
        with torch.no_grad():
            module(torch.ones(2, 3))
        module.eval()
        module(torch.ones(2, 3))
        quiet = nn.Linear(3, 2)
        others = self.watched(quiet)
        quiet(torch.ones(2, 3))
        assert notes.kept == others.kept == []

    def test_a_copy_is_not_watched(self):
        module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
        notes = self.watched(module)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            twin(torch.ones(2, 3))
        assert notes.kept == []


class TestForwardStates:
    """The masks of a training can be drawn again."""

    def test_a_pass_is_repeated_with_the_same_masks(self):
        module = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8))
        states = ForwardStates(module)
        states.wanted = True
        inputs = torch.ones(4, 8)
        first = module(inputs)
        other = module(inputs)
        assert not torch.equal(first, other)
        kept = states.take()
        states.wanted = False
        assert len(kept) == 2
        for state, output in zip(kept, (first, other), strict=True):
            set_generator_states(state)
            assert torch.equal(module(inputs), output)

    def test_nothing_is_kept_unasked_nor_in_evaluation_nor_by_copies(self):
        module = nn.Linear(3, 2)
        states = ForwardStates(module)
        module(torch.ones(1, 3))
        states.wanted = True
        with torch.no_grad():
            module(torch.ones(1, 3))
        module.eval()(torch.ones(1, 3))
        copy.deepcopy(module).train()(torch.ones(1, 3))
        pickle.loads(pickle.dumps(module)).train()(torch.ones(1, 3))
        assert states.passes == 1  # the first one
        assert states.take() == []
        assert states.passes == 0


class TestRepetitions:
    """No draw may be made twice from the same place."""

    def test_a_generator_that_goes_on_never_repeats(self):
        generator, seen = torch.Generator().manual_seed(1), Seen()
        for _ in range(50):
            assert not seen.again(generator_mark(generator))
            torch.rand(1, generator=generator)

    @pytest.mark.parametrize("own", [False, True])
    def test_one_that_is_seeded_again_does(self, own):
        generator, seen = torch.Generator() if own else None, Seen()
        seeded = torch.manual_seed if generator is None else generator.manual_seed
        with untouched_generators():
            seeded(4)
            assert not seen.again(generator_mark(generator))
            torch.rand(3, generator=generator)
            assert not seen.again(generator_mark(generator))
            seeded(4)
            assert seen.again(generator_mark(generator))
            seen.forget()
            assert not seen.again(generator_mark(generator))

    def test_what_has_no_state_repeats_nothing(self):
        class Secure:
            def get_state(self):
                raise RuntimeError("not supported")

        seen = Seen()
        assert not seen.again(generator_mark(Secure()))
        assert not seen.again(generator_mark(Secure()))
