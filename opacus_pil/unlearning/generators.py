"""Generators of one run: where its batches and its noise come from, and where they stand.

Two of its own, seeded once, so that a resumed run draws what the uninterrupted one would have
drawn; torch's global one is noted beside them, for what dropout and augmentation draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class Generators:
    """The sources of a run's batches and noise.

    Args:
        seed: Of both. Whoever knows it can remove the noise.
        device: Of the model.
        secure: Opacus brings its own source of noise, which nobody can rewind.

    Attributes:
        sampler: Draws the batches.
        sampler_state: Where a resumed run draws on; None: it begins.
        noise: Draws the noise; None in secure mode.
    """

    def __init__(self, seed: int, *, device: torch.device, secure: bool) -> None:
        sampler_seed, noise_seed = seeds(seed)[1:]
        self.sampler = torch.Generator().manual_seed(sampler_seed)
        self.sampler_state: torch.Tensor | None = None
        self.noise = None if secure else torch.Generator(device=device).manual_seed(noise_seed)

    def state(self) -> dict[str, Any]:
        """Return where all of them stand."""
        return {
            "global_rng": torch.random.get_rng_state(),
            "sampler_rng": self.sampler.get_state(),
            "noise_rng": None if self.noise is None else self.noise.get_state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from where they stood."""
        self.sampler_state = state["sampler_rng"]
        if self.noise is not None and state["noise_rng"] is not None:
            self.noise.set_state(state["noise_rng"])
        torch.random.set_rng_state(state["global_rng"])


def seeds(seed: int) -> list[int]:
    """Return three independent seeds: of the weights of a new model, the batches, the noise.

    From one seed the first weights would tell who is in the first batches, and amplification by
    sampling takes for granted that nobody knows.
    """
    return [int(n >> 2) for n in np.random.SeedSequence(seed).generate_state(3, np.uint64)]
