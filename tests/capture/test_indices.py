"""The rows the loader publishes are the rows of the batch, and its coins are Opacus's."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import wrap_data_loader
from torch.utils.data import Dataset, TensorDataset

from opacus_pil.capture.indices import record_indices
from opacus_pil.capture.tracker import BatchTracker
from opacus_pil.errors import UnsupportedError

SIZE = 40


class Numbered(Dataset):
    """Each row is its own number, so that a batch says which rows it holds."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(row), torch.tensor(0)


def numbered_loader(*, sample_rate: float = 0.2, workers: int = 0, persistent: bool = False):
    generator = torch.Generator().manual_seed(3)
    return DPDataLoader(
        Numbered(), sample_rate=sample_rate, num_workers=workers, generator=generator,
        persistent_workers=persistent,
    )  # fmt: skip


def claimed(tracker: BatchTracker) -> list[int] | None:
    rows = tracker.claim().rows
    return None if rows is None else rows.tolist()


@pytest.mark.parametrize(
    ("workers", "persistent"), [(0, False), (2, False), (2, True)], ids=["0", "2", "2 persistent"]
)
def test_rows_are_those_of_the_batch_whatever_the_loop_does(workers, persistent):
    loader = numbered_loader(workers=workers, persistent=persistent)
    tracker = record_indices(loader)
    seen = 0
    peeked = next(iter(loader))[0].tolist()  # a peek that nobody trains on
    assert claimed(tracker) == peeked
    next(iter(loader))
    for stop_at in (None, 2, None):  # a full epoch, an early break, a full epoch again
        for number, (batch, _) in enumerate(loader):
            if number == stop_at:
                break
            if number % 3 == 1:
                continue  # handed out, never used
            assert claimed(tracker) == batch.tolist()
            assert tracker.claim().rows is None  # once only
            seen += 1
    assert seen == 3 + 1 + 3  # of 5 batches, 1 and 4 are skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_random_stream_is_opacus_own(workers):
    stock, recording = numbered_loader(workers=workers), numbered_loader(workers=workers)
    record_indices(recording)
    for _ in range(2):
        ours = [batch[0].tolist() for batch in recording]
        assert ours == [batch[0].tolist() for batch in stock]
    states = [loader.batch_sampler.generator.get_state() for loader in (stock, recording)]
    assert torch.equal(*states)


def test_whole_population_keeps_the_random_stream():
    stock, recording = numbered_loader(), numbered_loader()
    record_indices(recording, population=np.arange(SIZE))
    assert [b[0].tolist() for b in recording] == [b[0].tolist() for b in stock]


def test_population_is_drawn_at_the_unchanged_rate_and_nothing_else_is():
    population, steps, rate = np.arange(0, SIZE, 2), 2000, 0.2
    loader = numbered_loader(sample_rate=rate)
    tracker = record_indices(loader, population=population[::-1].copy(), steps=steps)
    counts = np.zeros(SIZE)
    assert len(loader) == steps
    for batch, _ in loader:
        rows = tracker.claim().rows
        assert rows.tolist() == batch.tolist()
        counts[rows] += 1
    assert counts[1::2].sum() == 0
    # 20 members, each binomial(2000, 0.2), std 17.9: five sigma, union over members < 2e-5.
    assert np.abs(counts[::2] - steps * rate).max() < 5 * np.sqrt(steps * rate * (1 - rate))


def test_empty_draws_are_batches_without_rows():
    loader = numbered_loader(sample_rate=0.01)
    tracker = record_indices(loader)
    lengths = []
    for batch, _ in loader:
        rows = tracker.claim().rows
        assert rows is not None
        assert len(rows) == len(batch)
        lengths.append(len(rows))
    assert 0 in lengths  # P(no empty draw in 100) = (1 - 0.99^40)^100 < 1e-48


def test_a_nested_pass_makes_the_outer_batch_unknown():
    loader = numbered_loader()
    tracker = record_indices(loader)
    outer = iter(loader)
    next(outer)
    next(iter(loader))  # peeking while the outer batch waits for its step
    assert tracker.claim().rows is None
    batch, _ = next(outer)
    assert claimed(tracker) == batch.tolist()


def test_a_pass_that_failed_is_not_trusted_any_more():
    class Failing(Numbered):
        failures = 1

        def __getitem__(self, row: int):
            if Failing.failures:
                Failing.failures -= 1
                raise OSError("unreadable")
            return super().__getitem__(row)

    data = Failing()
    Failing.failures = 0
    loader = DPDataLoader(data, sample_rate=0.5)
    tracker = record_indices(loader)
    batches = iter(loader)
    Failing.failures = 1
    with pytest.raises(OSError, match="unreadable"):
        next(batches)
    next(batches)
    assert tracker.claim().rows is None


