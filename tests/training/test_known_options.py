"""Keywords of make_private: what Opacus takes is known, everything else is a mistake."""

from __future__ import annotations

import inspect

import pytest
from opacus import PrivacyEngine
from opacus.optimizers import AdaClipDPOptimizer

import opacus_pil
from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.accounting import PerInstanceAccountant
from opacus_pil.evaluation import calibrate
from opacus_pil.heads import caps_from_public_model
from opacus_pil.training.support import known_options, require_known_options


def test_what_opacus_takes_is_known():
    required = {
        "poisson_sampling", "clipping", "noise_generator", "grad_sample_mode", "loss_reduction",
        "batch_first", "wrap_model", "rand_on_empty", "target_unclipped_quantile", "alphas",
        "eps_error", "target_epsilon", "target_delta", "epochs",
    }  # fmt: skip
    assert required <= known_options()
    for function in (PrivacyEngine.make_private, PrivacyEngine.make_private_with_epsilon):
        names = set(inspect.signature(function).parameters) - {"self", "kwargs"}
        assert names <= known_options()
    adaptive = set(inspect.signature(AdaClipDPOptimizer.__init__).parameters)
    assert {"clipbound_learning_rate", "unclipped_num_std"} <= adaptive & known_options()
    require_known_options(dict.fromkeys(known_options()))


def test_a_catch_all_is_no_keyword():
    assert "kwargs" not in known_options()
    with pytest.raises(TypeError, match="unknown one: 'kwargs'"):
        require_known_options({"kwargs": 1})


@pytest.mark.parametrize(
    "name", ["instance_ids", "norm_policy", "caps", "budget", "history", "orders"]
)
def test_keywords_of_the_engine_are_sent_there(name):
    with pytest.raises(TypeError, match=rf"PerInstancePrivacyEngine\({name}="):
        require_known_options({name: 1})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("poison_sampling", "poisson_sampling"), ("noise_genarator", "noise_generator"),
     ("grad_sampling_mode", "grad_sample_mode"), ("clippin", "clipping"),
     ("lossreduction", "loss_reduction")],
)  # fmt: skip
def test_typos_are_named_with_what_was_meant(typo, meant):
    with pytest.raises(TypeError, match=rf"'{typo}'. Did you mean '{meant}'"):
        require_known_options({"clipping": "flat", typo: True})


def test_nonsense_has_no_nearest():
    with pytest.raises(TypeError, match="Leave it out"):
        require_known_options({"zzz_qqq": 1})


@pytest.mark.parametrize(
    ("call", "typo", "meant"),
    [
        (lambda **k: PerInstancePrivacyEngine(**k), "instance_id", "instance_ids"),
        (lambda **k: UnlearningEngine(None, optimizer=None, **k), "datset", "dataset"),
        (lambda **k: UnlearningEngine.plan(None, [0], **k), "step", "steps"),
        (lambda **k: opacus_pil.replay("run", **k), "noise_multiplyer", "noise_multiplier"),
        (lambda **k: opacus_pil.audit(None, **k), "held_ot", "held_out"),
        (lambda **k: PerInstanceAccountant(3, **k), "cap", "caps"),
        (lambda **k: calibrate(None, **k), "max_step", "max_steps"),
        (lambda **k: caps_from_public_model(None, None, **k), "flor", "floor"),
    ],
)
def test_a_typo_in_any_facade_is_told_what_was_meant(call, typo, meant):
    with pytest.raises(TypeError, match=rf"unknown one: '{typo}'. Did you mean '{meant}'\?"):
        call(**{typo: 1})


def test_a_wrapped_call_keeps_signature_docstring_and_python_s_other_refusals():
    names = inspect.signature(PerInstancePrivacyEngine).parameters
    assert {"norm_policy", "instance_ids"} <= set(names)
    assert "Forget instances" in (UnlearningEngine.__doc__ or "")
    assert "before anything runs" in (UnlearningEngine.plan.__doc__ or "")
    with pytest.raises(TypeError, match="positional"):
        PerInstancePrivacyEngine("prv")


def test_a_misspelt_choice_is_told_what_was_meant():
    with pytest.raises(ValueError, match=r"got norm_policy='ful'\. Did you mean 'full'"):
        PerInstancePrivacyEngine(norm_policy="ful")
    with pytest.raises(ValueError, match="norm_policy=3"):
        PerInstancePrivacyEngine(norm_policy=3)


def test_a_budget_the_wrong_way_round_is_refused_by_the_constructor():
    with pytest.raises(ValueError, match=r"=2.0. The order is \(epsilon, delta\)"):
        PerInstancePrivacyEngine(norm_policy="capped", budget=(1e-3, 2.0))
    with pytest.raises(ValueError, match="budget"):
        PerInstancePrivacyEngine(norm_policy="capped", budget=(1.0, 1e-5, 3))
