"""The certificates that a capped run on linear outputs gives: one or several, clipped or not.

Both certificates of contraction are made in the same ways; how batches are drawn is what they
differ in. Knows settings of runs; no divergence.
"""

from __future__ import annotations

import abc
from typing import Self

import numpy.typing as npt

from .capped_glm import CappedGlm


class OfCappedGlm(abc.ABC):
    """A certificate that follows from the settings of a capped run."""

    @classmethod
    @abc.abstractmethod
    def _of_glm(
        cls, run: CappedGlm, *, num_instances: int, training_steps: int, sample_rate: float
    ) -> Self:
        """Return the certificate of checked settings."""

    @classmethod
    def one_vs_rest_glm(
        cls,
        *,
        caps: npt.ArrayLike,
        max_grad_norms: npt.ArrayLike,
        step_size: float,
        weight_decay: float,
        feature_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        num_instances: int,
        training_steps: int,
        loss_smoothness: float = 0.25,
        sample_rate: float = 1.0,
    ) -> Self:
        """Certificate of DP-SGD with fixed caps on one linear output per class.

        Guarantee: as the class, for a loss Σ_k ℓ_k(⟨θ_k, x⟩, y), each term convex in its own output
            and with a parameter tensor of its own, whose per-sample gradient is clipped to a bound
            of its own (Opacus's clipping="per_layer"); noise z·sqrt(Σ C_k²) on every parameter.

        Args:
            caps: (members, outputs) clipping bounds of the forget set's members for each output,
                in units of that output's bound. In [0, 1].
            max_grad_norms: (outputs,) C_k. > 0.
            noise_multiplier: z, noise std on the gradient sum / sqrt(Σ C_k²). Unitless, >= 0.
            loss_smoothness: Lipschitz constant of each ℓ_k' in its output: 1/4 for a sum of
                logistic losses, 1/4 divided by the number of outputs for their mean. >= 0.
            step_size, weight_decay, feature_norm, expected_batch_size, num_instances,
                training_steps, sample_rate: As in `one_output_glm`.

        Returns:
            The certificate, with the contraction of `one_output_glm`. A step moves by at most
            (η/b)·sqrt(Σ_k (Σ_x cap_{x,k}·C_k)²); in mini-batches each member counts by its caps
            over all outputs together.

        Raises:
            CertificateError: An assumption does not hold, such as sample_rate 1 of
                ContractionCertificate, or a contraction below 1.
            ValueError: A value outside its range.

        Source: `one_output_glm` on each block of parameters, see `capped_glm.CappedGlm`.

        >>> from opacus_pil.certificates import ContractionCertificate
        >>> one = ContractionCertificate.one_vs_rest_glm(
        ...     caps=[[1.0, 0.5]], max_grad_norms=[1.0, 1.0], step_size=1.0, weight_decay=0.1,
        ...     feature_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0, num_instances=4,
        ...     training_steps=1,
        ... )
        >>> round(one.shifts[0] / (1.25**0.5 / 4.0), 4)
        1.0
        """
        run = CappedGlm.checked(
            caps=caps, max_grad_norm=max_grad_norms, kind="separate", step_size=step_size,
            weight_decay=weight_decay, feature_norm=feature_norm,
            noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size,
            loss_smoothness=loss_smoothness,
        )  # fmt: skip
        return cls._of_glm(
            run, num_instances=num_instances, training_steps=training_steps,
            sample_rate=sample_rate,
        )  # fmt: skip

    @classmethod
    def unclipped_glm(
        cls,
        *,
        caps: npt.ArrayLike,
        max_grad_norm: float,
        step_size: float,
        weight_decay: float,
        feature_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        num_instances: int,
        training_steps: int,
        loss_smoothness: float = 0.5,
        loss_steepness: float = 2.0**0.5,
        sample_rate: float = 1.0,
    ) -> Self:
        """Certificate of DP-SGD on linear outputs whose gradients never reach the clip.

        Guarantee: as the class, for a loss that is convex in all linear outputs together, such as
            softmax cross-entropy, where clipping them together is no contraction if it binds.

        Args:
            caps: (members,) bounds of the members' gradient norms by their own records, in units
                of max_grad_norm: loss_steepness·‖x‖/C. In [0, 1].
            max_grad_norm: C, at least loss_steepness · feature_norm + 1e-6. > 0.
            loss_smoothness: Lipschitz constant of the loss's gradient in the outputs; softmax: 1/2.
            loss_steepness: Most that this gradient is long; softmax: √2.
            step_size, weight_decay, feature_norm, noise_multiplier, expected_batch_size,
                num_instances, training_steps, sample_rate: As in `one_output_glm`.

        Raises:
            CertificateError: A clip that gradients reach, or another assumption that does not hold.
            ValueError: A value outside its range.
        """
        run = CappedGlm.checked(
            caps=caps, max_grad_norm=max_grad_norm, kind="unclipped", step_size=step_size,
            weight_decay=weight_decay, feature_norm=feature_norm,
            noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size,
            loss_smoothness=loss_smoothness, steepness=loss_steepness,
        )  # fmt: skip
        return cls._of_glm(
            run, num_instances=num_instances, training_steps=training_steps,
            sample_rate=sample_rate,
        )  # fmt: skip
