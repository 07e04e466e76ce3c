"""Tiny trials that the sweep tests run, here and in processes that are killed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch

from opacus_pil.evaluation.ensemble import run_trials


def tiny_trial(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fit a line by noisy descent; takes long enough to be hit by a kill."""
    x = torch.randn(20, generator=torch.Generator().manual_seed(config["seed"]))
    w = torch.zeros(())
    for _ in range(20):
        w = w - 0.1 * ((w - 2.0) * x.square()).mean() + 0.01 * torch.randn(())  # global generator
    time.sleep(0.01)
    return {"weights": {"w": w}, "metrics": {"loss": float((w - 2.0).square())}}


def configs(count: int) -> list[dict[str, Any]]:
    return [{"seed": seed, "forget_set": [seed, seed + 1]} for seed in range(count)]


def sweep_in_own_group(folder: str, count: int, n_jobs: int, started: Any) -> None:
    """Run the sweep as the leader of a process group, so that its workers die with it."""
    os.setsid()
    torch.set_num_threads(1)
    started.send(True)
    run_trials(tiny_trial, configs=configs(count), folder=folder, n_jobs=n_jobs, progress=False)
