"""Every mode and policy of the engine: true norms, sound charges, and the label they carry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError
from opacus_pil.accounting import sampled_gaussian_rdp
from opacus_pil.training.update import adaptive_noise
from tests.capture.models import convolutional, images, one_by_one_norms

SIZE, BATCH, DELTA = 60, 12, 1e-2
BOUND = 8.5  # between the smallest and largest gradient norm of the model
FLOAT32 = 1e-4  # as in test_sweep
ORDERS = (2.0, 8.0)
pytestmark = pytest.mark.filterwarnings("ignore:.*sample_rate.*will be used:UserWarning")


def twin(module):
    fresh = convolutional()
    fresh.load_state_dict(
        {key.removeprefix("_module."): value for key, value in module.state_dict().items()}
    )
    return fresh


def train(engine, *, reduction="mean", dropout=0.0, epochs=1, data=None, seed=3, **options):
    """Train by Opacus's loop; return module, made and one entry (rows, truth) per step."""
    torch.manual_seed(seed)
    module = convolutional(dropout=dropout)
    data = images(SIZE) if data is None else data
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    arguments = {
        "module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.05),
        "data_loader": DataLoader(data, batch_size=BATCH), "noise_multiplier": 1.0,
        "max_grad_norm": BOUND, "criterion": criterion, "loss_reduction": reduction,
    }  # fmt: skip
    made = engine.make_private(**(arguments | options))
    wrapped, optimizer, loader = made[0], made[1], made[-1]
    loss = made[2] if len(made) == 4 else criterion
    forward = wrapped if isinstance(wrapped, nn.Module) else module
    steps = []
    for _ in range(epochs):
        for inputs, targets in loader:
            before = twin(module)
            rows = [int((data.tensors[0] == x).flatten(1).all(1).nonzero()[0, 0]) for x in inputs]
            optimizer.zero_grad()
            loss(forward(inputs), targets).backward()
            optimizer.step()
            truth = one_by_one_norms(before, data, rows, nn.CrossEntropyLoss())
            steps.append((rows, truth))
    return module, made, steps


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("mode", "wrap"),
    [("hooks", True), ("hooks", False), ("functorch", True), ("functorch", False), ("ew", True),
     ("ghost", True), ("ghost", False)],
)  # fmt: skip
def test_every_mode_charges_the_norm_each_instance_has_by_itself(mode, wrap, reduction):
    engine = PerInstancePrivacyEngine(accountant="rdp", levels=4096)
    _, made, steps = train(engine, reduction=reduction, grad_sample_mode=mode, wrap_model=wrap)
    known = np.ones(SIZE)
    for rows, norms in steps:
        known[rows] = np.minimum(norms / BOUND, 1.0)
    held = engine.per_instance.sensitivities
    assert (held >= known * (1 - FLOAT32)).all()
    # 4096 levels over three decades: 0.17 % each; the lowest is 1e-3.
    np.testing.assert_allclose(held, np.maximum(known, 1e-3), rtol=0.003)
    assert engine.per_instance.unattributed_steps == 0
    np.testing.assert_allclose(made[0].per_sample_gradient_norms.cpu(), steps[-1][1], rtol=FLOAT32)


def test_a_full_pass_at_every_step_is_output_specific():
    engines = [
        PerInstancePrivacyEngine(accountant="rdp", norm_policy="full"),
        PerInstancePrivacyEngine(accountant="rdp", norm_policy="refresh", refresh_every=1),
    ]
    for engine in engines:
        train(engine)
    assert engines[0].per_instance.guarantee == "output_specific"
    np.testing.assert_array_equal(engines[0].per_instance.rdp(), engines[1].per_instance.rdp())


