"""The demo on small settings: what it writes, what it claims, what a failure leaves behind.

It trains once, for all tests that look at what it made; that a seed decides everything is seen on
settings too tiny to mean anything.
"""

import dataclasses
import json
import stat

import numpy as np
import pandas as pd
import pytest
import torch

from opacus_pil.datasets import load
from opacus_pil.demo import cnn, head, logistic, run_demo
from opacus_pil.demo.run import FILES
from opacus_pil.demo.table import as_text
from opacus_pil.demo.task import forget_sets

pytestmark = pytest.mark.slow  # trains three models and nine for comparison, and plots them

SMALL_CNN = dataclasses.replace(
    cnn.SETTINGS["digits"], epochs=4, batch_size=96, forget_size=10, unlearning_epochs=1
)
SMALL_LOGISTIC = dataclasses.replace(
    logistic.SETTINGS["digits"], steps=120, weight_decay=3e-2, forget_size=10
)
SMALL_HEAD = dataclasses.replace(
    head.SETTINGS["digits"],
    sizes={"public": 200, "train": 300, "test": 100},
    public_epochs=20,
    steps=100,
    weight_decay=8e-3,
    noise_std=0.3,
    epsilon=2.0,
    forget_size=10,
)
# One epoch, and twenty steps on forty instances: nothing is learned, but everything
# random is drawn.
TINY_CNN = dataclasses.replace(SMALL_CNN, epochs=1, batch_size=24)
TINY_LOGISTIC = dataclasses.replace(
    SMALL_LOGISTIC,
    sizes={"public": 10, "train": 40, "test": 10},
    steps=20,
    epsilon=5000.0,
    records=5,
)
TINY_HEAD = dataclasses.replace(
    SMALL_HEAD,
    sizes={"public": 30, "train": 60, "test": 20},
    public_epochs=1,
    steps=20,
    epsilon=5000.0,
    records=5,
)
SMALL = {head: SMALL_HEAD, cnn: SMALL_CNN, logistic: SMALL_LOGISTIC}
TINY = {head: TINY_HEAD, cnn: TINY_CNN, logistic: TINY_LOGISTIC}
CERTIFIED = {"head": SMALL_HEAD, "logistic": SMALL_LOGISTIC}


def small_demo(monkeypatch, out, *, settings=None, **changes):
    for task, small in (settings or SMALL).items():
        monkeypatch.setitem(task.SETTINGS, "digits", small)
    return run_demo(out=out, oracles=1, progress=False, **changes)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return small_demo(monkeypatch, tmp_path_factory.mktemp("demo") / "out", seed=3)


@pytest.fixture(scope="module")
def tasks(demo):
    return {task["name"]: task for task in demo.summary["tasks"]}


def test_all_files_are_there_and_readable_by_the_owner_only(demo):
    assert sorted(path.name for path in demo.folder.iterdir()) == sorted(FILES)
    for path in demo.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [path.name for path in demo.folder.parent.iterdir()] == ["out"]


def test_the_summary_on_disk_has_every_promised_key(demo, tasks):
    assert json.loads((demo.folder / "summary.json").read_text()) == demo.summary
    assert list(tasks) == ["head", "cnn", "logistic"]
    for task in tasks.values():
        assert {
            "name", "dataset", "num_instances", "delta", "worst_case_epsilon",
            "worst_case_epsilon_prv", "per_instance_epsilon", "guarantee", "test_accuracy",
            "forget_sets",
        } <= set(task)  # fmt: skip
        assert set(task["per_instance_epsilon"]) == {"min", "q10", "median", "mean", "q90", "max"}
        assert task["delta"] == 1 / task["num_instances"]
        for entry in task["forget_sets"]:
            assert {
                "name", "size", "privacy_loss", "certificate", "certified", "steps",
                "steps_worst_case", "steps_retrain", "epsilon", "forget_accuracy",
                "forget_accuracy_before", "retain_accuracy", "test_accuracy", "oracle",
            } <= set(entry)  # fmt: skip
            assert set(entry["oracle"]) == {"forget_accuracy", "retain_accuracy", "test_accuracy"}
            assert entry["size"] >= 10


def test_no_instance_exceeds_the_worst_case_and_hard_is_harder_than_easy(tasks):
    for task in tasks.values():
        assert task["per_instance_epsilon"]["max"] <= task["worst_case_epsilon"]
        losses = {entry["name"]: entry["privacy_loss"] for entry in task["forget_sets"]}
        assert losses["easy"] < losses["random"] < losses["hard"]


def test_the_network_claims_nothing(tasks):
    assert tasks["cnn"]["guarantee"] == "estimate"
    for entry in tasks["cnn"]["forget_sets"]:
        assert entry["certificate"] is None
        assert entry["epsilon"] is None
        assert entry["certified"] is False


@pytest.mark.parametrize("name", CERTIFIED)
def test_both_linear_models_are_certified_in_fewer_steps_than_the_worst_case(tasks, name):
    assert tasks[name]["guarantee"] == "bound"
    entries = {entry["name"]: entry for entry in tasks[name]["forget_sets"]}
    for entry in entries.values():
        assert entry["certificate"] == "ContractionCertificate"
        assert entry["epsilon"] <= CERTIFIED[name].epsilon
        assert entry["steps"] < entry["steps_retrain"]
        assert entry["assumptions"]
    assert entries["easy"]["steps"] <= entries["random"]["steps"] <= entries["hard"]["steps"]
    assert entries["easy"]["steps"] < entries["hard"]["steps"]
    assert entries["random"]["steps"] < entries["random"]["steps_worst_case"]
    assert entries["hard"]["steps"] <= entries["hard"]["steps_worst_case"]


