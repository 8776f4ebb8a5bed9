"""Which policy is decoded: the trained one, or one along the dial between it and the base."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from qadapter.objective import ObjectiveConfig
from qadapter_kernels.checks import coefficients, finite


@dataclasses.dataclass(frozen=True)
class Policy:
    """π̃_w ∝ π^(1−w)·π̃^w with π̃ ∝ exp((q + α₀·log π)/α̃) (design §2, fact 7).

    Args:
        objective: the objective an adapter was trained with: fixes q's two coefficients.
        strength: w. 0 is the base, 1 the trained policy, beyond 1 goes further.
        alpha_0, alpha_tilde: the α's to decode with; None: those of training. Changing one
            alone is mostly a change of temperature; ``strength`` is the dial for people.
    """

    objective: ObjectiveConfig
    strength: float = 1.0
    alpha_0: float | None = None
    alpha_tilde: float | None = None

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        if self.alpha_0 is not None and not self.alpha_0 >= 0:
            raise ValueError(f"alpha_0 must not be negative, got {self.alpha_0}")
        objective = self.objective
        coefficients(*self._alphas, objective.adapter_coef, objective.base_coef)

    @property
    def _alphas(self) -> tuple[float, float]:
        """(α₀, α̃) to decode with."""
        return (
            self.objective.alpha_0 if self.alpha_0 is None else self.alpha_0,
            self.objective.alpha_tilde if self.alpha_tilde is None else self.alpha_tilde,
        )

    def stream_weights(
        self, strength: float | Tensor | None = None
    ) -> tuple[float | Tensor, float | Tensor]:
        """(w_a, w_b): the policy's logits are w_a·a + w_b·b, up to a constant a row.

        Args:
            strength: overrides the policy's own; a tensor [B] gives every row its own.
        """
        strength = self.strength if strength is None else strength
        if not isinstance(strength, Tensor):
            _check_strength(strength)
        elif strength.dim() != 1:
            raise ValueError(
                f"strength must be a number or [B] for one adapter, got {list(strength.shape)}"
            )
        alpha_0, alpha_tilde = self._alphas
        weight_a = self.objective.adapter_coef / alpha_tilde
        weight_b = (self.objective.base_coef + alpha_0) / alpha_tilde
        return strength * weight_a, strength * weight_b + (1 - strength)

    def trunk_weights(self, strength: float | Tensor | None = None) -> tuple[float | Tensor, ...]:
        """The same for the streams that the trunk runs: every adapter's, the base's last."""
        return self.stream_weights(strength)


@dataclasses.dataclass(frozen=True)
class ComposedPolicy(Policy):
    """The policy of q = Σ wᵢ·qᵢ; and, with a strength for each adapter, π^(1−Σsᵢ)·Π π̃ᵢ^sᵢ.

    Args:
        parts: the objectives the adapters were trained with.
        weights: wᵢ.
    """

    parts: tuple[ObjectiveConfig, ...] = ()
    weights: tuple[float, ...] = ()

    def trunk_weights(self, strength: float | Tensor | None = None) -> tuple[float | Tensor, ...]:
        """Weights of the adapters' streams and of the base's.

        Args:
            strength: as in ``stream_weights``; or [B, n], a dial of each adapter for every row: a
                row of zeros is the base, a single 1 the policy of that adapter alone.
        """
        if isinstance(strength, Tensor) and strength.dim() == 2:
            if strength.shape[1] != len(self.parts):
                raise ValueError(
                    f"strength [B, n] needs n = {len(self.parts)}, got {strength.shape[1]}"
                )
            alone = [
                Policy(part, 1.0, self.alpha_0, self.alpha_tilde).stream_weights(dial_B)
                for part, dial_B in zip(self.parts, strength.unbind(1), strict=True)
            ]
            dials, bases = zip(*alone, strict=True)
            return (*dials, sum(bases) - (len(bases) - 1))
        weight_a, weight_b = self.stream_weights(strength)
        c = self.objective
        adapters = [
            weight_a * (w * part.adapter_coef / c.adapter_coef)
            for w, part in zip(self.weights, self.parts, strict=True)
        ]
        spare = sum(
            w * part.base_coef for w, part in zip(self.weights, self.parts, strict=True)
        ) - c.base_coef
        if abs(spare) < 1e-12 * abs(c.base_coef):
            spare = 0.0  # weights that sum to 1, but for their rounding
        return (*adapters, weight_b + weight_a * (spare / c.adapter_coef))


def _check_strength(strength: float) -> None:
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and not negative, got {strength}")
    finite("strength", strength)