class TestParticipation:
    """poisson_sampling=False: only who is in a batch is charged."""

    @staticmethod
    def engine():
        return PerInstancePrivacyEngine(
            accountant="rdp", norm_policy="participation", orders=ORDERS, levels=4096
        )

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_each_batch_costs_its_members_the_gaussian_mechanism(self, mode, workers):
        engine = self.engine()
        loader = DataLoader(images(SIZE), batch_size=BATCH, shuffle=True, num_workers=workers)
        _, made, steps = train(
            engine, epochs=2, poisson_sampling=False, data_loader=loader, grad_sample_mode=mode,
            noise_multiplier=2.0,
        )  # fmt: skip
        assert sorted(row for rows, _ in steps[:5] for row in rows) == list(range(SIZE))
        squares = np.zeros(SIZE)
        for rows, norms in steps:
            squares[rows] += np.minimum(norms / BOUND, 1.0) ** 2
        expected = np.outer(squares, np.array(ORDERS) / (2 * 2.0**2))
        found = engine.per_instance.rdp()
        assert (found >= expected * (1 - FLOAT32)).all()
        np.testing.assert_allclose(found, expected, rtol=0.006)  # levels up to 0.17 %, squared
        assert engine.per_instance.guarantee == "output_specific"
        assert made[-1] is not loader
        assert type(loader) is DataLoader

    def test_training_is_opacus_own_bit_for_bit(self):
        weights = []
        for engine in (PrivacyEngine(accountant="rdp"), self.engine()):
            loader = DataLoader(images(SIZE), batch_size=BATCH, shuffle=True)
            module, _, _ = train(engine, epochs=2, poisson_sampling=False, data_loader=loader)
            weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert torch.equal(weights[0], weights[1])

    def test_dropout_makes_it_an_estimate(self):
        engine = self.engine()
        train(engine, dropout=0.5, poisson_sampling=False)
        assert engine.per_instance.guarantee == "estimate"

    def test_it_goes_with_fixed_batches_only(self):
        with pytest.raises(UnsupportedError, match="participation"):
            train(self.engine())
        with pytest.raises(UnsupportedError, match="participation"):
            train(PerInstancePrivacyEngine(norm_policy="last_seen"), poisson_sampling=False)

    def test_it_is_the_default_for_fixed_batches_and_says_so(self):
        runs = []
        for engine in (PerInstancePrivacyEngine(accountant="rdp", orders=ORDERS), self.engine()):
            torch.manual_seed(3)
            if len(runs) == 0:
                assert engine.norm_policy == "last_seen"
                with pytest.warns(UserWarning, match="zero-out") as caught:
                    train(engine, poisson_sampling=False)
                said = [w for w in caught if "amplification" in str(w.message)]
                assert len(said) == 1
            else:
                train(engine, poisson_sampling=False)  # named: nothing to say
            assert engine.norm_policy == "participation"
            assert engine.fork().norm_policy == "participation"
            runs.append((engine.get_epsilon(1e-2), engine.per_instance.guarantee))
        torch.manual_seed(3)
        plain = PrivacyEngine(accountant="rdp")
        train(plain, poisson_sampling=False)
        assert runs[0] == runs[1] == (plain.get_epsilon(1e-2), "output_specific")

    @pytest.mark.filterwarnings("ignore:poisson_sampling=False")  # the test above is about it
    @pytest.mark.parametrize("first", [True, False])
    def test_one_engine_accounts_for_one_kind_of_batches(self, first):
        engine, data = PerInstancePrivacyEngine(accountant="rdp"), images(SIZE)
        loader = DataLoader(data, batch_size=BATCH)
        train(engine, poisson_sampling=first, data=data, data_loader=loader)
        before = engine.per_instance.rdp()
        with pytest.raises(UnsupportedError, match="another engine"):
            train(engine, poisson_sampling=not first, data=data, data_loader=loader)
        assert np.array_equal(engine.per_instance.rdp(), before)
        assert engine.norm_policy == ("last_seen" if first else "participation")
        train(engine, poisson_sampling=first, data=data, data_loader=loader, seed=4)
        assert engine.per_instance.steps == 2 * SIZE // BATCH

    def test_noise_for_a_target_epsilon_takes_fixed_batches_too(self):
        noises = []
        for engine in (PrivacyEngine(accountant="rdp"), self.engine()):
            module = convolutional()
            made = engine.make_private_with_epsilon(
                module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                data_loader=DataLoader(images(SIZE), batch_size=BATCH), target_epsilon=3.0,
                target_delta=1e-2, epochs=2, max_grad_norm=1.0, poisson_sampling=False,
            )  # fmt: skip
            noises.append(made[1].noise_multiplier)
        assert noises[0] == noises[1]

    def test_such_a_kernel_cannot_be_run_on_part_of_the_data(self):
        engine = self.engine()
        train(engine, poisson_sampling=False)
        with pytest.raises(UnsupportedError, match="Poisson"):
            _ = engine.kernel

    @pytest.mark.parametrize(
        "options", [{"batch_size": None}, {"num_workers": 1, "in_order": False}]
    )
    def test_loaders_without_known_rows_are_refused(self, options):
        loader = DataLoader(images(SIZE), **({"batch_size": BATCH} | options))
        with pytest.raises(UnsupportedError, match=r"batch_size=None|in_order=False"):
            train(self.engine(), poisson_sampling=False, data_loader=loader)


