"""Tombstones: what is read of an instance after it left the training set."""

import numpy as np
import pytest

from opacus_pil.accounting import PerInstanceAccountant

STEP = {"noise_multiplier": 1.0, "sample_rate": 0.1}
IDS = ["ada", "bob", "cyd", "dan"]


@pytest.fixture
def accountant():
    made = PerInstanceAccountant(4, orders=[2.0, 8.0, 64.0], levels=64, instance_ids=IDS)
    for _ in range(5):
        made.step(indices=[0, 1, 2, 3], sensitivities=[0.2, 0.4, 0.6, 0.8], **STEP)
    return made


def test_a_tombstone_keeps_what_was_lost_and_is_charged_no_more(accountant):
    before = accountant.rdp()
    accountant.forget([1])
    assert accountant.forgotten.tolist() == [False, True, False, False]
    accountant.step(indices=[0], sensitivities=[0.2], **STEP)
    accountant.step(indices=None, sensitivities=None, **STEP)
    after = accountant.rdp()
    # Rounding may be added when a row moves, by the ulps of a prefix sum; it is never taken off.
    np.testing.assert_allclose(after[1], before[1], rtol=1e-12)
    assert (after[1] >= before[1]).all()
    assert (after[[0, 2, 3]] > before[[0, 2, 3]]).all()


def test_every_reading_marks_a_tombstone_and_none_says_no_risk(accountant, tmp_path):
    pytest.importorskip("pyarrow")
    from opacus_pil.files.ledger_table import LedgerTable

    before = accountant.get_epsilon(1e-3).epsilon
    accountant.forget([1, 3])
    frame = accountant.to_dataframe(delta=1e-3).set_index("instance_id")
    accountant.to_parquet(tmp_path / "ledger.parquet", delta=1e-3)
    table = LedgerTable(tmp_path / "ledger.parquet")
    for found in (frame.loc["bob"], table.instance("bob").iloc[0]):
        assert found["forgotten"]
        assert not found["active"]
        assert np.isnan(found["sensitivity"])  # not 0: that would read as no risk
        assert found["epsilon"] >= before[1] > 0
    assert not frame.loc["ada", "forgotten"]
    assert frame.loc["ada", "sensitivity"] > 0
    # Quantiles of the living do not count the dead.
    quantiles = table.quantiles(at=[1.0]).set_index("forgotten")
    assert quantiles.loc[False, "instances"] == 2
    assert quantiles.loc[False, "q1"] == frame.loc["cyd", "epsilon"]
    assert quantiles.loc[True, "q1"] == frame.loc["dan", "epsilon"]
    assert table.top(1).iloc[0][["instance_id", "forgotten"]].tolist() == ["dan", True]


def test_a_tombstone_outlives_saving_and_cannot_be_charged_or_forgotten_again(accountant):
    accountant.forget([1])
    other = PerInstanceAccountant(4, orders=[2.0, 8.0, 64.0], levels=64, instance_ids=IDS)
    other.load_state_dict(accountant.state_dict())
    before = other.state_dict()
    for again in (
        lambda: other.forget([1]),
        lambda: other.step(indices=[1], sensitivities=[0.1], **STEP),
    ):
        with pytest.raises(ValueError, match=r"forgotten \(first: instance 1\)"):
            again()
    for key, value in before.items():
        np.testing.assert_array_equal(other.state_dict()[key], value)
    assert other.forgotten.tolist() == [False, True, False, False]
    other.observe_all(np.ones(4))  # a full pass does not wake it
    assert other.forgotten[1]
