"""Scalars in a real TensorBoard log, read back by TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.integrations.tensorboard import log_privacy

DELTA = 1e-2


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    log = EventAccumulator(str(folder))
    log.Reload()
    return {
        name: [(event.step, event.value) for event in log.Scalars(name)]
        for name in log.Tags()["scalars"]
    }


@pytest.mark.parametrize("quantiles", [False, True])
def test_a_loop_of_ones_own_logs_what_the_engine_says(quantiles: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, criterion = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
    data = TensorDataset(torch.randn(40, 3), torch.randint(2, (40,)))
    engine = PerInstancePrivacyEngine(norm_policy="full")
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=10), noise_multiplier=1.0, max_grad_norm=1.0,
        criterion=criterion,
    )  # fmt: skip
    expected: dict[str, list[tuple[int, float]]] = {}
    with SummaryWriter(str(tmp_path)) as writer:
        for step, (x, y) in enumerate(loader, start=1):
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
            log_privacy(writer, engine, step=step, delta=DELTA, quantiles=quantiles)
            said = {"epsilon": engine.get_epsilon(DELTA)}
            if quantiles:
                said["per_instance_epsilon_most"] = float(
                    engine.get_per_instance_epsilon(DELTA).epsilon.max()
                )
            for name, value in said.items():
                expected.setdefault(f"privacy/{name}", []).append((step, value))
    found = scalars(tmp_path)
    assert (len(found) == 1) is not quantiles  # nothing private unless asked for
    for name, points in expected.items():
        # A log holds float32.
        assert found[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


def test_what_is_no_writer_is_refused(tmp_path: Path) -> None:
    engine = PerInstancePrivacyEngine()
    with pytest.raises(TypeError, match="Expected writer to have add_scalar, got str"):
        log_privacy(str(tmp_path), engine, step=1, delta=DELTA)