class TestCaps:
    """Caps and budgets, enforced while clipping."""

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_caps_are_a_bound_in_both_modes(self, mode):
        caps = np.linspace(0.05, 1.0, SIZE)
        engine = PerInstancePrivacyEngine(
            accountant="rdp", norm_policy="capped", caps=caps, orders=ORDERS
        )
        _, _, steps = train(engine, grad_sample_mode=mode)
        exact = len(steps) * sampled_gaussian_rdp(
            caps, noise_multiplier=1.0, sample_rate=BATCH / SIZE, orders=ORDERS
        )
        assert (engine.per_instance.rdp() >= exact).all()
        assert engine.per_instance.guarantee == "bound"

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_whoever_has_spent_its_budget_moves_the_model_no_more(self, mode):
        # One instance with a budget below a single step: whatever its record says, the trained
        # weights are the same bits.
        epsilon = np.full(SIZE, 100.0)
        epsilon[7] = 0.08
        trained, data = [], images(SIZE)
        for poison in (0.0, 50.0):
            inputs = data.tensors[0].clone()
            inputs[7] += poison
            engine = PerInstancePrivacyEngine(
                accountant="rdp", norm_policy="capped", budget=(epsilon, DELTA)
            )
            module, _, _ = train(
                engine, epochs=2, data=TensorDataset(inputs, data.tensors[1]),
                grad_sample_mode=mode,
            )  # fmt: skip
            trained.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
            assert not engine.per_instance.active[7]
            assert (engine.per_instance.spent_rdp([7]) == 0.0).all()
        if mode == "hooks":
            assert torch.equal(trained[0], trained[1])
        else:  # 0 times a large gradient is 0, but sums of other lengths may round differently
            torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-6)

    def test_nobody_exceeds_the_budget_and_it_is_reported(self):
        engine = PerInstancePrivacyEngine(
            accountant="rdp", norm_policy="capped", caps=np.linspace(0.1, 1.0, SIZE),
            budget=(1.5, DELTA),
        )  # fmt: skip
        train(engine, epochs=4)
        found = engine.get_per_instance_epsilon(DELTA)
        assert found.guarantee == "bound"
        np.testing.assert_allclose(found.epsilon, 1.5, rtol=1e-9)
        ledger = engine.per_instance
        assert (ledger.spent_rdp() <= ledger.rdp()).all()
        assert 0 < ledger.active.sum() < SIZE

    def test_caps_may_follow_the_model_under_a_budget_only(self):
        free = PerInstancePrivacyEngine(norm_policy="capped", caps=np.ones(SIZE))
        train(free)
        with pytest.raises(ValueError, match="fixed before the run"):
            free.set_caps(np.full(SIZE, 0.5))
        held = PerInstancePrivacyEngine(norm_policy="capped", budget=(50.0, DELTA))
        _, made, _ = train(held)
        held.set_caps(np.full(SIZE, 0.25))
        before = held.per_instance.spent_rdp()
        inputs, targets = next(iter(made[-1]))
        made[1].zero_grad()
        nn.CrossEntropyLoss()(made[0](inputs), targets).backward()
        made[1].step()
        cost = (held.per_instance.spent_rdp() - before)[:, 20]
        worst = sampled_gaussian_rdp(
            [0.25, 1.0],
            noise_multiplier=1.0,
            sample_rate=0.2,
            orders=held.per_instance.orders[20:21],
        )[:, 0]
        assert (cost >= worst[0]).all()
        assert (cost < worst[1] / 4).all()  # at most a quarter of the norm
        assert held.per_instance.guarantee == "bound"
        with pytest.raises(ValueError, match="norm_policy='capped'"):
            PerInstancePrivacyEngine().set_caps(np.ones(SIZE))

    def test_what_is_enforced_is_never_above_what_a_loaded_ledger_charges(self):
        # A ledger brings its caps and budgets along; the engine's own may be larger.
        strict = PerInstancePrivacyEngine(
            accountant="rdp", norm_policy="capped", caps=np.full(SIZE, 0.1), budget=(0.3, DELTA)
        )
        train(strict, epochs=20)
        assert not strict.per_instance.active.all()
        engine = PerInstancePrivacyEngine(
            accountant="rdp", norm_policy="capped", caps=np.ones(SIZE)
        )
        train(engine)
        engine.account.load_state(strict.account.state())
        enforced = engine.trainings[0].recorder.caps(np.arange(SIZE))
        np.testing.assert_array_equal(
            enforced > 0, engine.per_instance.caps_for(noise_multiplier=1.0, sample_rate=0.2) > 0
        )
        assert (enforced <= engine.per_instance.sensitivities).all()

    @pytest.mark.parametrize(("noise", "bound"), [(0.9, 0.3), (1.1, 0.3)])
    def test_caps_are_tested_at_the_very_kernel_that_is_charged(self, noise, bound):
        # noise · bound / bound may be another float than noise; one test must decide for both.
        engine = PerInstancePrivacyEngine(
            accountant="rdp", norm_policy="capped", budget=(50.0, DELTA)
        )
        train(engine, noise_multiplier=noise, max_grad_norm=bound)
        charged = engine.per_instance._state.balances.pending.kernel
        assert engine.trainings[0].coming_kernel() == charged


