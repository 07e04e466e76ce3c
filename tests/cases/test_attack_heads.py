"""Heads found by attacking the package: certified as convex and contracting, and neither."""

from __future__ import annotations

from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from opacus_pil import CertificateError, UnlearningEngine, UnsupportedError
from opacus_pil.heads import FrozenFeatures, OneVsRestLoss
from tests.heads.models import CLASSES, SIZE, WIDTH, Heads, binary, frozen, head, linear, raw

CAPS = np.random.default_rng(0).uniform(0.05, 1.0, (SIZE, CLASSES))
GOAL = {"epsilon": 2.0, "delta": 1e-2, "method": "langevin", "max_steps": 5000}


def refused(made: Heads, words: str, *, feature_norm: float | None = 1.0) -> None:
    engine = UnlearningEngine(
        made.module, optimizer=made.optimizer, dataset=made.data, privacy_engine=made.engine,
        feature_norm=feature_norm, progress=False,
    )  # fmt: skip
    with pytest.raises(CertificateError, match=words):
        engine.plan([3], **GOAL)


@pytest.mark.parametrize("policy", ["capped", "worst_case"])
def test_a_softmax_that_is_clipped_output_by_output(policy):
    """Its outputs have tensors of their own, and a slope that depends on all of them."""
    caps = CAPS if policy == "capped" else None
    made = Heads(caps=caps, policy=policy, criterion=nn.CrossEntropyLoss()).run(2)
    refused(made, "OneVsRestLoss")


def own_forward() -> nn.Module:
    loss = OneVsRestLoss()
    loss.forward = MethodType(lambda self, *batch: 1.9 * OneVsRestLoss.forward(self, *batch), loss)
    return loss


def hooked() -> nn.Module:
    loss = OneVsRestLoss()
    loss.register_forward_hook(lambda module, inputs, found: 1.9 * found)
    return loss


@pytest.mark.filterwarnings("ignore:Per-instance losses")
@pytest.mark.parametrize("make", [own_forward, hooked])
def test_a_known_loss_that_computes_something_else(make):
    """At the start slopes are a half: scaled by less than two they are no longer than allowed."""
    made = Heads(caps=CAPS, criterion=make()).run(2)
    refused(made, "convex and smooth")


def test_dropout_that_is_switched_on_after_the_first_step():
    body = nn.Sequential(nn.Linear(WIDTH, WIDTH + 1), nn.Dropout(0.5)).requires_grad_(False)
    made = Heads(
        nn.Sequential(body, linear()), data=binary(raw()), criterion=nn.BCEWithLogitsLoss(),
        clipping="flat", caps=CAPS[:, 0], rate=0.1, decay=0.1,
    )  # fmt: skip
    body.eval()
    made.run(1)
    body.train()
    made.run(2)
    body.eval()
    longest = float(body(raw().tensors[0]).norm(dim=1).max())
    refused(made, "dropout at '0.1'", feature_norm=1.01 * longest)


def test_a_collate_function_that_scales_features():
    def scaled(items):
        inputs, targets = default_collate(items)
        return 1.1 * inputs, targets

    made = Heads(caps=CAPS, collate=scaled).run(2)
    refused(made, "constant steps")


def test_kept_features_that_are_put_into_another_order():
    """Each row would be clipped to somebody else's cap."""
    data = FrozenFeatures(raw(), frozen(head())[:-1], progress=False)
    made = Heads(caps=CAPS, data=data).run(2)
    for tensor in (data.features, data.targets):
        tensor.copy_(tensor.flip(0))
    with pytest.raises(UnsupportedError, match="not always the same instance"):
        made.run(1)


def test_weights_that_change_places_are_clipped_where_they_are():
    """Not false: a cap belongs to a tensor, and each stays a function of its own row."""
    made = Heads(caps=CAPS)

    def exchange(step, made):
        if step == 1:
            one, other = made.plain.outputs[0], made.plain.outputs[1]
            one.weight, other.weight = other.weight, one.weight

    seen = []

    def moved(step, made):
        seen.append(torch.stack([p.summed_grad.norm() for p in made.optimizer.params]))

    made.run(3, before=exchange, after=moved)
    most = torch.as_tensor(CAPS.sum(axis=0))
    assert made.label == "bound"
    assert all(bool((sums <= most * (1 + 1e-5)).all()) for sums in seen)


def test_outputs_in_another_order_are_another_model_for_caps():
    module = head()
    module.outputs = nn.ModuleList(list(module.outputs)[::-1])
    made = Heads(module, caps=CAPS).run(1)  # before the training: the order is theirs
    assert [p is q for p, q in zip(made.optimizer.params, module.parameters(), strict=True)] == (
        [True] * CLASSES
    )
