"""WeightsLeft: what the parameters were when the last step of a training had moved them.

Certificates speak of the model that training left. Whoever edits weights afterwards has another
one, with the same ledger. Knows parameters and their bits; no ledger, and buffers not at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

_SMALL = 1 << 16  # elements: a tensor below it is copied, which costs less than a sum's calls
_REPLACED = -1  # in place of a sum: a parameter that came into the module after the last step
_BLOCK = 509  # prime, so that swapped rows of any usual width fall on other places


class WeightsLeft:
    """Remembers, at a fraction of a per cent of a step, what a step has left; waits for nobody.

    Guarantee: two modules whose sums differ have different weights. Equal sums mean equal weights,
        bit for bit, unless somebody searched for weights with the same sums.
    Small tensors are copied, of large ones a sum of the bit patterns is kept, each on its device;
    what the optimizer does not hold is summed once.

    Args:
        module: The plain module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = weakref.ref(module)
        self._held = -1  # number of tensors that the optimizer holds; -1: no step was seen
        self._small: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._large: list[torch.Tensor] = []
        self._sums: dict[int, torch.Tensor] = {}  # id of a parameter -> sum
        self._loaded: dict[str, int] | None = None

    def note(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Remember the parameters as they are now.

        Args:
            groups: Parameter groups of the optimizer that may have moved them since the last call.
                Where others take the place of some, the weights that are left are not known again.
        """
        if self._held != sum([len(group["params"]) for group in groups]):
            self._begin([p for group in groups for p in group["params"]])
        copies, originals = self._small
        with torch.no_grad():
            if originals:
                torch._foreach_copy_(copies, originals)
            for tensor in self._large:
                self._sums[id(tensor)] = block_sum(tensor)

    def are(self, module: nn.Module) -> bool | None:
        """Return whether a module has the weights that were left; None: nothing is known."""
        left = self.state()
        return None if left is None else left == sums_of(module)

    def state(self) -> dict[str, int] | None:
        """Return the sums by the parameters' names, as plain numbers; None: nothing is known."""
        module = self._module()
        if self._loaded is not None or module is None or self._held < 0:
            return None if self._loaded is None else dict(self._loaded)
        copied = {id(p): block_sum(copy) for copy, p in zip(*self._small, strict=True)}
        sums = {**self._sums, **copied}
        named = module.named_parameters()
        return {name: int(sums[id(p)]) if id(p) in sums else _REPLACED for name, p in named}

    def load(self, state: Mapping[str, int] | None) -> None:
        """Take over what an earlier process remembered; None: nothing is known."""
        self._held = -1
        self._loaded = None if state is None else {str(k): int(v) for k, v in state.items()}

    def _begin(self, held: list[torch.Tensor]) -> None:
        """Sort the parameters: copied at each step, summed at each step, summed now."""
        module = self._module()
        own = {} if module is None else {id(p): p for p in module.parameters()}
        moved = {id(p): p for p in held if id(p) in own}
        copied = [p for p in moved.values() if p.numel() < _SMALL]
        self._small = ([p.detach().clone() for p in copied], copied)
        self._large = [p for p in moved.values() if p.numel() >= _SMALL]
        self._sums = {key: block_sum(p) for key, p in own.items() if key not in moved}
        self._loaded, self._held = None, len(held)


class NoteWeights:
    """Called after each step of a plain optimizer; a copy of the optimizer does not report.

    Args:
        weights: Told of the step, and not kept alive.
    """

    def __init__(self, weights: WeightsLeft | None) -> None:
        self._weights: Any = _nobody if weights is None else weakref.ref(weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoteWeights:
        """Copy without the training: a copy reports to nobody."""
        return NoteWeights(None)

    def __reduce__(self) -> Any:
        """Pickle likewise."""
        return NoteWeights, (None,)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Look at the parameters that the step has moved."""
        weights = self._weights()
        if weights is not None:
            weights.note(optimizer.param_groups)


def sums_of(module: nn.Module) -> dict[str, int]:
    """Return the sum of each parameter's bits by its name."""
    return {name: int(block_sum(p)) for name, p in module.named_parameters()}


def block_sum(values: torch.Tensor) -> torch.Tensor:
    """Return a sum of the bit patterns that depends on their places, without waiting for a device.

    Integers modulo 2^64, each multiplied by an odd number of its own place within a block: one
    changed value changes the sum, and so do values that were swapped. The order of summation does
    not matter, so that every device finds the same.
    """
    whole = values.detach().contiguous().reshape(-1)
    if whole.storage_offset() * whole.element_size() % 8:  # a part of somebody's flat buffer
        whole = whole.clone()
    bits = whole.view(torch.uint8)
    size = bits.numel() // 8 * 8
    words, rest = bits[:size].view(torch.int64), bits[size:].to(torch.int64)
    blocks = words.numel() // _BLOCK * _BLOCK
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    odd = torch.arange(1, 2 * _BLOCK + 1, 2, dtype=torch.int64, device=values.device)
    if blocks:
        total = total + (words[:blocks].view(-1, _BLOCK).sum(0) * odd).sum()
    for tail in (words[blocks:], rest):
        if len(tail):
            total = total + (tail * odd[: len(tail)]).sum()
    return total


def renormed(module: nn.Module) -> str:
    """Return the name of a layer whose forward pass rescales the weights it looks up; "": none."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    names = (
        n for n, p in module.named_modules() if isinstance(p, kinds) and p.max_norm is not None
    )
    return next((name or "the top" for name in names), "")


def _nobody() -> None:
    """Stand for a training that is gone."""
