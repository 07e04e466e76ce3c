"""The result that answers: by id, the most exposed, tables, a figure, a few lines."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import opacus_pil
from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.accounting import PerInstanceEpsilon as PlainEpsilon
from opacus_pil.exposure import PerInstanceEpsilon

IDS = ["ann", "bob", "cem", "dee"]


def spent(**changes) -> PerInstanceEpsilon:
    fields = {
        "instance_ids": np.array(IDS), "worst_case": 3.0, "norms": np.array([1.0, 9.0, 5.0, np.inf])
    }  # fmt: skip
    epsilon = np.array([0.5, 2.0, 2.0, 1.0])
    return PerInstanceEpsilon(epsilon, np.full(4, 8.0), 1e-5, "estimate", ("why",), **{
        **fields, **changes})  # fmt: skip


def trained(policy: str = "last_seen", ids: list[str] | None = None):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    x = torch.randn(40, 3) * torch.linspace(0.01, 3.0, 40)[:, None]
    data = TensorDataset(x, (x[:, :1] > 0).float())
    engine = PerInstancePrivacyEngine(norm_policy=policy, instance_ids=ids)
    criterion = torch.nn.BCEWithLogitsLoss()
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=20), noise_multiplier=1.0, max_grad_norm=0.5,
        criterion=criterion,
    )  # fmt: skip
    for x, y in loader:
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()
    return engine, module, optimizer, data


def test_one_is_asked_by_its_id_and_a_stranger_is_none() -> None:
    assert spent()["cem"] == 2.0
    with pytest.raises(KeyError, match="eve"):
        spent()["eve"]


def test_the_most_exposed_are_ordered_by_norm_where_their_loss_ties() -> None:
    table = spent().top(3)
    assert table["instance_id"].tolist() == ["bob", "cem", "dee"]  # 9 above 5, then 1.0
    assert table["tied"].tolist() == [2, 2, 1]
    assert np.isnan(table["norm"][2])  # never seen
    assert set(table["guarantee"]) == {"estimate"}
    # Without norms the order of the data set decides; nobody is hidden by it.
    unseen = spent(norms=np.array([1.0, np.inf, 5.0, 9.0]))  # bob and cem share their ε
    assert unseen.top(2)["instance_id"].tolist() == ["cem", "bob"]
    assert spent(norms=None).top(2)["instance_id"].tolist() == ["bob", "cem"]
    assert len(spent().top(99)) == 4
    with pytest.raises(ValueError, match="n"):
        spent().top(-1)


def test_ties_are_counted_and_said() -> None:
    assert spent().ties == 2
    words = repr(spent())
    for needed in ("estimate", "2 share", "worst case, by the same method 3", "why"):
        assert needed in words
    assert "ties" not in repr(PerInstanceEpsilon(np.array([1.0]), np.array([2.0]), 0.1, "bound"))


def test_no_printed_number_is_below_the_true_one() -> None:
    exact = np.array([1.23401, 0.099999, 7.00001, 2.0])
    words = repr(PerInstanceEpsilon(exact, np.full(4, 8.0), 1e-5, "bound", worst_case=7.0009))
    assert "least 0.100 ·" in words
    assert "most 7.01" in words
    assert "method 7.01" in words


def test_frames_and_arrow_hold_the_same_rows() -> None:
    table = spent().to_dataframe()
    assert table["instance_id"].tolist() == IDS
    assert table["epsilon"].tolist() == [0.5, 2.0, 2.0, 1.0]
    arrow = pa.table(spent())
    assert arrow.column("instance_id").to_pylist() == IDS
    assert arrow.column("epsilon").to_pylist() == table["epsilon"].tolist()


@pytest.mark.parametrize("policy", ["last_seen", "worst_case", "full"])
def test_the_engines_result_has_its_own_worst_case_and_none_is_above_it(policy) -> None:
    engine, *_ = trained(policy)
    found = engine.get_per_instance_epsilon(1e-3)
    assert isinstance(found, PlainEpsilon)
    np.testing.assert_array_equal(found.epsilon, engine.per_instance.get_epsilon(1e-3).epsilon)
    assert (found.epsilon <= found.worst_case).all()
    if policy == "worst_case":
        np.testing.assert_allclose(found.epsilon, found.worst_case, rtol=1e-12)
        assert found.ties == 40
    assert found.plot().axes


def test_part_of_the_instances_keep_their_names_and_norms() -> None:
    ids = [f"p{k}" for k in range(40)]
    engine, *_ = trained(ids=ids)
    everyone = engine.get_per_instance_epsilon(1e-3)
    some = engine.get_per_instance_epsilon(1e-3, indices=["p7", "p3"])
    assert some.instance_ids.tolist() == ["p7", "p3"]
    for name in ("p7", "p3"):
        assert some[name] == everyone[name]
    seen = everyone.to_dataframe().set_index("instance_id")["norm"]
    assert some.to_dataframe()["norm"].tolist() == pytest.approx(seen[["p7", "p3"]], nan_ok=True)


def test_engines_and_ledgers_say_in_a_line_what_they_are() -> None:
    assert repr(PerInstancePrivacyEngine()) == "PerInstancePrivacyEngine(norm_policy='last_seen')"
    engine, module, optimizer, data = trained()
    assert "40 instances" in repr(engine)
    assert "estimate" in repr(engine)
    assert repr(engine.per_instance).startswith("PerInstanceAccountant(40 instances, 2 steps")
    unlearning = UnlearningEngine(
        module, optimizer=optimizer, dataset=data, privacy_engine=engine, progress=False
    )
    assert repr(unlearning) == "UnlearningEngine(40 instances, 0 forgotten in 0 runs)"


def test_the_package_shows_its_rooms_and_the_table_of_ledgers() -> None:
    shown = dir(opacus_pil)
    for name in ("plots", "evaluation", "auditing", "heads", "LedgerTable"):
        assert name in shown
        assert getattr(opacus_pil, name) is not None


@pytest.mark.parametrize(("wanted", "meant"), [("P2", "p2"), (2, "p2"), ("p22", "p2")])
def test_an_id_that_nobody_has_is_told_what_ids_look_like_and_which_is_near(wanted, meant) -> None:
    found = spent(instance_ids=np.array(["p1", "p2", "q3", "q4"]))
    with pytest.raises(KeyError) as refused:
        found[wanted]
    said = str(refused.value)  # a KeyError, without Python's quotes around the sentence
    assert said.startswith(f"Expected an id of one of these 4 instances, got {wanted!r}. ")
    assert f"Ids look like 'p1'. Did you mean {meant!r}? By row: get_per_inst" in said
    assert ("rows=[2]" in said) == (wanted == 2)


def test_text_that_is_a_number_is_near_the_number() -> None:
    with pytest.raises(KeyError, match=r"Ids look like 0. Did you mean 2\?"):
        spent(instance_ids=np.arange(4))["2"]


def test_whoever_names_ids_is_told_the_same(monkeypatch) -> None:
    engine = trained(ids=[f"p{k}" for k in range(40)])[0]
    with pytest.raises(
        ValueError, match=r"nobody has: 'P7'. Ids look like 'p0'. Did you mean 'p7'"
    ):
        engine.get_per_instance_epsilon(1e-5, indices=["P7"])
