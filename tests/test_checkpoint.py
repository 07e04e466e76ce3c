"""Files are whole or absent, private, and tell when somebody touched them."""

import copy
import inspect
import io
import itertools
import os
import stat
from collections import Counter

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.accounting import PerInstanceAccountant
from opacus_pil.errors import LedgerError, UnsupportedError
from opacus_pil.files.container import load_state, save_state, save_weights, write_atomic
from opacus_pil.files.fingerprint import dataset_fingerprint
from tests.capture.models import convolutional, images
from tests.training_loop import SIZE, Loop, differences, same


def test_a_missing_folder_is_named_with_the_cure(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"Expected the folder .*no/such to exist, got none"
    ):
        write_atomic(tmp_path / "no" / "such" / "page.html", b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="to be a folder, got a file"):
        write_atomic(tmp_path / "file" / "page.html", b"x")


def test_a_private_file_is_readable_by_its_owner_only(tmp_path):
    write_atomic(tmp_path / "a", b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    write_atomic(tmp_path / "b", b"x", private=False)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a"
    write_atomic(target, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_weights_are_what_torch_would_have_written_and_private(tmp_path):
    weights, plain = torch.nn.Linear(3, 2).state_dict(), io.BytesIO()
    torch.save(weights, plain)
    save_weights(tmp_path / "model.pt", weights)
    assert (tmp_path / "model.pt").read_bytes() == plain.getvalue()
    assert stat.S_IMODE((tmp_path / "model.pt").stat().st_mode) == 0o600


def test_state_comes_back_and_loads_without_unpickling_code(tmp_path):
    state = {
        "step": np.int64(3),
        "weights": {"a": torch.arange(4.0)},
        "levels": [(np.arange(3, dtype=np.uint16), "x")],
        "none": None,
    }
    save_state(tmp_path / "s", state, kind="run")
    again = load_state(tmp_path / "s", kind="run")
    assert again["step"] == 3
    assert again["levels"][0][0].tolist() == [0, 1, 2]
    assert again["none"] is None
    assert torch.equal(again["weights"]["a"], state["weights"]["a"])
    torch.load(tmp_path / "s", weights_only=True)


def test_truncated_edited_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "s"
    save_state(path, {"weights": torch.zeros(1000)}, kind="run")
    whole = path.read_bytes()
    with pytest.raises(LedgerError, match="kind='run'"):
        load_state(path, kind="ledger")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LedgerError, match="cannot be read"):
        load_state(path, kind="run")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(LedgerError):
        load_state(path, kind="run")
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "missing", kind="run")


# --- checkpoints of a training --------------------------------------------------------------------


ADAPTIVE = {
    "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.3,
    "max_clipbound": 20.0, "min_clipbound": 0.1, "unclipped_num_std": 5.0,
}  # fmt: skip


def _here(loop):
    """Everything that a refused file must leave alone."""
    return copy.deepcopy(
        {**loop.outcome(), "left": loop.loader.batch_sampler.remainder(), "epoch": loop.epoch}
    )


def _saved(path, **options):
    Loop(**options).run(until=3, after=lambda loop: loop.steps == 3 and loop.save(path))
    return path


def test_arguments_are_opacus_own():
    for name in ("save_checkpoint", "load_checkpoint"):
        ours = inspect.signature(getattr(PerInstancePrivacyEngine, name)).parameters
        theirs = inspect.signature(getattr(PrivacyEngine, name)).parameters
        own = {"strict"}  # whether a file of other data is refused
        assert {k: (p.kind, p.default) for k, p in ours.items() if k not in own} == {
            k: (p.kind, p.default) for k, p in theirs.items()
        }