def test_the_hard_set_is_of_one_class_and_of_its_most_exposed():
    """Rows 0..8 by exposure, classes 0 and 1 in turn; the two highest of class 0 are 6 and 8."""
    order = np.arange(9)
    labels = order % 2
    sets = forget_sets(order, size=2, seed=0, labels=labels)
    assert sets["hard"].tolist() == [6, 8]
    assert sets["easy"].tolist() == [0, 1]
    assert forget_sets(order, size=2, seed=0)["hard"].tolist() == [7, 8]
    # No class is large enough: the most exposed of all.
    assert forget_sets(order, size=6, seed=0, labels=labels)["hard"].tolist() == [3, 4, 5, 6, 7, 8]


def test_the_ledger_has_one_labelled_row_per_instance_of_each_task(demo, tasks):
    frame = pd.read_parquet(demo.folder / "ledger.parquet")
    for name, task in tasks.items():
        rows = frame[frame["task"] == name]
        assert len(rows) == task["num_instances"]
        assert set(rows["guarantee"]) == {task["guarantee"]}
        assert rows["epsilon"].max() == task["per_instance_epsilon"]["max"]


def test_the_model_file_loads_without_unpickling_code(demo):
    state = torch.load(demo.folder / "model.pt", weights_only=True)
    model = cnn.make_cnn(8)
    model.load_state_dict(state["cnn"])
    assert set(state) == {"head", "cnn", "logistic"}


def test_the_report_says_first_that_it_is_private(demo):
    page = (demo.folder / "report.html").read_text()
    assert "private" in page[: page.index("data:image/png")]
    for name in ("head", "cnn", "logistic", "estimate", "bound"):
        assert name in page


def test_the_terminal_table_shows_what_is_certified_and_what_is_not(demo, tasks):
    text = as_text(demo.summary)
    assert "[estimate]" in text
    assert "[bound]" in text
    head_lines, network, logistic_lines, reading = text.split("\n\n")
    assert "near at" in reading
    assert sum(" no " in line for line in network.splitlines()[-3:]) == 3
    for name, lines in (("head", head_lines), ("logistic", logistic_lines)):
        for entry in tasks[name]["forget_sets"]:
            assert str(entry["steps"]) in lines
            before, after = entry["forget_accuracy_before"], entry["forget_accuracy"]
            assert f"{before:.2f} → {after:.2f}" in lines
    assert max(map(len, text.splitlines())) <= 110


def test_the_same_seed_gives_the_same_summary_and_another_another(monkeypatch, tmp_path):
    few = load("digits").take(range(300))
    monkeypatch.setattr("opacus_pil.datasets.load", lambda name: few)
    monkeypatch.setattr("opacus_pil.demo.run.write_report", lambda path, **_: path.touch())

    def summary(name, seed):
        torch.seed()  # what the process drew before must not matter
        out = tmp_path / name
        return small_demo(monkeypatch, out, settings=TINY, seed=seed).summary["tasks"]

    first = summary("first", 3)
    assert summary("again", 3) == first
    assert all(one != other for one, other in zip(first, summary("other", 4), strict=True))


def test_caps_depend_on_public_data_and_the_own_record_only(monkeypatch):
    """The cap of a record does not move when other private records change."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    y = (x[:, :1] > 0).float()
    public = torch.utils.data.TensorDataset(x[:20], y[:20])
    whole = torch.utils.data.TensorDataset(x[20:], y[20:])
    half = torch.utils.data.TensorDataset(x[20:30], y[20:30])
    caps = [
        logistic.public_caps(public, private, settings=SMALL_LOGISTIC) for private in (whole, half)
    ]
    # One batched pass against another batch size: float32 reductions differ in the last places.
    np.testing.assert_allclose(caps[0][:10], caps[1], rtol=1e-5)


class TestNothingHalfWritten:
    def test_a_run_that_fails_leaves_no_folder(self, monkeypatch, tmp_path):
        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        # The first tasks went well; only that they had is of interest here.
        monkeypatch.setattr("opacus_pil.demo.head.run_head", lambda data, **options: None)
        monkeypatch.setattr("opacus_pil.demo.cnn.run_cnn", lambda data, **options: None)
        monkeypatch.setattr("opacus_pil.demo.logistic.run_logistic", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            small_demo(monkeypatch, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_with_files_is_refused_before_anything_runs(self, monkeypatch, tmp_path):
        monkeypatch.setattr("opacus_pil.datasets.load", lambda name: pytest.fail("it ran"))
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="--force"):
            run_demo(out=tmp_path)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_force_overwrites_its_own_files_and_keeps_others(self, demo, monkeypatch, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        (tmp_path / "out" / "summary.json").write_text("old")
        monkeypatch.setattr(head, "run_head", lambda *a, **k: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            small_demo(monkeypatch, tmp_path / "out", force=True)
        assert (tmp_path / "out" / "summary.json").read_text() == "old"
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
