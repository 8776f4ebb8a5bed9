"""Which policy is decoded: the trained one, or one along the dial between it and the base."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from qadapter.objective import ObjectiveConfig


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
        if self.alpha_tilde is not None and not self.alpha_tilde > 0:
            raise ValueError(f"alpha_tilde must be positive, got {self.alpha_tilde}")
        if self.alpha_0 is not None and not self.alpha_0 >= 0:
            raise ValueError(f"alpha_0 must not be negative, got {self.alpha_0}")

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
        alpha_0 = self.objective.alpha_0 if self.alpha_0 is None else self.alpha_0
        alpha_tilde = self.objective.alpha_tilde if self.alpha_tilde is None else self.alpha_tilde
        weight_a = self.objective.adapter_coef / alpha_tilde
        weight_b = (self.objective.base_coef + alpha_0) / alpha_tilde
        return strength * weight_a, strength * weight_b + (1 - strength)


def _check_strength(strength: float) -> None:
    if not math.isfinite(strength) or strength < 0:
        raise ValueError(f"strength must be finite and not negative, got {strength}")
