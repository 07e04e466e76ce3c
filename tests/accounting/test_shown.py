"""Printed privacy numbers are on the safe side, wherever they are printed."""

from __future__ import annotations

import ast
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import opacus_pil
from opacus_pil.accounting.shown import quantiles_above, rounded_down, rounded_up

ROOT = Path(opacus_pil.__file__).parent
NUMBERS = st.floats(min_value=1e-12, max_value=1e12)


@given(NUMBERS, st.integers(1, 10))
def test_what_is_printed_encloses_the_number_and_is_near(value, digits):
    low, high = (Decimal(f(value, digits=digits)) for f in (rounded_down, rounded_up))
    number = Decimal(repr(value))
    assert low <= number <= high
    assert high - low <= number * Decimal(10) ** (1 - digits)  # one unit of the last digit


@given(st.lists(st.floats(0, 1e6) | st.just(float("inf")), min_size=1), st.floats(0.0, 1.0))
def test_a_quantile_is_a_value_and_covers_its_share(values, share):
    (found,) = quantiles_above(np.array(values), [share])
    assert found in values
    assert np.mean(np.array(values) <= found) >= share


def test_no_text_of_the_package_rounds_an_epsilon_or_a_delta_to_the_nearest():
    """A format such as `{epsilon:.3g}` prints 1.234 as 1.23: less than was spent. So with a δ.

    What has no precision (`{epsilon:g}`) echoes a target that the user gave.
    """
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FormattedValue) or node.format_spec is None:
                continue
            precise = "." in ast.unparse(node.format_spec)
            if precise and re.search("epsilon|delta", ast.unparse(node.value)):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []
