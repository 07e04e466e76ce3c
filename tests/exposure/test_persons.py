"""A person with several rows: one ε for all of them, one name for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.accounting import group_rdp, rdp_to_epsilon
from opacus_pil.errors import UnsupportedError

PEOPLE = ["ann", "bob", "ann", "cem", "bob", "ann", *(f"p{k}" for k in range(34))]
DELTA = 1e-3


def trained(**options):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    x = torch.randn(40, 3)
    data = TensorDataset(x, (x[:, :1] > 0).float())
    engine = PerInstancePrivacyEngine(groups=PEOPLE, **options)
    criterion = torch.nn.BCEWithLogitsLoss()
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=20), noise_multiplier=2.0, max_grad_norm=0.5,
        criterion=criterion,
    )  # fmt: skip
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
    return engine, module, optimizer, data


def test_a_persons_loss_is_that_of_all_their_rows_together() -> None:
    caps = np.linspace(0.1, 1.0, 40)
    engine, *_ = trained(norm_policy="capped", caps=caps)
    spent = engine.get_per_instance_epsilon(DELTA)
    assert len(spent) == 37
    assert spent.instance_ids.tolist()[:3] == ["ann", "bob", "cem"]
    ledger = engine.per_instance
    levels = ledger.sensitivities[[0, 2, 5]]
    one = group_rdp(levels, noise_multiplier=2.0, sample_rate=0.5, orders=ledger.orders)
    expected = rdp_to_epsilon(6 * np.asarray(one), orders=ledger.orders, delta=DELTA)[0]
    assert spent["ann"] == pytest.approx(float(expected), rel=1e-9)
    rows = ledger.get_epsilon(DELTA).epsilon
    assert spent["cem"] == rows[3]  # one row: that row's own
    assert spent["ann"] > max(rows[[0, 2, 5]])
    assert spent.guarantee == "bound"
    assert any("pointing one way" in reason for reason in spent.reasons)
    assert (spent.epsilon <= spent.worst_case).all()


def test_the_worst_case_is_that_of_as_many_rows() -> None:
    engine, *_ = trained(norm_policy="worst_case")
    spent = engine.get_per_instance_epsilon(DELTA)
    assert spent["ann"] == pytest.approx(spent.worst_case, rel=1e-9)
    alone = engine.get_per_instance_epsilon(DELTA, indices=["cem", "p0"])
    assert alone.epsilon == pytest.approx([alone.worst_case] * 2, rel=1e-9)
    assert alone.worst_case < spent.worst_case


def test_a_person_is_forgotten_with_all_their_rows() -> None:
    engine, module, optimizer, data = trained()
    unlearning = UnlearningEngine(
        module, optimizer=optimizer, dataset=data, privacy_engine=engine, progress=False
    )
    plan = unlearning.plan(["ann"], steps=1, method="dp_sgd")
    assert plan.forget_set.tolist() == [0, 2, 5]
    unlearning.unlearn(plan)
    assert unlearning.forgotten == frozenset({0, 2, 5})
    assert engine.get_per_instance_epsilon(DELTA, indices=["bob"])["bob"] > 0.0


def test_batches_name_rows_and_not_persons() -> None:
    engine, *_ = trained()
    with engine.batch(indices=[0, 3]):
        pass
    with pytest.raises((TypeError, ValueError)), engine.batch(indices=["ann"]):
        pass


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.get_per_instance_epsilon(DELTA, indices=["eve"]), "eve"),
        (lambda e: e.get_per_instance_epsilon(DELTA, indices=["ann", "ann"]), "twice"),
    ],
)
def test_strangers_and_repetitions_are_refused(call, words) -> None:
    engine, *_ = trained()
    with pytest.raises(ValueError, match=words):
        call(engine)
    with pytest.raises(UnsupportedError, match="rows"):
        engine.get_per_instance_epsilon(DELTA, rows=[0])


def test_groups_fit_the_data_and_have_no_budget() -> None:
    with pytest.raises(ValueError, match="budget"):
        PerInstancePrivacyEngine(groups=["a"], norm_policy="capped", budget=(1.0, 1e-5))
    module = torch.nn.Linear(3, 1)
    with pytest.raises(ValueError, match="groups"):
        PerInstancePrivacyEngine(groups=["a", "b"]).make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(3, 3), torch.ones(3, 1))),
            noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