def test_explicit_rows_replace_the_loaders_and_are_claimed_once():
    loader = numbered_loader()
    tracker = record_indices(loader)
    tracker.set_explicit(np.array([4, 2]))
    next(iter(loader))
    assert claimed(tracker) == [4, 2]
    assert tracker.claim().rows is None
    tracker.set_explicit(None)
    batch, _ = next(iter(loader))
    assert claimed(tracker) == batch.tolist()


class Signalled:
    """What Opacus's memory manager takes for the optimizer."""

    def __init__(self, tracker: BatchTracker) -> None:
        self.tracker = tracker

    def signal_skip_step(self, do_skip: bool = True) -> None:
        self.tracker.split.emit(last=not do_skip)


def split_by_opacus(*, workers: int = 0):
    loader = numbered_loader(workers=workers)
    tracker = record_indices(loader)
    signalled = Signalled(tracker)
    return loader, wrap_data_loader(data_loader=loader, max_batch_size=3, optimizer=signalled)


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_that_opacus_hands_out_know_their_draw(workers):
    loader, parts = split_by_opacus(workers=workers)
    for _ in range(2):
        draws: dict[object, list[int]] = {}
        for batch, _ in parts:
            claim = loader.tracker.claim()
            assert claim.rows is None  # of the part itself nothing is published
            assert (claim.fresh, claim.order.known) == (1, True)
            draws.setdefault(claim.draw, []).extend(batch.tolist())
        assert None not in draws
        assert len(draws) == 5
        for draw, rows in draws.items():
            assert draw.rows == rows
            assert draw.complete


def test_a_part_that_waits_beside_a_newer_pass_has_no_certain_draw():
    loader, parts = split_by_opacus()
    outer = iter(parts)
    next(outer)
    inner = iter(parts)
    next(inner)  # whose batch will be used, this or the outer one?
    claim = loader.tracker.claim()
    assert claim.rows is claim.draw is None
    assert inner is not outer


def test_rows_published_beside_a_waiting_part_are_not_claimed():
    loader, parts = split_by_opacus()
    outer = iter(parts)
    next(outer)
    next(iter(loader))  # a look at the private loader while the part waits for its step
    claim = loader.tracker.claim()
    assert claim.rows is claim.draw is None
    del outer
    batch, _ = next(iter(loader))
    assert claimed(loader.tracker) == batch.tolist()


class TestSkippedDraws:
    """A draw that makes no step while others do is counted; leaving a loop is not skipping."""

    @staticmethod
    def after(loop) -> int:
        loader = numbered_loader()
        tracker = record_indices(loader)
        loop(loader, tracker)
        return tracker.settle()

    def test_a_loop_that_steps_on_every_batch_skips_none(self):
        assert self.after(lambda loader, tracker: [tracker.claim() for _ in loader]) == 0

    def test_a_loop_that_is_left_skips_none(self):
        def leave(loader, tracker):
            for number, _ in enumerate(loader):
                if number == 2:
                    break
                tracker.claim()
            self_of_next_pass = [tracker.claim() for _ in loader]
            assert self_of_next_pass

        assert self.after(leave) == 0

    @pytest.mark.parametrize("skipped", [0, 2, 4], ids=["first", "middle", "last"])
    def test_a_batch_passed_over_counts_wherever_it_is(self, skipped):
        def loop(loader, tracker):
            for number, _ in enumerate(loader):
                if number != skipped:
                    tracker.claim()

        assert self.after(loop) == 1

    def test_a_whole_pass_with_gradients_on_counts_and_an_evaluation_does_not(self):
        def train(loader, tracker):
            for _ in loader:
                pass

        @torch.no_grad()
        def evaluate(loader, tracker):
            for _ in loader:
                pass

        assert self.after(train) == 5
        assert self.after(evaluate) == 0

    def test_batches_fetched_ahead_count_but_for_the_last(self):
        def ahead(loader, tracker):
            batches = iter(loader)
            next(batches)
            next(batches)
            assert tracker.claim().fresh == 2

        assert self.after(ahead) == 1


def test_a_closed_pass_leaves_no_doubt_behind():
    loader = numbered_loader()
    tracker = record_indices(loader)
    for _ in loader:
        break  # unclaimed, but its pass is gone
    gc.collect()
    batch, _ = next(iter(loader))
    assert claimed(tracker) == batch.tolist()


def test_other_loaders_and_populations_are_refused():
    loader = numbered_loader()
    with pytest.raises(ValueError, match="population"):
        record_indices(loader, population=np.array([0, SIZE]))
    with pytest.raises(ValueError, match="population"):
        record_indices(loader, population=np.array([], dtype=np.int64))
    record_indices(loader)
    with pytest.raises(UnsupportedError, match="DPDataLoader"):
        record_indices(loader)
    overtaking = DPDataLoader(Numbered(), sample_rate=0.2, num_workers=1, in_order=False)
    with pytest.raises(UnsupportedError, match="in_order=True"):
        record_indices(overtaking)
    plain = torch.utils.data.DataLoader(TensorDataset(torch.zeros(3)))
    with pytest.raises(UnsupportedError, match="DPDataLoader"):
        record_indices(plain)
