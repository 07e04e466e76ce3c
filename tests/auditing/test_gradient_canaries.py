"""Canaries inside Opacus's optimizer: the training keeps its bits, the numbers are the claim's."""

import math

import numpy as np
import pytest
import torch
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer

from opacus_pil import UnsupportedError
from opacus_pil.auditing import Claim, GradientCanaries
from tests.auditing.runs import HalfNoise, NoClip, NoNoise, exchanged, private, train, weights


def run(*, canaries=True, fault=None, steps=24, count=200, shared=False, each=None, **settings):
    engine, model, optimizer, criterion, loader = private(**settings)
    if fault is not None:
        exchanged(optimizer, fault)
    seen = None
    if canaries:
        seen = GradientCanaries(
            optimizer, count=count, controls=64, seed=3, shared_generator=shared
        )
    train(model, optimizer, criterion, loader, steps=steps, each=each or (lambda: None))
    return engine, model, optimizer, seen


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_the_training_keeps_every_bit(mode, clipping):
    plain = run(canaries=False, mode=mode, clipping=clipping, steps=4)
    watched = run(mode=mode, clipping=clipping, steps=4)
    assert (weights(plain[1]) - weights(watched[1])).abs().max() == 0.0
    assert plain[0].accountant.history == watched[0].accountant.history
    assert torch.equal(*(torch.randn(3, generator=torch.Generator().manual_seed(0)),) * 2)


def test_the_global_generator_stands_where_it_would_and_the_optimizer_has_nothing_more():
    _, _, optimizer, _ = run(canaries=False, steps=3)
    alone = torch.get_rng_state()
    _, _, watched, _ = run(steps=3)
    assert torch.equal(alone, torch.get_rng_state())
    assert len(watched.param_groups) == len(optimizer.param_groups) == 1
    assert watched.state_dict().keys() == optimizer.state_dict().keys()
    assert len(watched.params) == len(optimizer.params)
    assert watched._step_skip_queue == []


def test_a_shared_generator_keeps_the_law_and_not_the_bits():
    plain, shared = run(canaries=False, steps=4), run(shared=True, steps=4)
    assert (weights(plain[1]) - weights(shared[1])).abs().max() > 0.0
    record = shared[3].record
    assert math.sqrt(record.noise_squares / record.undrawn) == pytest.approx(1.0, abs=0.15)
    # 4 steps · 264 entries: the standard error is 2.2 %, seven of them


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_hits_are_the_bound_noise_is_the_claimed_one_and_draws_are_at_the_rate(clipping):
    _, _, optimizer, canaries = run(clipping=clipping, count=1000)
    record, n = canaries.record, 24
    q = 1 / 12
    assert record.steps == n
    assert record.hit_sum / record.draws == pytest.approx(1.0, abs=4 / math.sqrt(record.draws))
    assert math.sqrt(record.noise_squares / record.undrawn) == pytest.approx(
        1.0, abs=5 / math.sqrt(2 * record.undrawn)
    )
    members = int(record.included.sum())
    expected = n * members * q
    assert abs(record.draws - expected) < 5 * math.sqrt(expected)
    if clipping == "per_layer":
        assert float(optimizer.max_grad_norm) == pytest.approx(2.0)  # ‖(1, 1, 1, 1)‖, as before
        assert len(optimizer.max_grad_norms) == 4


def test_evidence_of_a_correct_run_stays_below_its_claim():
    engine, _, _, canaries = run(count=1000)
    proof = canaries.evidence(delta=1e-5)
    claim = Claim(tuple(engine.accountant.history), delta=1e-5)
    assert proof.refuted_p > 1e-3
    assert proof.steps_p > 1e-3
    assert proof.steps == claim.steps == 24
    assert 0.5 * claim.epsilon < proof.lower[1].epsilon < 1.1 * claim.epsilon
    assert [b.assumption for b in proof.lower] == [
        "independent by construction", "independent by construction",
        "independent by construction", "none", "none",
    ]  # fmt: skip
    assert proof.bits == "own"
    assert proof.powerful


