"""Observer: shows a run's model to whoever watches, as a copy that cannot move the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from .twin import twin_of


class Observer:
    """Calls the caller's functions with a copy of a module, refreshed in place before each call.

    What they do to the copy, to its modes and to torch's global generators stays without effect.

    Args:
        module: The model of the run, plain.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._twin: nn.Module | None = None

    def call(self, look: Callable[[int, nn.Module], Any], step: int) -> Any:
        """Return look(step, copy in evaluation mode)."""
        device = next(self._module.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            twin = self._refreshed()
            twin.eval()
            return look(step, twin)

    @torch.no_grad()
    def _refreshed(self) -> nn.Module:
        mine = [*self._module.parameters(), *self._module.buffers()]
        twin = self._twin
        theirs = [] if twin is None else [*twin.parameters(), *twin.buffers()]
        if twin is None or list(map(_form, mine)) != list(map(_form, theirs)):
            self._twin = twin = twin_of(self._module)  # first, or somebody has rebuilt it
        else:
            for here, there in zip(mine, theirs, strict=True):
                there.copy_(here)
                there.grad = None
        return twin


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
