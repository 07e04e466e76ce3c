"""Both ledgers as TensorBoard scalars, from a loop of your own.

Knows an engine, and a writer by its one method; Hugging Face's and Lightning's loggers are told by
their own modules.
"""

from __future__ import annotations

from typing import Any

from ..privacy_engine import PerInstancePrivacyEngine
from .scalars import privacy_scalars


def log_privacy(
    writer: Any,
    engine: PerInstancePrivacyEngine,
    *,
    step: int,
    delta: float,
    quantiles: bool = False,
) -> None:
    """Add what was spent so far to a TensorBoard log, under `privacy/`.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or whatever has its `add_scalar(name,
            value, step)`.
        engine: That trains.
        step: Where on the axis: of the optimizer's steps, say.
        delta: In (0, 1).
        quantiles: Also median, 90 % and largest per-instance ε.

    Raises:
        TypeError: A writer without `add_scalar`. Nothing is logged.
        ValueError: δ outside (0, 1).

    Privacy: `privacy/epsilon` is a function of public constants. Quantiles depend on private data,
        no ε covers a log of them, and a log has the permissions that its writer gives it. They are
        off unless asked for.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            f"Expected writer to have add_scalar, got {type(writer).__name__}. Pass a "
            "torch.utils.tensorboard.SummaryWriter."
        )
    for name, value in privacy_scalars(engine, delta=delta, quantiles=quantiles).items():
        writer.add_scalar(f"privacy/{name}", value, step)
