"""Figures of the report: one function per figure, each returns a matplotlib Figure.

Knows plain numbers and images. Keeps no global state (no pyplot) and writes no file. What a figure
shows is private wherever its numbers are (per-instance values, forget sets).
"""

try:
    import matplotlib as matplotlib
except ImportError as error:
    raise ImportError(
        "Expected matplotlib for the figures, got none. "
        'Install the report extra: pip install "opacus-pil[report]".'
    ) from error

from .epsilon import epsilon_against_steps as epsilon_against_steps
from .epsilon import epsilon_histogram as epsilon_histogram
from .forgetting import forget_curves as forget_curves
from .forgetting import loss_barrier_curves as loss_barrier_curves
from .images import image_grid as image_grid
from .style import rounded_up as rounded_up
from .style import to_png as to_png