def test_a_checkpoint_is_private_and_loads_without_unpickling_code(tmp_path):
    # A numpy scalar as noise multiplier would end up in Opacus's history.
    path = _saved(tmp_path / "c", noise_multiplier=np.float64(1.0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "pil_state_dict" in torch.load(path, weights_only=True)


def test_plain_opacus_reads_our_checkpoint(tmp_path):
    ours = Loop().run(until=3, after=lambda loop: loop.steps == 3 and loop.save(tmp_path / "c"))
    engine, module = PrivacyEngine(accountant="rdp"), convolutional()
    made, optimizer, _ = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
        data_loader=DataLoader(images(SIZE), batch_size=12), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    rest = engine.load_checkpoint(path=tmp_path / "c", module=made, optimizer=optimizer)
    assert same(dict(module.state_dict()), dict(ours.module.state_dict()))
    assert same(optimizer.state_dict(), ours.optimizer.state_dict())
    assert engine.get_epsilon(1e-2) == ours.engine.get_epsilon(1e-2)
    assert rest["steps"] == 3


def _plain_file(path, **options):
    """Train three steps with plain Opacus and save."""
    engine, module = PrivacyEngine(accountant="rdp"), convolutional()
    made, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
        data_loader=DataLoader(images(SIZE), batch_size=12), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    for inputs, targets in itertools.islice(loader, 3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(made(inputs), targets).backward()
        optimizer.step()
    engine.save_checkpoint(path=path, module=made, optimizer=optimizer, **options)
    return engine, module


@pytest.mark.parametrize("policy", ["last_seen", "worst_case", "capped"])
def test_a_plain_checkpoint_charges_everyone_the_worst_case(policy, tmp_path):
    plain, module = _plain_file(tmp_path / "c", checkpoint_dict={"epoch": 0, "steps": 3})
    ours = Loop(engine={"norm_policy": policy, "caps": np.full(SIZE, 0.1)} if policy == "capped"
                else {"norm_policy": policy})  # fmt: skip
    with pytest.warns(UserWarning, match="every instance is charged the worst case for its 3"):
        ours.load(tmp_path / "c")
    assert same(dict(ours.module.state_dict()), dict(module.state_dict()))
    assert ours.engine.get_epsilon(1e-2) == plain.get_epsilon(1e-2)
    worst = PerInstanceAccountant(SIZE, orders=[2.0, 8.0, 32.0], levels=64)
    for _ in range(3):
        worst.step(indices=None, sensitivities=None, noise_multiplier=1.0, sample_rate=0.2)
    assert np.array_equal(ours.engine.per_instance.rdp(), worst.rdp())
    assert ours.engine.per_instance.unattributed_steps == 3
    ours.run(until=4)
    assert (ours.engine.per_instance.rdp() >= worst.rdp()).all()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (ADAPTIVE, "adaptive"),
        ({"poisson_sampling": False, "engine": {"norm_policy": "participation"}}, "fixed batches"),
        ({"engine": {"norm_policy": "capped", "budget": (4.0, 1e-2)}}, "kept no budget"),
    ],
)  # fmt: skip
def test_a_plain_checkpoint_is_refused_where_its_history_bounds_nothing(options, why, tmp_path):
    _plain_file(tmp_path / "c")
    loop = Loop(**options)
    before = _here(loop)
    with pytest.raises(LedgerError, match=why):
        loop.load(tmp_path / "c")
    assert same(_here(loop), before)


def test_a_plain_checkpoint_is_refused_by_an_engine_that_was_charged(tmp_path):
    _plain_file(tmp_path / "c")
    loop = Loop().run(until=2)
    before = _here(loop)
    with pytest.raises(LedgerError, match="without steps"):
        loop.load(tmp_path / "c")
    assert same(_here(loop), before)


def test_a_damaged_checkpoint_is_refused_and_nothing_changes(tmp_path):
    path = _saved(tmp_path / "c")
    whole = path.read_bytes()
    loop = Loop(seed=9)
    before = _here(loop)
    for part in np.linspace(0, len(whole) - 1, 12).astype(int):
        path.write_bytes(whole[:part])
        with pytest.raises(LedgerError):
            loop.load(path)
    # Bytes of the container that mean nothing (padding, time stamps) may differ unnoticed: then
    # the file must load as it was saved.
    expected = Loop(seed=9)
    (tmp_path / "whole").write_bytes(whole)
    expected.load(tmp_path / "whole")
    expected = _here(expected)
    loop = Loop(seed=9)
    before = _here(loop)
    for position in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            loop.load(path)
        except LedgerError:
            assert same(_here(loop), before)
        else:
            assert same(_here(loop), expected)
            loop = Loop(seed=9)
            before = _here(loop)


def _edits():
    def weight(file):
        next(iter(file["module_state_dict"].values())).view(-1)[0] += 1.0

    def history(file):
        file["privacy_accountant_state_dict"]["history"] = [(5.0, 0.2, 3)]

    def momentum(file):
        file["optimizer_state_dict"]["param_groups"][0]["momentum"] = 0.0

    def losses(file):
        file["pil_state_dict"]["state"]["ledger"]["ledger"]["offset"] -= 1.0

    def added(file):
        file["something"] = 1

    def version(file):
        file["pil_state_dict"]["version"] = 2

    def header(file):
        del file["pil_state_dict"]["sha256"]

    def container(file):
        file["pil_state_dict"] = []

    return [weight, history, momentum, losses, added, version, header, container]


@pytest.mark.parametrize("edit", _edits(), ids=lambda edit: edit.__name__)
def test_an_edited_checkpoint_is_refused_and_nothing_changes(edit, tmp_path):
    path = _saved(tmp_path / "c")
    file = torch.load(path, weights_only=True)
    edit(file)
    torch.save(file, path)
    loop = Loop(seed=9)
    before = _here(loop)
    with pytest.raises(LedgerError):
        loop.load(path)
    assert same(_here(loop), before)


OTHERS = {
    "fewer instances": {"size": SIZE - 12},
    "other images": {"dataset": TensorDataset(*(t.flip(0) for t in images(SIZE).tensors))},
    "a subset": {"dataset": Subset(images(SIZE), list(range(SIZE))[::-1])},
    "orders": {"engine": {"orders": [2.0, 8.0, 16.0]}},
    "levels": {"engine": {"levels": 65}},
    "policy": {"engine": {"norm_policy": "worst_case"}},
    "caps": {"engine": {"norm_policy": "capped", "caps": np.ones(SIZE)}},
    "interval": {"engine": {"norm_policy": "refresh", "refresh_every": 3}},
    "accountant": {"engine": {"accountant": "prv"}},
    "history": {"engine": {"history": True}},
    "clipping": ADAPTIVE,
    "per layer": {"clipping": "per_layer", "max_grad_norm": [3.0] * 6},
    "mode": {"grad_sample_mode": "ghost"},
    "bound": {"max_grad_norm": 1.0},
    "batch size": {"batch": 10},
    "reduction": {"loss_reduction": "sum"},
    "generators": {"own": True},
    "model": {"model": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4))},
    # torch copies the layers that fit before it finds the one that does not
    "last layer": {"model": convolutional()[:-1].append(torch.nn.Linear(144, 5))},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_training_is_refused_and_nothing_changes(name, tmp_path):
    path = _saved(tmp_path / "c")
    loop = Loop(seed=9, **OTHERS[name]).run(until=1)
    before = _here(loop)
    with pytest.raises(LedgerError, match="Expected"):
        loop.load(path)
    assert same(_here(loop), before)


