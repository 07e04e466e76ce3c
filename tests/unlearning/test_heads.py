"""Heads on frozen features: which trainings contract, from a plan to a record that verifies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pil.certificates import (
    ContractionCertificate,
    read_certificate,
    verify_certificate,
)
from opacus_pil.unlearning.plan import CertifiedPlan
from opacus_pil.unlearning.result import CertifiedResult
from tests.heads.models import (
    CLASSES,
    SIZE,
    WIDTH,
    Heads,
    binary,
    bounded,
    frozen,
    head,
    linear,
    raw,
)
from tests.unlearning.head_runs import (
    CAPS,
    GOAL,
    LINEAR,
    SOFTMAX,
    columns,
    on_kept_features,
    unlearning,
)

STEPS = 12


def quiet(module: nn.Sequential) -> nn.Sequential:
    """A frozen part with dropout and BatchNorm, in evaluation mode as Opacus's loops leave it."""
    body = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(WIDTH), *module[:-1])
    body.requires_grad_(False)
    whole = nn.Sequential(body, module[-1])
    whole.train()
    body.eval()
    return whole


# --- what contracts -------------------------------------------------------------------------------

ACCEPTED = {
    "bare head": lambda: (Heads(caps=CAPS), 1.0),
    "worst case": lambda: (Heads(policy="worst_case"), 1.0),
    "other bounds": lambda: (Heads(caps=CAPS, bounds=[0.5, 1.0, 0.7]), 1.0),
    "frozen part": lambda: (Heads(frozen(head()), data=raw(), caps=CAPS), None),
    "frozen, evaluated": lambda: (Heads(quiet(frozen(head())), data=raw(), caps=CAPS), None),
    "kept features": lambda: (on_kept_features(), 1.0),
    "mean of outputs": lambda: (
        Heads(caps=CAPS, data=columns(bounded()), criterion=nn.BCEWithLogitsLoss()), 1.0
    ),
    "one of one": lambda: (
        Heads(head(1), data=binary(bounded()), criterion=nn.BCEWithLogitsLoss(), caps=CAPS[:, 0]),
        1.0,
    ),
    "Linear on frozen": lambda: (
        Heads(frozen(linear()), **LINEAR | {"data": binary(raw())}), None
    ),
    "bias beside": lambda: (Heads(nn.Linear(WIDTH + 1, 1), **LINEAR), 1.0),
    "Huber": lambda: (
        Heads(linear(), rate=0.3, decay=0.03,
              **LINEAR | {"criterion": nn.HuberLoss(delta=0.5)}), 1.0,
    ),
    "smooth L1": lambda: (
        Heads(linear(), **LINEAR | {"criterion": nn.SmoothL1Loss(beta=2.0)}), 1.0
    ),
    "softmax": lambda: (Heads(linear(CLASSES), bounds=1.5, **SOFTMAX), 1.0),
    "softmax, capped": lambda: (
        Heads(linear(CLASSES), bounds=2.0,
              **SOFTMAX | {"policy": "capped", "caps": np.full(SIZE, 0.8)}), 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_head_is_unlearned_with_a_certificate(name):
    made, feature_norm = ACCEPTED[name]()
    made.run(STEPS)
    assert made.label == "bound"
    engine = unlearning(made, feature_norm=feature_norm)
    plan = engine.plan([3, 5], **GOAL)
    assert isinstance(plan, CertifiedPlan)
    assert isinstance(plan.certificate, ContractionCertificate)
    assert 0 < plan.steps <= plan.steps_worst_case
    result = engine.unlearn(plan, seed=1)
    assert isinstance(result, CertifiedResult)
    assert result.epsilon <= GOAL["epsilon"]
    record = result.record(plain_ids=True)
    assert verify_certificate(record).holds
    assert record.forgotten == (3, 5)


def test_the_certificate_has_the_constants_of_the_training():
    made = Heads(caps=CAPS, bounds=[0.5, 1.0, 0.7], noise=3.0, rate=2.0, decay=0.02).run(STEPS)
    plan = unlearning(made, feature_norm=1.0).plan([3, 5], **GOAL)
    ours = plan.certificate
    clip = np.array([0.5, 1.0, 0.7])
    assert ours.contraction == pytest.approx(1.0 - 2.0 * 0.02, rel=1e-9)
    assert ours.noise_std == pytest.approx(2.0 * 3.0 * np.linalg.norm(clip) / SIZE, rel=1e-6)
    moved = np.linalg.norm((CAPS[3] + CAPS[5]) * clip)
    np.testing.assert_allclose(ours.shifts, STEPS * [2.0 / SIZE * moved], rtol=2e-5)
    assert min(ours.shifts) >= 2.0 / SIZE * moved


def test_steps_of_an_instance_are_at_most_those_of_the_worst_case():
    engine = unlearning(Heads(caps=CAPS).run(STEPS), feature_norm=1.0)
    found = [engine.plan([row], **GOAL) for row in range(0, SIZE, 4)]
    assert all(plan.steps <= plan.steps_worst_case for plan in found)
    assert len({plan.steps for plan in found}) > 1
    assert len({plan.steps_worst_case for plan in found}) == 1
    order = np.argsort(np.linalg.norm(CAPS[::4], axis=1))
    assert sorted(plan.steps for plan in found) == [found[k].steps for k in order]


def test_requests_in_turn_count_all_their_members():
    made = Heads(caps=CAPS).run(STEPS)
    engine = unlearning(made, feature_norm=1.0)
    first = engine.plan([0], **GOAL)
    engine.unlearn(first, seed=1)
    second = engine.plan([5], **GOAL)
    unit = 1.0 / SIZE  # step size over batch, clip bounds of 1
    both, later = np.linalg.norm(CAPS[0] + CAPS[5]), np.linalg.norm(CAPS[5])
    expected = np.r_[np.full(STEPS, unit * both), np.full(first.steps, unit * later)]
    np.testing.assert_allclose(second.certificate.shifts, expected, rtol=2e-5)
    result = engine.unlearn(second, seed=2)
    record = result.record(plain_ids=True)
    assert (record.earlier_requests, record.earlier_steps) == (1, first.steps)
    assert verify_certificate(record).holds


def test_requests_are_served_from_a_queue_by_a_head_that_was_opened_again(tmp_path):
    """The second process trains nothing: it takes the state, caps per output included."""
    first = unlearning(Heads(caps=CAPS).run(STEPS), feature_norm=1.0, requests=tmp_path)
    first.submit([0], request_id="ada")
    (ada,) = first.serve(**GOAL)
    again = unlearning(Heads(caps=CAPS).run(STEPS), feature_norm=1.0, requests=tmp_path)
    again.load_state_dict(first.state_dict())
    again.submit([5], request_id="bob")
    (bob,) = again.serve(**GOAL)
    assert (ada.result["status"], bob.result["status"]) == ("certified", "certified")
    assert again.forgotten == {0, 5}
    record = read_certificate(tmp_path / bob.result["certificate_file"])
    assert (record.earlier_requests, record.earlier_steps) == (1, ada.result["steps"])
    assert verify_certificate(record).holds
    both = np.linalg.norm(CAPS[0] + CAPS[5]) / SIZE  # both in all steps of training
    assert max(record.certificate.shifts) == pytest.approx(both, rel=2e-5)


def test_unlearning_clips_each_output_to_its_cap_as_training_did(monkeypatch):
    from opacus_pil.capture.norms import RecordingPerLayerOptimizer

    engine = unlearning(Heads(caps=CAPS).run(STEPS), feature_norm=1.0)
    seen = []
    own = RecordingPerLayerOptimizer._accumulate_capped
    monkeypatch.setattr(
        RecordingPerLayerOptimizer, "_accumulate_capped",
        lambda self, factors, **kept: seen.append((self.max_grad_norms, len(factors)))
        or own(self, factors, **kept),
    )  # fmt: skip
    plan = engine.plan([3], **GOAL)
    engine.unlearn(plan, seed=1)
    assert seen == [([1.0] * CLASSES, SIZE - 1)] * plan.steps


def coupled(made: Heads, rows: np.ndarray, steps: int) -> list[torch.Tensor]:
    """Train a head from the start on some rows, by the kernel and the noise of the others."""
    fork, module, path = made.engine.fork(), head(), []
    wrapped, optimizer, loader = fork.make_private_on(
        rows, module=module, dataset=made.data, steps=steps,
        optimizer=torch.optim.SGD(module.parameters(), lr=2.0, weight_decay=0.05),
        noise_generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    for inputs, targets in loader:
        optimizer.zero_grad()
        made.criterion(wrapped(inputs), targets).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().double() for p in module.parameters()]))
    return path


