"""Every sentence that a certificate can say, by its code; numbers are left open.

Knows words only: which code holds is said by the certificate's class, or by its `context`. A
certificate file holds codes, so nobody can put other words into its mouth. A code never changes
its meaning: another meaning is another code. Adding one is adding a line.

Numbers: {name:g} is a number, {name:d} a count, {name:list} several counts,
{name:names} names of classes.
"""

# What whoever derived a certificate's constants may add: the codes of `context`.
CONTEXT: dict[str, str] = {
    # about the training that the certificate speaks of, without numbers
    "rows_independent_not_checked": (
        "The loss of each instance depends on its own row alone, not on the other rows of its "
        "batch; this was not checked."
    ),
    "order_given_by_caller": (
        "Which instance a row of a batch belongs to is as the caller said; this was not checked."
    ),
    "dataset_not_fingerprinted": (
        "Training and unlearning read the same instances in the same order; the data set has no "
        "fingerprint, and this was not checked."
    ),
    "fingerprint_given_by_caller": (
        "The fingerprint of the data set was given by the caller; that it belongs to the instances "
        "that were read was not checked."
    ),
    "frozen_part_is_public": (
        "The part of the model that is not trained was fixed before training and never saw the "
        "private data."
    ),
    "augmentation_random": (
        "Instances are augmented at random, each from its own row and its own random numbers "
        "alone, so that both runs can draw the same; the bounds hold whatever is drawn."
    ),
    "labels_without_evidence": (
        "The ledger's label was written by a release that did not check the steps: it says how "
        "training was configured, not what its steps showed."
    ),
    "supplied_by_caller": (
        "The certificate was supplied by the caller; that it describes this run was not checked."
    ),
    # DP-SGD with fixed caps on a model with one linear output; `derivation` checks the numbers
    "one_linear_output": (
        "The model has one linear output, and every record's features have norm at most "
        "{feature_norm:g}, the constant feature of a bias included."
    ),
    "smooth_convex_loss": (
        "The loss is convex in that output, and its derivative changes by at most "
        "{loss_smoothness:g} per unit; it contains no L2 term."
    ),
    "capped_gradients": (
        "Per-sample gradients are clipped to {max_grad_norm:g} times a cap fixed before the run, "
        "from public data and the instance's own record only; the {members:d} forgotten ones have "
        "caps summing to {cap_sum:.6g}."
    ),
    # the same with one output per class, trained and clipped one by one
    "separate_linear_outputs": (
        "The model has one linear output per class, each with parameters of its own, and every "
        "record's features have norm at most {feature_norm:g}, the constant feature of a bias "
        "included."
    ),
    "smooth_convex_losses": (
        "The loss is a sum over the outputs of terms that are convex in one output each, whose "
        "derivative changes by at most {loss_smoothness:g} per unit; it contains no L2 term."
    ),
    "capped_outputs": (
        "The per-sample gradient of each output is clipped to a bound of its own (together "
        "{max_grad_norm:g}) times a cap per instance and output, fixed before the run from public "
        "data and the instance's own record only; the {members:d} forgotten ones move the sum of "
        "gradients by at most {cap_sum:.6g} times that bound."
    ),
    "clip_never_binds": (
        "The model's outputs are linear in features of norm at most {feature_norm:g}, a bias "
        "included; the loss is convex in all outputs together, its gradient in them is at most "
        "{steepness:g} long and {loss_smoothness:g}-Lipschitz, and it contains no L2 term; no "
        "gradient reaches its clip."
    ),
    "bounded_gradients": (
        "Per-sample gradients are at most {max_grad_norm:g} times a number that the instance's own "
        "record gives; for the {members:d} forgotten ones these sum to {cap_sum:.6g}."
    ),
    "full_batch": (
        "Every step uses the full batch of at most {num_instances:d} instances, divides by "
        "{expected_batch_size:g} and adds noise {noise_multiplier:g} times {max_grad_norm:g} to "
        "the sum, whether or not the forgotten instances take part."
    ),
    "decoupled_decay": (
        "Weight decay {weight_decay:g} is decoupled from clipping; the step size is {step_size:g}."
    ),
    "noise_burst": (
        "The first unlearning step adds {burst:g} times the noise of the others, a number chosen "
        "without a look at the model."
    ),
    # batches that were fixed before the run
    "batches_fixed_before": (
        "The batches were fixed before the run, or drawn without looking at the data and are "
        "public; without the forgotten instances their places stay empty."
    ),
    "constant_divisor": (
        "Every gradient sum is divided by {expected_batch_size:g}, weight decay {weight_decay:g} "
        "is decoupled from clipping, and the step size is {step_size:g}."
    ),
    "convex_retained": (
        "Each retained instance adds the gradient of a convex function, {smoothness:g}-Lipschitz; "
        "a batch of unlearning has at most {unlearning_batch_size:d} of them."
    ),
    # several requests
    "requests_in_turn": (
        "{requests:d} requests are served one after the other, each without looking at a model "
        "released in between; the forgotten instances are those of all requests, and each takes "
        "part until its own request is served."
    ),
    "phase_steps": (
        "Training took the first of the given numbers of steps, unlearning all requests but the "
        "last took the others: {phase_steps:list}."
    ),
    # full-batch Langevin in the setting of Chien et al. (2024)
    "replaced_records": (
        "With the old and with the new records, the averaged loss of {num_instances:d} records is "
        "{strong_convexity:g}-strongly convex and {smoothness:g}-smooth; {num_deleted:d} records "
        "are replaced, each with gradients of norm at most {gradient_bound:g}."
    ),
    "full_batch_descent": (
        "Training and unlearning are full-batch gradient descent with step size {step_size:g} and "
        "fresh Gaussian noise of variance 2·{step_size:g}·{langevin_sigma:g}² on every parameter, "
        "with or without projection to one convex set; no momentum."
    ),
    "stationary_start": (
        "Training has reached its stationary law, and the reference is the stationary law on the "
        "retained data: a finite burn-in is not in the formula."
    ),
}

