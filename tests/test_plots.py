import io
import math
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import matplotlib.image
import numpy as np
import pytest
import torch

from opacus_pil import plots
from opacus_pil.evaluation import LossBarrier


def texts(figure):
    """Every visible word of a figure."""
    return " | ".join(
        t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text"))
    )


def drawn(figure):
    """Render, so that layout and warnings (errors in pytest) are exercised."""
    pixels = matplotlib.image.imread(io.BytesIO(plots.to_png(figure, dpi=50)))
    assert pixels.std() > 0  # something is on the page
    return figure


def test_histogram_counts_every_instance_and_marks_the_worst_case():
    epsilons = np.random.default_rng(0).gamma(2.0, 0.5, 300)
    figure = drawn(
        plots.epsilon_histogram(
            epsilons,
            worst_case=7.0,
            forget_sets={"hard": np.argsort(epsilons)[-10:]},
            guarantee="output_specific",
            delta=1e-3,
        )
    )
    axes, rug = figure.axes
    assert sum(patch.get_height() for patch in axes.patches) == 300
    assert 7.0 in [line.get_xdata()[0] for line in axes.lines]
    assert "worst case" in texts(figure)
    assert "label: output_specific" in texts(figure)
    assert sorted(rug.lines[0].get_xdata()) == sorted(epsilons)[-10:]


def test_histogram_says_estimate_unless_told_otherwise():
    assert "label: estimate" in texts(plots.epsilon_histogram([1.0, 2.0], worst_case=3.0))
    with pytest.raises(ValueError, match="guarantee"):
        plots.epsilon_histogram([1.0], worst_case=3.0, guarantee="certain")


def test_infinite_values_are_counted_and_raise_the_median():
    figure = drawn(
        plots.epsilon_histogram([1.0, 2.0, math.inf, math.inf, math.inf], worst_case=math.inf)
    )
    assert "3 of 5 have infinite ε" in texts(figure)
    assert "median instance: ∞" in texts(figure)  # leaving them out would say 1.5
    assert "worst case: ε is infinite" in texts(figure)
    drawn(plots.epsilon_histogram([math.inf], worst_case=math.inf))


@pytest.mark.parametrize("value", [0.0, 1e-300, 2.0, 1e6])
@pytest.mark.parametrize("count", [1, 50])
def test_equal_values_make_one_bar(value, count):
    figure = drawn(plots.epsilon_histogram([value] * count, worst_case=value))
    (bar,) = figure.axes[0].patches
    assert bar.get_height() == count


@pytest.mark.parametrize("bad", [[], [math.nan], [-1.0], [[1.0]]])
def test_histogram_refuses_what_is_no_epsilon(bad):
    with pytest.raises(ValueError, match="Expected epsilons"):
        plots.epsilon_histogram(bad, worst_case=1.0)


def test_image_grid_shows_each_image_with_its_caption():
    images = torch.rand(13, 1, 8, 8)
    captions = [f"instance {n}\nε 1.2" for n in range(13)]
    figure = drawn(plots.image_grid(images, captions=captions, title="most exposed"))
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == captions
    assert np.array_equal(shown[3].images[0].get_array(), images[3, 0].numpy().astype(float))
    assert "most exposed" in texts(figure)
    with pytest.raises(ValueError, match="captions"):
        plots.image_grid(images, captions=["one"], title="")
    with pytest.raises(ValueError, match="images"):
        plots.image_grid(torch.rand(8, 8), captions=["one"] * 8, title="")


def test_unreached_points_are_drawn_above_the_limit_and_named():
    figure = drawn(
        plots.epsilon_against_steps({"runs": ([1.0, 2.0, 3.0], [5, None, math.inf])}, limit=100)
    )
    points = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    unreached = next(line for line in points if line.get_marker() == "o")
    assert list(unreached.get_xdata()) == [2.0, 3.0]
    assert min(unreached.get_ydata()) > 100
    assert "not reached within 100 steps" in texts(figure)


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([1.0, 29.0], "linear"), ([1.0, 31.0], "log"), ([0.0, 1.0, 31.0], "symlog")],
)
def test_axis_is_logarithmic_only_for_wide_values(losses, scale):
    figure = plots.epsilon_against_steps({"runs": (losses, [1] * len(losses))})
    assert drawn(figure).axes[0].get_xscale() == scale


