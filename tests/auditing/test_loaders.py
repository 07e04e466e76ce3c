"""Whose batches the steps were made on: no fault passes for its batch sizes, no right loop is one.

Eleven batches of 150 and one of 147: their sizes vary less than Poisson draws do. The last one of a
loader that leaves `LEFT` rows over varies enough to hide that nothing was drawn.
"""

import itertools
import random

import pytest
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, Subset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.auditing import watch
from opacus_pil.auditing.handed_out import Waiting
from tests.auditing.runs import digits, private, train

LEFT = 109  # 11 · 150 + 109 rows: the variance of the twelve sizes is that of Poisson draws


def some_digits():
    return Subset(digits(), range(11 * 150 + LEFT))


def training(*, loader=None, engine=None, model=None, noise=1.0, **options):
    """Return (model, optimizer, own loader, private loader) of a training by Opacus."""
    own = DataLoader(some_digits(), batch_size=150, shuffle=True) if loader is None else loader
    model = nn.Sequential(nn.Linear(64, 10)) if model is None else model
    engine = PrivacyEngine(accountant="rdp") if engine is None else engine
    made = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), data_loader=own,
        noise_multiplier=noise, max_grad_norm=1.0, **options,
    )  # fmt: skip
    return made[0], made[1], own, made[-1]