_CURVE = (
    "The given Rényi curve ({last_rdp:.6g} at its largest order {last_order:g}) bounds the "
    "divergence "
)
_TRANSCRIPTS = (
    "between the whole training transcripts with and without the forgotten instances: every noisy "
    "gradient, hence the model and the optimizer state."
)
_LSI = "The declared log-Sobolev constant {lsi_constant:g} holds for the "
_NOT_FITTED = " and is not fitted to observed decay."
_OWN_LAW = " The unlearned law obeys the same constant at every step."

# What the classes say of themselves.
OWN: dict[str, str] = {
    # Of every certificate that speaks of the last model alone: given an earlier one, the noise
    # that is to hide the difference is known.
    "not_adaptive": (
        "Who is forgotten was chosen without a look at a model released before, this request's and "
        "all earlier ones'."
    ),
    "same_constants": (
        "Step size, clipping, noise, decay and the number of steps are the same constants in both "
        "runs and do not depend on the data; arithmetic is exact."
    ),
    "memoryless_steps": (
        "There is no momentum, no dropout, no BatchNorm and no stopping on a private signal."
    ),
    # ContractionCertificate
    "contracting_steps": (
        "On the retained data one noiseless training step brings two models to at most "
        "{contraction:g} times their distance, an unlearning step to {unlearning_contraction:g} "
        "times."
    ),
    "noise_every_step": (
        "Each training step adds fresh Gaussian noise of standard deviation {noise_std:g} to every "
        "parameter, each unlearning step {unlearning_noise_std:g}."
    ),
    "first_step_noise": (
        "The first unlearning step adds noise of standard deviation {first_noise_std:g} instead."
    ),
    "bounded_shifts": (
        "At each of the {shifts:d} training steps the forgotten instances move the result by at "
        "most the given shift, whatever the model is (largest {largest:.6g}, total {total:.6g}); "
        "no unlearning step uses them."
    ),
    "initial_distance": (
        "Before the first step the two runs are almost surely at most {initial_distance:g} apart, "
        "under a coupling independent of the noise."
    ),
    "reference_all_steps": (
        "The reference is retraining on the retained data from the same initialisation, for as "
        "many steps as training and unlearning together, with the same constants."
    ),
    # PoissonContractionCertificate
    "poisson_batches": (
        "Every batch of training and unlearning is drawn by Poisson sampling: each instance by its "
        "own coin of probability {sample_rate:g}, whatever the data are; no shuffled epochs."
    ),
    "poisson_step": (
        "A step is θ ← (1 − {step_size:g}·{weight_decay:g})θ − {step_size:g}/"
        "{expected_batch_size:g} · (sum of the batch's gradients) + fresh Gaussian noise of "
        "standard deviation {noise_std:g} on every parameter; the divisor is that constant, "
        "whatever was drawn and whoever was forgotten."
    ),
    "retained_convex": (
        "Each of the {num_retained:d} retained instances adds the gradient of a convex function, "
        "{smoothness:g}-Lipschitz, which depends on no other instance."
    ),
    "forgotten_bounded": (
        "Whatever the model is, the {members:d} forgotten instances' gradients have norms at most "
        "{largest:g}, in sum at most {total:.6g}; no unlearning step uses them."
    ),
    "reference_counted_steps": (
        "The reference is retraining on the retained data from the same initialisation, for as "
        "many steps as training ({training_steps:d}) and unlearning together, with the same "
        "constants."
    ),
    # LangevinCertificate
    "log_sobolev_retrained": (
        _LSI + "law retrained on the retained data, when unlearning starts," + _NOT_FITTED
    ),
    "log_sobolev_retrained_both": (
        _LSI
        + "law retrained on the retained data, when unlearning starts,"
        + _NOT_FITTED
        + _OWN_LAW
    ),
    "log_sobolev_stationary": (
        _LSI + "stationary law of the unlearning step on the retained data" + _NOT_FITTED
    ),
    "log_sobolev_stationary_both": (
        _LSI + "stationary law of the unlearning step on the retained data" + _NOT_FITTED + _OWN_LAW
    ),
    "lipschitz_full_batch": (
        "Every unlearning step is one full-batch map, {lipschitz:g}-Lipschitz without its noise, "
        "then fresh Gaussian noise of standard deviation {noise_std:g} on every parameter, then at "
        "most a projection to a convex set."
    ),
    "start_from_retrained": (
        _CURVE + "of the trained from the retrained law when unlearning starts."
    ),
    "start_from_retrained_both": (
        _CURVE + "of the trained from the retrained law when unlearning starts, and the reverse "
        "one."
    ),
    "start_from_stationary": _CURVE + "of the trained law from that stationary law.",
    "start_from_stationary_both": (
        _CURVE + "of the trained law from that stationary law, and the reverse one."
    ),
    "reference_same_horizon": (
        "The reference is retraining on the retained data for as many steps as training and "
        "unlearning together, with the same constants."
    ),
    "reference_stationary": (
        "The reference is retraining on the retained data for infinitely many steps: the "
        "stationary law itself."
    ),
    "reference_retrained": (
        "The reference is retraining on the retained data for as many steps as training; the given "
        "functions bound its divergences to and from the stationary law, and what lies between the "
        "two is never unlearned."
    ),
    "plain_langevin_steps": (
        "Step size, noise and the number of steps do not depend on the data; there is no momentum, "
        "no dropout, no BatchNorm, no batch sampling, and no clipping but what the Lipschitz "
        "constant accounts for."
    ),
    # Chien2024Certificate
    "published_rate": (
        "The rate exp(−Kηm/α), the constant 4 at K = 0 and the conversion D + log(1/δ)/(α − 1) are "
        "the authors'; all three are valid and looser than needed."
    ),
    "step_grid": "`steps_for` starts at one step and tries every number {step_grid:d} apart.",
    # NoisyFineTuningCertificate
    "model_clipped": (
        "Before the first step the model is projected to norm {model_clip:g}; so is the retrained "
        "one."
    ),
    "model_clipped_near": (
        "Before the first step the model is projected to norm {model_clip:g}, and under a coupling "
        "the two models are almost surely at most {initial_distance:g} apart; so is the retrained "
        "one."
    ),
    "averaged_gradient_clipped": (
        "At each step the averaged batch gradient (not each sample's) is clipped to norm "
        "{gradient_clip:g} and multiplied by the step size {step_size:g}."
    ),
    "shrinking_model": (
        "Weight decay {weight_decay:g} is decoupled: the model shrinks by the factor {factor:g} "
        "per step."
    ),
    "constant_noise": (
        "Each step adds fresh Gaussian noise of standard deviation {noise_std:g} to every "
        "parameter."
    ),
    "noise_schedule": (
        "Each step adds fresh Gaussian noise of standard deviation {least:g} to {most:g}, by a "
        "schedule of {values:d} steps fixed before the first one (later steps are not counted), to "
        "every parameter."
    ),
    "nothing_carried": "No momentum and no other state is carried between unlearning steps.",
    "blind_batches": (
        "Batches come from the retained data by a rule that does not look at the model, so that "
        "both runs can draw the same ones."
    ),
    "reference_any_training": (
        "The reference is any model trained without the forgotten instances, then fine-tuned by "
        "the same steps."
    ),
    "public_settings": (
        "Step size, clips, noise and the number of steps do not depend on the forgotten data."
    ),
    # DataProcessingCertificate
    "training_curve": _CURVE + "of with against without " + _TRANSCRIPTS,
    "training_curve_both": _CURVE + "in both directions " + _TRANSCRIPTS,
    "reference_same_unlearning": (
        "The reference is retraining on the retained data with the same constants, followed by the "
        "same unlearning steps."
    ),
    "retained_data_only": "The unlearning steps use the transcript and the retained data only.",
    "nothing_else_carried": (
        "Nothing else carries data from training: no BatchNorm buffers, no data-dependent "
        "hyperparameters, no choice among several runs."
    ),
    # BestCertificate
    "least_of": (
        "Each number is the least of {members:d} certificates ({names:names}) of the same forget "
        "set, training run and unlearning steps, and rests on the assumptions of the one that "
        "gives it; which certificates are compared does not depend on the data."
    ),
}

SENTENCES = {**OWN, **CONTEXT}
