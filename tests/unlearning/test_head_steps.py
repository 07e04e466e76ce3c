"""A head's steps in closed form, which `suggest` and a benchmark take, are those of training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from opacus_pil.unlearning.suggest import _descended
from tests.heads.models import CLASSES, Heads, bounded
from tests.unlearning.head_runs import CAPS

_PATH = Path(__file__).parents[2] / "benchmarks" / "certified_heads.py"
_SPEC = importlib.util.spec_from_file_location("certified_heads", _PATH)
benchmark = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = benchmark  # its dataclasses look their module up
_SPEC.loader.exec_module(benchmark)

DECAY, STEPS = 0.01, 5
SETTING = benchmark.Setting(noise_std=0.0, weight_decay=DECAY, steps=STEPS)


def suggested() -> torch.Tensor:
    return _descended(
        bounded().tensors, CLASSES, eta=benchmark.STEP_SIZE, decay=DECAY, steps=STEPS, caps=CAPS
    )


def measured(**changes) -> torch.Tensor:
    data = benchmark._Part(*bounded().tensors)
    return benchmark.descend(data, SETTING, **{"steps": STEPS, "caps": CAPS, **changes})


@pytest.fixture(autouse=True)
def _classes(monkeypatch):
    monkeypatch.setattr(benchmark, "CLASSES", CLASSES)


@pytest.mark.filterwarnings("ignore:Per-instance losses")
@pytest.mark.parametrize("closed_form", [suggested, measured])
def test_steps_without_noise_are_those_that_training_takes_with_caps(closed_form):
    made = Heads(caps=CAPS, noise=0.0, rate=benchmark.STEP_SIZE, decay=DECAY).run(STEPS)
    trained = made.weights.reshape(CLASSES, -1).double()
    torch.testing.assert_close(closed_form(), trained, rtol=0.0, atol=1e-5)  # it is float32
    assert (trained - measured(caps=None)).abs().max() > 0.01  # caps bind


def test_steps_go_on_from_where_a_run_stands():
    whole = measured(start=measured(steps=2), steps=STEPS - 2)
    torch.testing.assert_close(whole, suggested(), rtol=0.0, atol=1e-12)  # roundings of float64
