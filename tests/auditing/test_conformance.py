"""Conformance from numbers: a correct training is flagged as rarely as promised, faults by name."""

import math

import numpy as np
import pytest

from opacus_pil.auditing import conformance
from opacus_pil.auditing.conformance import TESTS
from opacus_pil.auditing.measurements import KEPT_STEPS, Measurements, Source

N, Q, STEPS, BATCH = 600, 0.05, 40, 30
LEVEL = 1e-3


def correct(
    *, seed=0, std=1.0, tensors=(400, 40, 8), rate=Q, sizes=None, noise=None, steps=STEPS,
    weight=1.0,
):  # fmt: skip
    """Measurements of a training that is as accounted, or with one thing otherwise."""
    random = np.random.default_rng(seed)
    m = Measurements(tensors=("a", "b", "c"), divisor=BATCH, instances=N)
    m.drawn = np.zeros(N, dtype=np.int64)
    for step in range(steps):
        parts = [std * random.standard_normal(n) for n in tensors]
        if noise is not None:
            parts = noise(step, parts, random)
        squares = np.array([p @ p for p in parts])
        entries = np.concatenate([p[:64] for p in parts]).astype(np.float32)
        m.add_noise(squares, np.array(tensors, dtype=float), entries)
        rows = np.flatnonzero(random.random(N) < rate)
        m.drawn[rows] += 1
        m.draws += 1
        m.sizes.append(len(rows) if sizes is None else sizes(step, random))
        expected = random.standard_normal(100) * 3
        m.weight_sum += float((weight * expected + random.standard_normal(100)) @ expected)
        m.weight_base += float(expected @ expected)
        m.weight_noise += float(expected @ expected)
        m.add_clip(1e-6)
        m.add_source(step + 1, Source(fed=True))
        m.add_divisor(BATCH)
        m.moves += 1
        m.noisy += 1
    m.rows = m.clipped_rows = sum(m.sizes)
    return m


def judged(m, *, level=LEVEL, rate=Q, ledger=STEPS, seen=None):
    return conformance(m, sample_rate=rate, ledger_steps=ledger, seen_steps=seen, level=level)


def test_a_correct_training_agrees_everywhere_and_every_interval_holds_the_truth():
    found = judged(correct())
    assert found.violations == ()
    for check in found.checks:
        assert check.state == "agrees", check
        if check.low is not None and check.accounted not in (None, 0.0):
            assert check.low <= check.accounted <= check.high


@pytest.mark.slow
def test_correct_trainings_are_flagged_no_more_often_than_the_level():
    runs, level = 400, 0.1
    counts = dict.fromkeys(TESTS, 0)
    flagged = 0
    for seed in range(runs):
        found = judged(correct(seed=seed), level=level)
        for check in found.checks:
            if check.state in ("violates", "differs") and check.name in counts:
                counts[check.name] += 1
        flagged += any(c.state in ("violates", "differs") for c in found.checks)
    assert flagged / runs <= level + 3 * math.sqrt(level * (1 - level) / runs)
    each = level / len(TESTS)
    for name, count in counts.items():  # none of them spends another's share
        assert count / runs <= each + 4 * math.sqrt(each / runs), name


@pytest.mark.parametrize(("rate", "instances"), [(0.002, 2000), (0.05, 60), (0.5, 40), (0.9, 100)])
@pytest.mark.slow
def test_gamma_laws_of_sizes_and_rows_hold_in_the_tails_that_are_used(rate, instances):
    random = np.random.default_rng(0)
    level, runs = 0.012, 1000  # a thousandth each
    flagged = {"batch_sizes": 0, "rows": 0, "rate": 0}
    for _ in range(runs):
        m = Measurements(instances=instances)
        draws = random.random((60, instances)) < rate
        m.drawn, m.draws, m.sizes = draws.sum(axis=0), 60, list(draws.sum(axis=1))
        found = judged(m, rate=rate, level=level)
        for name in flagged:
            flagged[name] += found[name].state in ("violates", "differs")
    for name, count in flagged.items():
        assert count <= 8, (name, count)  # 1 expected; 9 has probability 1e-6


def test_noise_off_halved_and_on_one_tensor():
    off = judged(correct(std=0.0))
    assert "no noise at all" in off["noise"].reason
    assert off["noise_over_steps"].state == "not measurable"
    half = judged(correct(std=0.5))
    assert half["noise"].measured == pytest.approx(0.5, abs=0.02)
    assert half["noise"].state == "violates"
    one = judged(correct(noise=lambda _, parts, __: [parts[0], 0 * parts[1], 0 * parts[2]]))
    assert one["noise_per_tensor"].state == "violates"
    assert "on 2 of 3 tensors (b, c)" in one["noise_per_tensor"].reason
    assert one["noise_over_steps"].state == one["noise_over_entries"].state == "agrees"


def test_more_noise_than_accounted_is_said_and_is_no_violation():
    found = judged(correct(std=1.5))
    assert found["noise"].state == "differs"
    assert found.violations == ()


def test_noise_that_repeats_is_seen_at_once_and_for_the_right_reason():
    first = [np.random.default_rng(5).standard_normal(n) for n in (400, 40, 8)]
    found = judged(correct(noise=lambda *_: first))
    assert [c.name for c in found.violations] == ["noise_over_steps"]
    assert found["noise_over_steps"].measured == pytest.approx(1.0)
    assert "no independent measurements" in found["noise"].reason
    every_third = judged(correct(noise=lambda s, parts, _: first if s % 3 == 0 else parts))
    assert "noise_over_steps" in [c.name for c in every_third.violations]


