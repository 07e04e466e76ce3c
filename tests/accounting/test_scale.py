"""Millions of instances: few orders, offsets in a file, rows in chunks, questions by DuckDB.

Everything here is an exact equality with the plain way of doing the same thing.
"""

import os
import pickle
import stat

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from opacus_pil.accounting import COMPACT_ORDERS, DEFAULT_ORDERS, PerInstanceAccountant
from opacus_pil.accounting.ledger_rows import ledger_chunks, write_ledger
from opacus_pil.errors import LedgerError
from opacus_pil.files.ledger_table import LedgerTable

SIZE = 101  # odd, so that no share of it below is a whole number of instances
LABELS = np.arange(SIZE) % 3


def random_run(accountant, *, steps, seed):
    generator = np.random.default_rng(seed)
    for number in range(steps):
        rows = generator.permutation(accountant.num_instances)[:30]
        accountant.step(
            indices=rows, sensitivities=generator.random(30), sample_rate=0.1,
            noise_multiplier=1.0 if number % 3 else 0.8,
        )  # fmt: skip


def used(*, steps=12, seed=0, **extra):
    accountant = PerInstanceAccountant(SIZE, **{"orders": COMPACT_ORDERS, "levels": 64, **extra})
    random_run(accountant, steps=steps, seed=seed)
    return accountant


def same_state(first, second):
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(other[key], value, err_msg=key)


class TestCompactOrders:
    """The small set is a part of the default one, so nothing about an order changes."""

    def test_there_are_at_most_sixteen_and_all_are_default_orders(self):
        assert len(COMPACT_ORDERS) <= 16
        assert set(COMPACT_ORDERS) < set(DEFAULT_ORDERS)
        assert list(COMPACT_ORDERS) == sorted(COMPACT_ORDERS)

    def test_shared_orders_have_the_same_rdp(self):
        shared = np.isin(DEFAULT_ORDERS, COMPACT_ORDERS)
        compact, default = used(), used(orders=DEFAULT_ORDERS)
        np.testing.assert_array_equal(compact.rdp(), default.rdp()[:, shared])

    def test_epsilon_is_never_smaller_than_with_all_orders(self):
        compact, default = used(), used(orders=DEFAULT_ORDERS)
        assert (compact.get_epsilon(1e-5).epsilon >= default.get_epsilon(1e-5).epsilon).all()


