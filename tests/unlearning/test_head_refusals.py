"""Heads whose training does not contract, or not as it is said: refused by name, with the cure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pil import CertificateError, LedgerError
from opacus_pil.heads import BoundedFeatures, OneVsRest
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
    DELTA,
    FLAT,
    GOAL,
    LINEAR,
    SOFTMAX,
    columns,
    on_kept_features,
    unlearning,
)


class Own(nn.Module):
    """A model with a forward pass of its own around a head."""

    def __init__(self, call, part=None) -> None:
        super().__init__()
        self.head = head() if part is None else part
        self._call = call

    def forward(self, inputs):
        return self._call(self, inputs)


def twice(self, x):
    return 0.5 * (self.head(x) + self.head(x))


def after(self, x):
    return 2.0 * self.head(x)


def after_in_place(self, x):
    return self.head(x).mul_(1.9)


def peeking(self, x):
    weight = next(self.head.parameters()).detach()
    return self.head(x / (1.0 + weight.norm()))


def by_mode(self, x):
    return self.head(x if self.training else 0.5 * x)


def functional_dropout(self, x):
    return self.head(nn.functional.dropout(x, 0.5, self.training))


def overridden() -> nn.Module:
    module = head()
    module.forward = lambda x: 0.5 * OneVsRest.forward(module, x)
    return module


def output_overridden() -> nn.Module:
    module = head()
    module.outputs[1].forward = lambda x: 0.5 * nn.functional.linear(x, module.outputs[1].weight)
    return module


def with_bias() -> nn.Module:
    module = head()
    module.outputs[1] = nn.Linear(WIDTH + 1, 1)
    return module


REFUSED = {
    "outputs clipped together": (
        {"clipping": "flat", "policy": "worst_case"}, "clipping='per_layer' and max_grad_norm=",
    ),
    "a Linear of several outputs": (
        {"module": linear(CLASSES), "data": columns(bounded()), **FLAT,
         "criterion": nn.BCEWithLogitsLoss()}, r"heads\.OneVsRest with clipping='per_layer'",
    ),
    "momentum": (
        {**LINEAR, "module": linear(), "make": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5)},
        "Set momentum=0",
    ),
    "another optimizer": (
        {"caps": CAPS, "make": lambda p: torch.optim.Adam(p, lr=0.1)}, "torch.optim.SGD",
    ),
    "a bias beside": (
        {"module": with_bias(), "policy": "worst_case", "clipping": "flat"}, "heads.Bounded",
    ),
    "weights of classes": (
        {**LINEAR, "module": linear(),
         "criterion": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0]))}, "weights",
    ),
    "label smoothing": (
        {**SOFTMAX, "module": linear(CLASSES), "bounds": 3.0,
         "criterion": nn.CrossEntropyLoss(label_smoothing=0.1)}, "CrossEntropyLoss",
    ),
    "squared loss": ({**LINEAR, "module": linear(), "criterion": nn.MSELoss()}, "MSELoss"),
    "softmax that is clipped": (
        {**SOFTMAX, "module": linear(CLASSES), "bounds": 1.3}, "raise max_grad_norm or the caps",
    ),
    "softmax that caps clip": (
        {**SOFTMAX, "module": linear(CLASSES), "bounds": 3.0, "policy": "capped",
         "caps": np.r_[0.4, np.ones(SIZE - 1)]}, "raise max_grad_norm or the caps",
    ),
    "softmax of scores": (
        {**SOFTMAX, "module": linear(CLASSES), "bounds": 1.5,
         "data": TensorDataset(bounded().tensors[0], torch.full((SIZE, CLASSES), 1.0))},
        "class numbers as targets",
    ),
    "head called twice": ({"module": Own(twice), "caps": CAPS}, "once.*[23] calls"),
    "something after the head": ({"module": Own(after), "caps": CAPS}, "another output"),
    "the same in place": ({"module": Own(after_in_place), "caps": CAPS}, "another output"),
    "features that read the head": ({"module": Own(peeking), "caps": CAPS}, "the same in training"),
    "features by mode": ({"module": Own(by_mode), "caps": CAPS}, "the same in training"),
    "functional dropout": (
        {"module": Own(functional_dropout), "caps": CAPS}, "the same in training",
    ),
    "a body that trains": (
        {"module": frozen(linear()).requires_grad_(True), "data": binary(raw()),
         "criterion": nn.BCEWithLogitsLoss(), **FLAT}, "freeze all but the head",
    ),
    "dropout": (
        {"module": frozen(head(), last=nn.Sequential(nn.Dropout(0.5), BoundedFeatures(WIDTH))),
         "data": raw(), "caps": CAPS}, "dropout at '2.0'",
    ),
    "no bound by construction": (
        {"module": frozen(head(), last=nn.ConstantPad1d((0, 1), 1.0)), "data": raw(),
         "caps": CAPS}, "feature_norm=None",
    ),
    "a forward pass of its own": ({"module": overridden(), "caps": CAPS}, "its own forward"),
    "an output with one": (
        {"module": output_overridden(), "policy": "worst_case"}, "its own forward",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Per-instance losses")
@pytest.mark.parametrize("name", REFUSED)
def test_a_training_that_does_not_contract_is_refused_by_name(name):
    options, words = REFUSED[name]
    made = Heads(**options).run(2)
    bare = not isinstance(made.plain, nn.Sequential)
    with pytest.raises(CertificateError, match=words) as refusal:
        unlearning(made, feature_norm=1.0 if bare else None).plan([3], **GOAL)
    assert str(refusal.value).startswith("Expected")


@pytest.mark.filterwarnings("ignore:Per-instance losses")
def test_a_loss_that_is_scaled_in_the_loop_is_refused():
    made = Heads(caps=CAPS)
    for inputs, targets in made.loader:
        made.optimizer.zero_grad()
        (3.0 * made.criterion(made.module(inputs), targets)).backward()
        made.optimizer.step()
    with pytest.raises(CertificateError, match=r"norm at most|other gradients"):
        unlearning(made, feature_norm=1.0).plan([3], **GOAL)


def test_another_loss_than_the_trainings_is_refused():
    made = Heads(linear(), **LINEAR | {"criterion": nn.HuberLoss(delta=0.5)}).run(2)
    other = unlearning(made, feature_norm=1.0, criterion=nn.HuberLoss(delta=0.4))
    with pytest.raises(CertificateError, match="the training's own loss"):
        other.plan([3], **GOAL)


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.outputs[1]])
def test_a_hook_on_the_head_is_refused(part):
    made = Heads(caps=CAPS).run(2)
    part(made.plain).register_forward_hook(lambda module, inputs, found: 0.5 * found)
    with pytest.raises(CertificateError, match="without forward hooks"):
        unlearning(made, feature_norm=1.0).plan([3], **GOAL)


def test_a_row_above_the_bound_is_named():
    data = bounded()
    data.tensors[0][7] *= 1.01
    made = Heads(data=data, caps=CAPS).run(2)
    with pytest.raises(CertificateError, match=r"feature_norm=1, got norm|feature_norm=1 .*row 7"):
        unlearning(made, feature_norm=1.0).plan([3], **GOAL)


def test_caps_that_were_changed_midway_are_refused():
    made = Heads(caps=CAPS, settings={"budget": (8.0, DELTA)}).run(2)
    made.engine.set_caps(0.5 * CAPS)
    made.run(1)
    with pytest.raises(CertificateError, match="caps fixed before the run"):
        unlearning(made, feature_norm=1.0).plan([3], **GOAL)


def test_a_schedule_of_one_outputs_bound_is_no_constant_step():
    made = Heads(policy="worst_case", bounds=[1.0, 1.0, 0.5]).run(2)
    made.optimizer.max_grad_norms = [1.0, 0.5, 1.0]  # as long together
    made.run(2)
    with pytest.raises(CertificateError, match="constant steps"):
        unlearning(made, feature_norm=1.0).plan([3], **GOAL)


def test_weights_that_are_tied_after_training_are_refused():
    made = Heads(caps=CAPS).run(2)
    made.plain.outputs[1].weight = made.plain.outputs[0].weight
    with pytest.raises((CertificateError, LedgerError), match=r"share weights|as it was"):
        unlearning(made, feature_norm=1.0).plan([3], **GOAL)


def test_rows_that_were_erased_and_not_forgotten_are_refused():
    made = on_kept_features().run(2)
    made.data.erase([9])
    with pytest.raises(CertificateError, match=r"an erased one \(row 9\)"):
        unlearning(made, feature_norm=1.0).plan([3], **GOAL)


def test_rows_that_were_forgotten_may_be_erased():
    made = on_kept_features().run(2)
    engine = unlearning(made, feature_norm=1.0)
    engine.unlearn(engine.plan([9], **GOAL), seed=1)
    made.data.erase([9])
    assert isinstance(engine.unlearn(engine.plan([3], **GOAL), seed=2), CertifiedResult)
