"""C13, C16: calls that stopped with words of somebody else, or went on without a word."""

import sys

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.certificates import BestCertificate
from opacus_pil.unlearning import search

from .unlearning_models import DELTA, SIZE, classes, logistic, network, network_module

# --- C13 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "found"),
    [
        (opacus.PrivacyEngine(accountant="rdp"), "opacus.PrivacyEngine"),
        (type("Own", (opacus.PrivacyEngine,), {})(accountant="rdp"), "Own"),
        ("engine", "str"),
    ],
)
def test_an_engine_that_keeps_no_account_of_instances_is_named_with_the_cure(engine, found):
    module = network_module()
    with pytest.raises(TypeError, match=f"got {found}, which keeps no account") as raised:
        UnlearningEngine(
            module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), dataset=classes(),
            criterion=nn.CrossEntropyLoss(), privacy_engine=engine,
        )  # fmt: skip
    assert "attach(" in str(raised.value)


def test_the_cure_is_one():
    torch.manual_seed(0)
    module, dataset, criterion = network_module(), classes(), nn.CrossEntropyLoss()
    plain = opacus.PrivacyEngine(accountant="rdp")
    wrapped, optimizer, loader = plain.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(dataset, batch_size=8), noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy="worst_case")
    engine.attach(module=wrapped, optimizer=optimizer, data_loader=loader, criterion=criterion)
    for x, y in loader:
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()
    unlearning = UnlearningEngine(
        wrapped, optimizer=optimizer, dataset=dataset, privacy_engine=engine, progress=False
    )
    assert unlearning.plan([0], steps=2, delta=DELTA).certificate.context == ()


@pytest.mark.parametrize(
    "mask", [np.arange(SIZE) < 2, (np.arange(SIZE) < 2).tolist(), torch.arange(SIZE) < 2]
)
def test_a_mask_is_a_forget_set(mask):
    assert network().unlearning().plan(mask, steps=1).forget_set.tolist() == [0, 1]


@pytest.mark.parametrize("mask", [np.zeros(SIZE, bool), np.ones(SIZE, bool), np.ones(3, bool)])
def test_masks_of_nobody_of_everybody_and_of_other_rows_are_refused(mask):
    with pytest.raises(ValueError, match="Expected"):
        network().unlearning().plan(mask, steps=1)


# --- C16: a sign of life --------------------------------------------------------------------------


class Terminal:
    """Where a progress bar would be drawn."""

    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        """Nothing is kept back."""

    encoding = "utf-8"


@pytest.mark.parametrize(("tty", "progress"), [(True, True), (True, False), (False, True)])
def test_a_search_shows_that_it_works_on_a_terminal_only(tty, progress, monkeypatch):
    trained = logistic(batch_size=8, steps=8)
    unlearning = trained.unlearning(progress=progress)
    terminal = Terminal(tty)
    monkeypatch.setattr(search, "_PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    plan = unlearning.plan(
        [0], epsilon=2.0, delta=DELTA, method="langevin", max_steps=8, step_grid=1
    )
    monkeypatch.undo()
    assert isinstance(plan.certificate, BestCertificate)
    assert ("planning" in terminal.text) == (tty and progress)


def test_a_search_that_is_over_at_once_shows_nothing(monkeypatch):
    terminal = Terminal(tty=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with search.searching(progress=True) as on_probe:
        on_probe(3, 0.5)
    monkeypatch.undo()
    assert terminal.text == ""


def test_a_search_that_is_shown_finds_what_the_certificate_finds():
    for make in (lambda: logistic(batch_size=8, steps=8), logistic):
        plan = (
            make()
            .unlearning()
            .plan([0], epsilon=1.0, delta=DELTA, method="langevin", max_steps=40, step_grid=1)
        )
        if hasattr(plan, "certificate"):
            assert plan.steps == plan.certificate.steps_for(epsilon=1.0, delta=DELTA, max_steps=40)
            assert type(plan.certificate).__name__ in plan.reason or "Certificate" in plan.reason
