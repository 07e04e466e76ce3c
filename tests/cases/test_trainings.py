"""The truth that the cases are held against, and that honest trainings keep their strong labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pil.accounting import sampled_gaussian_rdp
from tests.cases.trainings import (
    CLIP,
    MODES,
    NOISE,
    ORDERS,
    SIZE,
    answer,
    gaussian_rdp,
    linear,
    plain_loop,
    points,
    shifts,
)  # fmt: skip

BEST = {"worst_case": "bound", "capped": "bound", "budget": "bound", "full": "output_specific",
        "participation": "output_specific"}  # fmt: skip


def test_the_measured_shift_is_the_clipped_gradient_of_the_row():
    """Against autograd, row by row: the harness needs no belief in the package."""
    data = points()
    torch.manual_seed(3)
    module = linear()  # as in `train`
    for row in (0, 1, 7):
        inputs, target = data[row]
        loss = nn.functional.cross_entropy(module(inputs[None]), target[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, module.parameters())])
        clipped = min(float(gradient.norm()), CLIP)
        assert shifts(plain_loop, row=row) == pytest.approx(clipped / (NOISE * CLIP), rel=1e-4)


def test_the_measured_divergence_is_the_gaussian_mechanism_s():
    (shift,) = shifts(plain_loop, row=0)  # clipped: one bound
    exact = sampled_gaussian_rdp(
        np.array(1.0), noise_multiplier=NOISE, sample_rate=1.0, orders=ORDERS
    )
    np.testing.assert_allclose(gaussian_rdp([shift]), exact, rtol=1e-4)  # float32 sums of 24


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", list(BEST))
def test_a_loop_as_everybody_writes_it_keeps_its_label(policy, mode):
    caps = np.where(np.arange(SIZE) % 2, 1.0, 0.3) if policy == "capped" else None
    for row in (0, 1, 7):
        found = answer(plain_loop, row=row, policy=policy, mode=mode, caps=caps)
        assert found.label == BEST[policy]
        assert found.honest
        # One level of 256 on three decades is 2.7 %, squared; the worst case is above by itself.
        if policy != "worst_case" and policy != "budget":
            top = 1.06 if policy != "capped" or caps[row] < 0.5 or row == 0 else np.inf
            assert (found.claimed <= found.truth * top).all()
