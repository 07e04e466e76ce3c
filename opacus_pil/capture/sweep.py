"""A full pass: the gradient norm and loss of every instance at the current parameters.

Works on a copy: the training module, its gradients and hooks, and every random generator are left
as they were, so that training with and without sweeps stays bit-identical.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.grad_sample.embedding_norm_sample import compute_embedding_norm_sample
from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
from torch import nn
from torch.utils.data import default_collate

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..errors import UnsupportedError
from .collate import keeps_order, order_of_rows
from .randomness import untouched_generators
from .row_losses import LossOf, moved_to, pair_loss
from .unhooked import measurable_copy


@dataclass(frozen=True)
class Sweep:
    """What a full pass found.

    Attributes:
        indices: Shape (n,), rows of the data set.
        norms: Shape (n,), unclipped norm of each instance's own gradient; with `layer_bounds` that
            of what is left of it.
        losses: Shape (n,), each instance's own loss.
        outputs: Shape (n, ...), model outputs, if asked for.
        deterministic: Neither model nor data set touched a global random generator. With dropout
            modules set aside this says that the norms do not depend on a draw.
        whole: Shape (n,), unclipped norms in any case.

    Privacy: all of it depends on private data and is not private to release.
    """

    indices: IntArray
    norms: FloatArray
    losses: FloatArray
    outputs: npt.NDArray[Any] | None
    deterministic: bool
    whole: FloatArray


def sweep(
    module: nn.Module,
    dataset: Any,
    *,
    criterion: Callable[..., torch.Tensor] | None = None,
    loss_of: LossOf | None = None,
    indices: npt.ArrayLike | None = None,
    loss_reduction: str = "mean",
    batch_first: bool = True,
    chunk_size: int = 256,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    parameters: Collection[str] | None = None,
    layer_bounds: Mapping[str, float] | None = None,
    keep_outputs: bool = False,
    infinite: bool = False,
) -> Sweep:
    """Measure every instance's gradient norm and loss at the module's current parameters.

    Guarantee: norms[i] is the norm of the gradient of instance indices[i]'s own loss, as Opacus
        clips it (a mean over the batch is undone), with dropout modules switched off, modules that
        hold trained parameters in training mode and all others in their own; exact up to rounding
        in the module's dtype.

    Args:
        module: Plain or wrapped by Opacus; its inner module is copied.
        dataset: Map-style; of pairs (input, target) unless `loss_of` is given.
        criterion: Loss of (outputs, targets). With a `reduction` attribute it is asked for one loss
            per instance; a function of none is called on each instance by itself.
        loss_of: In its place: loss_of(module, batch) -> one loss per row, shape (rows,).
        indices: Shape (n,), rows to measure. Default: all.
        loss_reduction: "mean" or "sum": how a loss with several terms per instance (pixels,
            tokens) joins them when the criterion does not say so itself.
        batch_first: As in Opacus: False if the batch is the inputs' second dimension.
        chunk_size: Instances per forward pass; bounds the memory.
        collate_fn: Joins items to a batch. Default: torch's default_collate. One that moves rows,
            as by sorting them, is asked for each row alone.
        parameters: Names of the parameters that count. Default: all that require a gradient.
        layer_bounds: Clip bound of each parameter by name, where layers are clipped one by one: of
            each layer's norm what is left of it counts. Default: norms are unclipped.
        keep_outputs: Also return the model's outputs.
        infinite: Return a norm that is not finite as inf instead of raising.

    Raises:
        ValueError: A norm or loss is not finite; names the first row.
        UnsupportedError: A module that mixes instances (BatchNorm that trains or updates), a batch
            that is not a pair, or a loss that is not one value per instance.

    Edge cases: no indices give arrays of length 0.
    """
    size = len(dataset)
    chosen = np.arange(size) if indices is None else indices
    rows = check.index_array("indices", chosen, size=size, unique=False)
    check.choice("loss_reduction", loss_reduction, ("mean", "sum"))
    check.integer("chunk_size", chunk_size, low=1)
    if loss_of is None:
        if criterion is None:
            raise ValueError("Expected criterion or loss_of, got neither. Pass the training's own.")
        loss_of = pair_loss(criterion, reduction=loss_reduction)
    plain = measurable_copy(module)
    _count_only(plain, parameters)
    join = default_collate if collate_fn is None else collate_fn
    dimension = 0 if batch_first else 1
    device = next(plain.parameters()).device
    with untouched_generators(device) as moved:
        measure = _Measure(plain, loss_of, batch_first=batch_first, layer_bounds=layer_bounds)
        parts = []
        for start in range(0, len(rows), chunk_size):
            items = [dataset[int(row)] for row in rows[start : start + chunk_size]]
            for batch, order in _batches(join, items, dimension=dimension):
                found = measure(moved_to(batch, device), len(order))
                parts.append(tuple(part[order] for part in found))
        deterministic = not moved()
    norms, losses, whole = (
        np.concatenate([part[k] for part in parts]) if parts else np.empty(0) for k in (0, 1, 3)
    )
    if infinite:
        norms = np.where(np.isfinite(norms), norms, np.inf)
    else:
        for name, values in (("norms", norms), ("losses", losses)):
            _require_finite(name, values, rows)
    outputs = np.concatenate([part[2] for part in parts]) if parts and keep_outputs else None
    return Sweep(rows, norms, losses, outputs, deterministic, whole)


def _batches(join: Any, items: list[Any], *, dimension: int) -> Iterator[tuple[Any, IntArray]]:
    """Join items to one batch, or to one each where the batch does not show which row is whose.

    Yields:
        A batch, and the position in it of each of its items.
    """
    if keeps_order(join):
        yield join(items), np.arange(len(items))
        return
    single = [join([copy.copy(item)]) for item in items]  # a collate function may take items apart
    batch = join([copy.copy(item) for item in items])
    order, _ = order_of_rows(batch, single, dimension=dimension)
    if order is not None:
        yield batch, np.argsort(order)
        return
    for one in single:
        yield one, np.zeros(1, dtype=np.int64)


def _linear_norms(
    layer: nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Norms of a linear layer's per-sample gradients, without forming them where that is exact.

    For sequences ghost clipping sums Gram matrices, which cancels: in float32 the norm of a small
    sum of large terms comes out too small. There the gradients are formed.
    """
    if backprops.ndim == 2:
        return compute_linear_norm_sample(layer, activations, backprops)
    gradients = compute_linear_grad_sample(layer, activations, backprops)
    return {p: g.flatten(start_dim=1).norm(2, dim=1) for p, g in gradients.items()}


