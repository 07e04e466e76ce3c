"""A second pass of an optimizer's own step, over rows that are nobody's: canaries.

The real tensors are stood in for by one entry each, whose rows are zero, in their order and number;
behind them comes one more tensor, the canaries'. What runs is the optimizer's own `pre_step`: its
clip, its noise, its scaling, whatever somebody made of them. Afterwards everything is as before,
generators included. Knows rows and entries; no coins and no scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer

from ..errors import UnsupportedError
from .seams import Listener, Seams, is_ghost

_MOST_ROWS = 2**24  # numbers in the canaries' per-sample gradients of one step


class _Silent:
    """In the place of a recorder of this package: a shadow step is nobody's step."""

    caps = None
    guarded = False
    noised = False

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Take nothing down, and cap nothing."""

    def __getattr__(self, name: str) -> Any:
        """Take whatever else a recorder may be told."""
        return self.capture

    def untouched(self) -> bool:
        """Stand-ins belong to nobody who could write to them."""
        return True

    @property
    def noise_seen(self) -> _Silent:
        """Remember no draw either."""
        return self

    def again(self, mark: int | None) -> bool:
        """Call no draw repeated."""
        return False


class ShadowStep(Listener):
    """Runs an optimizer's `pre_step` on canary rows.

    Args:
        seams: Of an optimizer of Opacus that clips per-sample gradients, flat or per layer.
        entries: Length of the appended tensor.
        generator: Of the canaries' noise; None: the optimizer's own, so that a stream that repeats
            is seen here too, and the training draws other numbers than without canaries.

    Raises:
        UnsupportedError: Another kind of optimizer.
    """

    def __init__(self, seams: Seams, *, entries: int, generator: torch.Generator | None) -> None:
        optimizer = seams.optimizer
        require_per_sample(optimizer)
        self._seams = seams
        self._generator = generator
        first = optimizer.params[0]
        self._canaries: Any = torch.nn.Parameter(
            torch.zeros(entries, device=first.device, dtype=first.dtype)
        )
        self._stand_ins: dict[int, torch.nn.Parameter] = {}
        self._noised: torch.Tensor | None = None
        self._divisor: float | None = None
        seams.listeners.append(self)

    def run(self, *, rows: int, hit: torch.Tensor) -> torch.Tensor | None:
        """Make one shadow step and return the canaries' sum with noise, in units of the clip bound.

        Args:
            rows: Rows of the real step, which are zero here.
            hit: Shape (hits,), entries of the canaries drawn at this step: one row each.

        Returns:
            Shape (entries,), float64 on the CPU; None if there was no gradient to move by.
        """
        optimizer, canaries = self._seams.optimizer, self._canaries
        bound = float(optimizer.max_grad_norm)
        count = min(rows, max(_MOST_ROWS // len(canaries) - len(hit), 0))
        total = max(count + len(hit), 1)
        own = torch.zeros((total, len(canaries)), device=canaries.device, dtype=canaries.dtype)
        own[torch.arange(len(hit)), hit.to(own.device)] = max(3.0 * bound, 1.0)
        self._noised = self._divisor = None
        with self._exchanged(optimizer), torch.no_grad(), self._generators():
            for p in optimizer.params:
                p.grad = p.summed_grad = None
                p.grad_sample = torch.zeros((total, 1), device=p.device, dtype=p.dtype)
            canaries.grad_sample = own
            optimizer.pre_step()
        found = canaries.grad
        canaries.grad = canaries.summed_grad = canaries.grad_sample = None
        if found is None:
            return None
        divisor = self._divisor if self._divisor is not None else nominal_divisor(optimizer)
        return found.detach().to("cpu", torch.float64) * divisor / bound

    def shadow(self, stage: str, optimizer: Any) -> None:
        """Measure the divisor of the shadow step, which is not what canaries are about."""
        grad = self._canaries.grad
        if stage == "add_noise" and grad is not None:
            self._noised = grad.detach().clone()
        elif stage == "scale_grad" and grad is not None and self._noised is not None:
            below = float((grad.double() * self._noised.double()).sum())
            above = float((self._noised.double() ** 2).sum())
            self._divisor = above / below if below else None

    @contextmanager
    def _exchanged(self, optimizer: Any) -> Iterator[None]:
        """Let the optimizer see stand-ins and canaries, and nobody hear of it."""
        kept = dict(optimizer.__dict__)
        plain = optimizer.original_optimizer
        groups = plain.param_groups
        self._seams.paused = True
        try:
            plain.param_groups = [
                {**group, "params": [self._stand_in(p) for p in group["params"]]}
                for group in groups
            ]
            plain.param_groups.append({**groups[-1], "params": [self._canaries], "lr": 0.0})
            optimizer.step_hook = None
            optimizer._step_skip_queue = []
            if isinstance(optimizer, DPPerLayerOptimizer):
                # As one more layer whose bound is that of all: the noise of the others stays.
                optimizer.max_grad_norms = [
                    *optimizer.max_grad_norms,
                    float(optimizer.max_grad_norm),
                ]
            if hasattr(optimizer, "recorder"):
                optimizer.recorder = _Silent()
            if self._generator is not None and not optimizer.secure_mode:
                optimizer.generator = self._generator
            yield
        finally:
            plain.param_groups = groups
            optimizer.__dict__.clear()
            optimizer.__dict__.update(kept)
            self._seams.paused = False

    def _stand_in(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return one entry in the place of a tensor; what does not train stays itself."""
        if not parameter.requires_grad:
            return parameter
        key = id(parameter)
        if key not in self._stand_ins:
            self._stand_ins[key] = torch.nn.Parameter(
                torch.zeros(1, device=parameter.device, dtype=parameter.dtype)
            )
        return self._stand_ins[key]

    @contextmanager
    def _generators(self) -> Iterator[None]:
        """Keep torch's own streams where they are, unless they are shared on purpose."""
        if self._generator is None:
            yield
            return
        devices = [self._canaries.device] if self._canaries.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            yield


def require_per_sample(optimizer: Any) -> None:
    """Raise unless an optimizer clips per-sample gradients as canaries can follow.

    Raises:
        UnsupportedError: Ghost clipping, adaptive clipping, several processes.
    """
    if is_ghost(optimizer):
        raise UnsupportedError(
            "Expected per-sample gradients for gradient canaries, got ghost clipping "
            f"({type(optimizer).__name__}), which never forms them. Conformance measures noise, "
            "rate and steps there; or train once with grad_sample_mode='hooks'."
        )
    known = any(
        kind.__module__.startswith("opacus.optimizers")
        and kind in (DPOptimizer, DPPerLayerOptimizer)
        for kind in type(optimizer).__mro__
    )
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    if not known or names & {"AdaClipDPOptimizer"} or any("Distributed" in n for n in names):
        raise UnsupportedError(
            "Expected DPOptimizer or DPPerLayerOptimizer for gradient canaries, got "
            f"{type(optimizer).__name__}. Adaptive clipping and distributed training are not "
            "audited by canaries."
        )
    if not optimizer.params:
        raise UnsupportedError(
            "Expected an optimizer with trainable parameters, got none. Attach canaries after "
            "the model is ready to train."
        )


def nominal_divisor(optimizer: Any) -> float:
    """Return what the optimizer says that it divides sums by."""
    if optimizer.loss_reduction != "mean":
        return 1.0
    return float(optimizer.expected_batch_size)