@pytest.mark.parametrize("fault", [NoNoise, HalfNoise, NoClip])
@pytest.mark.slow
def test_a_fault_refutes_the_claim_and_raises_the_bound(fault):
    engine, _, _, canaries = run(fault=fault, count=400)
    proof = canaries.evidence(delta=1e-5)
    claim = Claim(tuple(engine.accountant.history), delta=1e-5)
    assert proof.refuted_p < 1e-6
    assert proof.lower[1].epsilon > 1.5 * claim.epsilon


def test_a_run_without_noise_is_guessed_at_the_measured_noise_not_at_the_claimed():
    _, _, _, canaries = run(fault=NoNoise, count=400)
    record = canaries.record
    drawn_once = 1 - (1 - 1 / 12) ** 24
    # Who was drawn at all is known for certain; the others look like those who are out.
    assert record.wrong <= 400 * 0.5 * (1 - drawn_once) + 5 * math.sqrt(400)


def test_a_generator_that_repeats_is_seen_when_it_is_shared():
    noise = torch.Generator()
    again = {"each": lambda: noise.manual_seed(7), "noise_generator": noise}
    _, _, _, shared = run(shared=True, **again)
    assert np.ptp(np.array(shared.record.kept), axis=0).max() < 1e-5  # the same at every step
    noise = torch.Generator()
    _, _, _, own = run(each=lambda: noise.manual_seed(7), noise_generator=noise)
    assert np.ptp(np.array(own.record.kept), axis=0).min() > 0.1


def test_physical_batches_are_one_step_for_canaries_too():
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    _, model, optimizer, criterion, loader = private()
    canaries = GradientCanaries(optimizer, count=100, controls=64, seed=0)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=40, optimizer=optimizer
    ) as split:
        train(model, optimizer, criterion, split, steps=30)
    assert 0 < canaries.record.steps < 15  # about four physical batches are one step


def test_accumulated_batches_are_refused_when_evidence_is_asked_for():
    _, model, optimizer, criterion, loader = private(poisson_sampling=False)
    canaries = GradientCanaries(optimizer, count=50, controls=64, seed=0)
    batches = iter(loader)
    for _ in range(2):
        inputs, targets = next(batches)
        criterion(model(inputs), targets).backward()
    optimizer.step()
    with pytest.raises(UnsupportedError, match="2 batches are accumulated"):
        canaries.evidence(delta=1e-5)


def test_ghost_and_adaptive_clipping_are_refused_by_name():
    _, _, optimizer, _, _ = private(mode="ghost")
    with pytest.raises(UnsupportedError, match=r"ghost clipping .DPOptimizerFastGradient.*hooks"):
        GradientCanaries(optimizer)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    adaptive = AdaClipDPOptimizer(
        plain, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1,
        target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, max_clipbound=10.0,
        min_clipbound=0.01, unclipped_num_std=5.0,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="AdaClipDPOptimizer"):
        GradientCanaries(adaptive, sample_rate=0.1)


def test_coins_thrown_after_training_began_are_refused_with_the_cure():
    _, _, optimizer, _ = run(canaries=False, steps=1)
    with pytest.raises(
        ValueError, match=r"before training.*right after make_private.*resumed=True"
    ):
        GradientCanaries(optimizer)
    rest = GradientCanaries(optimizer, resumed=True, count=50, controls=64, seed=0)
    with pytest.raises(ValueError, match="with noisy steps, got none"):
        rest.evidence(delta=1e-5)


def test_without_an_accountant_the_rate_must_be_said():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = DPOptimizer(
        torch.optim.SGD([parameter], lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="Expected a sample_rate"):
        GradientCanaries(optimizer)
    canaries = GradientCanaries(optimizer, sample_rate=0.5, count=40, controls=64, seed=0)
    for _ in range(3):
        optimizer.zero_grad()
        parameter.grad_sample = torch.ones(2, 2)
        optimizer.step()
    with pytest.raises(ValueError, match="Expected a claim"):
        canaries.evidence(delta=1e-5)
    assert canaries.evidence(delta=1e-5, claim=Claim(((1.0, 0.5, 3),), delta=1e-5)).steps == 3


def test_detached_canaries_hear_nothing_more():
    _, model, optimizer, criterion, loader = private()
    canaries = GradientCanaries(optimizer, count=50, controls=64, seed=0)
    train(model, optimizer, criterion, loader, steps=2)
    canaries.detach()
    train(model, optimizer, criterion, loader, steps=2)
    assert canaries.record.steps == 2
