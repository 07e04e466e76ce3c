"""What ghost clipping does inside `loss.backward()`: norms, factors, and whose gradients they clip.

Opacus's module computes a factor per row, multiplies the losses by them and lets autograd sum. Here
each of these is seen as it happens. Knows Opacus's ghost module; no loader and no accountant.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
from torch import nn

from .clipping import clip_factors
from .recorder import Recorder, written

# Float32 Gram matrices of a sequence lose the norm of a small sum of large terms. The rounding
# error of the squared norm is about eps · Σ ‖activation‖²‖backprop‖² over the sequence; where
# sixteen times that exceeds a ten-thousandth of the square, the gradient itself is formed.
_ROUNDINGS, _TOLERANCE = 16.0, 1e-4
# What is left of it, as a rounding of which charges are raised by sixteen.
SEQUENCE_ROUNDING = _TOLERANCE / 16.0


class GhostSeam:
    """Sits in a ghost module's clipping and tells a recorder what it did.

    The module's weights, factors and gradients stay Opacus's, bit for bit, except that rows have
    their own caps if the recorder has any, and that norms of sequences are computed again where
    float32 has lost them.
    """

    def __init__(self, module: Any, recorder: Recorder) -> None:
        self._module: Any = weakref.ref(module)
        self._recorder = recorder
        self._norms: torch.Tensor | None = None  # of the last private backward pass, uncommitted
        self._bound = 0.0
        self._rounding = 0.0
        self._sequences = False
        self._clipped: frozenset[int] = frozenset()
        self._gradients: dict[int, tuple[int, int]] | None = None
        module.get_clipping_coef = _Method(self, "factors")
        module.enable_hooks = _Method(self, "after_backward")
        module.NORM_SAMPLERS = {**module.NORM_SAMPLERS, nn.Linear: _LinearNorms(self)}

    def factors(self) -> torch.Tensor:
        """Return each row's clip factor in place of the module's own."""
        module = self._module()
        norms = module.get_norm_sample()
        layers = [p._norm_sample for p in module.trainable_parameters]
        self._norms, self._bound = norms.detach(), float(module.max_grad_norm)
        self._rounding = max(torch.finfo(norm.dtype).eps for norm in [norms, *layers])
        if self._sequences:
            self._rounding = max(self._rounding, SEQUENCE_ROUNDING)
        self._clipped = frozenset(id(p) for p in module.trainable_parameters)
        self._gradients = None
        caps = None
        if self._recorder.caps is not None:  # each row's own, which must be known by now
            caps = self._capture()
        plain = clip_factors(norms, max_grad_norm=module.max_grad_norm, caps=caps)
        made = plain.as_subclass(ClipFactors)
        made.recorder = self._recorder
        return made

    def after_backward(self) -> None:
        """Switch hooks on again, which Opacus does right after the clipped backward pass."""
        module = self._module()
        type(module).enable_hooks(module)
        if self._norms is not None and self._gradients is None:
            self._gradients = {
                id(p): written(p.grad)
                for p in module._module.parameters()
                if p.grad is not None
            }  # fmt: skip

    def commit(self, parameters: Sequence[Any]) -> None:
        """Say that a step uses the gradients as they are now."""
        recorder, noted = self._recorder, self._gradients
        if self._norms is None:
            recorder.note("gradient_not_clipped", "no clipped backward pass came before the step")
        else:
            if recorder.caps is None:
                self._capture()
            touched = [
                p for p in parameters
                if noted is None or p.grad is None or noted.get(id(p)) != written(p.grad)
            ]  # fmt: skip
            if touched:
                recorder.note("gradient_changed")
        unclipped = [p for p in parameters if id(p) not in self._clipped]
        if unclipped and self._clipped:
            recorder.note("not_clipped", f"{len(unclipped)} of {len(parameters)} tensors")
        self._norms, self._gradients = None, None

    def note_sequences(self) -> None:
        """Say that norms of a linear layer were those of sequences."""
        self._sequences = True

    def _capture(self) -> torch.Tensor | None:
        assert self._norms is not None
        return self._recorder.capture(
            self._norms, max_grad_norm=self._bound, rounding=self._rounding, droppable=False
        )


class _Method:
    """A method of a seam, hung on one module; a copy of the module gets Opacus's own back."""

    def __init__(self, seam: GhostSeam, name: str) -> None:
        self._seam, self._name = seam, name

    def __call__(self) -> Any:
        return getattr(self._seam, self._name)()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._seam._module()))
        return _opacus(copied, self._name) if copied is not None else self

    def __reduce__(self) -> Any:
        return _opacus, (self._seam._module(), self._name)


