"""Own ids: where they are given they are what is asked for, and rows only by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from opacus_pil.accounting.instance_ids import InstanceIds


def test_ids_and_rows_are_two_ways_to_one_answer():
    names = np.array([f"patient-{n:03}" for n in range(20)])
    ids = InstanceIds(names)
    rows = np.array([3, 0, 17])
    np.testing.assert_array_equal(ids.rows(ids.of(rows)), rows)
    np.testing.assert_array_equal(ids.rows(rows=rows), rows)
    np.testing.assert_array_equal(ids.rows(names == "patient-003"), [3])
    np.testing.assert_array_equal(InstanceIds(pd.Series(names)).rows(["patient-019"]), [19])


def test_an_integer_id_is_not_a_row():
    ids = InstanceIds([30, 20, 10])
    assert ids.rows([10]).tolist() == [2]
    with pytest.raises(
        ValueError, match=r"1 of 2 that nobody has: 2\. Ids look like 30\. Rows are passed by rows="
    ):
        ids.rows([10, 2])


def test_without_ids_rows_are_the_ids():
    ids = InstanceIds()
    assert not ids.given
    assert ids.rows([2, 0], size=3).tolist() == ids.rows(rows=[2, 0], size=3).tolist() == [2, 0]
    assert ids.of([2, 0]) == [2, 0]
    with pytest.raises(ValueError, match=r"in \[0, 2\]"):
        ids.rows([3], size=3)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({}, TypeError, "neither"),
        ({"ids": ["a"], "rows": [0]}, TypeError, "both"),
        ({"ids": "a"}, TypeError, "sequence of instance ids"),
        ({"ids": ["a", "a"]}, ValueError, "without repetition"),
        ({"ids": ["z"]}, ValueError, "nobody has: 'z'"),
        ({"ids": [0]}, ValueError, "nobody has: 0"),
        ({"rows": ["a"]}, TypeError, "rows"),
        ({"rows": [2]}, ValueError, "rows"),
    ],
)
def test_what_names_nobody_is_refused_with_the_cure(asked, error, words):
    with pytest.raises(error, match=words):
        InstanceIds(["a", "b"]).rows(**asked)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (["a", "b", "a"], ValueError, "got 'a' 2 times"),
        ([1.5, 2.0], TypeError, "integers or texts"),
        ([["a"], ["b"]], TypeError, "vector"),
        (["a", ""], ValueError, "a letter at least"),
    ],
)
def test_ids_that_name_nobody_or_two_are_refused(ids, error, words):
    with pytest.raises(error, match=words):
        InstanceIds(ids)


def test_one_id_per_row_is_asked_for():
    with pytest.raises(ValueError, match=r"one id per row of the data set \(3\), got 2"):
        InstanceIds(["a", "b"]).require_size(3)
