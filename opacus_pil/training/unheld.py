"""Unheld: tensors of a module that the private optimizer does not hold, and that must stay still.

Knows versions of tensors; no values and no noise.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer


class Unheld:
    """Notices, by their versions, whether buffers of a module change, and parameters that train
    and that an optimizer does not hold.
    """

    def __init__(self, module: torch.nn.Module, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._places = [
            (f"{name}.{own}".lstrip("."), tensors, own)
            for name, part in module.named_modules()
            for tensors in (part._buffers, part._parameters)
            for own, tensor in tensors.items()
            if id(tensor) not in held
        ]
        self._seen = self._versions()

    def changed(self) -> str:
        """Return the name of one that has changed since it was asked last; "": none."""
        before, self._seen = self._seen, self._versions()
        changed = (name for name, v in self._seen.items() if before.get(name, v) != v)
        return next(changed, "")

    def _versions(self) -> dict[str, tuple[int, int]]:
        found = ((name, tensors.get(own)) for name, tensors, own in self._places)
        return {
            name: (t.data_ptr(), t._version)
            for name, t in found
            if t is not None and (t.requires_grad or not isinstance(t, torch.nn.Parameter))
        }