class _LinearNorms:
    """`linear_norms`, telling one module's seam of sequences; a copy of the module tells nobody."""

    def __init__(self, seam: GhostSeam) -> None:
        self._seam = seam

    def __call__(
        self, layer: nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor
    ) -> dict[nn.Parameter, torch.Tensor]:
        if backprops.ndim == 3:
            self._seam.note_sequences()
        return linear_norms(layer, activations, backprops)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return linear_norms

    def __reduce__(self) -> Any:
        return _untold, ()


def _untold() -> Any:
    return linear_norms


_ORIGINAL = {"factors": "get_clipping_coef", "after_backward": "enable_hooks"}


def _opacus(module: Any, name: str) -> Any:
    return types.MethodType(getattr(type(module), _ORIGINAL[name]), module)


class ClipFactors(torch.Tensor):
    """Factors, one per row, that notice what they are multiplied with.

    Opacus multiplies them with the losses. Losses of shape (rows, 1) would broadcast to all pairs
    of rows, and nothing would be clipped.
    """

    recorder: Recorder

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute as plain tensors do, looking at the shapes of a product."""
        owner = next((a for a in args if isinstance(a, ClipFactors)), None)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        plain = found.as_subclass(torch.Tensor) if isinstance(found, ClipFactors) else found
        if owner is None or not isinstance(plain, torch.Tensor):
            return plain
        recorder = getattr(owner, "recorder", None)
        if recorder is None:
            return plain
        if func in (torch.Tensor.to, torch.Tensor.detach):
            kept = plain.as_subclass(ClipFactors)
            kept.recorder = recorder
            return kept
        if func in (torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul):
            shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            if any(shape != tuple(owner.shape) for shape in shapes):
                other = next(shape for shape in shapes if shape != tuple(owner.shape))
                sizes = ["rows" if size == len(owner) else str(size) for size in other]
                recorder.note("loss_not_per_row", f"({', '.join(sizes)})")
        return plain


def linear_norms(
    layer: nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Norms of a linear layer's per-sample gradients: Opacus's, or formed where float32 fails.

    Args:
        layer: The layer.
        activations: Its input, shape (rows, [sequence,] in).
        backprops: Gradients of its output, shape (rows, [sequence,] out).
    """
    found: dict[nn.Parameter, torch.Tensor] = compute_linear_norm_sample(
        layer, activations, backprops
    )
    if backprops.ndim != 3 or not len(backprops):
        return found
    inputs = activations[0].to(backprops.dtype)
    squares = backprops.square().sum(dim=2)
    terms = {layer.weight: (inputs.square().sum(dim=2) * squares).sum(dim=1)}
    if layer.bias is not None:
        terms[layer.bias] = squares.sum(dim=1)
    share = _ROUNDINGS * torch.finfo(backprops.dtype).eps / _TOLERANCE
    lost = {p: ~(norm.square() >= share * terms[p]) for p, norm in found.items()}
    if bool(torch.stack([rows.any() for rows in lost.values()]).any()):
        formed = compute_linear_grad_sample(layer, activations, backprops)
        for p, rows in lost.items():
            exact = formed[p].flatten(start_dim=1).norm(2, dim=1)
            found[p] = torch.where(rows, exact, found[p])
    return found