class TestMemoryMap:
    """Where the offsets are makes no difference to any number."""

    def test_offsets_in_a_file_equal_offsets_in_memory_bit_for_bit(self, tmp_path):
        same_state(used(memory_map=tmp_path), used())

    def test_the_file_is_private_has_no_name_and_goes_with_the_accountant(self, tmp_path):
        def mapped():
            with open("/proc/self/maps", encoding="utf-8") as maps:
                return [line for line in maps if str(tmp_path) in line]

        accountant = used(memory_map=tmp_path)
        assert list(tmp_path.iterdir()) == []
        if os.path.exists("/proc/self/maps"):
            assert len(mapped()) == 1
            assert "(deleted)" in mapped()[0]
            del accountant
            assert mapped() == []

    def test_a_copy_shares_nothing_and_has_a_file_of_its_own(self, tmp_path):
        accountant = used(memory_map=tmp_path)
        before = accountant.state_dict()
        copied = accountant.copy()
        same_state(copied, accountant)
        assert not np.shares_memory(
            copied._state.balances.offset, accountant._state.balances.offset
        )
        assert not copied._state.balances.offset.flags.owndata  # it lies in a buffer: the map
        random_run(copied, steps=3, seed=1)
        for key, value in before.items():
            np.testing.assert_array_equal(accountant.state_dict()[key], value)

    def test_a_loaded_ledger_lies_in_the_file_and_goes_on_bit_for_bit(self, tmp_path):
        first = used()
        state = first.state_dict()
        second = PerInstanceAccountant(SIZE, orders=COMPACT_ORDERS, levels=64, memory_map=tmp_path)
        second.load_state_dict(state)
        assert not second._state.balances.offset.flags.owndata
        for accountant in (first, second):
            random_run(accountant, steps=4, seed=7)
        same_state(first, second)
        assert not np.array_equal(second.state_dict()["offset"], state["offset"])

    def test_merged_shards_equal_shards_in_memory(self, tmp_path):
        def merged(folder):
            shards = [
                used(instance_ids=np.arange(SIZE) * 2 + odd, memory_map=folder) for odd in (0, 1)
            ]
            shards[0].merge(shards[1])
            return shards[0]

        mapped = merged(tmp_path)
        same_state(mapped, merged(None))
        assert mapped.num_instances == 2 * SIZE
        assert not mapped._state.balances.offset.flags.owndata

    def test_what_was_pickled_comes_back_with_a_file_of_its_own(self, tmp_path):
        accountant = used(memory_map=tmp_path)
        other = pickle.loads(pickle.dumps(accountant))
        same_state(other, accountant)
        assert not other._state.balances.offset.flags.owndata

    def test_a_fork_is_refused_before_it_writes_into_the_file_of_its_parent(
        self, tmp_path, monkeypatch
    ):
        mapped, plain = used(memory_map=tmp_path), used()
        before = mapped.state_dict()
        monkeypatch.setattr(os, "getpid", lambda: -1)
        for use in (
            mapped.rdp,
            mapped.state_dict,
            mapped.copy,
            lambda: random_run(mapped, steps=1, seed=0),
        ):
            with pytest.raises(LedgerError, match="fork"):
                use()
        random_run(plain.copy(), steps=1, seed=0)  # in memory a fork has its own
        monkeypatch.undo()
        for key, value in before.items():
            np.testing.assert_array_equal(mapped.state_dict()[key], value)

    def test_a_missing_folder_is_refused_when_the_accountant_is_made(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            PerInstanceAccountant(3, memory_map=tmp_path / "missing")


@pytest.fixture
def accountant():
    made = used(instance_ids=np.random.default_rng(3).permutation(SIZE) + 1000)
    made.forget([5])
    return made


@pytest.fixture
def table(accountant, tmp_path):
    folder, other = tmp_path / "a[1]*", tmp_path / "a1x"
    folder.mkdir()
    other.mkdir()  # what DuckDB would read if it took the folder's name for a pattern
    PerInstanceAccountant(3).to_parquet(other / "ledger.parquet")
    accountant.to_parquet(folder / "ledger.parquet", delta=1e-4, columns={"label": LABELS})
    return LedgerTable(folder / "ledger.parquet")


@pytest.fixture
def frame(accountant):
    return accountant.to_dataframe(delta=1e-4).assign(label=LABELS)


class TestParquet:
    """The file holds the rows of the data frame, every one with δ and guarantee."""

    def test_the_file_equals_the_data_frame(self, table, frame):
        found = pd.read_parquet(table.path)
        pd.testing.assert_frame_equal(found, frame, check_exact=True)
        assert len(table) == SIZE
        assert set(found["guarantee"]) == {"estimate"}
        assert set(found["delta"]) == {1e-4}

    @pytest.mark.parametrize("size", [1, 7, SIZE, 10 * SIZE])
    def test_chunks_of_any_size_give_the_same_rows(self, accountant, frame, tmp_path, size):
        columns = {"label": LABELS}
        path = tmp_path / "ledger.parquet"
        write_ledger(path, ledger_chunks(accountant, delta=1e-4, columns=columns, size=size))
        pd.testing.assert_frame_equal(pd.read_parquet(path), frame, check_exact=True)
        assert pq.read_metadata(path).num_row_groups == -(-SIZE // size)

    def test_under_a_budget_what_was_spent_is_a_column(self, tmp_path):
        made = PerInstanceAccountant(4, budget=(2.0, 1e-5))
        for _ in range(5):
            made.step(indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.05)
        made.to_parquet(tmp_path / "a", delta=1e-5)
        found = pd.read_parquet(tmp_path / "a")
        pd.testing.assert_frame_equal(found, made.to_dataframe(delta=1e-5), check_exact=True)
        assert (found["spent_epsilon"] < found["epsilon"]).all()

    def test_infinite_losses_and_text_ids_survive(self, tmp_path):
        made = PerInstanceAccountant(2, instance_ids=["a", "b"], orders=[2.0, 8.0])
        made.observe_all([0.0, 0.5])
        made.step(indices=[], sensitivities=[], noise_multiplier=0.0, sample_rate=0.1)
        made.to_parquet(tmp_path / "a")
        asked = LedgerTable(tmp_path / "a")
        assert asked.top(1)["instance_id"].tolist() == ["b"]
        assert asked.instance("b")["epsilon"].tolist() == [np.inf]
        assert asked.instance("a")["epsilon"].tolist() == [0.0]
        assert asked.instance("a")["delta"].tolist() == [0.5]  # 1 / num_instances

    def test_the_file_is_private(self, table):
        assert stat.S_IMODE(table.path.stat().st_mode) == 0o600

    @pytest.mark.parametrize(
        ("extra", "words"),
        [
            ({"delta": 2.0}, "delta"),
            ({"columns": {"label": [1, 2]}}, r"column 'label' .*instances \(101\)"),
            ({"columns": {"epsilon": LABELS}}, r"\['epsilon'\].*Rename"),
        ],
    )
    def test_a_refused_write_leaves_the_old_file(self, accountant, tmp_path, extra, words):
        path = tmp_path / "ledger.parquet"
        path.write_bytes(b"old")
        with pytest.raises(ValueError, match=words):
            accountant.to_parquet(path, **extra)
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["ledger.parquet"]

    @staticmethod
    def interrupted():
        yield {"epsilon": np.ones(2)}
        raise KeyboardInterrupt

    def test_a_write_that_breaks_off_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "ledger.parquet"
        path.write_bytes(b"old")
        with pytest.raises(ValueError, match="same columns"):
            write_ledger(path, [{"epsilon": np.ones(2)}, {"epsilon": np.ones(2), "more": [1, 2]}])
        with pytest.raises(ValueError, match="at least one chunk"):
            write_ledger(path, [])
        with pytest.raises(KeyboardInterrupt):
            write_ledger(path, self.interrupted())
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["ledger.parquet"]


class TestQuestions:
    """DuckDB answers as pandas does on the whole data frame."""

    @pytest.mark.parametrize("k", [1, 10, 2 * SIZE])
    @pytest.mark.parametrize("lowest", [False, True])
    def test_top_equals_a_stable_sort(self, table, frame, k, lowest):
        expected = frame.sort_values("epsilon", ascending=lowest, kind="stable").head(k)
        assert frame["epsilon"].duplicated().any()  # so the order of ties is tested
        found = table.top(k, lowest=lowest)
        pd.testing.assert_frame_equal(found, expected.reset_index(drop=True), check_exact=True)

    @pytest.mark.parametrize("by", [None, "label", "active", "guarantee"])
    def test_quantiles_equal_those_of_each_group(self, table, frame, by):
        shares = (0.0, 0.1, 0.5, 0.77, 1.0)
        found = table.quantiles(by=by, at=shares)
        groups = list(frame.groupby([by or "delta", "forgotten"]))  # tombstones apart
        assert found["instances"].tolist() == [len(rows) for _, rows in groups]
        assert set(found["guarantee"]) == {"estimate"}
        assert set(found["delta"]) == {1e-4}
        for place, ((value, forgotten), rows) in enumerate(groups):
            assert by is None or found[by][place] == value
            assert found["forgotten"][place] == forgotten
            for share in shares:
                expected = np.quantile(rows["epsilon"], share, method="inverted_cdf")
                assert found[f"q{share:g}"][place] == expected
                # At least that share has no more: rounded up, never down.
                assert (rows["epsilon"] <= expected).mean() >= share

    def test_rows_with_another_delta_or_guarantee_are_never_mixed(self, tmp_path):
        weak, strong = used(), PerInstanceAccountant(SIZE, orders=COMPACT_ORDERS)
        chunks = [
            next(ledger_chunks(made, delta=delta))
            for made, delta in ((weak, 1e-4), (strong, 1e-4), (strong, 1e-5))
        ]
        write_ledger(tmp_path / "a", chunks)
        found = LedgerTable(tmp_path / "a").quantiles()
        assert found[["delta", "guarantee"]].to_numpy().tolist() == [
            [1e-5, "bound"], [1e-4, "bound"], [1e-4, "estimate"],
        ]  # fmt: skip
        assert len(LedgerTable(tmp_path / "a").instance(4)) == 3

    def test_one_instance_is_its_row(self, table, frame):
        for place in (0, 5, SIZE - 1):
            expected = frame.iloc[[place]].reset_index(drop=True)
            found = table.instance(int(expected["instance_id"][0]))
            pd.testing.assert_frame_equal(found, expected, check_exact=True)

    def test_what_cannot_be_answered_is_refused(self, table):
        with pytest.raises(LedgerError, match="instance_id=3"):
            table.instance(3)
        with pytest.raises(TypeError, match="an integer"):
            table.instance("1003")
        with pytest.raises(ValueError, match="k "):
            table.top(0)
        with pytest.raises(ValueError, match="by to be one of instance_id, epsilon"):
            table.quantiles(by='label", 1 --')
        with pytest.raises(ValueError, match="at in"):
            table.quantiles(at=[1.5])

    def test_other_files_are_refused(self, tmp_path, frame):
        with pytest.raises(FileNotFoundError, match="no file"):
            LedgerTable(tmp_path / "missing")
        (tmp_path / "text").write_text("epsilon")
        with pytest.raises(LedgerError, match="whole Parquet file"):
            LedgerTable(tmp_path / "text")
        frame.to_parquet(tmp_path / "frame")
        with pytest.raises(LedgerError, match="version='none'"):
            LedgerTable(tmp_path / "frame")
