"""Rows given by number or by mask: the same rows, and a mask of other rows is never guessed at."""

import numpy as np
import pytest
import torch

from opacus_pil import _validate
from opacus_pil.accounting import PerInstanceAccountant
from opacus_pil.certificates import known_batches
from opacus_pil.unlearning import RequestQueue

MASK = np.array([False, True, False, False, True])


@pytest.mark.parametrize("kind", [np.asarray, list, tuple, torch.tensor])
@pytest.mark.parametrize("unique", [False, True])
def test_a_mask_stands_for_the_rows_where_it_is_true(kind, unique):
    rows = _validate.index_array("rows", kind(MASK.tolist()), size=5, unique=unique)
    assert rows.tolist() == [1, 4]
    assert rows.dtype == np.int64


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("value", [False, True])
def test_a_mask_of_nobody_and_one_of_everybody(size, value):
    rows = _validate.index_array("rows", np.full(size, value), size=size)
    assert rows.tolist() == (list(range(size)) if value else [])


def test_whole_numbers_are_row_numbers_even_if_they_are_zeros_and_ones():
    assert _validate.index_array("rows", [1, 0], size=2).tolist() == [1, 0]
    with pytest.raises(ValueError, match="without repetition, got index 0 2 times"):
        _validate.index_array("rows", [0, 1, 0], size=3)


@pytest.mark.parametrize(
    "mask", [MASK[:4], np.append(MASK, True), MASK[None], MASK[0], np.zeros(0, dtype=bool)]
)
def test_a_mask_of_another_length_is_refused_with_the_cure(mask):
    with pytest.raises(ValueError, match=r"one entry for each of 5 rows, got a mask of shape") as e:
        _validate.index_array("forget", mask, size=5)
    assert str(mask.shape) in str(e.value)
    assert f"with {int(mask.sum())} true" in str(e.value)
    assert "numpy.flatnonzero(mask)" in str(e.value)
    assert str(e.value).startswith("Expected forget ")


@pytest.mark.parametrize("value", [[0.0, 1.0], [[0], [1]], ["a"], 3, None])
def test_what_is_neither_names_both(value):
    with pytest.raises(TypeError, match=r"1-D sequence of integers, or a boolean mask, got rows="):
        _validate.index_array("rows", value, size=5)


def test_a_callers_own_cure_is_kept():
    with pytest.raises(TypeError, match=r"\. Ask the shard\.$"):
        _validate.index_array("rows", [0.5], size=5, cure="Ask the shard.")


def test_an_empty_list_is_no_row():
    assert _validate.index_array("rows", [], size=5).tolist() == []


def test_an_accountant_reads_and_charges_masks_as_rows():
    by_mask, by_number = PerInstanceAccountant(5), PerInstanceAccountant(5)
    kernel = {"noise_multiplier": 1.0, "sample_rate": 0.5}
    by_mask.step(indices=MASK, sensitivities=[0.25, 0.5], **kernel)
    by_number.step(indices=[1, 4], sensitivities=[0.25, 0.5], **kernel)
    assert np.array_equal(by_mask.rdp(), by_number.rdp())
    assert np.array_equal(by_mask.rdp(MASK), by_number.rdp([1, 4]))
    one, other = (a.get_epsilon(1e-5, indices=i) for a, i in ((by_mask, MASK), (by_number, [1, 4])))
    assert np.array_equal(one.epsilon, other.epsilon)
    before = by_mask.rdp()
    with pytest.raises(ValueError, match="each of 5 rows"):
        by_mask.step(indices=MASK[:4], sensitivities=[0.25], **kernel)
    assert np.array_equal(by_mask.rdp(), before)


def test_where_the_number_of_rows_is_not_known_a_mask_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"numpy\.flatnonzero"):
        RequestQueue(tmp_path).submit("r", MASK)
    with pytest.raises(ValueError, match=r"numpy\.flatnonzero"):
        known_batches(
            [[0, 1]], forget=MASK, gradient_bounds=[1.0], noise_std=1.0, step_size=0.1,
            weight_decay=0.1, smoothness=0.2, expected_batch_size=2,
        )  # fmt: skip
