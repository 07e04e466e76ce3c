"""A deletion from end to end as a new user tries it: scikit-learn's breast-cancer data, own ids."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import CertificateError, PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.heads import (
    BoundedFeatures,
    FrozenFeatures,
    OneVsRest,
    OneVsRestLoss,
    caps_from_public_model,
)

PUBLIC, STEPS, STEP_SIZE, DECAY, NOISE = 100, 60, 7.0, 5e-3, 0.2
pytestmark = pytest.mark.slow  # trains for seconds


def patients() -> tuple[TensorDataset, TensorDataset, list[str]]:
    """Public rows, private rows and what the private ones are called."""
    x, y = load_breast_cancer(return_X_y=True)
    x = np.log1p(x) / np.log1p(x[:PUBLIC]).max(axis=0)  # by public rows
    features, classes = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    names = [f"patient-{k:03}" for k in range(len(x) - PUBLIC)]
    return (
        TensorDataset(features[:PUBLIC], classes[:PUBLIC]),
        TensorDataset(features[PUBLIC:], classes[PUBLIC:]),
        names,
    )


def descend(module: nn.Module, data: Any, criterion: nn.Module) -> None:
    """Train on public rows, without noise."""
    optimizer = torch.optim.SGD(module.parameters(), lr=STEP_SIZE, weight_decay=DECAY)
    x, y = next(iter(DataLoader(data, batch_size=len(data))))
    for _ in range(STEPS):
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()


class Hospital:
    """A head that was trained privately, with caps from the public rows, and its queue."""

    def __init__(self, folder: Any) -> None:
        public, private, names = patients()
        frozen = BoundedFeatures(30)
        self.data = FrozenFeatures(private, frozen, folder=folder, progress=False)
        first, criterion = OneVsRest(31, 2), OneVsRestLoss()
        descend(first, FrozenFeatures(public, frozen, progress=False), criterion)
        caps = caps_from_public_model(first, self.data, max_grad_norm=[1.0, 1.0])
        self.privacy = PerInstancePrivacyEngine(norm_policy="capped", caps=caps, instance_ids=names)
        torch.manual_seed(0)
        module = OneVsRest(31, 2)
        optimizer = torch.optim.SGD(module.parameters(), lr=STEP_SIZE, weight_decay=DECAY)
        size = len(self.data)
        private_module, private_optimizer, loader = self.privacy.make_private(
            module=module, optimizer=optimizer, data_loader=DataLoader(self.data, batch_size=size),
            noise_multiplier=NOISE * size / (STEP_SIZE * math.sqrt(2.0)),
            max_grad_norm=[1.0, 1.0], clipping="per_layer", criterion=criterion,
        )  # fmt: skip
        for _ in range(STEPS):
            for x, y in loader:
                private_optimizer.zero_grad()
                criterion(private_module(x), y).backward()
                private_optimizer.step()
        (folder / "requests").mkdir()
        self.head = UnlearningEngine(
            private_module, optimizer=private_optimizer, dataset=self.data,
            privacy_engine=self.privacy, feature_norm=1.0, requests=folder / "requests",
            progress=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return Hospital(tmp_path_factory.mktemp("hospital"))


def test_a_patient_is_forgotten_and_the_file_on_disk_proves_it(hospital: Hospital) -> None:
    head, delta = hospital.head, 1e-3
    assert hospital.privacy.per_instance.guarantee == "bound"
    assert head.requirements("langevin").met, str(head.requirements("langevin"))
    table = head.options(["patient-017"], epsilon=1.0, delta=delta)
    assert table.best is not None
    assert table.best.method == "langevin"
    features = hospital.data.features[17].clone()
    head.submit(["patient-017"], request_id="case-1")
    served = head.serve(epsilon=1.0, delta=delta, method="langevin")
    report = served.verify(model=head.module, ids=["patient-017"])
    assert report.holds, str(report)
    assert report.covers
    assert served[0].result is not None
    assert served[0].result["epsilon"] <= 1.0
    assert served[0].result["steps"] == table.best.steps  # the table is the plan
    # What the features keep of the patient is gone, in memory and in the file.
    assert features.abs().sum() > 0.0
    assert not hospital.data.features[17].any()
    assert hospital.data.erased.nonzero()[0].tolist() == [17]


def test_the_proof_is_about_this_model_and_this_patient_only(hospital: Hospital) -> None:
    head = hospital.head
    head.submit(["patient-100"], request_id="case-2")
    served = head.serve(epsilon=1.0, delta=1e-3, method="langevin")
    assert not served.verify(model=OneVsRest(31, 2), ids=["patient-100"]).holds
    with pytest.raises(CertificateError, match="nobody asked"):
        served.verify(ids=["patient-101"])
    report = served.verify(model=head.module, ids=["patient-100", "patient-101"])
    assert report.holds
    assert not report.covers
    # Both requests are in one chain, counted together, and both rows are out of the ledger.
    gone = np.flatnonzero(hospital.privacy.per_instance.forgotten)
    assert 100 in gone
    everyone = np.array([f"patient-{k:03}" for k in range(len(hospital.data))])
    assert set(everyone[gone]) <= {"patient-017", "patient-100"}