def step(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def watched(loop, *, seed=0, **options):
    """Watch `loop(model, optimizer, own, private)`; return the only training's check."""
    torch.manual_seed(seed)
    random.seed(seed)
    with watch(canaries=0) as audit:
        loop(*training(**options))
    (found,) = audit.result.trainings
    return found


# --- faults -----------------------------------------------------------------------------------


def own_loader(model, optimizer, own, private):
    for _ in range(2):
        for batch in own:
            step(model, optimizer, *batch)


def one_look(model, optimizer, own, private):
    next(iter(private))
    own_loader(model, optimizer, own, private)


def looked_through_before(model, optimizer, own, private):
    """As many batches as there are steps, all of them before the first."""
    for _ in range(2):
        for _batch in private:
            pass
    own_loader(model, optimizer, own, private)


def evaluated_after(model, optimizer, own, private):
    own_loader(model, optimizer, own, private)
    for _ in range(2):
        with torch.no_grad():
            for inputs, _targets in private:
                model(inputs)


def side_by_side(model, optimizer, own, private):
    """As many batches as there are steps, each just before its step."""
    for _ in range(2):
        for batch, _drawn in zip(own, private, strict=True):
            step(model, optimizer, *batch)


def slices(model, optimizer, own, private):
    rows = torch.randperm(len(own.dataset))
    inputs, targets = default_tensors(own.dataset)
    for _ in range(2):
        for number, _drawn in enumerate(private):
            chosen = rows[150 * number : 150 * (number + 1)]
            step(model, optimizer, inputs[chosen], targets[chosen])


def default_tensors(dataset):
    inputs, targets = digits().tensors
    return inputs[: len(dataset)], targets[: len(dataset)]


def cycled(model, optimizer, own, private):
    """itertools.cycle keeps the batches of the first pass and gives them again."""
    for batch in itertools.islice(itertools.cycle(private), 24):
        step(model, optimizer, *batch)


def twice_on_each(model, optimizer, own, private):
    for batch in private:
        step(model, optimizer, *batch)
        step(model, optimizer, *batch)


def second_epoch_elsewhere(model, optimizer, own, private):
    for loader in (private, own):
        for batch in loader:
            step(model, optimizer, *batch)


def own_in_parts(model, optimizer, own, private):
    """Opacus's memory manager around the wrong loader."""
    with BatchMemoryManager(
        data_loader=own, max_physical_batch_size=40, optimizer=optimizer
    ) as parts:
        own_loader(model, optimizer, parts, private)


NEVER = "was never iterated while weights moved 24 times: loop over it, not over your own"


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        (own_loader, NEVER),
        (evaluated_after, NEVER),
        (own_in_parts, NEVER),
        (one_look, "23 of 24 steps had no batch of the loader that make_private returned, which "
                   "handed out 1: step once on each batch of it"),
        (cycled, "12 of 24 steps had no batch"),
        (twice_on_each, "12 of 24 steps had no batch"),
        (second_epoch_elsewhere, "12 of 24 steps had no batch"),
        (looked_through_before, "of 24 steps had more rows"),
        (side_by_side, "of 24 steps had more rows than the loader that make_private returned"),
        (slices, "of 24 steps had more rows"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_steps_on_other_batches_are_a_red_flag_of_their_own(loop, words):
    found = watched(loop)
    assert found.conformance["loader"].state == "violates"
    assert words in found.conformance["loader"].reason
    assert found.verdict == "red flag"
    assert any(words in reason for reason in found.reasons)


@pytest.mark.parametrize("seed", range(3))
def test_batch_sizes_alone_would_pass_the_own_loader(seed):
    """Why the check is needed: every other one agrees."""
    found = watched(own_loader, seed=seed)
    assert [check.name for check in found.conformance.violations] == ["loader"]
    assert found.conformance["batch_sizes"].state == "agrees"
    assert found.conformance["rate"].state == "agrees"


def test_a_loader_of_another_training_is_not_the_own_one():
    """Both step on the same draw, which the ledgers count as two."""
    torch.manual_seed(0)
    engine = PrivacyEngine(accountant="rdp")
    loader = DataLoader(some_digits(), batch_size=150)
    with watch(canaries=0) as audit:
        first, second = (training(engine=engine, loader=loader) for _ in range(2))
        for batch in first[3]:
            for model, optimizer, *_ in (first, second):
                step(model, optimizer, *batch)
    states = [found.conformance["loader"].state for found in audit.result.trainings]
    assert states == ["agrees", "violates"]


# --- loops that are right ---------------------------------------------------------------------


def ordinary(model, optimizer, own, private):
    for _ in range(3):
        for batch in private:
            step(model, optimizer, *batch)


def left_early(model, optimizer, own, private):
    for _ in range(3):
        for batch in itertools.islice(private, 5):
            step(model, optimizer, *batch)


def a_new_iterator_each(model, optimizer, own, private):
    for _ in range(2 * len(private)):
        step(model, optimizer, *next(iter(private)))


def looked_at_first(model, optimizer, own, private):
    next(iter(private))
    ordinary(model, optimizer, own, private)


def evaluated_between(model, optimizer, own, private):
    for _ in range(3):
        for batch in private:
            step(model, optimizer, *batch)
        with torch.no_grad():
            for inputs, _targets in itertools.chain(private, own):
                model(inputs)


def fetched_ahead(model, optimizer, own, private):
    waiting = None
    for batch in private:
        if waiting is not None:
            step(model, optimizer, *waiting)
        waiting = batch
    step(model, optimizer, *waiting)


def all_at_once_and_shuffled(model, optimizer, own, private):
    batches = list(private)
    random.shuffle(batches)
    for batch in batches:
        step(model, optimizer, *batch)


def some_skipped(model, optimizer, own, private):
    for _ in range(2):
        for number, batch in enumerate(private):
            if number % 3:
                step(model, optimizer, *batch)


def in_parts(model, optimizer, own, private):
    with BatchMemoryManager(
        data_loader=private, max_physical_batch_size=40, optimizer=optimizer
    ) as parts:
        for _ in range(2):
            for batch in parts:
                step(model, optimizer, *batch)
        for batch in itertools.islice(parts, 17):  # left in the middle of a draw, too
            step(model, optimizer, *batch)


def parts_by_hand(model, optimizer, own, private):
    for inputs, targets in private:
        pieces = list(zip(inputs.split(60), targets.split(60), strict=True))
        for number, piece in enumerate(pieces, 1):
            optimizer.signal_skip_step(do_skip=number < len(pieces))
            step(model, optimizer, *piece)


def rows_by_hand(model, optimizer, own, private):
    inputs, targets = default_tensors(own.dataset)  # all in memory: only the sampler is needed
    for _ in range(2):
        for rows in private.batch_sampler:
            step(model, optimizer, inputs[rows], targets[rows])


def the_sampler_in_a_loader_of_ones_own(model, optimizer, own, private):
    loader = DataLoader(own.dataset, batch_sampler=private.batch_sampler)
    ordinary(model, optimizer, own, loader)


def the_sampler_inside_one_of_ones_own(model, optimizer, own, private):
    class Twos:
        """Hands the draws on in twos; nothing about its names tells from whom it has them."""

        def __iter__(self):
            draws = iter(private.batch_sampler)
            for first in draws:
                ahead = next(draws, None)
                yield first
                if ahead is not None:
                    yield ahead

    ordinary(model, optimizer, own, DataLoader(own.dataset, batch_sampler=Twos()))


def a_failed_batch(model, optimizer, own, private):
    batches, data = iter(private), own.dataset
    step(model, optimizer, *next(batches))
    kept, data.indices = data.indices, [9999] * len(data)
    with pytest.raises(IndexError):
        next(batches)  # drawn, and lost
    data.indices = kept
    for batch in batches:
        step(model, optimizer, *batch)


RIGHT = [
    ordinary, left_early, a_new_iterator_each, looked_at_first, evaluated_between, fetched_ahead,
    all_at_once_and_shuffled, some_skipped, in_parts, parts_by_hand, rows_by_hand,
    the_sampler_in_a_loader_of_ones_own, the_sampler_inside_one_of_ones_own, a_failed_batch,
]  # fmt: skip


@pytest.mark.parametrize("loop", RIGHT, ids=lambda loop: loop.__name__)
def test_a_right_loop_is_no_fault(loop):
    found = watched(loop)
    check = found.conformance["loader"]
    assert check.state == "agrees", check
    assert check.measured == check.accounted == sum(n for _, _, n in found.claim)
    assert found.verdict == "consistent", str(found)


def test_two_draws_a_step_are_the_private_loader_s_at_another_rate():
    def loop(model, optimizer, own, private):
        for number, batch in enumerate(private):
            optimizer.signal_skip_step(do_skip=number % 2 == 0)
            step(model, optimizer, *batch)

    found = watched(loop)
    assert found.conformance["loader"].state == "agrees"
    assert [check.name for check in found.conformance.violations] == ["rate"]


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_load_ahead_are_no_fault_and_do_not_hide_one(persistent):
    def loader():
        return DataLoader(
            some_digits(), batch_size=150, num_workers=2, persistent_workers=persistent
        )

    for loop in (ordinary, left_early, in_parts):
        found = watched(loop, loader=loader())
        assert found.conformance["loader"].state == "agrees", found
    assert "never iterated" in watched(own_loader, loader=loader()).conformance["loader"].reason
    assert watched(one_look, loader=loader()).verdict == "red flag"


def test_a_draw_of_nobody_is_a_batch():
    def loop(model, optimizer, own, private):
        ordinary(model, optimizer, own, private)

    few = DataLoader(Subset(digits(), range(40)), batch_size=1)  # 1/e of the draws are empty
    for filled in (False, True):
        found = watched(loop, loader=few, rand_on_empty=filled)
        assert found.conformance["loader"].state == "agrees", found.conformance["loader"]


def test_an_own_poisson_loader_that_is_used_as_it_is():
    """poisson_sampling=False: make_private hands back the caller's loader."""
    own = DPDataLoader(some_digits(), sample_rate=1 / 12)
    found = watched(ordinary, loader=own, poisson_sampling=False)
    assert found.verdict == "consistent", str(found)
    assert found.conformance["loader"].measured == 36


@pytest.mark.parametrize("kind", [PrivacyEngine, PerInstancePrivacyEngine])
@pytest.mark.filterwarnings("ignore:Per-instance losses:UserWarning")  # of our engine, rightly
@pytest.mark.filterwarnings("ignore:poisson_sampling=False:UserWarning")  # likewise
@pytest.mark.filterwarnings("ignore:A step could not be matched:UserWarning")  # likewise
def test_fixed_batches_are_not_blamed_on_the_loader(kind):
    """Accounted as Poisson draws they are a fault, which another check names."""
    loader = DataLoader(some_digits(), batch_size=150, drop_last=True, shuffle=True)
    for loop in (ordinary, own_loader):  # Opacus returns the caller's own one, ours a copy of it
        found = watched(loop, loader=loader, engine=kind(accountant="rdp"), poisson_sampling=False)
        assert found.conformance["loader"].state == "agrees", found
        assert found.conformance["batch_sizes"].state == "violates"


@pytest.mark.filterwarnings("ignore:Per-instance losses:UserWarning")  # rightly, in the last one
@pytest.mark.filterwarnings("ignore:A step could not be matched:UserWarning")  # likewise
def test_our_own_engine_and_its_memory_manager_are_right():
    from opacus_pil import BatchMemoryManager as OwnManager

    def split(model, optimizer, own, private):
        with OwnManager(
            data_loader=private, max_physical_batch_size=40, optimizer=optimizer
        ) as parts:
            ordinary(model, optimizer, own, parts)

    for loop in (ordinary, left_early, split):
        found = watched(loop, engine=PerInstancePrivacyEngine(accountant="rdp"))
        assert found.verdict == "consistent", str(found)
        assert found.conformance["loader"].state == "agrees"
    found = watched(own_loader, engine=PerInstancePrivacyEngine(accountant="rdp"))
    assert NEVER in found.conformance["loader"].reason


def test_ghost_clipping_is_held_against_its_loader_too():
    for right in (True, False):
        with watch(canaries=0) as audit:
            _, model, optimizer, criterion, loader = private(mode="ghost")
            own = DataLoader(digits(), batch_size=150)
            train(model, optimizer, criterion, loader if right else own, steps=12)
        (found,) = audit.result.trainings
        assert found.conformance["loader"].state == ("agrees" if right else "violates")


def test_private_a_second_time_the_first_loader_still_draws_for_it():
    """Another optimizer on the way, the loader kept: same data, same rate, fresh draws."""

    def loop(model, optimizer, own, private):
        ordinary(model, optimizer, own, private)
        model, optimizer, *_ = training(loader=own, model=model)
        ordinary(model, optimizer, own, private)

    with watch(canaries=0) as audit:
        loop(*training())
    assert [t.conformance["loader"].state for t in audit.result.trainings] == ["agrees"] * 2


def test_rows_left_out_are_said_and_are_no_fault():
    def loop(model, optimizer, own, private):
        waiting = None
        for inputs, targets in itertools.chain(private, private):
            if waiting is not None:
                step(model, optimizer, *waiting)
            kept = targets != 3
            waiting = inputs[kept], targets[kept]

    found = watched(loop).conformance["loader"]
    assert found.state == "differs"
    assert "of 23 steps had other rows than all of a batch" in found.reason


def test_a_sampler_that_cannot_be_listened_to_is_not_measurable():
    class Own:
        def __iter__(self):
            return iter([list(range(150))] * 11)

        def __len__(self):
            return 11

    loader = DataLoader(some_digits(), batch_sampler=Own())

    def by_hand(model, optimizer, own, private):
        inputs, targets = default_tensors(own.dataset)
        for rows in private.batch_sampler:
            step(model, optimizer, inputs[rows], targets[rows])

    found = watched(by_hand, loader=loader, poisson_sampling=False).conformance["loader"]
    assert found.state == "not measurable"
    assert "taken from Own unseen" in found.reason
    found = watched(ordinary, loader=loader, poisson_sampling=False).conformance["loader"]
    assert found.state == "agrees"


def test_listening_that_fails_is_said_and_stops_nobody(monkeypatch):
    from opacus_pil.auditing import handed_out

    def fails(*_):
        raise ZeroDivisionError("a test")

    monkeypatch.setattr(handed_out, "_length", fails)
    found = watched(ordinary)
    assert found.conformance["loader"].state == "not measurable"
    assert "listening to loaders failed (ZeroDivisionError: a test)" in str(found)


# --- sizes alone ------------------------------------------------------------------------------


def waiting(*sizes):
    found = Waiting()
    for size in sizes:
        found.give(size)
    return found


def test_a_step_without_a_batch_or_with_more_rows_is_seen():
    assert not waiting().take(3).fed
    assert not waiting().take(None).fed
    source = waiting(5).take(6)
    assert source.fed
    assert (source.ordered, source.equal, source.whole) == (False,) * 3
    source = waiting(5).take(3)
    assert (source.ordered, source.equal, source.whole) == (True, False, False)
    assert waiting(0).take(0).whole  # a draw of nobody
    assert waiting(5, 3, 4).take(7).whole  # parts of one draw, after a batch that was looked at
    assert waiting(3, 4).take(7).ordered
    assert waiting(5, None).take(9).ordered  # sizes are not known


@pytest.mark.parametrize("leaves_out", [False, True])
def test_no_step_in_order_is_ever_without_rows_whatever_is_skipped_or_held_back(leaves_out):
    for seed in range(300):
        coins = random.Random(seed)
        sizes = [coins.randrange(0, 12) for _ in range(60)]  # small: they coincide all the time
        ahead, found = coins.randrange(5), Waiting()
        number = 0  # of the next batch that the loop looks at
        for handed in range(len(sizes) + ahead):
            if handed < len(sizes):
                found.give(sizes[handed])
            while number <= handed - ahead:
                several = min(coins.choice([1, 1, 1, 2, 3]), handed - ahead + 1 - number)
                rows = sum(sizes[number : number + several])
                number += several
                if coins.random() < 0.2:
                    continue
                if leaves_out:
                    rows = sum(coins.random() < 0.8 for _ in range(rows))
                source = found.take(rows)
                assert source.fed, (seed, handed)
                assert source.ordered, (seed, handed)


def test_no_step_on_a_whole_batch_is_ever_unequal_in_any_order():
    for seed in range(300):
        coins = random.Random(seed)
        found, held = Waiting(), []
        for _ in range(60):
            held.append(coins.randrange(0, 12))
            found.give(held[-1])
            while held and coins.random() < 0.4:
                source = found.take(held.pop(coins.randrange(len(held))))
                assert source.fed, seed
                assert source.equal, seed
                assert source.whole, seed