def test_noise_that_repeats_late_is_seen_by_its_neighbour():
    def noise(step, parts, _):
        return first if step > KEPT_STEPS + 2 else parts

    first = [np.random.default_rng(5).standard_normal(n) for n in (400, 40, 8)]
    found = judged(correct(noise=noise, steps=KEPT_STEPS + 8), ledger=KEPT_STEPS + 8)
    assert "noise_over_steps" in [c.name for c in found.violations]


def test_entries_that_share_their_noise():
    def shared(_, parts, random):
        return [np.full(len(p), random.standard_normal()) for p in parts]

    found = judged(correct(noise=shared))
    assert [c.name for c in found.violations] == ["noise_over_entries"]


def test_clip_divisor_and_changes_after_the_noise():
    m = correct()
    m.add_clip(0.5)
    found = judged(m)
    assert "at 1 of 41 steps" in found["clip"].reason
    m = correct()
    m.add_divisor(2 * BATCH)
    assert "changes from step to step" in judged(m)["divisor"].reason
    m = correct()
    m.divisor = BATCH / 2
    assert judged(m)["divisor"].reason == "another divisor than accounted"
    m.changed = (3, 0.2)
    assert judged(m)["after_noise"].state == "violates"


def test_a_gradient_that_is_in_the_step_twice():
    found = judged(correct(weight=2.0))
    assert found["gradient"].state == "violates"
    assert found["gradient"].measured == pytest.approx(2.0, abs=0.2)
    assert judged(correct(weight=0.2))["gradient"].state == "differs"


def test_rows_drawn_too_often_and_batches_of_fixed_size():
    double = judged(correct(rate=2 * Q))
    assert [c.name for c in double.violations] == ["rate"]
    assert "2" in double["rate"].reason
    slow = judged(correct(rate=Q / 2))
    assert slow["rate"].state == "differs"
    fixed = judged(correct(sizes=lambda *_: BATCH))
    assert "fixed or shuffled" in fixed["batch_sizes"].reason
    m = correct()
    m.drawn[:] = m.draws // 20
    assert "without replacement" in judged(m)["rows"].reason
    m.drawn[: N // 2] = 3
    m.drawn[N // 2 :] = 1
    m.drawn[0] = 40
    assert "more often than others" in judged(m)["rows"].reason


def sourced(*sources, handed=None):
    m = correct(steps=8)
    m.sourced = 0
    for number, source in enumerate(sources, 1):
        m.add_source(number if handed is None else handed, source)
    return judged(m)["loader"]


def test_steps_against_the_batches_of_the_private_loader():
    fed, unfed = Source(fed=True), Source(fed=False, ordered=False, equal=False, whole=False)
    more = Source(fed=True, ordered=False, equal=False, whole=False)
    assert sourced(*[fed] * 20).state == "agrees"
    never = sourced(*[unfed] * 20, handed=0)
    assert never.state == "violates"
    assert never.measured == 0.0
    assert "never iterated while weights moved 20 times" in never.reason
    one = sourced(*[fed] * 19, unfed, handed=19)  # a single one is enough: nothing is random here
    assert one.state == "violates"
    assert "1 of 20 steps had no batch" in one.reason
    assert "handed out 19" in one.reason
    assert sourced(*[fed] * 17, *[more] * 3).state == "violates"
    assert "3 of 20 steps had more rows" in sourced(*[fed] * 17, *[more] * 3).reason
    # In another order, or with rows left out, but not both ways at once:
    shuffled, thinned = Source(fed=True, ordered=False), Source(fed=True, equal=False, whole=False)
    assert sourced(*[shuffled] * 20).state == "agrees"
    for parts in ([thinned] * 20, [*[fed] * 18, more, more]):
        assert sourced(*parts).state == "differs"


def test_steps_against_the_ledger():
    assert "40 times, the ledger counts 20" in judged(correct(), ledger=20)["steps"].reason
    assert judged(correct(), ledger=60)["steps"].state == "differs"
    assert judged(correct(), ledger=80, seen=80)["steps"].state == "agrees"


def test_what_was_not_seen_is_not_measurable_and_says_why():
    found = judged(Measurements(), rate=None, ledger=None)
    for check in found.checks:
        assert check.state == "not measurable", check
        assert check.reason
    assert "not measurable" in str(found["noise"])
    m = correct()
    m.phantom, m.instances = True, 20
    assert "random row" in judged(m)["rate"].reason
    m = correct()
    m.notes["clip"] = "each row is clipped to a cap of its own"
    assert judged(m)["clip"].reason == m.notes["clip"]


def test_a_clip_that_was_never_needed_is_said():
    m = correct()
    m.clipped_rows = 0
    assert "never needed" in judged(m)["clip"].reason
    assert judged(m)["clip"].state == "agrees"


def test_the_record_is_plain_json():
    import json

    found = json.loads(json.dumps(judged(correct()).to_json()))
    assert found["level"] == LEVEL
    assert {c["name"] for c in found["checks"]} >= {"noise", "clip", "rate", "steps"}
    with pytest.raises(KeyError):
        judged(correct())["nonsense"]