def test_a_training_with_other_noise_goes_on_with_its_own_and_is_charged_for_it(tmp_path):
    path = _saved(tmp_path / "c")
    loop = Loop(seed=9, noise_multiplier=2.0)
    with pytest.warns(UserWarning, match="goes on with its own, 2.0"):
        loop.load(path)
    assert loop.optimizer.noise_multiplier == 2.0
    before, steps = loop.engine.per_instance.rdp(), loop.steps
    loop.run(until=steps + 1)
    most = PerInstanceAccountant(1, orders=[2.0, 8.0, 32.0], levels=64)
    most.step(indices=None, sensitivities=None, noise_multiplier=2.0, sample_rate=0.2)
    grown = loop.engine.per_instance.rdp() - before
    # A difference of sums: rounding of the larger operands only.
    assert (grown <= most.rdp() * (1 + 1e-9) + 1e-12).all()
    np.testing.assert_allclose(grown.max(axis=0), most.rdp()[0], rtol=1e-9)  # not seen yet
    assert [run[0] for run in loop.engine.accountant.history] == [1.0, 2.0]
    loop.save(tmp_path / "d")
    again = Loop(seed=8, noise_multiplier=2.0).load(tmp_path / "d")
    for mixed in (loop, again):  # one kernel would be wrong for some of the steps
        with pytest.raises(UnsupportedError, match="one training kernel"):
            _ = mixed.engine.kernel


def test_a_checkpoint_of_other_rows_of_the_data_set_is_refused(tmp_path):
    def part(rows):
        loop, module = Loop(), convolutional()
        made, optimizer, _ = loop.engine.make_private_on(
            rows, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
            dataset=images(SIZE), steps=5,
        )  # fmt: skip
        return loop.engine, {"path": tmp_path / "c", "module": made, "optimizer": optimizer}

    for rows in (range(50), range(10, 60)):
        engine, arguments = part(np.array(rows))
        if not (tmp_path / "c").exists():
            engine.save_checkpoint(**arguments)
            engine.load_checkpoint(**arguments)
        else:
            with pytest.raises(LedgerError, match="population"):
                engine.load_checkpoint(**arguments)