def test_points_at_infinite_loss_are_counted():
    figure = drawn(plots.epsilon_against_steps({"a": ([1.0, math.inf], [3, 4]), "b": ([2], [0])}))
    assert "1 with infinite loss not drawn" in texts(figure)
    drawn(plots.epsilon_against_steps({"nothing finite": ([math.inf], [None])}))
    with pytest.raises(ValueError, match="points"):
        plots.epsilon_against_steps({})
    with pytest.raises(ValueError, match="same length"):
        plots.epsilon_against_steps({"a": ([1.0], [1, 2])})


def test_barrier_curves_have_a_panel_per_split_and_a_chord_per_line():
    alphas = tuple(np.linspace(0, 1, 11).tolist())
    bump = LossBarrier(0.25, alphas, tuple(a * (1 - a) for a in alphas))
    broken = LossBarrier(math.nan, alphas, (math.inf,) + (1.0,) * 10)
    figure = drawn(
        plots.loss_barrier_curves(
            {
                "original to retrained": {"forget": bump, "test": broken},
                "unlearned": {"forget": bump},
            }
        )
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["forget", "test"]
    assert len(figure.axes[0].lines) == 4  # two lines, two chords
    assert len(figure.axes[1].lines) == 1  # no chord to a loss that is not finite
    assert "barrier 0.25" in texts(figure)
    assert "original to retrained" in texts(figure)
    with pytest.raises(ValueError, match="barriers"):
        plots.loss_barrier_curves({})


def test_forget_curves_show_run_band_and_time():
    figure = drawn(
        plots.forget_curves(
            {"easy": [0, 1, 2], "hard": [0]},
            accuracies={"easy": [1.0, 0.9, 0.8], "hard": [1.0]},
            oracle_bands={"easy": (0.7, 0.9), "hard": (0.2, 0.2)},
            reached={"easy": 1, "hard": None},
        )
    )
    assert figure.axes[0].get_title(loc="left") == "easy: 1 steps"
    assert list(figure.axes[0].lines[0].get_ydata()) == [1.0, 0.9, 0.8]
    box = figure.axes[0].patches[0].get_extents().transformed(
        figure.axes[0].transData.inverted()
    )  # fmt: skip
    assert (box.y0, box.y1) == pytest.approx((0.7, 0.9))
    assert "not reached" in texts(figure)


def test_forget_curves_refuse_sets_that_do_not_match():
    with pytest.raises(ValueError, match="'easy'"):
        plots.forget_curves({}, accuracies={"easy": [1.0]}, oracle_bands={"easy": (0, 1)})
    with pytest.raises(ValueError, match="accuracies"):
        plots.forget_curves({"a": [0]}, accuracies={"a": [1.5]}, oracle_bands={"a": (0, 1)})
    with pytest.raises(ValueError, match="same length"):
        plots.forget_curves({"a": [0, 1]}, accuracies={"a": [1.0]}, oracle_bands={"a": (0, 1)})


def test_names_are_text_and_never_formulas():
    drawn(plots.epsilon_against_steps({r"$\broken{": ([1.0, 100.0], [1, 100])}))


def test_the_same_figure_gives_the_same_bytes():
    first, second = (plots.epsilon_histogram([1.0, 2.0, 3.0], worst_case=4.0) for _ in range(2))
    assert plots.to_png(first) == plots.to_png(second)


@hypothesis.given(st.floats(0, 1e12), st.integers(1, 6))
def test_printed_epsilon_is_never_below_the_value(value, digits):
    printed = float(plots.rounded_up(value, digits=digits))
    assert printed >= value
    assert printed <= value * (1 + 10.0 ** (1 - digits)) + 5e-324  # less than one last digit more


def test_no_pyplot_and_no_global_state():
    """Importing pyplot would pick a backend and keep every figure alive."""
    code = (
        "import sys, matplotlib\n"
        # Reading 'backend' would itself import pyplot.
        "rc = matplotlib.rcParams\n"
        "settings = lambda: {key: rc[key] for key in rc if key != 'backend'}\n"
        "before = settings()\n"
        "from opacus_pil import plots\n"
        "plots.to_png(plots.epsilon_histogram([1.0, 2.0], worst_case=3.0), dpi=20)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "assert settings() == before\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
