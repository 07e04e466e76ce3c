"""How far each per-sample gradient is scaled down: Opacus's clips, with per-instance caps.

Knows norms, bounds and caps; not where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..errors import UnsupportedError


def checked_caps(caps: npt.ArrayLike, *, num_instances: int, outputs: int = 0) -> FloatArray:
    """Return caps as float64 over all instances, each in [0, 1], or raise.

    Args:
        caps: Shape (instances,), clipping bounds in units of max_grad_norm; with `outputs` also
            (instances, outputs), in units of each output's own.
        num_instances: Size of the training set.
        outputs: Layers that are clipped one by one, each with caps of its own; 0: none.

    Returns:
        Shape (instances,); with `outputs` (instances, outputs).
    """
    array = check.real_array(
        "caps", caps, low=0.0, high=1.0,
        cure="A cap is a clipping bound divided by max_grad_norm; 1 is Opacus's own clip.",
    ).copy()  # fmt: skip
    if not outputs:
        if array.ndim == 2:
            raise ValueError(
                f"Expected one cap per instance, got caps of shape {array.shape}. Caps per output "
                "are for opacus_pil.heads.OneVsRest with clipping='per_layer'."
            )
        check.same_length("caps", array, "instances", num_instances)
        return array
    if array.ndim == 1:
        array = array[:, None]
    if array.shape not in ((num_instances, 1), (num_instances, outputs)):
        raise ValueError(
            f"Expected caps of shape ({num_instances}, {outputs}), one per instance and output, "
            f"got caps of shape {np.shape(caps)}. caps_from_public_model gives them."
        )
    return np.broadcast_to(array, (num_instances, outputs)).copy()


def joint_caps(caps: FloatArray, bounds: Sequence[float]) -> FloatArray:
    """Return the most that each instance moves all outputs together by, in units of all bounds.

    Args:
        caps: Shape (instances, outputs), in units of each output's clip bound.
        bounds: Clip bound of each output.

    Returns:
        Shape (instances,), in [0, 1]: sqrt(Σ (cap_k C_k)²) / sqrt(Σ C_k²).

    >>> joint_caps(np.array([[1.0, 0.0]]), [3.0, 4.0])
    array([0.6])
    """
    weights = np.asarray(bounds, dtype=np.float64) / math.hypot(*bounds)
    joint: FloatArray = np.minimum(np.sqrt(np.square(caps * weights).sum(axis=1)), 1.0)
    return joint


@dataclass(frozen=True)
class LayerNorms:
    """Norms of each row's gradient in each layer, where layers are clipped one by one.

    Attributes:
        norms: Shape (batch, layers), unclipped.
        bounds: Clip bound of each layer; inf: it is not clipped.
    """

    norms: torch.Tensor
    bounds: tuple[float, ...]

    @property
    def left(self) -> torch.Tensor:
        """What Opacus's clip leaves, shape (batch, layers); what is not finite stays so."""
        limits = self.norms.new_tensor(self.bounds)
        return torch.where(torch.isfinite(self.norms), self.norms.minimum(limits), self.norms)

    def factors(self, caps: torch.Tensor | None) -> torch.Tensor:
        """What gradients are multiplied with, shape (batch, layers).

        Args:
            caps: Shape (batch, layers); None: Opacus's own clip.
        """
        columns = [
            clip_factors(self.norms[:, k], max_grad_norm=bound, caps=None if caps is None else
                         caps[:, k])
            for k, bound in enumerate(self.bounds)
        ]  # fmt: skip
        return torch.stack(columns, dim=1)

    def allowed(self, caps: torch.Tensor | None) -> torch.Tensor:
        """Most that the norm of each layer's clipped sum can be, shape (layers,)."""
        left = self.left
        if caps is not None:
            limits = caps * left.new_tensor(self.bounds)
            left = torch.where(caps > 0, left.minimum(limits), torch.zeros_like(left))
        return left.sum(dim=0)

    @property
    def largest(self) -> torch.Tensor:
        """The largest finite unclipped norm of any row in any layer, shape (1,)."""
        known = torch.where(torch.isfinite(self.norms), self.norms, torch.zeros_like(self.norms))
        return known.max().reshape(1) if known.numel() else known.new_zeros(1)


def clip_factors(
    norms: torch.Tensor, *, max_grad_norm: float, caps: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the factor of each per-sample gradient, shape (batch,).

    Guarantee: factor * norm <= cap * max_grad_norm, up to rounding in the dtype of `norms`.

    Args:
        norms: Shape (batch,), unclipped per-sample gradient norms.
        max_grad_norm: Opacus's clip bound, > 0.
        caps: Shape (batch,), in units of max_grad_norm; None and all ones are Opacus's clip, bit
            for bit.

    Edge cases (first match wins):
        cap = 0     0; drop such rows before multiplying, since 0 · NaN is NaN
        norm = 0    1

    >>> clip_factors(torch.tensor([2.0, 2.0]), max_grad_norm=1.0, caps=torch.tensor([1.0, 0.5]))
    tensor([0.5000, 0.2500])
    """
    factors = max_grad_norm / (norms + 1e-6)
    if caps is not None:
        factors = torch.where(caps > 0, factors * caps.to(factors), torch.zeros_like(factors))
    return factors.clamp(max=1.0)


def require_bounds(layers: LayerNorms | None, *, caps_for: tuple[float, ...]) -> None:
    """Raise where caps per layer would be held against other bounds than they are charged for.

    What an instance moves all layers together by, in units of all bounds, depends on each of them.

    Args:
        layers: As they are clipped now; None: together.
        caps_for: Clip bounds that caps are in units of; (): of whole gradients.

    Raises:
        UnsupportedError: Others.
    """
    found = () if layers is None else layers.bounds
    if found != caps_for:
        raise UnsupportedError(
            f"Expected clip bounds {list(caps_for)}, one per output, which caps were charged for, "
            f"got {list(found)}. Leave max_grad_norms, and which outputs train, as they were when "
            "the training was made private."
        )


def require_finite(norms: torch.Tensor, rows: IntArray, dropped: torch.Tensor) -> None:
    """Raise where a row that is not left out has a gradient that no cap bounds.

    Raises:
        UnsupportedError: Names the first.
    """
    bad = ~torch.isfinite(norms) & ~dropped
    if bool(bad.any()):
        first = int(rows[int(bad.nonzero()[0])])
        raise UnsupportedError(
            f"Expected finite per-sample gradient norms under caps, got {int(bad.sum())} of "
            f"{len(norms)} not finite (first: instance {first}). A non-finite gradient cannot be "
            "clipped; check its loss."
        )