def test_per_layer_clipping_charges_the_norm_that_is_left():
    bounds = [0.3, 0.1, 2.0, 0.2, 1.0, 0.5]
    engine = PerInstancePrivacyEngine(accountant="rdp")
    _, _, steps = train(engine, clipping="per_layer", max_grad_norm=bounds)
    total = float(np.linalg.norm(bounds))
    seen = sorted({row for rows, _ in steps for row in rows})
    held = engine.per_instance.sensitivities
    whole = {row: norm for rows, norms in steps for row, norm in zip(rows, norms, strict=True)}
    for row in seen:  # clipping each layer leaves no more than clipping the whole
        assert held[row] <= min(whole[row] / total, 1.0) * 1.007 + 1e-3  # one level
    assert engine.per_instance.guarantee == "estimate"
    with pytest.raises(UnsupportedError, match="flat clipping"):
        _ = engine.kernel
    with pytest.raises(ValueError, match="to be a list"):
        train(PerInstancePrivacyEngine(), clipping="per_layer", max_grad_norm=1.0)


class TestAdaptiveClipping:
    """An estimate, with the released count charged in full."""

    OPTIONS = {  # noqa: RUF012
        "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2,
        "max_clipbound": 20.0, "min_clipbound": 0.1, "unclipped_num_std": 2.0,
    }  # fmt: skip

    @pytest.mark.parametrize("policy", ["last_seen", "worst_case"])
    def test_the_worst_case_pays_for_gradient_and_count(self, policy):
        engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy=policy, orders=ORDERS)
        _, _, steps = train(engine, **self.OPTIONS)
        # Independent noise on both: shifts 1/z_gradient and 1/σ, joined by Pythagoras; with
        # z = 1, σ = 2 Opacus adds (1 - 1/16)^(-1/2) to the gradients.
        noise = (1.0 - 1.0 / 16.0) ** -0.5
        shift = np.hypot(1.0 / noise, 1.0 / 2.0)
        exact = len(steps) * sampled_gaussian_rdp(
            shift, noise_multiplier=1.0, sample_rate=0.2, orders=ORDERS
        )
        np.testing.assert_allclose(engine.per_instance.worst_case_rdp(), exact, rtol=1e-9)
        assert engine.per_instance.guarantee == "estimate"
        if policy == "worst_case":
            np.testing.assert_allclose(engine.per_instance.rdp()[0], exact, rtol=1e-9)
        else:
            assert (engine.per_instance.rdp() <= exact * (1 + 1e-9)).all()
            assert engine.per_instance.sensitivities.min() >= adaptive_noise(1.0, 2.0)[1]

    def test_caps_are_refused(self):
        engine = PerInstancePrivacyEngine(norm_policy="capped", caps=np.ones(SIZE))
        with pytest.raises(UnsupportedError, match="adaptive"):
            train(engine, **self.OPTIONS)
