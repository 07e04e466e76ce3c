"""CertifiedClassifier: scikit-learn's estimator around a head whose rows can be forgotten.

Knows X, y and who is public; how a head is trained is `head_training.py`, what is proved about
forgetting is the unlearning engine's.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
from torch import nn
from torch.utils.data import TensorDataset

from .. import _validate as check
from .._validate import FloatArray
from ..capture.randomness import untouched_generators
from ..errors import CertificateError
from ..exposure import PerInstanceEpsilon
from ..heads import FrozenFeatures
from ..unlearning import UnlearningEngine
from ..unlearning.plan import CertifiedPlan
from ..unlearning.result import CertifiedResult
from .forgotten import Forgotten
from .head_features import HeadFeatures
from .head_training import (
    FEATURE_NORM,
    HeadConstants,
    caps_by_public_rows,
    quiet_hooks,
    trained,
)
from .split_rows import SplitRows, private_rows


class CertifiedClassifier(ClassifierMixin, BaseEstimator):
    """A linear classifier, trained with privacy, that forgets rows with a certificate.

    One logistic output per class on features of bounded norm, trained on all rows at every step
    with noise, as in `docs/certified_heads.md`. `fit` spends privacy anew each time it is called:
    a search over parameters by cross-validation on private rows is covered by no number here.

    Guarantee: after `forget`, `verify` recomputes that the model is (ε, δ)-indistinguishable, both
        ways, from one retrained without these rows, under the assumptions that the certificate
        lists; `per_instance_epsilon` has the label "bound". Both take as given what the caller
        says is public, and the number of rows and the labels (`classes`) as public.

    Args:
        noise_std: Noise on every parameter at every step, > 0. More noise: fewer steps to forget,
            less accuracy.
        weight_decay: λ of SGD, > 0. A larger one contracts faster.
        training_steps: Full-batch steps. None: 7/(step size · λ).
        target: (epsilon, delta, steps) of a later deletion of one row: noise_std and weight_decay,
            and training_steps unless it is given, are then chosen on the public rows, by
            `UnlearningEngine.suggest`. Needs public rows of every class.
        cap_factor, cap_floor: Caps are factor times the gradient at a public model, plus floor.
        classes: All labels, known beforehand. None: those of the public rows, or without public
            rows those in y: that a label occurs at all is then taken to be public.
        frozen: Network in torch that maps (batch, columns) to (batch, width), trained without the
            private rows. None: the columns are the features.
        feature_scale: Without public rows: X is divided by it, a constant that is not computed
            from X. Rows longer than 0.7 of it are shortened to that length.
        random_state: Seed of the noise. Whoever knows it can remove the noise: fix it in
            experiments only. None: from the system's own entropy, and not kept.
        progress: Show progress bars when the output is a terminal.

    Attributes:
        classes_: Labels, shape (classes,).
        head_: The plain `heads.OneVsRest` as it is now.
        features_: From rows of X to its inputs.
        caps_: Shape (private rows, classes).
        constants_: Of the run.
        engine_: The `PerInstancePrivacyEngine`, with both ledgers.
        unlearning_: The `UnlearningEngine`; for a durable queue of requests see
            docs/certified_heads.md.
        scikit-learn's own too: `n_features_in_`, `feature_names_in_`.

    Public rows: without `public` or `public_size` every cap is 1, the worst case, and X is only
        divided by `feature_scale`. Nothing becomes unsafe; a deletion takes more steps, since a
        certificate then has to assume that each row pulled with all it was allowed to.
    No statistic of private rows is computed before training. A `StandardScaler`, an imputer or a
        feature selection that was fitted on them voids what is said here, in a Pipeline too: fit
        it on public rows.

    Privacy: caps, per-instance values and the steps of a deletion are private. So is a pickle of
        the estimator: it holds the rows' features and the ledgers. Release predictions or `head_`.
    """

    def __init__(
        self, *, noise_std: float = 0.1, weight_decay: float = 1e-3,
        training_steps: int | None = None, target: tuple[float, float, int] | None = None,
        cap_factor: float = 1.5, cap_floor: float = 0.02, classes: Sequence[Any] | None = None,
        frozen: nn.Module | None = None, feature_scale: float = 1.0, random_state: Any = None,
        progress: bool = False,
    ) -> None:  # fmt: skip
        self.noise_std = noise_std
        self.weight_decay = weight_decay
        self.training_steps = training_steps
        self.target = target
        self.cap_factor = cap_factor
        self.cap_floor = cap_floor
        self.classes = classes
        self.frozen = frozen
        self.feature_scale = feature_scale
        self.random_state = random_state
        self.progress = progress

    def fit(
        self, X: Any, y: Any, *, ids: npt.ArrayLike | None = None,
        public: tuple[Any, Any] | None = None, public_size: int | None = None,
    ) -> Self:  # fmt: skip
        """Train on the private rows.

        Args:
            X: Shape (rows, columns), finite.
            y: Labels, shape (rows,).
            ids: Who each row of X is: texts or integers, shape (rows,). With ids every call that
                names rows takes ids. Default: rows are called by their number in X.
            public: (X0, y0), rows that are nobody's secret and not in X.
            public_size: In its place: so many rows at the beginning of X are public. They give
                caps and scale, and are neither trained on nor accounted for.

        Raises:
            ValueError, TypeError: A parameter, a label or a row outside of what is said above.
            CertificateError: `target` is out of reach.
        """
        constants, scale = self._checked_constants()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        split = SplitRows.of(
            (X, y), ids=ids, public=self._checked_public(public), public_size=public_size,
            classes=self.classes,
        )  # fmt: skip
        features = self._fixed_features(split, scale)
        data = FrozenFeatures(
            TensorDataset(torch.tensor(split.rows), split.numbers), features,
            progress=self.progress,
        )  # fmt: skip
        classes = len(split.classes)
        caps: FloatArray = np.ones((len(data), classes))
        if split.public_rows is None or split.public_numbers is None:
            if self.target is not None:
                raise ValueError(
                    "Expected public rows to choose constants by, got target without any. Pass "
                    "public= or public_size=, or noise_std and weight_decay in place of target."
                )
        else:
            known = TensorDataset(
                torch.as_tensor(features.of(split.public_rows)).float(), split.public_numbers
            )
            with untouched_generators():
                constants = self._suggested(known, classes=classes, size=len(data)) or constants
                caps = caps_by_public_rows(
                    known, data, constants=constants, classes=classes, factor=self.cap_factor,
                    floor=self.cap_floor,
                )  # fmt: skip
        seeds = _seeds(self.random_state)
        with untouched_generators():  # noise comes from one of its own
            engine, unlearning = trained(
                data, constants=constants, classes=classes, caps=caps, instance_ids=split.names,
                seed=_next_seed(seeds), progress=self.progress,
            )  # fmt: skip
        # All at once, so that a fit that fails leaves an earlier one as it was.
        self.classes_, self.features_, self.caps_ = split.classes, features, caps
        self.constants_, self.engine_, self.unlearning_ = constants, engine, unlearning
        self._start, self._seeds = split.start, seeds
        return self

    # --- predictions --------------------------------------------------------------------------

    @property
    def head_(self) -> nn.Module:
        """The plain head as it is now: trained, or unlearned by the last `forget`."""
        return self.unlearning_.module

    def decision_function(self, X: Any) -> FloatArray:
        """Return logits, shape (rows, classes); of two classes the second's half lead, (rows,)."""
        logits = self._logits(X)
        return (logits[:, 1] - logits[:, 0]) / 2.0 if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> FloatArray:
        """Return probabilities, shape (rows, classes).

        Of two classes the logistic function of `decision_function`; of more each output's own
        probability, divided by their sum. They are not calibrated.
        """
        logits = self._logits(X)
        if len(self.classes_) == 2:
            logits = logits - logits.mean(axis=1, keepdims=True)
        single = np.exp(-np.logaddexp(0.0, -logits))
        found: FloatArray = single / single.sum(axis=1, keepdims=True)
        return found

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return the label of the largest logit, shape (rows,)."""
        best = self._logits(X).argmax(axis=1)
        found: npt.NDArray[Any] = self.classes_[best]
        return found

    # --- privacy ------------------------------------------------------------------------------

    def per_instance_epsilon(self, delta: float) -> PerInstanceEpsilon:
        """Return what the model gives away about each private row, by id, with its label.

        Args:
            delta: In (0, 1).

        Privacy: private data itself.
        """
        check_is_fitted(self)
        return self.engine_.get_per_instance_epsilon(delta)

    def forget(
        self, ids: npt.ArrayLike | None = None, *, rows: npt.ArrayLike | None = None,
        epsilon: float, delta: float, max_steps: int | None = None,
        adaptive: bool = False,
    ) -> Forgotten:  # fmt: skip
        """Forget rows: run the noisy steps on the others that the certificate asks for.

        Their features are overwritten; X itself, copies and pickles of this estimator are the
        caller's. What later calls certify counts earlier ones too. Not safe against a kill in the
        middle, which leaves the model of before: a durable queue is in docs/certified_heads.md.

        Args:
            ids: Who, each once: as `fit` was given them, else by row number in its X.
            rows: Row numbers in the X of `fit`, in their place.
            epsilon: Of the certificate, > 0.
            delta: Of the certificate, in (0, 1).
            max_steps: Most steps worth running. Default: one less than training took.
            adaptive: Whoever chose these rows had seen a model released before; see
                `UnlearningEngine.plan`.

        Returns:
            The certificate and what was run. 0 steps where training's own noise covers the target.

        Raises:
            CertificateError: Out of reach in so many steps; fit again without these rows.
            ValueError: Somebody who is not there, or is forgotten already.

        In each case nothing has changed.
        """
        check_is_fitted(self)
        if rows is not None and ids is None:
            rows = private_rows(rows, start=self._start, private=len(self.caps_))
        plan = self.unlearning_.plan(
            ids,
            rows=rows,
            epsilon=epsilon,
            delta=delta,
            method="langevin",
            max_steps=max_steps,
            adaptive=adaptive,
        )
        if not isinstance(plan, CertifiedPlan):
            raise CertificateError(
                f"Expected a deletion that is cheaper than training again, got none: {plan.reason} "
                "Fit again without these rows, or allow a larger epsilon."
            )
        with untouched_generators(), quiet_hooks():
            result = self.unlearning_.unlearn(plan, seed=_next_seed(self._seeds))
        assert isinstance(result, CertifiedResult)
        return Forgotten(plan=plan, record=result.record())

    # --- inside -------------------------------------------------------------------------------

    def _logits(self, X: Any) -> FloatArray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        weights = torch.cat([p.detach() for p in self.head_.parameters()]).double().numpy()
        logits: FloatArray = self.features_.of(X) @ weights.T
        return logits

    def _checked_constants(self) -> tuple[HeadConstants, float]:
        check.real("cap_factor", self.cap_factor, low=0.0)
        check.real("cap_floor", self.cap_floor, low=0.0)
        steps = self.training_steps
        constants = HeadConstants.of(
            weight_decay=check.real("weight_decay", self.weight_decay, low=0.0, open_low=True),
            noise_std=check.real("noise_std", self.noise_std, low=0.0, open_low=True),
            training_steps=None if steps is None else check.integer("training_steps", steps, low=1),
        )
        return constants, check.real("feature_scale", self.feature_scale, low=0.0, open_low=True)

    def _checked_public(self, public: Any) -> tuple[FloatArray, npt.NDArray[Any]] | None:
        if public is None:
            return None
        if not isinstance(public, tuple | list) or len(public) != 2:
            raise TypeError(check.expected("public", "to be a pair (X0, y0)", type(public)))
        rows = validate_data(self, public[0], reset=False, dtype=np.float64)
        labels = column_or_1d(check_array(public[1], ensure_2d=False, dtype=None))
        check.same_length("public labels", labels, "public rows", len(rows))
        return rows, labels

    def _fixed_features(self, split: SplitRows, scale: float) -> HeadFeatures:
        frozen = None if self.frozen is None else copy.deepcopy(self.frozen)
        if split.public_rows is None:
            return HeadFeatures.fixed(frozen, split.rows, scale=scale)
        return HeadFeatures.from_public(frozen, split.public_rows)

    def _suggested(self, public: TensorDataset, *, classes: int, size: int) -> HeadConstants | None:
        """Return the constants that reach `target`, by public rows; None: no target."""
        if self.target is None:
            return None
        if not isinstance(self.target, tuple | list) or len(self.target) != 3:
            raise TypeError(check.expected("target", "to be (epsilon, delta, steps)", self.target))
        seen = len(public.tensors[1].unique())
        if seen != classes:
            raise ValueError(
                f"Expected public rows of all {classes} classes to choose constants by, got {seen}."
                " Add some, or pass noise_std and weight_decay in place of target."
            )
        epsilon, delta, steps = self.target
        found = UnlearningEngine.suggest(
            public, epsilon=epsilon, delta=delta, num_instances=size, steps=steps,
            feature_norm=FEATURE_NORM, cap_factor=self.cap_factor, cap_floor=self.cap_floor,
            progress=self.progress,
        )  # fmt: skip
        return HeadConstants.of(
            weight_decay=found.weight_decay, noise_std=found.noise_std,
            training_steps=self.training_steps or found.training_steps,
        )  # fmt: skip


def _seeds(random_state: Any) -> np.random.SeedSequence | None:
    """Return the source of reproducible seeds; None: none are wanted, and none are kept."""
    if random_state is None:
        return None
    words = check_random_state(random_state).randint(2**31 - 1, size=4)
    return np.random.SeedSequence([int(word) for word in words])


def _next_seed(seeds: np.random.SeedSequence | None) -> int:
    """Return the seed of the next run's noise; never the same twice."""
    if seeds is None:
        return secrets.randbits(62)
    return int(seeds.spawn(1)[0].generate_state(1, np.uint64)[0] >> 2)
