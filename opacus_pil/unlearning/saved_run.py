"""A run in progress and the file that a killed run goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from ..checkpoint import arrays, load_state, save_state
from ..errors import LedgerError
from ..privacy_engine import PerInstancePrivacyEngine
from .plan import UnlearningPlan

_KIND = "unlearning run"


class SavedRun:
    """Everything that the rest of a run depends on.

    Batches and noise come from two generators of their own, seeded once, so that a resumed run
    draws what the uninterrupted one would have drawn.
    """

    def __init__(
        self,
        *,
        plan: UnlearningPlan,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        privacy_engine: PerInstancePrivacyEngine | None,
        seed: int,
    ) -> None:
        self.module, self.optimizer, self.privacy_engine = module, optimizer, privacy_engine
        self.done, self.seed = 0, seed
        self.history: list[Any] = []
        device = next(module.parameters()).device
        secure = privacy_engine is not None and privacy_engine.secure_mode
        self.sampler_state: torch.Tensor | None = None  # where a resumed run draws on
        sampler_seed, noise_seed = seeds(seed)[1:]
        self.sampler_generator = torch.Generator().manual_seed(sampler_seed)
        # In secure mode Opacus brings its own generator, which nobody can rewind.
        self.noise_generator = (
            None if secure else torch.Generator(device=device).manual_seed(noise_seed)
        )
        self._fingerprint = plan.basis  # the request, its method and constants, the weights

    def resume(self, folder: str | os.PathLike[str] | None) -> Path | None:
        """Return where to save (None: nowhere), after loading what an earlier run left there.

        Raises:
            NotADirectoryError: `folder` is not an existing folder.
            LedgerError: The file there is damaged or belongs to another plan or model.
        """
        if folder is None:
            return None
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"Expected checkpoint_dir to be a folder, got {folder}.")
        path = Path(folder) / "unlearning.pt"
        if path.exists():
            self._load(load_state(path, kind=_KIND), path)
        return path

    def save(self, path: Path) -> None:
        """Write the run as it stands after `done` steps."""
        state: dict[str, Any] = {
            "fingerprint": self._fingerprint,
            "done": self.done,
            "seed": self.seed,
            "history": self.history,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "global_rng": torch.random.get_rng_state(),
            "sampler_rng": self.sampler_generator.get_state(),
            "noise_rng": None if self.noise_generator is None else self.noise_generator.get_state(),
        }
        if self.privacy_engine is not None:
            state["ledgers"] = self.privacy_engine.ledger_state()
        save_state(path, state, kind=_KIND)

    def remove(self, path: Path | None) -> None:
        """Delete the file of a finished run: it was computed next to the forget set.

        So were the parts of it that writes left behind which were killed.
        """
        if path is not None:
            for found in (path, *path.parent.glob(f".{path.name}.*")):
                found.unlink(missing_ok=True)

    def _load(self, state: dict[str, Any], path: Path) -> None:
        if state["fingerprint"] != self._fingerprint:
            raise LedgerError(
                f"Expected {path} to belong to this plan and model, got a run of others. "
                "Finish that one, or pass another checkpoint_dir."
            )
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.privacy_engine is not None:
            self.privacy_engine.load_ledger_state(arrays(state["ledgers"]))
        self.sampler_state = state["sampler_rng"]
        if self.noise_generator is not None and state["noise_rng"] is not None:
            self.noise_generator.set_state(state["noise_rng"])
        torch.random.set_rng_state(state["global_rng"])
        self.seed = int(state.get("seed", self.seed))  # its noise goes on, not this call's
        self.done, self.history = int(state["done"]), list(state["history"])


def seeds(seed: int) -> list[int]:
    """Return three independent seeds: of the weights of a new model, the batches, the noise.

    From one seed the first weights would tell who is in the first batches, and amplification by
    sampling takes for granted that nobody knows.
    """
    return [int(n >> 2) for n in np.random.SeedSequence(seed).generate_state(3, np.uint64)]
