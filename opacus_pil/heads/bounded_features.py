"""BoundedFeatures: any features made vectors of bounded norm, with the bias as a feature.

Knows vectors; no model and no data.
"""

from __future__ import annotations

import torch
from torch import nn

from .. import _validate as check

_ROOM = 1e-6  # of the radius: for the rounding of each scaled entry in float32


class BoundedFeatures(nn.Module):
    """Scale each feature vector to a bounded norm, and append the constant that a bias needs.

    Guarantee: every row of the output has norm at most `radius`, whatever the input, so that a
        certificate needs no look at the data: x ↦ (x·s, r) with s = min(1, r/‖x‖) and
        r = radius/√2. A vector shorter than r is left as it is.

    Args:
        features: Length of the vectors.
        radius: Bound on the norm of the output, constant included; > 0.

    Shape: (batch, features), or anything that flattens to it, to (batch, features + 1).

    Raises:
        ValueError: features < 1, radius <= 0, or vectors of another length.

    Edge cases:
        a vector with inf or NaN   becomes zeros: it has no direction

    >>> BoundedFeatures(2, radius=1.0)(torch.tensor([[30.0, 40.0]])).norm().item() <= 1.0
    True
    """

    def __init__(self, features: int, radius: float = 1.0) -> None:
        super().__init__()
        self.features = check.integer("features", features, low=1)
        self.radius = check.real("radius", radius, low=0.0, open_low=True)

    @property
    def out_features(self) -> int:
        """Length of the output: one more, for the bias."""
        return self.features + 1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return bounded vectors; see the class."""
        vectors = inputs.flatten(1)
        if vectors.shape[1] != self.features:
            raise ValueError(
                f"Expected vectors of {self.features} features, got {vectors.shape[1]}. Build "
                "BoundedFeatures for the length that the frozen part gives."
            )
        room = max(_ROOM, 4.0 * torch.finfo(vectors.dtype).eps)
        half = self.radius * 0.5**0.5 * (1.0 - room)
        # In float64: float32 sums of many squares err by more than the room. MPS has none.
        precise = torch.float32 if vectors.device.type == "mps" else torch.float64
        norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=precise)
        scaled = (vectors * (half / norms.clamp(min=half))).to(vectors.dtype)
        scaled = torch.where(torch.isfinite(norms), scaled, torch.zeros_like(scaled))
        return torch.cat([scaled, scaled.new_full((len(scaled), 1), half)], dim=1)

    def extra_repr(self) -> str:
        """Return the arguments, for a printed model."""
        return f"features={self.features}, radius={self.radius!r}"
