"""Features of bounded norm by construction: whatever goes in, whatever the precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opacus_pil.heads import BoundedFeatures

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 200_000])  # float32 norms of the last err by 1e-6
@pytest.mark.parametrize("radius", [1.0, 0.3, 40.0])
def test_no_vector_is_longer_than_the_radius(dtype, width, radius):
    generator = torch.Generator().manual_seed(width)
    scales = torch.logspace(-6, 4, 12)[:, None] * radius
    inputs = (torch.randn(12, width, generator=generator) * scales).to(dtype)
    norms = BoundedFeatures(width, radius=radius)(inputs).double().norm(dim=1)
    assert float(norms.max()) <= radius
    # The bound is used up where the input is long: it is not met by shrinking everything.
    assert float(norms.max()) >= radius * (1.0 - 8.0 * torch.finfo(dtype).eps - 1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e38, 3e38, torch.inf, -torch.inf, torch.nan])
def test_extreme_inputs_give_finite_vectors_within_the_radius(value):
    inputs = torch.full((2, 5), value)
    inputs[1, 1:] = 1.0
    found = BoundedFeatures(5)(inputs)
    assert bool(torch.isfinite(found).all())
    assert float(found.double().norm(dim=1).max()) <= 1.0


def test_short_vectors_are_left_and_long_ones_keep_their_direction():
    short = torch.tensor([[0.1, -0.2, 0.3]])
    layer = BoundedFeatures(3)
    found = layer(torch.cat([short, 1000.0 * short]))
    assert torch.equal(found[0, :3], short[0])
    torch.testing.assert_close(
        found[1, :3] / found[1, :3].norm(), short[0] / short.norm(), rtol=1e-6, atol=0.0
    )


def test_the_last_feature_is_one_positive_constant_so_that_a_bias_is_a_weight():
    found = BoundedFeatures(3, radius=2.0)(torch.randn(9, 3))
    assert found.shape == (9, BoundedFeatures(3).out_features)
    assert len(set(found[:, 3].tolist())) == 1
    assert float(found[0, 3]) == pytest.approx(2.0**0.5, rel=1e-5)  # radius/√2, less the room


def test_a_finite_vector_keeps_its_direction_however_long_it_is():
    """Its norm is above the largest float32."""
    found = BoundedFeatures(5)(torch.full((1, 5), 3e38))
    assert float(found[0, 0]) == pytest.approx((0.5 / 5) ** 0.5, rel=1e-5)


def test_a_row_does_not_depend_on_its_neighbours():
    inputs = torch.randn(6, 4) * 3.0
    layer = BoundedFeatures(4)
    other = inputs.clone()
    other[1:] = torch.inf
    assert torch.equal(layer(inputs)[0], layer(other)[0])


def test_it_has_nothing_to_train_and_prints_every_digit_of_its_radius():
    one, other = BoundedFeatures(4, radius=1.0), BoundedFeatures(4, radius=1.0 + 1e-9)
    assert not list(one.parameters())
    assert not list(one.buffers())
    assert repr(one) != repr(other)  # features that are kept are known by it


def test_images_are_flattened_and_other_lengths_refused():
    assert BoundedFeatures(12)(torch.zeros(2, 3, 4)).shape == (2, 13)
    with pytest.raises(ValueError, match="12 features, got 8"):
        nn.Sequential(BoundedFeatures(12))(torch.zeros(2, 8))


@pytest.mark.parametrize("arguments", [{"features": 0}, {"features": 2, "radius": 0.0}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"Expected (features|radius)"):
        BoundedFeatures(**arguments)
