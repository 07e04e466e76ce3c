"""The engine trains exactly as Opacus does, and charges every instance for what happened."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from opacus_pil import LedgerError, PerInstancePrivacyEngine, UnsupportedError
from opacus_pil.accounting import PerInstanceAccountant
from tests.capture.models import convolutional, images, one_by_one_norms

SIZE, BATCH, DELTA = 60, 12, 1e-2
BOUND = 8.5  # between the smallest and largest gradient norm of the model below
CRITERION = nn.CrossEntropyLoss()


def prepared(engine, *, mode="hooks", workers=0, dropout=0.0, size=SIZE, **options):
    module = convolutional(dropout=dropout)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loader = DataLoader(images(size), batch_size=BATCH, num_workers=workers)
    arguments = {
        "noise_multiplier": 1.0, "max_grad_norm": BOUND, "criterion": nn.CrossEntropyLoss(),
        "grad_sample_mode": mode,
    }  # fmt: skip
    arguments.update(options)
    made = engine.make_private(module=module, optimizer=optimizer, data_loader=loader, **arguments)
    return module, made


def train(made, *, epochs=1, after=None):
    wrapped, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if len(made) == 4 else CRITERION
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(wrapped(inputs), targets).backward()
            optimizer.step()
            if after is not None:
                after()


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


POLICIES = {
    "worst_case": {"norm_policy": "worst_case"},
    "last_seen": {},
    "refresh 1": {"norm_policy": "refresh", "refresh_every": 1},
    "refresh 3": {"norm_policy": "refresh", "refresh_every": 3},
    "full": {"norm_policy": "full"},
    "capped at one": {"norm_policy": "capped", "caps": np.ones(SIZE)},
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_training_is_opacus_own_bit_for_bit_under_every_policy(mode, workers):
    def run(engine):
        torch.manual_seed(7)
        module, made = prepared(engine, mode=mode, workers=workers, dropout=0.4)
        train(made, epochs=2)
        return weights(module), torch.get_rng_state(), engine.get_epsilon(DELTA)

    expected = run(PrivacyEngine(accountant="rdp"))
    for name, options in POLICIES.items():
        engine = PerInstancePrivacyEngine(accountant="rdp", **options)
        found = run(engine)
        assert torch.equal(found[0], expected[0]), name
        assert torch.equal(found[1], expected[1]), name
        assert found[2] == expected[2]
        assert engine.per_instance.unattributed_steps == 0
        assert engine.per_instance.steps == 10


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental:UserWarning")  # Opacus's own
@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp"])
def test_get_epsilon_is_opacus_own(accountant):
    epsilons = []
    for make in (PrivacyEngine, PerInstancePrivacyEngine):
        torch.manual_seed(8)
        engine = make(accountant=accountant)
        train(prepared(engine)[1])
        epsilons.append(engine.get_epsilon(DELTA))
    assert epsilons[0] == epsilons[1]


def test_noise_for_a_target_epsilon_is_opacus_own():
    noises = []
    for make in (PrivacyEngine, PerInstancePrivacyEngine):
        engine = make(accountant="rdp")
        module = convolutional()
        made = engine.make_private_with_epsilon(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(images(), batch_size=BATCH), target_epsilon=3.0,
            target_delta=DELTA, epochs=2, max_grad_norm=1.0,
        )  # fmt: skip
        noises.append(made[1].noise_multiplier)
    assert noises[0] == noises[1] == engine.kernel.noise_multiplier


def test_arguments_are_opacus_own():
    for name in ("make_private", "make_private_with_epsilon"):
        ours = inspect.signature(getattr(PerInstancePrivacyEngine, name)).parameters
        theirs = inspect.signature(getattr(PrivacyEngine, name)).parameters
        assert set(ours) - {"options", "loss_of"} <= set(theirs)  # the one argument of its own
        assert all(
            p.kind is p.KEYWORD_ONLY for n, p in ours.items() if n not in ("self", "options")
        )


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_full_pass_at_every_step_charges_the_true_norms(mode):
    torch.manual_seed(9)
    engine = PerInstancePrivacyEngine(norm_policy="refresh", refresh_every=1)
    module, made = prepared(engine, mode=mode)
    twin, dataset = convolutional(), images()
    truth = PerInstanceAccountant(SIZE)
    norms = []

    def exact():
        twin.load_state_dict(module.state_dict())
        norms.append(one_by_one_norms(twin, dataset, range(SIZE), CRITERION))

    exact()
    train(made, after=exact)
    for at_step in norms[:-1]:  # the charge is at the parameters the step was computed at
        truth.observe_all(np.minimum(at_step * (1 + 1e-5), BOUND) / BOUND)
        truth.step(indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.2)
    charged = engine.get_per_instance_epsilon(DELTA)
    assert charged.guarantee == "output_specific"
    # Both round up to a grid of 1 % spacing; 1e-5 more on one side moves a level at most.
    np.testing.assert_allclose(charged.epsilon, truth.get_epsilon(DELTA).epsilon, rtol=0.03)
    assert charged.epsilon.min() < 0.9 * charged.epsilon.max()  # the test can tell instances apart


def test_last_seen_charges_the_norm_of_the_last_batch_an_instance_was_in():
    torch.manual_seed(10)
    engine = PerInstancePrivacyEngine()
    module, made = prepared(engine)
    twin, dataset, truth = convolutional(), images(), PerInstanceAccountant(SIZE)
    wrapped, optimizer, loader = made
    emitted = loader.batch_sampler
    for inputs, targets in loader:
        twin.load_state_dict(module.state_dict())
        rows = [
            int((dataset.tensors[0] == x).flatten(start_dim=1).all(dim=1).nonzero()) for x in inputs
        ]
        norms = one_by_one_norms(twin, dataset, rows, CRITERION)
        truth.step(
            indices=rows, sensitivities=np.minimum(norms * (1 + 1e-5), BOUND) / BOUND,
            noise_multiplier=1.0, sample_rate=emitted.sample_rate,
        )  # fmt: skip
        optimizer.zero_grad()
        CRITERION(wrapped(inputs), targets).backward()
        optimizer.step()
    charged = engine.get_per_instance_epsilon(DELTA)
    assert charged.guarantee == "estimate"
    np.testing.assert_allclose(charged.epsilon, truth.get_epsilon(DELTA).epsilon, rtol=0.03)
    assert (charged.epsilon <= engine.per_instance.worst_case_epsilon(DELTA)).all()


def test_labels_claim_no_more_than_was_measured():
    def label(*, dropout=0.0, **options):
        torch.manual_seed(11)
        engine = PerInstancePrivacyEngine(**options)
        train(prepared(engine, dropout=dropout)[1])
        return engine.per_instance.guarantee

    assert label(norm_policy="worst_case") == "bound"
    assert label(norm_policy="capped", caps=np.full(SIZE, 0.5)) == "bound"
    assert label(norm_policy="refresh", refresh_every=1) == "output_specific"
    assert label(norm_policy="refresh", refresh_every=1, dropout=0.2) == "estimate"
    assert label(norm_policy="refresh", refresh_every=2) == "estimate"
    assert label() == "estimate"


def test_another_criterion_than_training_uses_is_noticed():
    torch.manual_seed(12)
    engine = PerInstancePrivacyEngine(norm_policy="refresh", refresh_every=1)
    _, made = prepared(engine, criterion=nn.CrossEntropyLoss(label_smoothing=0.5))
    with (
        pytest.warns(UserWarning, match="other gradient norms"),
        pytest.warns(UserWarning, match="are 'estimate' from now on, not 'output_specific'"),
    ):
        train(made)
    found = engine.get_per_instance_epsilon(DELTA)
    assert found.guarantee == "estimate"
    assert "other gradients in training than the named loss" in " ".join(found.reasons)


def test_worst_case_charges_everyone_alike_and_caps_charge_less():
    torch.manual_seed(13)
    worst = PerInstancePrivacyEngine(norm_policy="worst_case")
    train(prepared(worst)[1])
    epsilons = worst.get_per_instance_epsilon(DELTA).epsilon
    assert (epsilons == worst.per_instance.worst_case_epsilon(DELTA)).all()
    caps = np.linspace(0.0, 1.0, SIZE)
    capped = PerInstancePrivacyEngine(norm_policy="capped", caps=caps)
    train(prepared(capped)[1])
    assert (capped.per_instance.caps >= caps).all()  # rounding is charged upwards
    charged = capped.get_per_instance_epsilon(DELTA).epsilon
    assert (np.diff(charged) >= 0).all()
    assert charged[0] == 0.0
    assert charged[-1] == epsilons[0]


def test_caps_allow_a_peek_but_no_loop_that_fetches_ahead():
    torch.manual_seed(28)
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=np.full(SIZE, 0.5))
    module, made = prepared(engine)
    next(iter(made[2]))
    train(made)
    before = weights(module)
    ahead = list(made[2])  # which of them is the step's batch? Its caps would be a guess
    with pytest.raises(UnsupportedError, match="no loader had just handed it out"):
        train((made[0], made[1], ahead))
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_modules_with_hooks_but_no_wrapper_are_recorded_too(mode):
    torch.manual_seed(29)
    engine = PerInstancePrivacyEngine(norm_policy="refresh", refresh_every=2)
    module, made = prepared(engine, mode=mode, wrap_model=False)
    train((module, *made[1:]))
    assert engine.per_instance.steps == 5
    assert engine.per_instance.unattributed_steps == 0
    assert (engine.per_instance.sensitivities < 1.0).any()


def test_charges_follow_schedules_of_noise_and_clip_bound():
    torch.manual_seed(14)
    engine = PerInstancePrivacyEngine(norm_policy="refresh", refresh_every=100)
    module, made = prepared(engine)
    optimizer = made[1]
    batches = iter(made[2])
    truth, swept = PerInstanceAccountant(SIZE), None
    norms = one_by_one_norms(convolutional_like(module), images(), range(SIZE), CRITERION)
    for noise, bound in ((1.0, BOUND), (2.0, BOUND), (2.0, BOUND / 2), (0.5, 2 * BOUND)):
        optimizer.noise_multiplier, optimizer.max_grad_norm = noise, bound
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # parameters stand still: the norms stay those of the first pass
        inputs, targets = next(batches)
        optimizer.zero_grad()
        CRITERION(made[0](inputs), targets).backward()
        optimizer.step()
        swept = np.minimum(norms * (1 + 1e-5), bound) / bound
        truth.observe_all(swept)
        truth.step(indices=[], sensitivities=[], noise_multiplier=noise, sample_rate=0.2)
    np.testing.assert_allclose(
        engine.get_per_instance_epsilon(DELTA).epsilon, truth.get_epsilon(DELTA).epsilon, rtol=0.03
    )  # as above: grid spacing


def test_a_module_that_clips_to_more_than_the_noise_fits_is_charged_for_it():
    torch.manual_seed(15)
    engine = PerInstancePrivacyEngine(norm_policy="worst_case")
    _, made = prepared(engine, mode="ghost")
    made[1].max_grad_norm = BOUND / 4  # what a clip scheduler does; the module keeps its bound
    with pytest.warns(UserWarning, match="Opacus's own epsilon is not"):
        train(made)
    truth = PerInstanceAccountant(1)
    for _ in range(5):
        truth.step(indices=[], sensitivities=[], noise_multiplier=0.25, sample_rate=0.2)
    assert engine.get_per_instance_epsilon(DELTA).epsilon[0] == truth.get_epsilon(DELTA).epsilon[0]


def test_the_larger_of_accounted_and_drawn_rate_is_charged():
    engine = PerInstancePrivacyEngine(norm_policy="worst_case")
    # 93 batches of one: int(1 / (1 / 93)) is 92, so Opacus accounts at 1/92 and draws at 1/93.
    _, made = prepared(engine, size=93)
    assert engine.kernel.sample_rate == 1 / 8
    one = DataLoader(made[2].dataset, batch_size=1)
    module = convolutional()
    made = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=one,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert (len(made[2]), made[2].batch_sampler.sample_rate) == (92, 1 / 93)
    step = next(iter(made[2]))
    made[1].zero_grad()
    CRITERION(made[0](step[0]), step[1]).backward()
    made[1].step()
    truth = PerInstanceAccountant(1)
    truth.step(indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=1 / 92)
    assert engine.per_instance.rdp([0]).tolist() == truth.rdp().tolist()
    with pytest.raises(UnsupportedError, match="one training kernel"):
        _ = engine.kernel


def test_steps_that_match_no_rows_charge_everyone_the_worst_case():
    torch.manual_seed(16)
    engine = PerInstancePrivacyEngine()
    _, (wrapped, optimizer, loader) = prepared(engine)
    inputs, targets = images()[[1, 2, 3]]  # not from the loader
    with pytest.warns(UserWarning, match="worst case"):
        train((wrapped, optimizer, [(inputs, targets)] * 2))
    assert engine.per_instance.unattributed_steps == 2
    epsilons = engine.get_per_instance_epsilon(DELTA).epsilon
    assert (epsilons == engine.per_instance.worst_case_epsilon(DELTA)).all()
    inputs, targets = next(iter(loader))
    optimizer.zero_grad()
    CRITERION(wrapped(inputs[1:]), targets[1:]).backward()  # one row less than was drawn
    optimizer.step()
    assert engine.per_instance.unattributed_steps == 3


def test_explicit_rows_serve_custom_loops():
    torch.manual_seed(18)
    engine = PerInstancePrivacyEngine()
    _, (wrapped, optimizer, _) = prepared(engine)
    inputs, targets = images()[[4, 40]]
    with engine.batch(indices=[4, 40]):
        optimizer.zero_grad()
        CRITERION(wrapped(inputs), targets).backward()
        optimizer.step()
    assert engine.per_instance.unattributed_steps == 0
    known = engine.per_instance.sensitivities
    assert (np.delete(known, [4, 40]) == 1.0).all()
    with (
        pytest.raises(ValueError, match="indices"),
        engine.batch(indices=[4, 4]),
    ):
        pass


def test_refreshing_on_request_sets_every_level():
    torch.manual_seed(19)
    engine = PerInstancePrivacyEngine()
    module, _ = prepared(engine)
    found = engine.refresh_norms()
    truth = one_by_one_norms(convolutional_like(module), images(), range(SIZE), CRITERION)
    np.testing.assert_allclose(found.norms, truth, rtol=1e-4)  # float32, as in test_sweep
    held = engine.per_instance.sensitivities
    assert (held >= np.minimum(found.norms / BOUND, 1.0)).all()
    np.testing.assert_allclose(held, np.minimum(found.norms / BOUND, 1.0), rtol=0.01)  # the grid
    worst = PerInstancePrivacyEngine(norm_policy="worst_case")
    prepared(worst)
    with pytest.raises(UnsupportedError, match="norm policy"):
        worst.refresh_norms()


def convolutional_like(module):
    twin = convolutional()
    twin.load_state_dict(module.state_dict())
    return twin


def test_a_hook_of_the_user_does_not_stop_the_accounting():
    engine = PerInstancePrivacyEngine(accountant="rdp")
    _, made = prepared(engine)
    calls = []
    with pytest.warns(UserWarning, match="added after"):
        made[1].attach_step_hook(calls.append)
    train(made)
    assert len(calls) == engine.per_instance.steps == engine.accountant.history[0][2] == 5


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 6, 6), 0


REFUSED = {
    "no length": ({"data_loader": DataLoader(Stream(), batch_size=2)}, "to have a length"),
    "weighted": (
        {
            "data_loader": DataLoader(
                images(), batch_size=BATCH, sampler=WeightedRandomSampler(torch.ones(SIZE), SIZE)
            )
        },
        "WeightedRandomSampler",
    ),
    "part of the rows": (
        {
            "data_loader": DataLoader(
                images(), batch_size=BATCH, sampler=SubsetRandomSampler(range(20))
            )
        },
        "Subset",
    ),
    "sharded": ({"grad_sample_mode": "ghost_fsdp"}, "grad_sample_mode='ghost_fsdp'"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["make_private", "make_private_with_epsilon"])
def test_uses_without_a_sound_number_are_refused_before_anything_changes(case, method):
    options, message = REFUSED[case]
    engine = PerInstancePrivacyEngine()
    module = convolutional()
    arguments = {
        "module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
        "data_loader": DataLoader(images(), batch_size=BATCH), "max_grad_norm": 1.0,
    }  # fmt: skip
    if method == "make_private":
        arguments["noise_multiplier"] = 1.0
    else:
        arguments |= {"target_epsilon": 3.0, "target_delta": DELTA, "epochs": 1}
    with pytest.raises(UnsupportedError, match=message):
        getattr(engine, method)(**(arguments | options))
    assert engine.dataset is None
    assert not hasattr(module, "autograd_grad_sample_hooks")
    with pytest.raises(ValueError, match="make_private to be called first"):
        _ = engine.per_instance


def test_arguments_that_do_not_fit_each_other_are_refused():
    for options in (
        {"norm_policy": "refresh"},
        {"refresh_every": 3},
        {"norm_policy": "capped"},
        {"caps": [1.0]},
        {"budget": (1.0, 1e-5)},
        {"norm_policy": "full", "refresh_every": 2},
        {"norm_policy": "refresh", "refresh_every": 0},
        {"norm_policy": "newest"},
    ):
        with pytest.raises(ValueError, match="Expected"):
            PerInstancePrivacyEngine(**options)
    refresh = PerInstancePrivacyEngine(norm_policy="refresh", refresh_every=2)
    module = convolutional()
    with pytest.raises(ValueError, match="criterion to be named"):
        refresh.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(images(), batch_size=BATCH), noise_multiplier=1.0,
            max_grad_norm=1.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="caps"):
        prepared(PerInstancePrivacyEngine(norm_policy="capped", caps=np.ones(SIZE - 1)))
    used = PerInstancePrivacyEngine()
    prepared(used)
    with pytest.raises(UnsupportedError, match="data set of 60"):
        prepared(used, size=30)


def test_the_kernel_is_what_the_training_ran_with():
    engine = PerInstancePrivacyEngine()
    _, made = prepared(engine, size=100, noise_multiplier=1.5)
    kernel = engine.kernel
    assert kernel.sample_rate == made[2].batch_sampler.sample_rate == 1 / 9  # ceil(100 / 12) = 9
    assert kernel.expected_batch_size == made[1].expected_batch_size == 11
    assert (kernel.noise_multiplier, kernel.max_grad_norm) == (1.5, BOUND)
    assert (kernel.loss_reduction, kernel.grad_sample_mode) == ("mean", "hooks")
    assert (kernel.batch_first, kernel.num_instances) == (True, 100)


def on_population(engine, population, *, steps, module=None, seed=0):
    module = convolutional() if module is None else module
    made = engine.make_private_on(
        population, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        dataset=images(), criterion=nn.CrossEntropyLoss(), steps=steps,
        noise_generator=torch.Generator().manual_seed(seed),
        sampler_generator=torch.Generator().manual_seed(seed + 1),
    )  # fmt: skip
    return module, made


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("policy", ["worst_case", "last_seen", "refresh"])
def test_a_population_is_trained_with_the_kernel_of_training(mode, policy):
    torch.manual_seed(20)
    every = 3 if policy == "refresh" else None
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy=policy, refresh_every=every)
    _, first = prepared(engine, mode=mode)
    train(first)
    population = np.arange(10, SIZE)
    engine.per_instance.forget(np.arange(10))
    spent = engine.per_instance.rdp(np.arange(10))
    _, made = on_population(engine, population, steps=7)
    assert len(made) == len(first)
    optimizer, loader = made[1], made[-1]
    assert (optimizer.expected_batch_size, optimizer.noise_multiplier) == (12, 1.0)
    assert (optimizer.max_grad_norm, len(loader)) == (BOUND, 7)
    train(made)
    assert engine.per_instance.steps == 12
    assert engine.per_instance.unattributed_steps == 0
    assert engine.accountant.history == [(1.0, 0.2, 12)]  # one unchanged kernel all along
    # The ledger reports its own rounding error on top, which grows with the steps: upwards only.
    after = engine.per_instance.rdp(np.arange(10))
    np.testing.assert_allclose(after, spent, rtol=1e-9)


def test_the_whole_population_is_trained_as_make_private_would():
    found = []
    for way in ("make_private", "make_private_on"):
        torch.manual_seed(21)
        engine = PerInstancePrivacyEngine()
        module, made = prepared(engine)
        if way == "make_private_on":
            torch.manual_seed(21)
            module = convolutional()
            made = engine.make_private_on(
                np.arange(SIZE), module=module,
                optimizer=torch.optim.SGD(module.parameters(), lr=0.1), dataset=images(), steps=5,
            )  # fmt: skip
        train(made)
        found.append(weights(module))
    assert torch.equal(*found)


def test_populations_that_do_not_fit_are_refused():
    engine = PerInstancePrivacyEngine()
    with pytest.raises(ValueError, match="make_private to be called first"):
        on_population(engine, [0], steps=1)
    module, made = prepared(engine)
    for population, message in (([], "population"), ([SIZE], "population"), ([1, 1], "population")):
        with pytest.raises((ValueError, TypeError), match=message):
            on_population(engine, population, steps=1)
    with pytest.raises(ValueError, match="steps"):
        on_population(engine, [0], steps=0)
    with pytest.raises(ValueError, match="plain module"):
        on_population(engine, [0], steps=1, module=module)
    with pytest.raises(ValueError, match="parameters of module"):
        engine.make_private_on(
            [0], module=convolutional(), optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters()),
            dataset=images(), steps=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="training set of 60"):
        engine.make_private_on(
            [0], module=convolutional(), optimizer=made[1].original_optimizer,
            dataset=images(30), steps=1,
        )  # fmt: skip


def test_a_fork_charges_copies_until_it_is_adopted():
    torch.manual_seed(22)
    engine = PerInstancePrivacyEngine(accountant="rdp")
    train(prepared(engine)[1])
    before = engine.per_instance.rdp().copy(), engine.get_epsilon(DELTA)
    fork = engine.fork()
    assert fork.kernel == engine.kernel
    train(on_population(fork, np.arange(30), steps=4)[1])
    assert (engine.per_instance.rdp() == before[0]).all()
    assert engine.get_epsilon(DELTA) == before[1]
    assert fork.per_instance.steps == 9
    ledger = engine.per_instance
    engine.adopt(fork)
    assert engine.per_instance is ledger  # whoever holds it sees the charges
    assert (ledger.rdp() == fork.per_instance.rdp()).all()
    assert engine.get_epsilon(DELTA) == fork.get_epsilon(DELTA) > before[1]
    fork.account.charge_without_noise(1)
    assert engine.get_epsilon(DELTA) < np.inf  # adopted ledgers are copies


def test_adopting_never_loses_a_charge():
    torch.manual_seed(23)
    engine = PerInstancePrivacyEngine()
    _, made = prepared(engine)
    fork = engine.fork()
    train(made)
    with pytest.raises(LedgerError, match="5"):
        engine.adopt(fork)
    with pytest.raises(LedgerError, match="fork of this engine"):
        engine.adopt(PerInstancePrivacyEngine())
    assert engine.per_instance.steps == 5


def test_forks_keep_caps_and_may_fall_back_to_the_worst_case():
    torch.manual_seed(24)
    capped = PerInstancePrivacyEngine(norm_policy="capped", caps=np.full(SIZE, 0.5))
    train(prepared(capped)[1])
    fork = capped.fork()
    train(on_population(fork, np.arange(30), steps=2)[1])
    assert fork.per_instance.guarantee == "bound"
    with pytest.raises(ValueError, match="caps"):
        capped.fork(norm_policy="last_seen")
    seen = PerInstancePrivacyEngine()
    train(prepared(seen)[1])
    worst = seen.fork(norm_policy="worst_case")
    train(on_population(worst, np.arange(30), steps=1)[1])
    truth = PerInstanceAccountant(1)
    truth.step(indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.2)
    grown = worst.per_instance.rdp() - seen.per_instance.rdp()
    # A difference of sums: rounding of the larger operands only.
    np.testing.assert_allclose(grown, np.tile(truth.rdp(), (SIZE, 1)), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="caps"):
        seen.fork(norm_policy="capped")


def test_saved_ledgers_go_on_where_they_stopped():
    results = []
    for interrupted in (False, True):
        torch.manual_seed(25)
        engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy="refresh", refresh_every=4)
        module, made = prepared(engine)
        train(made)
        if interrupted:
            state = engine.account.state()
            rng = torch.get_rng_state()
            heir = PerInstancePrivacyEngine(
                accountant="rdp", norm_policy="refresh", refresh_every=4
            )
            twin, made = prepared(heir)
            twin.load_state_dict(module.state_dict())
            heir.account.load_state(state)
            torch.set_rng_state(rng)
            engine = heir
        train(made)
        results.append((engine.per_instance.rdp(), engine.get_epsilon(DELTA)))
    assert (results[0][0] == results[1][0]).all()
    assert results[0][1] == results[1][1]
    other = PerInstancePrivacyEngine(accountant="prv")
    prepared(other)
    with pytest.raises(LedgerError, match="prv"):
        other.account.load_state(state)


def test_noise_free_steps_cost_everyone_everything():
    engine = PerInstancePrivacyEngine(accountant="prv")
    prepared(engine)
    engine.account.charge_without_noise(2)
    assert engine.get_epsilon(DELTA) == np.inf
    assert (engine.get_per_instance_epsilon(DELTA).epsilon == np.inf).all()
    assert engine.per_instance.steps == 2


def test_checkpoints_of_opacus_still_work(tmp_path):
    torch.manual_seed(26)
    engine = PerInstancePrivacyEngine(accountant="rdp")
    _, made = prepared(engine)
    train(made)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=made[0], optimizer=made[1])
    plain = PrivacyEngine(accountant="rdp")
    _, other = prepared(plain)
    plain.load_checkpoint(path=tmp_path / "run.pt", module=other[0], optimizer=other[1])
    assert plain.get_epsilon(DELTA) == engine.get_epsilon(DELTA)


def test_empty_draws_are_charged_like_any_step():
    torch.manual_seed(27)
    engine = PerInstancePrivacyEngine()
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    data = TensorDataset(*images(12).tensors)
    made = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=1), noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    sizes = []
    for inputs, targets in made[2]:
        sizes.append(len(inputs))
        made[1].zero_grad()
        CRITERION(made[0](inputs), targets).backward()
        made[1].step()
    assert 0 in sizes  # 12 draws, each empty with probability (11/12)^12 = 0.35; the seed is fixed
    assert engine.per_instance.steps == 12
    assert engine.per_instance.unattributed_steps == 0
