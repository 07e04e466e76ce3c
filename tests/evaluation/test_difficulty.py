import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_pil import BatchMemoryManager, PerInstancePrivacyEngine
from opacus_pil.capture.sweep import sweep
from opacus_pil.evaluation import DIFFICULTY_SCORES, DifficultyTracker, difficulty_scores
from tests.batches import BATCH, BOUND, FLOAT32, PHYSICAL, SIZE, Training
from tests.capture.models import convolutional, images, one_by_one_norms

EARLY = 3


class ByHand:
    """The definitions, instance by instance: every visit is written down and read at the end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.looks: list[list[dict[str, float]]] = [[] for _ in range(size)]
        self.norms: list[list[tuple[float, bool]]] = [[] for _ in range(size)]

    def look(self, row, logits, label, *, early):
        z = [float(value) for value in logits]
        p = [math.exp(value - max(z)) for value in z]
        p = [value / sum(p) for value in p]
        others = [j for j in range(len(z)) if j != label]
        self.looks[row].append({
            "margin": p[label] - max(p[j] for j in others),
            "area_under_margin": z[label] - max(z[j] for j in others),
            "loss": -math.log(p[label]),
            "c_score": float(max(range(len(z)), key=z.__getitem__) == label),
            "el2n": math.sqrt(sum((p[j] - (j == label)) ** 2 for j in range(len(z)))),
            "early": early,
        })  # fmt: skip

    def scores(self):
        names = set(DIFFICULTY_SCORES) - {"loss_trace_iqr", "leverage", "held_out_loss"}
        result = {name: np.full(self.size, np.nan) for name in names}
        for row, (looks, norms) in enumerate(zip(self.looks, self.norms, strict=True)):
            for name in ("margin", "area_under_margin", "loss", "c_score"):
                if looks:
                    result[name][row] = np.mean([look[name] for look in looks])
            early = [look["el2n"] for look in looks if look["early"]]
            if early:
                result["el2n"][row] = np.mean(early)
            right = [look["c_score"] for look in looks]
            if len(right) >= 2:
                events = sum(a > b for a, b in itertools.pairwise(right))
                result["forgetting_events"][row] = events if any(right) else math.inf
            if norms:
                result["mean_gradient_norm"][row] = np.mean([norm for norm, _ in norms])
                result["max_gradient_norm"][row] = max(norm for norm, _ in norms)
            first = [norm for norm, is_early in norms if is_early]
            if first:
                result["grand"][row] = np.mean(first)
        for name in ("margin", "area_under_margin", "c_score"):  # higher is harder
            result[name] *= -1
        return result


def assert_same(found, expected):
    for name, values in expected.items():
        # float32 logits and sums of float32 gradients, against float64 by hand.
        np.testing.assert_allclose(found[name], values, rtol=FLOAT32, atol=1e-5, err_msg=name)


def row_of(data, inputs):
    return int((data.tensors[0] == inputs).flatten(start_dim=1).all(dim=1).nonzero()[0])


def plain(training):
    """A copy without Opacus, to be looked at as often as one likes."""
    module = convolutional()
    weights = training.module.state_dict().items()
    module.load_state_dict({name.removeprefix("_module."): value for name, value in weights})
    return module


def true_norms(training, rows):
    return one_by_one_norms(plain(training), training.data, rows, nn.functional.cross_entropy)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
@pytest.mark.parametrize("manager", [None, BatchMemoryManager])
def test_scores_of_a_private_training_are_those_of_the_definitions(mode, manager):
    """Poisson batches, every gradient mode, whole and physical batches; rows found by content."""
    training = Training(mode=mode, manager=manager)
    tracker, truth = DifficultyTracker(SIZE, early_steps=EARLY), ByHand(SIZE)
    tracker.watch(training.optimizer)
    for _ in range(2):
        with training.loading() as batches:
            for inputs, targets in batches:
                early = len(training.records) < EARLY
                training.optimizer.zero_grad()
                outputs = training.wrapped(inputs)
                rows = [row_of(training.data, one) for one in inputs]
                norms = true_norms(training, rows)
                for row, z, y, norm in zip(rows, outputs.detach(), targets, norms, strict=True):
                    truth.look(row, z, int(y), early=early)
                    truth.norms[row].append((norm, early))
                tracker.update(outputs, targets)
                training.used.append(inputs)
                training.criterion(outputs, targets).backward()
                training.optimizer.step()
    assert_same(difficulty_scores(tracker), truth.scores())
    assert tracker.steps == len(training.records)
    assert tracker.unattributed == 0
    assert tracker.visits.tolist() == [len(looks) for looks in truth.looks]
    assert tracker.gradient_visits.tolist() == tracker.visits.tolist()
    assert tracker.visits.max() > 1


def test_fixed_shuffled_batches_visit_everyone_once_an_epoch():
    data = images(SIZE)
    torch.manual_seed(3)
    module = convolutional()
    engine = PerInstancePrivacyEngine(norm_policy="participation")
    module, optimizer, criterion, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=BATCH, shuffle=True), noise_multiplier=1.0,
        max_grad_norm=BOUND, poisson_sampling=False, criterion=nn.CrossEntropyLoss(),
        grad_sample_mode="ghost",
    )  # fmt: skip
    tracker, truth = DifficultyTracker(SIZE, early_steps=EARLY), ByHand(SIZE)
    tracker.watch(optimizer)
    for _ in range(2):
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = module(inputs)
            tracker.update(outputs, targets)
            for one, z, y in zip(inputs, outputs.detach(), targets, strict=True):
                truth.look(row_of(data, one), z, int(y), early=tracker.steps < EARLY)
            criterion(outputs, targets).backward()
            optimizer.step()
    assert (tracker.visits == 2).all()
    found, expected = difficulty_scores(tracker), truth.scores()
    known = ["margin", "area_under_margin", "loss", "c_score", "el2n", "forgetting_events"]
    assert_same(found, {name: expected[name] for name in known})
    assert np.isnan(found["grand"]).sum() == SIZE - EARLY * BATCH


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_training_is_bit_identical_with_and_without_the_tracker(mode):
    def weights(tracked):
        training = Training(mode=mode)
        tracker = DifficultyTracker(SIZE, early_steps=EARLY)
        if tracked:
            tracker.watch(training.optimizer)
        for inputs, targets in training.loader:
            training.used.append(inputs)
            training.optimizer.zero_grad()
            outputs = training.wrapped(inputs)
            if tracked:
                tracker.update(outputs, targets)
            training.criterion(outputs, targets).backward()
            training.optimizer.step()
        assert bool(tracker.visits.sum()) is tracked
        return [*training.module.state_dict().values(), torch.get_rng_state(),
                torch.from_numpy(training.engine.per_instance.rdp())]  # fmt: skip

    assert all(map(torch.equal, weights(True), weights(False)))


def explicit_loop(tracker, truth, *, order):
    """A plain training with rows and norms of its own, no Opacus."""
    data = images(20)
    torch.manual_seed(0)
    module = convolutional()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for step, rows in enumerate(order):
        inputs, targets = data.tensors[0][rows], data.tensors[1][rows]
        outputs = module(inputs)
        norms = one_by_one_norms(module, data, rows, nn.functional.cross_entropy)
        tracker.update(outputs, targets, indices=rows, norms=norms)
        for row, z, y, norm in zip(rows, outputs.detach(), targets, norms, strict=True):
            truth.look(row, z, int(y), early=step < EARLY)
            truth.norms[row].append((norm, step < EARLY))
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs, targets).backward()
        optimizer.step()


def random_order(seed=0, steps=12):
    generator = np.random.default_rng(seed)
    return [np.flatnonzero(generator.random(20) < 0.2).tolist() or [0] for _ in range(steps)]


def test_plain_training_with_explicit_rows():
    tracker, truth = DifficultyTracker(20, early_steps=EARLY), ByHand(20)
    explicit_loop(tracker, truth, order=random_order())
    expected = truth.scores()
    assert_same(difficulty_scores(tracker), expected)
    events = expected["forgetting_events"]
    # The definitions were exercised: never seen, never learned, forgotten, remembered.
    assert np.isnan(events).any()
    assert np.isinf(events).any()
    assert (events == 0).any()
    assert (events[np.isfinite(events)] > 0).any()


def test_never_drawn_instances_are_nan_and_never_zero():
    tracker = DifficultyTracker(4, early_steps=0)
    tracker.update([[3.0, 0.0]], [0], indices=[2], norms=[0.5])
    scores = difficulty_scores(tracker)
    for name, values in scores.items():
        assert np.isnan(values[[0, 1, 3]]).all(), name
    assert np.isnan(scores["el2n"]).all()  # no early window: nobody has an early score
    assert np.isnan(scores["forgetting_events"]).all()  # one visit shows no change
    assert tracker.visits.tolist() == [0, 0, 1, 0]


def test_higher_is_harder_for_every_score():
    """One instance is fitted better and better, one is wrong with large gradients throughout."""
    tracker = DifficultyTracker(2, early_steps=10)
    for step in range(4):
        tracker.update(
            [[2.0 + step, 0.0], [0.0, 2.0 + step]], [0, 0], indices=[0, 1], norms=[0.1, 2.0]
        )
    for name, (easy, hard) in difficulty_scores(tracker).items():
        assert easy < hard, name


def test_full_passes_count_as_visits_and_give_everyone_an_early_score():
    data = images(20)
    module = convolutional()
    tracker, truth = DifficultyTracker(20, early_steps=EARLY), ByHand(20)

    def observe(*, early):
        found = sweep(module, data, criterion=nn.CrossEntropyLoss(), keep_outputs=True)
        tracker.observe(found, targets=data.tensors[1])
        norms = one_by_one_norms(module, data, range(20), nn.functional.cross_entropy)
        with torch.no_grad():
            for row, (x, y) in enumerate(zip(*data.tensors, strict=True)):
                truth.look(row, module(x[None])[0], int(y), early=early)
                truth.norms[row].append((norms[row], early))

    observe(early=True)
    explicit_loop(tracker, truth, order=random_order(1))
    observe(early=False)
    scores = difficulty_scores(tracker)
    assert_same(scores, truth.scores())
    assert not any(np.isnan(values).any() for values in scores.values())
    assert tracker.visits.min() >= 2


def test_refresh_points_of_the_engine_count_norms():
    training = Training(engine={"norm_policy": "refresh", "refresh_every": 2})
    tracker = DifficultyTracker(SIZE, early_steps=1)
    found = training.engine.refresh_norms()
    tracker.observe(found)
    assert (tracker.gradient_visits == 1).all()
    assert (tracker.visits == 0).all()
    assert np.array_equal(difficulty_scores(tracker)["grand"], found.norms)
    assert np.isnan(difficulty_scores(tracker)["loss"]).all()


def test_one_logit_is_the_two_class_model_with_a_logit_of_zero():
    generator = np.random.default_rng(2)
    z, y = 3 * generator.normal(size=8), generator.integers(0, 2, size=8)
    one, two = DifficultyTracker(8, early_steps=1), DifficultyTracker(8, early_steps=1)
    column = torch.tensor(z)[:, None]
    for turn in (1, -1):
        one.update(turn * column, torch.tensor(y)[:, None].double(), indices=np.arange(8))
        two.update(np.stack([0 * z, turn * z], axis=1), y, indices=np.arange(8))
    scores = difficulty_scores(one)
    for name, values in difficulty_scores(two).items():
        np.testing.assert_array_equal(scores[name], values, err_msg=name)
    # In closed form: el2n = √2 |sigmoid(z) − y| at the first visit.
    np.testing.assert_allclose(
        scores["el2n"], math.sqrt(2) * np.abs(1 / (1 + np.exp(-z)) - y), rtol=1e-12
    )


def test_scores_of_several_runs_are_averaged_where_they_exist():
    first, second = (DifficultyTracker(2, early_steps=1) for _ in range(2))
    first.update([[1.0, 0.0]], [0], indices=[0], norms=[1.0])
    second.update([[1.0, 0.0], [1.0, 0.0]], [0, 0], indices=[0, 1], norms=[3.0, 5.0])
    assert difficulty_scores([first, second])["grand"].tolist() == [2.0, 5.0]
    with pytest.raises(ValueError, match="same instances"):
        difficulty_scores([first, DifficultyTracker(3, early_steps=1)])
    with pytest.raises(ValueError, match="at least one"):
        difficulty_scores([])


def test_a_saved_tracker_goes_on_as_if_never_stopped():
    order = random_order(3)
    whole, truth = DifficultyTracker(20, early_steps=5), ByHand(20)
    explicit_loop(whole, truth, order=order)
    states = []

    class Interrupted(DifficultyTracker):
        """Saved, thrown away and loaded again at every step."""

        def update(self, outputs, targets, **options):
            super().update(outputs, targets, **options)
            states.append(self.state_dict())
            self.__init__(20, early_steps=5)
            self.load_state_dict(states[-1])

    parts = Interrupted(20, early_steps=5)
    explicit_loop(parts, ByHand(20), order=order)
    for name, values in difficulty_scores(whole).items():
        np.testing.assert_array_equal(difficulty_scores(parts)[name], values)
    assert states[0]["counts"]["visits"].sum() < states[-1]["counts"]["visits"].sum()  # copies
    with pytest.raises(ValueError, match="early_steps=4"):
        DifficultyTracker(20, early_steps=4).load_state_dict(states[0])


def test_update_after_the_step_is_refused_rather_than_given_to_another_batch():
    training = Training()
    tracker = DifficultyTracker(SIZE, early_steps=EARLY)
    tracker.watch(training.optimizer)
    inputs, targets = next(iter(training.loader))
    training.step(inputs, targets)
    with pytest.raises(ValueError, match="between the forward pass"):
        tracker.update(plain(training)(inputs), targets)
    with training.engine.batch(indices=[4, 7]):  # rows of the caller's own
        x, y = training.data.tensors[0][[4, 7]], training.data.tensors[1][[4, 7]]
        tracker.update(plain(training)(x), y)
        training.step(x, y)
        with pytest.raises(ValueError, match="between the forward pass"):
            tracker.update(plain(training)(x), y)
    assert np.flatnonzero(tracker.visits).tolist() == [4, 7]


def test_batches_of_unknown_rows_are_counted_and_given_to_nobody():
    from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusManager

    training = Training(manager=OpacusManager)  # hides the rows of each physical batch
    tracker = DifficultyTracker(SIZE, early_steps=EARLY)
    tracker.watch(training.optimizer)
    with training.loading(PHYSICAL) as batches:
        for inputs, targets in batches:
            tracker.update(plain(training)(inputs), targets)
            training.step(inputs, targets)
    assert tracker.unattributed > 0
    assert tracker.visits.sum() == 0
    # Whole draws are known at the step: norms are attributed all the same.
    assert tracker.gradient_visits.sum() == sum(len(r.indices) for r in training.records)


def test_batches_fetched_ahead_are_given_to_nobody():
    """Two were handed out: the one in use may be either, even if the lengths agree."""
    training = Training()
    tracker = DifficultyTracker(SIZE, early_steps=EARLY)
    tracker.watch(training.optimizer)
    batches = iter(training.loader)
    inputs, targets = next(batches)
    next(batches)
    tracker.update(plain(training)(inputs), targets)
    assert (tracker.unattributed, tracker.visits.sum()) == (1, 0)


def test_an_empty_draw_is_nobodys_visit():
    data = images(SIZE)
    module = convolutional()
    engine = PerInstancePrivacyEngine()
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=1), noise_multiplier=1.0, max_grad_norm=BOUND,
    )  # fmt: skip
    tracker = DifficultyTracker(SIZE, early_steps=EARLY)
    tracker.watch(optimizer)
    torch.manual_seed(1)
    empty = 0
    for inputs, targets in loader:
        optimizer.zero_grad()
        outputs = module(inputs)
        empty += len(inputs) == 0
        tracker.update(outputs, targets)
        nn.functional.cross_entropy(outputs, targets, reduction="sum").backward()
        optimizer.step()
    assert empty > 0
    assert tracker.visits.tolist() == tracker.gradient_visits.tolist()
    assert tracker.unattributed == 0


def test_norms_are_those_before_clipping_even_of_rows_that_caps_leave_out():
    caps = np.full(SIZE, 0.01)
    caps[::2] = 0.0
    training = Training(engine={"norm_policy": "capped", "caps": caps})
    tracker = DifficultyTracker(SIZE, early_steps=EARLY)
    tracker.watch(training.optimizer)
    inputs, _ = batch = next(iter(training.loader))
    rows = [row_of(training.data, one) for one in inputs]
    truth = true_norms(training, rows)
    training.optimizer.zero_grad()
    training.criterion(training.wrapped(inputs), batch[1]).backward()
    training.optimizer.recorder.take = training._take  # the checks there are about clipped rows
    training.optimizer.step()
    found = difficulty_scores(tracker)["max_gradient_norm"][rows]
    np.testing.assert_allclose(found, truth, rtol=FLOAT32)
    assert found.min() > 0.01 * BOUND


def test_per_layer_clipping_gives_no_norms():
    training = Training(clipping="per_layer", max_grad_norm=[BOUND] * 6)
    training.optimizer.recorder.take = training._take
    tracker = DifficultyTracker(SIZE, early_steps=EARLY)
    tracker.watch(training.optimizer)
    training.step(*next(iter(training.loader)))
    assert tracker.steps == 1
    assert tracker.gradient_visits.sum() == 0


LOGITS = [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("outputs", "targets", "options", "match"),
    [
        (LOGITS, [0, 1], {}, "watch"),
        (LOGITS, [0, 1], {"indices": [0, 5]}, "index 5"),
        (LOGITS, [0, 1], {"indices": [1, 1]}, "without repetition"),
        (LOGITS, [0, 1], {"indices": [0]}, "same length"),
        (LOGITS, [0, 2], {"indices": [0, 1]}, "classes 0 to 1.*row 1, value 2"),
        ([[1.0, 0.0], [math.nan, 1.0]], [0, 1], {"indices": [0, 1]}, "row 1"),
        ([1.0, 2.0], [0.0, 0.5], {"indices": [0, 1]}, "classes 0 to 1"),
        ([[[1.0]]], [0], {"indices": [0]}, "Flatten"),
        (LOGITS, [0, 1], {"indices": [0, 1], "norms": [1.0, -1.0]}, "row 1"),
        (LOGITS, [0, 1], {"indices": [0, 1], "norms": [1.0]}, "same length"),
        (LOGITS, [0, 1], {"norms": [1.0, 1.0]}, "norms without indices"),
    ],
)
def test_unusable_batches_leave_the_tracker_as_it_was(outputs, targets, options, match):
    tracker = DifficultyTracker(3, early_steps=1)
    with pytest.raises(ValueError, match=match):
        tracker.update(outputs, targets, **options)
    assert tracker.steps == tracker.visits.sum() == tracker.gradient_visits.sum() == 0


def test_unusable_sources_are_refused():
    tracker = DifficultyTracker(SIZE, early_steps=1)
    with pytest.raises(TypeError, match="make_private"):
        tracker.watch(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    optimizer = Training().optimizer
    tracker.watch(optimizer)
    with pytest.raises(ValueError, match="watches nothing yet"):
        tracker.watch(optimizer)
    found = sweep(convolutional(), images(SIZE), criterion=nn.CrossEntropyLoss(), indices=[3])
    with pytest.raises(ValueError, match="outputs and targets together"):
        tracker.observe(found, targets=[0])


def test_one_table_names_every_score():
    tracker = DifficultyTracker(1, early_steps=0, traces=True)
    others = {"leverage", "held_out_loss"}  # of no training's own batches
    assert set(difficulty_scores(tracker)) == set(DIFFICULTY_SCORES) - others
    assert set(DIFFICULTY_SCORES.values()) == {1, -1}
