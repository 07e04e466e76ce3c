"""What Opacus draws and which noise it makes, watched from outside, with the coins it made both of.

Knows Opacus's noise function and its sampler; no training, and nothing of opacus_pil.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

_NOISY = (
    "opacus.optimizers.optimizer",
    "opacus.optimizers.optimizer_fast_gradient_clipping",
)

Coins = int  # a mark of where torch's generator stood: whoever draws from there again gets the same


@dataclass(frozen=True)
class Drawn:
    """Rows that a Poisson sampler drew."""

    rows: list[int]
    coins: Coins


@dataclass(frozen=True)
class Noised:
    """Noise that was made for a sum: the tensor `reference`, whose values were `sums` then."""

    std: float
    reference: torch.Tensor
    sums: torch.Tensor
    noise: torch.Tensor
    coins: Coins


class Watch:
    """Sees what Opacus draws and which noise it makes, while it is open."""

    def __init__(self) -> None:
        self.drawn: list[Drawn] = []  # of every Poisson sampler, in order
        self.noise: list[Noised] = []
        self._stack = contextlib.ExitStack()

    def open(self) -> None:
        for name in _NOISY:
            module = importlib.import_module(name)
            self._replace(module, "_generate_noise", self._noising(module._generate_noise))
        sampler = UniformWithReplacementSampler
        self._replace(sampler, "__iter__", self._drawing(sampler.__iter__))

    def close(self) -> None:
        self._stack.close()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def _noising(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(std: float, reference: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            coins = _coins()
            made = original(std, reference, *args, **kwargs)
            sums = reference.detach().clone()
            self.noise.append(Noised(float(std), reference, sums, made, coins))
            return made

        return generate

    def _drawing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def draw(sampler: Any) -> Iterator[list[int]]:
            source = original(sampler)
            while True:
                coins = _coins()
                rows = next(source, None)
                if rows is None:
                    return
                self.drawn.append(Drawn(list(rows), coins))
                yield rows

        return draw


def _coins() -> Coins:
    return hash(torch.get_rng_state().numpy().tobytes())