def test_generators_shared_in_another_way_are_refused(tmp_path):
    # Two generators in one state would draw the noise from the numbers that chose the batch.
    path = _saved(tmp_path / "c", own=True)
    loop = Loop(own=True)
    loop.optimizer.generator = loop.loader.generator
    with pytest.raises(LedgerError, match="generators"):
        loop.load(path)


def test_without_an_optimizer_only_weights_and_ledgers_are_loaded(tmp_path):
    path = _saved(tmp_path / "c")
    loop = Loop(seed=9)
    before = _here(loop)
    with pytest.warns(UserWarning, match="a state of optimizer, which was not given"):
        loop.engine.load_checkpoint(path=path, module=loop.wrapped)
    after = _here(loop)
    assert loop.engine.per_instance.steps == 3
    for name in ("optimizer", "torch", "numpy", "python", "generators", "left", "noise"):
        assert same(after[name], before[name])
    loop.engine.save_checkpoint(path=path, module=loop.wrapped)
    with pytest.raises(LedgerError, match="saved with its optimizer"):
        Loop().load(path)


def test_an_optimizer_of_nobody_is_refused(tmp_path):
    loop, other = Loop(), Loop()
    for call in (loop.engine.save_checkpoint, loop.engine.load_checkpoint):
        path = _saved(tmp_path / "c")
        with pytest.raises(ValueError, match="that this engine made private"):
            call(path=path, module=loop.wrapped, optimizer=other.optimizer)


def test_objects_that_need_code_are_refused_when_saving_and_when_loading(tmp_path):
    path, loop = _saved(tmp_path / "c"), Loop()
    whole = path.read_bytes()
    with pytest.raises(TypeError, match=r"checkpoint\['args'\]\['net'\].*got Linear"):
        loop.engine.save_checkpoint(
            path=path, module=loop.wrapped, optimizer=loop.optimizer,
            checkpoint_dict={"args": {"net": torch.nn.Linear(1, 1)}},
        )  # fmt: skip
    assert path.read_bytes() == whole
    torch.save({**torch.load(path), "args": torch.nn.Linear(1, 1)}, path)
    before = _here(loop)
    with pytest.raises(LedgerError, match="cannot be read safely"):
        loop.load(path)
    assert same(_here(loop), before)


def test_plain_values_of_the_caller_come_back_and_its_dict_is_not_changed(tmp_path):
    loop = Loop()
    mine = {"best": np.float64(0.5), "milestones": Counter([3, 3]), "curve": np.arange(3)}
    loop.engine.save_checkpoint(path=tmp_path / "c", module=loop.wrapped, checkpoint_dict=mine)
    assert list(mine) == ["best", "milestones", "curve"]
    rest = loop.engine.load_checkpoint(path=tmp_path / "c", module=loop.wrapped)
    assert rest["best"] == 0.5
    assert rest["milestones"][7] == 0
    assert rest["curve"].tolist() == [0, 1, 2]
    assert "pil_state_dict" not in rest


def test_an_open_file_works_as_in_opacus(tmp_path):
    file, loop = io.BytesIO(), Loop().run(until=2)
    loop.save(file)
    file.seek(0)
    assert differences(Loop(seed=9).load(file).outcome(), loop.outcome()) == []


def test_a_killed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = _saved(tmp_path / "c")
    whole = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Loop().save(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# --- which data set -------------------------------------------------------------------------------


def test_a_fingerprint_tells_rows_and_their_order_but_draws_none():
    class Folder(torch.utils.data.Dataset):
        def __init__(self, targets):
            self.targets = targets

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, row):
            raise AssertionError("an item was drawn")

    found = [
        dataset_fingerprint(dataset)["sha256"]
        for dataset in (
            images(6), images(7), Subset(images(6), [0, 1]), Subset(images(6), [1, 0]),
            ConcatDataset([images(6)]), Folder([1, 2]), Folder([2, 1]), Folder(np.array([3, 1])),
            Folder(torch.ones(2, dtype=torch.bfloat16)), Folder(["a", "b"]),
        )
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert dataset_fingerprint(Folder(["a", "b"])) == dataset_fingerprint(Folder(["b", "a"]))