def test_coupled_runs_never_part_by_more_than_the_certificate_assumes():
    """Same noise, with and without two rows: z_t <= c z_{t-1} + s_t, by what really clips."""
    bounds, forget = [0.2, 0.05, 0.4], [1, 3]
    made = Heads(caps=CAPS, bounds=bounds, noise=0.5, rate=2.0, decay=0.05).run(3)
    certificate = unlearning(made, feature_norm=1.0).plan(forget, **GOAL).certificate
    everyone = np.arange(SIZE)
    paths = [coupled(made, rows, 25) for rows in (everyone, np.setdiff1d(everyone, forget))]
    allowed, closest = 0.0, 0.0
    for first, second in zip(*paths, strict=True):
        allowed = certificate.contraction * allowed + certificate.shifts[0]
        distance = float((first - second).norm())
        closest = max(closest, distance / allowed)
        assert distance <= allowed
    assert closest > 0.2  # and is not vacuous


def test_poisson_batches_of_a_head_are_certified_too():
    made = Heads(caps=0.3 * CAPS, batch=12, decay=0.1).run(4)
    plan = unlearning(made, feature_norm=1.0).plan([3], **GOAL | {"epsilon": 3.0})
    assert isinstance(plan, CertifiedPlan)
    assert plan.steps <= plan.steps_worst_case
