"""The public constants of a DP-SGD run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch.optim import Optimizer

from .update import described_update


@dataclass(frozen=True, repr=False)
class TrainingKernel:
    """What stays fixed when instances leave: unlearning and oracles keep it, never re-derive it.

    Attributes:
        sample_rate: Probability that an instance is drawn into a batch. In (0, 1].
        expected_batch_size: What Opacus divides a mean-reduced gradient sum by.
        noise_multiplier: Noise std on the gradient sum / max_grad_norm. Unitless.
        max_grad_norm: Clip bound on a per-sample gradient norm.
        loss_reduction: "mean" or "sum".
        grad_sample_mode: As in Opacus, one of GRAD_SAMPLE_MODES.
        batch_first: Whether the batch is the inputs' first dimension.
        num_instances: Size of the training set.
        clipping: "flat", "per_layer" or "adaptive".
        output_bounds: Clip bound of each output of an OneVsRest head that is clipped output by
            output; `max_grad_norm` is then their norm. Empty: other models, other clipping.
        poisson_sampling: False for fixed batches.
        world_size: Number of processes that draw from a shard each; `sample_rate` is that of each.
        rand_on_empty: Opacus puts a random instance into an empty draw.
    """

    sample_rate: float
    expected_batch_size: int
    noise_multiplier: float
    max_grad_norm: float
    loss_reduction: str
    grad_sample_mode: str
    batch_first: bool
    num_instances: int
    clipping: str = "flat"
    poisson_sampling: bool = True
    world_size: int = 1
    rand_on_empty: bool = False
    output_bounds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Take a list, as files hold it, for a tuple."""
        object.__setattr__(self, "output_bounds", tuple(self.output_bounds))

    def plain(self) -> dict[str, Any]:
        """Return the constants for a file; what only some kernels have is left out of the others.

        Files that earlier releases wrote are then equal to those of this one.
        """
        found = asdict(self)
        if not self.output_bounds:
            del found["output_bounds"]
        return found

    def __repr__(self) -> str:
        """Return the constants in words; digests of plans are made of them."""
        words = ", ".join(f"{name}={value!r}" for name, value in self.plain().items())
        return f"{type(self).__name__}({words})"

    def update_by(self, optimizer: Optimizer) -> str:
        """Return how a step of such a training moves a model now, in the words of `update.py`."""
        return described_update(
            optimizer,
            clip_bound=self.output_bounds or self.max_grad_norm,
            noise_std=self.noise_multiplier * float(self.max_grad_norm),
            divisor=self.expected_batch_size,
            loss_reduction=self.loss_reduction,
            batches=1,
            default_batches=True,
        )
