"""A grid of instances, as images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .. import _validate as check
from .style import INK, STYLE


def image_grid(
    images: Any, *, captions: Sequence[str], title: str, columns: int | None = None
) -> Figure:
    """Draw small grey images in a grid, each with its caption (the most or least exposed ones).

    Args:
        images: Array or CPU tensor, shape (n, height, width) or (n, 1, height, width), n ≥ 1.
        captions: One per image.
        title: Above the grid.
        columns: Images per row; up to 10 when None.

    Returns:
        The figure.

    Raises:
        ValueError: Shapes that do not fit, values not finite, or no image.

    Privacy: shows training images: private.
    """
    pixels = check.real_array("images", images)
    if pixels.ndim == 4 and pixels.shape[1] == 1:
        pixels = pixels[:, 0]
    if pixels.ndim != 3 or len(pixels) == 0:
        raise ValueError(check.expected("images", "of shape (n, height, width)", pixels.shape))
    if len(captions) != len(pixels):
        raise ValueError(
            check.expected("captions", f"to be one per image ({len(pixels)})", len(captions))
        )
    wide = min(len(pixels), 10) if columns is None else check.integer("columns", columns, low=1)
    tall = math.ceil(len(pixels) / wide)
    lines = max(caption.count("\n") + 1 for caption in captions)
    with matplotlib.rc_context(STYLE):
        size = (max(0.85 * wide, 2.5), (0.85 + 0.17 * lines) * tall + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        grid = figure.subplots(tall, wide, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, image, caption in zip(grid, pixels, captions, strict=False):
            # Dark on light, as on paper; each image over its own range, so faint strokes show.
            axes.imshow(image, cmap="gray_r", interpolation="nearest")
            axes.set_title(caption, fontsize=8, loc="center", color=INK)
    return figure