def _embedding_norms(
    layer: nn.Embedding, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Opacus's, for a batch that is the inputs' second dimension too: it takes views of them."""
    words = [words.contiguous() for words in activations]
    return compute_embedding_norm_sample(layer, words, backprops.contiguous())


class _Norms(GradSampleModuleFastGradientClipping):
    """Opacus's ghost clipping with norms that are exact for sequences too."""

    NORM_SAMPLERS = {  # noqa: RUF012, as in Opacus
        **GradSampleModuleFastGradientClipping.NORM_SAMPLERS,
        nn.Linear: _linear_norms,
        nn.Embedding: _embedding_norms,
    }


_Found = tuple[FloatArray, FloatArray, npt.NDArray[Any], FloatArray]  # `_Measure` of one chunk


class _Measure:
    """Norms, losses and outputs of one chunk, by ghost clipping where the model allows it."""

    def __init__(
        self,
        module: nn.Module,
        loss_of: LossOf,
        *,
        batch_first: bool,
        layer_bounds: Mapping[str, float] | None,
    ) -> None:
        self._bounds = layer_bounds
        self._module = module
        self._loss_of = loss_of
        self._batch_first = batch_first
        self._wrapped = self._wrap(ghost=True)

    def _wrap(self, *, ghost: bool) -> Any:
        # "sum": the losses below are already one per instance.
        try:
            return _Norms(
                self._module, batch_first=self._batch_first, loss_reduction="sum",
                use_ghost_clipping=ghost,
            )  # fmt: skip
        except NotImplementedError as error:
            raise UnsupportedError(
                f"Expected a module with per-sample gradients, got {type(self._module).__name__}: "
                f"{error}"
            ) from error

    def __call__(self, batch: Any, size: int) -> _Found:
        try:
            return self._run(batch, size)
        except NotImplementedError:  # tied parameters, or a layer without ghost norms
            self._wrapped.to_standard_module()
            self._module = measurable_copy(self._module)
            self._wrapped = self._wrap(ghost=False)
        try:
            return self._run(batch, size)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"Expected per-sample gradients of every parameter, got none: {error}"
            ) from error

    def _run(self, batch: Any, size: int) -> _Found:
        counted = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        for parameter in counted.values():
            parameter._norm_sample = None  # type: ignore[attr-defined]  # none may be left over
        seen = _LastOutput(self._wrapped)
        with torch.enable_grad():
            losses = self._loss_of(seen, batch)
            if losses.shape != (size,):
                raise UnsupportedError(
                    f"Expected one loss per row, shape ({size},), got shape "
                    f"{tuple(losses.shape)}. Let loss_of return them unreduced."
                )
            losses.sum().backward()
        unused = [n for n, p in counted.items() if p._norm_sample is None]  # type: ignore[attr-defined]
        if unused:
            raise NotImplementedError(f"parameter {unused[0]} took no part in the loss")
        whole = _float64(self._wrapped.get_norm_sample())
        if self._bounds is not None:
            for name, parameter in counted.items():
                layer: Any = parameter
                layer._norm_sample = layer._norm_sample.clamp(max=self._bounds[name])
        norms = self._wrapped.get_norm_sample()
        for parameter in self._module.parameters():
            parameter.grad = None
        check.same_length("norms", _float64(norms), "instances", size)
        return _float64(norms), _float64(losses), seen.array(size), whole


class _LastOutput:
    """A module as `loss_of` sees it, keeping what it answered last."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._output: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._output = self._module(*arguments, **named)
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def array(self, size: int) -> npt.NDArray[Any]:
        """The output as an array; of a record with logits (transformers) these."""
        output = getattr(self._output, "logits", self._output)
        if not torch.is_tensor(output):
            return np.empty(size)
        coarse = output.dtype is torch.bfloat16  # which numpy does not have
        return (output.float() if coarse else output).detach().cpu().numpy()


def _float64(values: torch.Tensor) -> FloatArray:
    return values.detach().double().cpu().numpy()


def _count_only(module: nn.Module, parameters: Collection[str] | None) -> None:
    """Leave gradients only to the parameters named."""
    if parameters is None:
        return
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in parameters)


def _require_finite(name: str, values: FloatArray, rows: IntArray) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"Expected finite {name}, got {len(bad)} of {len(values)} not finite (first: row "
            f"{int(rows[bad[0]])}). Check its loss."
        )
